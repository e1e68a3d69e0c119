"""Our CPU server beside others on the same bundle, requests and machine: capacity, latency, memory, start-up.

All servers stand side by side, each pinned to one core, and are measured in turns, round by round; the load comes from
another core. The limit is measured in each round too: the model in a bare loop on the server's core, at its best batch. What
is told are medians over the rounds and of ratios within a round, for a machine that others use is not the same twice.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from models.config import Fleet
from serve.codec import Codec
from serve.errors import ShipyardError
from serve.files import read_json, sha256_file
from serve.trust import MANIFEST
from shipyard.bench import load
from shipyard.bench.contenders import CODE, OURS, PACKAGES, PEERS, Contender, contenders, cores, memory, running
from shipyard.console import Reporter
from shipyard.pages.live import titles
from shipyard.pretrained import base_folder

CONNECTIONS = 32
CANDIDATES = 1_000
PAIRS = 192
"""Candidates that the classifier of text pairs is given: each takes as long as another."""

SMALL = {"history": [], "k": 1}

BUDGET_MS = 50.0
"""Milliseconds that 99 of 100 requests may take where throughput is told within a budget."""

Requests = Mapping[str, Sequence[Mapping[str, Any]]]


def bench(
    bundle: Path, names: Sequence[str], seconds: float, rounds: int, out: Path, constraints: Path, base: Path,
    texts: Mapping[str, str], progress: Callable[[str, int, int], None],
) -> dict[str, Any]:  # fmt: skip
    """Measure our server, the peers `names` and the bare model on a cpu bundle; write `out`/bench.json, .md and .svg.

    `base` is the folder of the text encoder and `texts` what products are called, for the classifier of text pairs.

    Raises:
        ShipyardError: there are fewer than two cores, a peer is unknown, or a server does not start.
    """
    server, client = cores()
    if unknown := [name for name in names if name not in PACKAGES]:
        raise ShipyardError("bench: unknown server", value=unknown[0], allowed=", ".join(PACKAGES))
    out.mkdir(parents=True, exist_ok=True)
    asked = workloads(bundle)
    record: dict[str, Any] = {
        "processor": _processor(), "bundle": sha256_file(bundle / MANIFEST), "seconds": seconds, "rounds": rounds,
        "bare": [], "servers": {},
    }  # fmt: skip
    everywhere = os.sched_getaffinity(0)
    with ExitStack() as stack:
        stack.callback(os.sched_setaffinity, 0, everywhere)
        standing = []
        for i, name in enumerate((OURS, *names)):
            progress(f"bench: {name}: the best of its settings", i, len(names) + 1)
            best = _tuned(contenders(name, bundle, out, constraints, 18_500 + 10 * i), bundle, asked, server, out)
            pid, start = stack.enter_context(running(best, bundle, server, out))
            standing.append((best, pid))
            told = {"setting": best.setting, "start_seconds": round(start, 2), "rounds": []}
            record["servers"][name] = told
        bare = stack.enter_context(_bare(bundle, asked, server))
        os.sched_setaffinity(0, {client})
        for done in range(rounds):
            progress("bench: rounds", done, rounds)
            record["bare"].append(bare(seconds))
            # nobody is always the one that follows the same other
            for found, _ in standing[done % len(standing) :] + standing[: done % len(standing)]:
                record["servers"][found.name]["rounds"].append(_measure(found, asked, seconds))
        for found, pid in standing:
            record["servers"][found.name]["memory_mb"] = round(memory(pid) / 1e6, 1)
    progress("bench: the classifier of text pairs", 0, 1)
    record["pairs"] = _pairs(asked["rank"][0], texts, base, server)
    (out / "bench.json").write_text(json.dumps(record, indent=1) + "\n")
    (out / "bench.md").write_text(markdown(record))
    plot(record, out / "bench.svg")
    return record


def workloads(bundle: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the requests: the bundle's golden ones over the whole catalogue, and the same for 1,000 candidates each."""
    manifest = read_json(bundle / MANIFEST)
    whole = [golden["request"] for golden in manifest["golden"] if golden["request"]["history"]]
    answers = Codec(bundle, manifest).answers
    rng = np.random.default_rng(7)
    rank = [
        {"history": request["history"], "k": 10,
         "candidates": [answers[i] for i in rng.permutation(len(answers))[:CANDIDATES].tolist()]}
        for request in whole
    ]  # fmt: skip
    return {"recommend": whole, "rank": rank}


