"""The graph of a GPU target on a GPU: are its answers those of the CPU, what does a batch cost, and how large should it be.

    python tests/bench_gpu.py cases build/full build/gpu           # where a profile has been built
    PYTHONPATH=packaging python tests/bench_gpu.py run build/gpu   # where onnxruntime-gpu and a GPU are

The first writes real requests of the validation period, extreme ones, and what the fp32 graph says to them on a CPU; the
second needs those files, numpy and the engine alone. ONNX Runtime is what Triton runs the graph by.
"""

import argparse
import collections
import json
import platform
import queue
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort

from serve.triton import STEPS, padded

ASKED = ["rows", "scores"]
SINGLE = 16
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
NAMES = {"items": ("items", "features"), "offers": ("offers", "strengths"), "query_mask": ("query_ids", "query_mask")}


def trim(inputs):
    """Cut off columns that are padding in every request."""
    found = {}
    for given, names in NAMES.items():
        used = max(1, int((inputs[given] != 0).sum(1).max()))
        found |= {name: inputs[name][:, :used] for name in names}
    return found


def alone(inputs, i):
    return trim({name: value[i : i + 1] for name, value in inputs.items()})


def cases(build, out, most):
    from models import trunk
    from models.behaviour import VALIDATION, load_behaviour
    from models.config import load_fleet
    from shipyard import cases as made
    from shipyard.examples import Examples
    from shipyard.pretrained import base_folder

    [fp16] = (build / "search/bundle/bundle/model_repository").glob("*/*/model.onnx")
    session = ort.InferenceSession(build / "search/export/model.onnx", providers=["CPUExecutionProvider"])
    names = tuple(i.name for i in session.get_inputs())
    cut = Examples(load_behaviour(build / "joint/data"), VALIDATION, most, ("search",)).of("search")
    tokenizer = trunk.load_tokenizer(base_folder(load_fleet(Path("fleet.toml"))))
    real, extreme = made.requests(names, cut, tokenizer), made.extremes(names, cut, tokenizer)
    arrays = {f"real/{name}": value for name, value in real.inputs.items()} | {"relevant": real.relevant}
    rows = [session.run(["rows"], batch)[0] for batch in real.batches(16)]
    arrays["rows"] = np.concatenate(rows)
    for i, one in enumerate(made.singles(real, list(extreme.values()))):
        arrays |= {f"single/{i}/{name}": value for name, value in one.items()}
        arrays[f"logits/{i}"] = session.run(["logits"], one)[0]
    out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(out / "cases.npz", **arrays)
    shutil.copyfile(fp16, out / "model.onnx")


def open_graph(file, provider):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    providers = [provider] if provider == "CPUExecutionProvider" else [provider, "CPUExecutionProvider"]
    session = ort.InferenceSession(file, options, providers=providers)
    if session.get_providers()[0] != provider:
        sys.exit(f"{provider} is not there: {', '.join(session.get_providers())}; mend: its libraries have to be found")
    return session


def placed(file, provider, inputs):
    """Count the graph's nodes by where they run."""
    options = ort.SessionOptions()
    options.enable_profiling, options.log_severity_level = True, 3
    session = ort.InferenceSession(file, options, providers=[provider, "CPUExecutionProvider"])
    session.run(ASKED, inputs)
    trace = Path(session.end_profiling())
    found = collections.defaultdict(collections.Counter)
    for event in json.loads(trace.read_text()):
        where = event.get("args", {}).get("provider")
        if event.get("cat") == "Node" and where:
            found[where][event["args"]["op_name"]] += 1
    trace.unlink()
    return {where: dict(names.most_common()) for where, names in found.items()}


