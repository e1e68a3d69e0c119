"""Fresh items: what is newer than search's catalogue is asked of a shard beside it, and the two answers become one.

The shard is search's own graph over other rows, so the scores of both are of one scale. It is attested under a name that has
the digest of the search bundle that it goes with: a shard of another release, whose scale is another, is none of that name.
"""

from collections.abc import Callable
from dataclasses import dataclass

from serve.asgi import dump, load
from serve.codec import PLURALS, Id
from serve.targets import Call, Gone, Heard, checked, connections, post

SHARD = "items"
"""What the shard is called beside the sources."""


def shard_name(artifact: str, manifest: str) -> str:
    """Return the name that a shard is attested by: that of search's artifact, and of its bundle.json's SHA-256."""
    return f"{artifact}-{SHARD}-{manifest[:12]}"


@dataclass(frozen=True)
class Fresh:
    """What a shard says: its best items with their scores, and all items of the catalogue that it `replaces`."""

    heard: Heard
    replaces: frozenset[Id]


def shard_send(url: str, answer_key: str) -> Callable[[Call], Fresh]:
    """Return what asks the shard at `url`, e.g. http://host/search-items-0123456789ab/v1/search."""
    pool = connections()
    plural = PLURALS[answer_key]

    def send(call: Call) -> Fresh:
        body = post(pool, url, dump(call.document), call, {"Content-Type": "application/json"})[0]
        try:
            told = load(body)
            heard = checked([one[answer_key] for one in told[plural]], [one["score"] for one in told[plural]])
            replaces = told.get("replaces", [])
            if not all(type(item) in (int, str) for item in replaces):
                raise Gone("corrupt")
            return Fresh(heard, frozenset(replaces))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise Gone("corrupt") from None

    return send


def merge(catalogue: Heard, fresh: Fresh, most: int) -> Heard:
    """Return the best of both by their scores, at most `most`; of equal ones the catalogue's is first.

    An item that the shard holds is never taken from the catalogue, which knows it as it was.
    """
    mine = set(fresh.heard[0])
    kept = [
        (product, score)
        for product, score in zip(*catalogue, strict=True)
        if product not in mine and product not in fresh.replaces
    ]
    both = sorted([*kept, *zip(*fresh.heard, strict=True)], key=lambda one: -one[1])[:most]
    return [product for product, _ in both], [score for _, score in both]
