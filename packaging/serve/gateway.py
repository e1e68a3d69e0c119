"""The fusion gateway: ask every target at once, fuse what they answer in time with the release's pinned weights.

POST /v1/search asks all sources of the release's fusion, POST /v1/recommend those that need no query. POST /v1/feedback
takes what the shopper did with an answer. The bundle is verified first, as every runtime's is.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

from serve.asgi import DEADLINE_HEADER
from serve.errors import ShipyardError
from serve.feedback import Journal, files, firehose
from serve.fused import POLICIES, RECOMMEND, SEARCH, Gateway, Pinned, Policy, open_gateway
from serve.listen import add_common, serve
from serve.resilience import Breaker, Hedge, Target
from serve.shard import SHARD, Fresh, shard_name, shard_send
from serve.targets import Send, http_send, sagemaker_send, triton_send
from serve.trust import trusted


def sends(pinned: Pinned, search: str, cluster: str, more: Mapping[str, str]) -> dict[str, Send]:
    """Return how each source is asked: `search` is sagemaker:NAME or triton:URL, `cluster` the private cluster's URL.

    `more` names servers of ours by source. A source that none of them reaches is left out.

    Raises:
        ShipyardError: an address is none.
    """
    found: dict[str, Send] = {}
    for source in pinned.sources:
        told = pinned.targets[source]
        path = f"/v1/{told['task']}"
        kind, _, address = search.partition(":")
        if source in more:
            found[source] = http_send(more[source].rstrip("/") + path, told["level"])
        elif told["task"] == "search" and kind == "sagemaker" and address:
            found[source] = sagemaker_send(address, pinned.codec)
        elif told["task"] == "search" and kind == "triton" and address.startswith("http"):
            found[source] = triton_send(f"{address.rstrip('/')}/v2/models/{told['artifact']}/infer", pinned.codec)
        elif told["task"] == "search" and search:
            raise ShipyardError(
                "--search: wrong", value=search, allowed="sagemaker:ENDPOINT or triton:http://HOST:PORT"
            )
        elif told["place"] == "cpu" and cluster:
            found[source] = http_send(f"{cluster.rstrip('/')}/{told['artifact']}{path}", told["level"])
    return found


def shard(
    pinned: Pinned, url: str, more: Mapping[str, str], seconds: float, hedge: Hedge, usual: float
) -> Target[Fresh]:  # fmt: skip
    """Return the shard of fresh items that goes with the release's search, at the server `url`.

    Raises:
        ShipyardError: search is not asked by its raw scores, which alone are of the shard's scale.
    """
    [(source, told)] = [(name, told) for name, told in pinned.targets.items() if told["task"] == SEARCH]
    if source in more:
        raise ShipyardError(
            "--items: search is asked by --target, whose scores may be a cross-encoder's", value=more[source],
            allowed="--search sagemaker:ENDPOINT or triton:URL",
        )  # fmt: skip
    name = shard_name(told["artifact"], told["manifest"])
    send = shard_send(f"{url.rstrip('/')}/{name}/v1/{SEARCH}", told["level"])
    # a shard that comes later is to be found soon, and asking where nothing listens costs next to nothing
    return Target(SHARD, send, seconds, hedge=hedge, breaker=Breaker(longest=1.0), usual=usual)


def main(arguments: list[str] | None = None) -> int:
    """Serve until SIGTERM; exit with 1 when the bundle is not to be trusted."""
    parser = argparse.ArgumentParser(prog="python -m serve.gateway", description=__doc__)
    add_common(parser)
    parser.add_argument("--search", default="", help="sagemaker:ENDPOINT or triton:http://HOST:PORT")
    parser.add_argument("--cluster", default="", help="URL of the private cluster, artifacts' prefixes below it")
    parser.add_argument(
        "--target", action="append", default=[], metavar="SOURCE=URL", help="a server of ours, by source"
    )
    parser.add_argument("--items", default="", metavar="URL", help="server of the shard of fresh items, if any")
    parser.add_argument("--deadline", action="append", default=[], metavar="SOURCE=MS", help="of one target")
    parser.add_argument(
        "--deadline-ms", type=float, default=1000, help=f"of a request, unless {DEADLINE_HEADER} tells it"
    )
    parser.add_argument("--policy", action="append", default=[], metavar="ROUTE=POLICY", help=", ".join(POLICIES))
    parser.add_argument("--cache-seconds", type=float, default=10, help="how old a whole answer may be, 0 for none")
    parser.add_argument(
        "--hedge", type=float, default=0.05, metavar="SHARE",
        help="of the questions to a target, how many may be asked twice, 0 for none (default: 0.05)",
    )  # fmt: skip
    parser.add_argument(
        "--hedge-after", type=float, default=0.95, metavar="QUANTILE",
        help="of a target's latest times, after which it is asked again (default: 0.95)",
    )  # fmt: skip
    parser.add_argument("--feedback", required=True, help="firehose:STREAM, or a folder")
    parser.add_argument("--page", type=Path, help="a page to show at /")
    chosen = parser.parse_args(arguments)
    try:
        hedge = _hedge(chosen.hedge, chosen.hedge_after)
        keys = trusted(chosen.trusted_key)
        pinned = open_gateway(chosen.bundle, chosen.artifact, chosen.attestation, keys)
        policies = _pairs(chosen.policy, "--policy", (SEARCH, RECOMMEND), POLICIES)
        deadlines = {
            k: float(v) / 1000 for k, v in _pairs(chosen.deadline, "--deadline", (*pinned.sources, SHARD)).items()
        }
        addresses = _pairs(chosen.target, "--target", pinned.sources)
        asked = sends(pinned, chosen.search, chosen.cluster, addresses)
        usual = chosen.deadline_ms / 1000
        targets = {
            name: Target(name, send, deadlines.get(name, 60.0), hedge=hedge(), usual=usual)
            for name, send in asked.items()
        }
        fresh = None
        if chosen.items:
            fresh = shard(pinned, chosen.items, addresses, deadlines.get(SHARD, 60.0), hedge(), usual)
        stream = chosen.feedback.removeprefix("firehose:") if chosen.feedback.startswith("firehose:") else ""
        put = firehose(stream) if stream else files(Path(chosen.feedback))
        gateway = Gateway(
            pinned, targets, Journal(put, prompt=not stream),
            {route: cast(Policy, policies.get(route, POLICIES[0])) for route in (SEARCH, RECOMMEND)},
            usual, chosen.cache_seconds, chosen.prefix,
            chosen.page.read_bytes() if chosen.page is not None else None, fresh,
        )  # fmt: skip

        serve(gateway.app, chosen.host, chosen.port, chosen.artifact, chosen.drain, end=gateway.journal.close)
        for target in targets.values():
            target.close()
        if fresh is not None:
            fresh.close()
    except (ShipyardError, OSError, OverflowError, ValueError) as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 1
    return 0


def _hedge(share: float, quantile: float) -> Callable[[], Hedge]:
    """Return what makes the hedge of each target."""
    if not 0 <= share <= 1:
        raise ShipyardError("--hedge: wrong", value=share, allowed="a share from 0 to 1")
    if not 0 < quantile < 1:
        raise ShipyardError("--hedge-after: wrong", value=quantile, allowed="a quantile between 0 and 1")
    return functools.partial(Hedge, share, quantile)


def _pairs(
    given: list[str], option: str, names: tuple[str, ...], allowed: tuple[str, ...] | None = None
) -> dict[str, str]:
    """Return the pairs NAME=VALUE of an option."""
    found = dict(pair.partition("=")[::2] for pair in given)
    for name, value in found.items():
        if name not in names or not value or (allowed is not None and value not in allowed):
            raise ShipyardError(
                f"{option}: wrong", value=f"{name}={value}",
                allowed=f"{' or '.join(names)}=" + (" or ".join(allowed) if allowed else "..."),
            )  # fmt: skip
    return found


if __name__ == "__main__":
    sys.exit(main())