def _tuned(found: Sequence[Contender], bundle: Path, asked: Requests, core: int, out: Path) -> Contender:
    """Return the setting with the largest capacity."""
    if len(found) == 1:
        return found[0]
    rates = []
    for one in found:
        with running(one, bundle, core, out):
            requests = [one.request(document) for document in asked["recommend"]]
            load.closed(one.port, requests, 1.0, CONNECTIONS)  # batchers learn
            rates.append(load.closed(one.port, requests, 2.0, CONNECTIONS).throughput)
    return found[int(np.argmax(rates))]


def _measure(found: Contender, asked: Requests, seconds: float) -> dict[str, Any]:
    """Return one round's figures of a server."""
    told: dict[str, Any] = {}
    for name, documents in asked.items():
        requests = [found.request(document) for document in documents]
        told[name] = load.closed(found.port, requests, seconds, CONNECTIONS).record()
        rate = max(1.0, told[name]["throughput"] / 2)
        told[name]["half"] = load.opened(found.port, requests, seconds, rate).record()
        told[name]["within_budget"] = _within(found, requests, seconds, rate, told[name]["half"])
    alone = load.closed(found.port, [found.request(SMALL)], seconds / 2, 1)
    return told | {"small_ms": round(alone.quantile(0.5), 4)}


def _within(found: Contender, requests: Sequence[bytes], seconds: float, rate: float, told: Mapping[str, Any]) -> float:
    """Return the largest rate, to an eighth of `rate`, at which all is answered within the budget; 0 where there is none.

    `rate` is half of the capacity, and `told` what was seen at it.
    """
    best = 0.0
    for step in (rate / 2, rate / 4, rate / 8, 0.0):
        kept = told["p99_ms"] <= BUDGET_MS and told["throughput"] >= 0.97 * rate and not told["others"]
        best = rate if kept else best
        if step:
            rate += step if kept else -step
            told = load.opened(found.port, requests, seconds, rate).record()
    return round(best, 1)