def same(session, given):
    """Hold the answers to those of the fp32 graph on a CPU."""
    from shipyard.metrics import ndcg

    real = {name.removeprefix("real/"): given[name] for name in given if name.startswith("real/")}
    n = len(given["relevant"])
    rows = np.concatenate(
        [session.run(["rows"], trim({k: v[at : at + 16] for k, v in real.items()}))[0] for at in range(0, n, 16)]
    )
    before, now = (float(np.nanmean(ndcg(found, given["relevant"]))) for found in (given["rows"], rows))
    singles = sum(name.startswith("logits/") for name in given)
    largest, apart, pads = 0.0, 0.0, 0.0
    heard = []
    for i in range(singles):
        one = {name.rpartition("/")[2]: given[name] for name in given if name.startswith(f"single/{i}/")}
        [logits] = session.run(["logits"], one)
        heard.append(logits[0, 1:])
        scale = np.abs(given[f"logits/{i}"][:, 1:]).max()
        largest = max(largest, float(np.abs(logits - given[f"logits/{i}"])[:, 1:].max() / scale))
        pads = max(pads, float(np.abs(session.run(["logits"], padded(one))[0] - logits)[:, 1:].max() / scale))
    [batched] = session.run(["logits"], trim({k: v[:SINGLE] for k, v in real.items()}))
    for i in range(SINGLE):
        apart = max(apart, float(np.abs(batched[i, 1:] - heard[i]).max() / np.abs(heard[i]).max()))
    return {
        "requests": n, "top10_equal": float((rows[:, :10] == given["rows"][:, :10]).mean()),
        "ndcg_fp32_cpu": before, "ndcg": now, "largest_difference": largest, "alone_against_batch": apart,
        "padding": pads,
    }  # fmt: skip


def timed(session, inputs, seconds):
    """Return the times of calls, in seconds, after the first three, and that of the first one."""
    began = time.perf_counter()
    session.run(ASKED, inputs)
    first = time.perf_counter() - began
    for _ in range(2):
        session.run(ASKED, inputs)
    times = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        began = time.perf_counter()
        session.run(ASKED, inputs)
        times.append(time.perf_counter() - began)
    return np.array(times), first


def shaped(query, items, offers, batch, rows):
    """Return a full batch of a shape."""
    rng = np.random.default_rng(0)
    return {
        "query_ids": rng.integers(1000, 20000, (batch, query)), "query_mask": np.ones((batch, query), np.int64),
        "items": rng.integers(1, rows, (batch, items)), "features": rng.random((batch, items, 18), np.float32),
        "offers": rng.integers(1, rows, (batch, offers)), "strengths": rng.random((batch, offers, 3), np.float32),
    }  # fmt: skip


def batched(sessions, requests, most, seconds):
    """Return requests a second where always 256 wait, batched as Triton does: those of one shape, the oldest first."""
    waiting, lock, done = collections.deque(), threading.Lock(), [0] * len(sessions)
    source = iter(range(10**9))

    def fill():
        while len(waiting) < 256:
            waiting.append(requests[next(source) % len(requests)])

    fill()
    stop = threading.Event()
    faults = queue.SimpleQueue()

    def work(k):
        try:
            while not stop.is_set():
                with lock:
                    shape = key(waiting[0])
                    batch, rest = [], []
                    while waiting:
                        one = waiting.popleft()
                        (batch if len(batch) < most and key(one) == shape else rest).append(one)
                    waiting.extend(rest)
                    fill()
                inputs = {name: np.concatenate([one[name] for one in batch]) for name in batch[0]}
                sessions[k].run(ASKED, inputs)
                done[k] += len(batch)
        except Exception as fault:
            faults.put(fault)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(sessions))]
    for thread in threads:
        thread.start()
    time.sleep(seconds / 2)  # kernels of new shapes are loaded, memory is taken
    before, began = sum(done), time.perf_counter()
    time.sleep(seconds)
    found = (sum(done) - before) / (time.perf_counter() - began)
    stop.set()
    for thread in threads:
        thread.join()
    if not faults.empty():
        raise faults.get()
    return round(found)


def key(one):
    return tuple(value.shape[1] for value in one.values())


