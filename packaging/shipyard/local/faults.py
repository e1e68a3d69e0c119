"""Faults that a rehearsal puts into the local cloud: a deployment that fails, lies, or is held while its client is killed.

A fault is armed for one place and is met once. The one who armed it hears over HTTP that it was met.
"""

import json
import threading
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, get_args

from moto.s3.models import s3_backends
from werkzeug.wrappers import Request, Response

PATH = "/shipyard-local/"
SECONDS_HELD = 120

Kind = Literal["fails", "lies", "killed before", "killed after", "falls"]
"""fails: refused, or taken back by CloudFormation; lies: called a success, and nothing is changed; killed before, killed
after: held before or after it is done, for whoever asked is to be killed; falls: done, and the endpoint fails after it."""


class Held(Exception):
    """A request that was held until its client was gone: it was never done."""


class Faults:
    """The faults of one process, by place: `stack NAME`, `greengrass ACCOUNT`, `devices ACCOUNT`."""

    def __init__(self) -> None:
        self.armed: dict[str, Kind] = {}
        self.met: list[str] = []
        self._gone = threading.Event()

    def take(self, place: str) -> Kind | None:
        """Return the fault of a place, which is met by that, or None."""
        kind = self.armed.pop(place, None)
        if kind is not None and not kind.startswith("killed"):
            self.met.append(place)
        return kind

    def meet(
        self, place: str, work: Callable[[], Any], fails: Callable[[], Any], lies: Callable[[], Any],
        falls: Callable[[], Any] = lambda: None,
    ) -> Any:  # fmt: skip
        """Do some work as the place's fault has it: `fails` and `lies` come in its stead, `falls` after it.

        Raises:
            Held: the client was gone before.
        """
        kind = self.take(place)
        if kind == "fails":
            return fails()
        if kind == "lies":
            return lies()
        if kind == "killed before":
            self._hold(place)
            raise Held(place)
        done = work()
        if kind == "killed after":
            self._hold(place)
        if kind == "falls":
            falls()
        return done

    def _hold(self, place: str) -> None:
        self._gone.clear()
        self.met.append(place)
        self._gone.wait(SECONDS_HELD)

    def clear(self) -> None:
        """Forget all faults, and let go what is held."""
        self.armed.clear()
        self.met.clear()
        self._gone.set()


FAULTS = Faults()
"""Those of this process: what is put into moto has no other way to be told."""


def controlled(app: Callable[..., Any]) -> Callable[..., Any]:
    """Return a server's application with the way by which a rehearsal arms faults and lets time pass."""

    def answer(environ: dict[str, Any], start: Callable[..., Any]) -> Any:
        if not environ["PATH_INFO"].startswith(PATH):
            return app(environ, start)
        asked = Request(environ)
        told = json.loads(asked.get_data() or b"{}")
        what = asked.path.removeprefix(PATH)
        if what == "arm" and told["kind"] in get_args(Kind):
            FAULTS.clear()
            FAULTS.armed[told["place"]] = told["kind"]
        elif what == "clear":
            FAULTS.clear()
        elif what == "age" and (found := s3_backends[told["account"]]["aws"].get_object(told["bucket"], told["key"])):
            found.last_modified -= timedelta(seconds=told["seconds"])
        elif what != "met":
            return Response(status=404)(environ, start)
        return Response(json.dumps(FAULTS.met), content_type="application/json")(environ, start)

    return answer


@dataclass(frozen=True)
class Control:
    """The other end: what a rehearsal tells the local cloud at `url`."""

    url: str

    def arm(self, place: str, kind: Kind) -> None:
        """Arm one fault in the stead of all others."""
        self._tell("arm", place=place, kind=kind)

    def met(self) -> list[str]:
        """Return the places whose fault was met; one that is held is met once it is held."""
        return self._tell("met")

    def clear(self) -> None:
        """Forget all faults, and let go what is held."""
        self._tell("clear")

    def age(self, account: str, bucket: str, key: str, seconds: float) -> None:
        """Make an object older, as if this time had passed."""
        self._tell("age", account=account, bucket=bucket, key=key, seconds=seconds)

    def _tell(self, what: str, **told: Any) -> list[str]:
        request = urllib.request.Request(f"{self.url}{PATH}{what}", json.dumps(told).encode(), method="POST")  # noqa: S310
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310 -- the address is ours
            found: list[str] = json.load(answer)
        return found