@contextmanager
def _bare(bundle: Path, asked: Requests, core: int) -> Iterator[Callable[[float], Any]]:
    """Run the bare loop on a core; yield what measures it for some seconds."""
    everywhere = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    surroundings = os.environ | {"PYTHONPATH": str(CODE), "OMP_NUM_THREADS": "1", "BUNDLE": str(bundle)}
    process = subprocess.Popen(
        [sys.executable, str(PEERS / "bare_loop.py")], env=surroundings, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    os.sched_setaffinity(0, everywhere)
    assert process.stdin is not None and process.stdout is not None
    to, back = process.stdin, process.stdout

    def said(line: str) -> None:
        to.write(line + "\n")
        to.flush()

    def measure(seconds: float) -> Any:
        said(str(seconds))
        return json.loads(back.readline())

    said(json.dumps({name: list(requests) for name, requests in asked.items()}))
    try:
        yield measure
    finally:
        to.close()
        process.wait(timeout=60)


def _pairs(request: Mapping[str, Any], texts: Mapping[str, str], base: Path, core: int) -> dict[str, Any]:
    """Return how long the classifier takes for a request's candidates: the shopper is the last five purchases' names."""
    named = {product: texts.get(str(product), str(product)) for product in request["candidates"][:PAIRS]}
    bought = ", ".join(texts.get(str(event["product"]), "") for event in request["history"][-5:])
    pairs = [{"text": bought, "text_pair": name} for name in named.values()]
    everywhere = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    done = subprocess.run(
        [sys.executable, str(PEERS / "pairs.py")], input=json.dumps(pairs), capture_output=True, text=True, check=False,
        env=os.environ | {"BASE": str(base), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    os.sched_setaffinity(0, everywhere)
    if done.returncode:
        raise ShipyardError("bench: the classifier of text pairs does not run", value=done.stderr.strip()[-200:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def figures(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return of each server the medians over the rounds, and of the ratios to the bare loop in the same round."""
    found = []
    for name, told in record["servers"].items():
        rounds = told["rounds"]
        one = {"name": name, "setting": told["setting"], "memory_mb": told["memory_mb"], "start": told["start_seconds"],
               "small_us": median((own["small_ms"] - bare["small_ms"]) * 1e3
                                  for own, bare in zip(rounds, record["bare"], strict=True))}  # fmt: skip
        for load_name in ("recommend", "rank"):
            rates = [own[load_name]["throughput"] for own in rounds]
            one[load_name] = {"rate": median(rates), "low": min(rates), "high": max(rates)} | {
                f"of_{limit}": median(rate / bare[load_name][limit]
                                      for rate, bare in zip(rates, record["bare"], strict=True))
                for limit in ("model", "engine")
            } | {key: median(own[load_name]["half"][key] for own in rounds) for key in ("p50_ms", "p99_ms")}  # fmt: skip
            one[load_name]["within"] = median(own[load_name]["within_budget"] for own in rounds)
        found.append(one)
    return found


def markdown(record: Mapping[str, Any]) -> str:
    """Return the tables of a bench."""
    found = figures(record)
    lines = []
    for name, title in (("recommend", "The whole catalogue"), ("rank", f"{CANDIDATES:,} candidates")):
        bare = {limit: median(told[name][limit] for told in record["bare"]) for limit in ("model", "engine")}
        lines += [
            f"**{title}.** The model in a bare loop: {bare['model']:.0f} requests/s, the engine alone: "
            f"{bare['engine']:.0f}, at batches of {record['bare'][0][name]['batch']}.", "",
            f"| server | requests/s (least, most) | with p99 within {BUDGET_MS:.0f} ms | of the model | of the engine | "
            "p50, p99 at half load |",
            "| --- | --- | --- | --- | --- | --- |",
            *(f"| {one['name']} | {one[name]['rate']:.0f} ({one[name]['low']:.0f}, {one[name]['high']:.0f}) | "
              f"{one[name]['within']:.0f} | "
              f"{one[name]['of_model']:.0%} | {one[name]['of_engine']:.0%} | {one[name]['p50_ms']:.1f} ms, "
              f"{one[name]['p99_ms']:.1f} ms |" for one in found), "",
        ]  # fmt: skip
    lines += [
        "| server | batching | one small request over the bare model | memory | start-up |",
        "| --- | --- | --- | --- | --- |",
        *(f"| {one['name']} | {one['setting']} | {one['small_us']:.0f} µs | {one['memory_mb']:.0f} MB | "
          f"{one['start']:.1f} s |" for one in found), "",
    ]  # fmt: skip
    pairs, ours = record["pairs"], found[0]["rank"]["rate"]
    other = pairs["pairs"] / pairs["seconds"]
    lines.append(
        f"A PyTorch classifier on text pairs takes {1e3 / other:.1f} ms for a candidate, without any server; in requests of "
        f"{CANDIDATES:,} candidates {OURS} ranks {ours * CANDIDATES / other:,.0f} times as many.\n"
    )
    return "\n".join(lines) + f"\n{record['processor']}; {record['rounds']} rounds of {record['seconds']:g} s.\n"


def plot(record: Mapping[str, Any], path: Path) -> None:
    """Draw each server's throughput beside the bare model's, with the least and the most of the rounds."""
    found = figures(record)
    figure = Figure(figsize=(8, 0.5 * len(found) + 1.3), layout="constrained")
    for axes, (name, title) in zip(
        figure.subplots(1, 2, sharey=True),
        (("recommend", "whole catalogue"), ("rank", "1,000 candidates")),
        strict=True,
    ):
        rates = np.array([one[name]["rate"] for one in found])
        bounds = np.abs(np.array([[one[name][key] for one in found] for key in ("low", "high")]) - rates)
        colours = ["#0b62a4" if one["name"] == OURS else "#9aa5ae" for one in found]
        axes.barh([one["name"] for one in found], rates, xerr=bounds, color=colours, ecolor="#333", capsize=2)
        axes.axvline(median(told[name]["model"] for told in record["bare"]), color="#c05a00", linestyle="--")
        axes.set(title=title, xlabel="requests/s; dashed: the model in a bare loop")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].invert_yaxis()
    figure.savefig(path, metadata={"Date": None})


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown processor"
    )
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


def run(chosen: argparse.Namespace, fleet: Fleet, root: Path, build: Path, reporter: Reporter) -> int:
    """Measure the CPU server beside others."""
    made = build / chosen.profile
    bundle = made / chosen.unit / "bundle" / "bundle"
    if not bundle.is_dir():
        raise ShipyardError(f"{bundle}: no bundle", mend=f"shipyard release --profile {chosen.profile}")
    record = bench(
        bundle, [name for name in chosen.peers.split(",") if name], chosen.seconds, chosen.rounds, build / "bench",
        root / "constraints.txt", base_folder(fleet), titles(made), reporter.progress,
    )  # fmt: skip
    print(json.dumps(record) if chosen.json else markdown(record))
    return 0