def card():
    try:
        asked = ["nvidia-smi", "--query-gpu=name,driver_version,memory.used", "--format=csv,noheader"]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "none"


def run(folder, provider, seconds):
    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()
    told = {"engine": ort.__version__, "provider": provider, "python": platform.python_version(), "card": card()}

    def tell(name, value):
        told[name] = value
        print(f"{name}: {json.dumps(value)}", flush=True)

    given = dict(np.load(folder / "cases.npz"))
    real = {name.removeprefix("real/"): given[name] for name in given if name.startswith("real/")}
    each = [alone(real, i) for i in range(len(given["relevant"]))]
    rows = given["logits/0"].shape[1]
    file = str(folder / "model.onnx")
    tell("first", dict(told))
    tell("nodes", placed(file, provider, each[0]))
    began = time.perf_counter()
    session = open_graph(file, provider)
    tell("open_seconds", round(time.perf_counter() - began, 2))
    tell("same", same(session, given))
    lengths = {name: np.quantile([one[name].shape[1] for one in each], [0, 0.5, 0.9, 1]).tolist() for name in NAMES}
    tell("lengths_min_median_p90_most", lengths)
    middle = [STEPS[name][0] for name in ("query_ids", "items")]
    table = {}
    for batch in BATCHES:
        times, first = timed(session, shaped(*middle, 1024, batch, rows), seconds)
        p50, p99 = np.quantile(times, [0.5, 0.99]) * 1000
        table[batch] = {"first_ms": round(first * 1000, 2), "p50_ms": round(p50, 3), "p99_ms": round(p99, 3),
                        "requests_per_s": round(batch * 1000 / p50)}  # fmt: skip
    tell("batches", table)
    costs = {}
    for query, items, offers in [(8, 64, 16), (32, 64, 16), (8, 256, 16), (8, 512, 16), (8, 64, 1024), (8, 64, 4096),
                                 (8, 64, 8192), (8, 64, 20_000), (32, 512, 1024), (32, 512, 8192)]:  # fmt: skip
        for batch in (1, 32):
            times, first = timed(session, shaped(query, items, offers, batch, rows), seconds / 2)
            costs[f"query {query}, items {items}, offers {offers}, batch {batch}"] = [
                round(float(np.median(times)) * 1000, 3), round(first * 1000, 2)]  # fmt: skip
    tell("lengths_ms_first_ms", costs)
    fewer = [padded(one) for one in each]
    tell("shapes", {"as they come": len(set(map(key, each))), "padded": len(set(map(key, fewer)))})
    sessions = [session, *(open_graph(file, provider) for _ in range(3))]
    waiting = {}
    for count in (1, 2, 4):
        for most in (32, 64, 128):
            waiting[f"padded, {count} instances, batch {most}"] = batched(sessions[:count], fewer, most, seconds)
    waiting["as they come, 1 instances, batch 32"] = batched(sessions[:1], each, 32, seconds)
    waiting["as they come, 2 instances, batch 32"] = batched(sessions[:2], each, 32, seconds)
    waiting["no batching, 1 instances, batch 1"] = batched(sessions[:1], each, 1, seconds)
    tell("requests_per_s_256_waiting", waiting)
    tell("card_after", card())
    return told


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    first = verbs.add_parser("cases")
    first.add_argument("build", type=Path)
    first.add_argument("out", type=Path)
    first.add_argument("--most", type=int, default=512)
    second = verbs.add_parser("run")
    second.add_argument("folder", type=Path)
    second.add_argument("--provider", default="CUDAExecutionProvider")
    second.add_argument("--seconds", type=float, default=2.0)
    second.add_argument("--json", type=Path)
    asked = parser.parse_args()
    if asked.verb == "cases":
        cases(asked.build, asked.out, asked.most)
        return
    told = run(asked.folder, asked.provider, asked.seconds)
    if asked.json:
        asked.json.write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
