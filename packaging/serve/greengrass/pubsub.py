"""Local clients by publish and subscribe: the desk of `serve.greengrass.local`, for programs that know the nucleus alone.

A client says {"id": text, "client": name, "model": name, "task": task, "request": one or a list} on ASK, and hears {"id",
"status", "answer"} on ANSWER/<client>, the status as HTTP's. Memory is bounded: so many wait, and what is beyond is answered
with 503 at once; an answer is never larger than what nucleus lite passes on.
"""

import json
import logging
import queue
import re
import threading
from typing import Any

from serve.greengrass.link import Link
from serve.greengrass.local import Desk
from serve.greengrass.words import ANSWER, ASK, dump

LARGEST = 6 * 1024
"""Bytes of a message: nucleus lite ends the connection of one of 10,000 in Base64."""

MOST_WAITING = 32

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")

log = logging.getLogger("edge")


class Mailbox:
    """Questions of local clients, one after the other."""

    def __init__(self, desk: Desk, link: Link) -> None:
        self._desk, self._link = desk, link
        self._waiting: queue.Queue[dict[str, Any]] = queue.Queue(MOST_WAITING)

    def open(self) -> None:
        """Listen, and answer in a thread of its own."""
        threading.Thread(target=self._serve, daemon=True).start()
        self._link.listen(ASK, self.take)

    def take(self, topic: str, payload: bytes) -> None:
        """Put a question where it is answered from; never waits."""
        try:
            asked = json.loads(payload) if len(payload) <= LARGEST else None
        except (ValueError, RecursionError):
            asked = None
        texts = ("id", "client", "model", "task")
        if (
            not isinstance(asked, dict)
            or asked.keys() != {*texts, "request"}
            or not all(isinstance(asked[key], str) for key in texts)
            or not _NAME.fullmatch(asked["client"])
            or not _NAME.fullmatch(asked["id"])
        ):
            # nobody is named who could be told
            log.warning("%s: a message of %d bytes is no question", topic, len(payload))
            return
        try:
            self._waiting.put_nowait(asked)
        except queue.Full:
            self._say(asked, 503, {"error": "busy"})

    def _serve(self) -> None:
        while True:
            asked = self._waiting.get()
            self._say(asked, *self._desk.serve(asked["model"], asked["task"], asked["request"]))

    def _say(self, asked: dict[str, Any], status: int, answer: Any) -> None:
        text = dump({"id": asked["id"], "status": status, "answer": answer}).encode()
        if len(text) > LARGEST:
            fault = {
                "error": f"the answer has {len(text)} bytes; allowed: {LARGEST}; mend: a smaller k, fewer requests"
            }
            text = dump({"id": asked["id"], "status": 413, "answer": fault}).encode()
        self._link.tell(f"{ANSWER}/{asked['client']}", text)
