"""Time and memory of what leaves the line: each stage for the default model and for a BERT of 110 million parameters of
random weights, bundles against tar, gzip and zstd, and upload against the AWS CLI on the same local server.

Run by `make bench-artifacts`; writes build/bench/artifacts.json and prints its tables, medians of one run.
"""

import argparse
import json
import logging
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

import torch
from moto.server import ThreadedMotoServer
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, BertConfig, BertModel

from models.config import load_fleet
from shipyard.bundle import write_zip
from shipyard.line import Line
from shipyard.s3 import open_bucket
from shipyard.upload import upload
from tests.conftest import ROOT, TINY

ROUNDS = 5
MODELS = ("default", "bert")


class Watch:
    """Run a line's stages, and note wall time and the largest memory of each."""

    def __init__(self):
        self.found = []

    def __call__(self, stage, build):
        peak, done = [0], threading.Event()

        def sample():
            while not done.wait(0.02):
                pages = int(Path("/proc/self/statm").read_text().split()[1])
                peak[0] = max(peak[0], pages * os.sysconf("SC_PAGE_SIZE"))

        sampler = threading.Thread(target=sample)
        sampler.start()
        began = time.perf_counter()
        try:
            return stage.run(build)
        finally:
            seconds = time.perf_counter() - began
            done.set()
            sampler.join()
            self.found.append({"stage": f"{stage.name} {stage.unit}", "seconds": seconds, "peak_mb": peak[0] / 1e6})


def random_bert(folder, base):
    """Write a BERT of the base size with random weights beside the tokenizer of `base`; return its parameters."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = BertModel(BertConfig(vocab_size=len(tokenizer)), add_pooling_layer=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def stages(fleet, base, build):
    """Return the figures of every stage of search, and the folder of its bundle."""
    watch = Watch()
    line = Line(fleet, "tiny", ROOT, build, lambda *told: None, watch)
    if base is not None:
        line.__dict__["base"] = base  # a folder on disk: fleet.toml takes a package or the hub alone
    record = line.bundle("search")
    return watch.found, record.folder / "bundle", record.said


def median_of(work):
    seconds = []
    for round_ in range(ROUNDS):
        began = time.perf_counter()
        work(round_)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def archives(bundle, scratch):
    """Return seconds and bytes of the bundle's zip, tar, gzip and zstd, of the same files."""

    def tar(name, mode, **more):
        with tarfile.open(scratch / name, mode, **more) as stream:
            stream.add(bundle, arcname="bundle")

    def zstd():
        tar("plain.tar", "w")
        subprocess.run(["zstd", "-q", "-f", "-3", str(scratch / "plain.tar")], check=True)

    ways = {
        "bundle.zip (stored, ours)": lambda _: write_zip(bundle, scratch / "ours.zip"),
        "tar": lambda _: tar("plain.tar", "w"),
        "tar + gzip -6": lambda _: tar("plain.tar.gz", "w:gz", compresslevel=6),
    }
    files = dict(zip(ways, ("ours.zip", "plain.tar", "plain.tar.gz"), strict=True))
    if shutil.which("zstd"):
        ways["tar + zstd -3"] = lambda _: zstd()
        files["tar + zstd -3"] = "plain.tar.zst"
    return {
        name: {"seconds": median_of(work), "bytes": (scratch / files[name]).stat().st_size}
        for name, work in ways.items()
    }


def uploads(bundle, said):
    """Return seconds of uploading the bundle by us and by the AWS CLI, turn about, to the same server."""
    import boto3

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # the server's line for every request
    client, cli = boto3.client("s3"), shutil.which("aws")
    seconds = {"shipyard": []} | ({"aws s3 cp": []} if cli else {})
    for number in range(ROUNDS):
        bucket = f"round-{number}"
        client.create_bucket(Bucket=bucket)
        began = time.perf_counter()
        upload(open_bucket(bucket), said, bundle, lambda *told: None)
        seconds["shipyard"].append(time.perf_counter() - began)
        if cli:
            began = time.perf_counter()
            subprocess.run([cli, "s3", "cp", "--quiet", "--recursive", "--checksum-algorithm", "SHA256", str(bundle),
                            f"s3://{bucket}/cli/"], check=True)  # fmt: skip
            seconds["aws s3 cp"].append(time.perf_counter() - began)
        for item in client.list_objects_v2(Bucket=bucket)["Contents"]:
            client.delete_object(Bucket=bucket, Key=item["Key"])
    server.stop()
    size = said["bytes"]
    return {
        name: {"seconds": statistics.median(s), "mb_per_s": size / 1e6 / statistics.median(s)}
        for name, s in seconds.items()
    }


def measure(name):
    """Walk the line with one of MODELS; return its title and its figures."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        (scratch / "fleet.toml").write_text(
            (ROOT / "fleet.toml").read_text().replace("max_size_mb = 400", "max_size_mb = 2000") + TINY
        )
        fleet, base, title = load_fleet(scratch / "fleet.toml"), None, name
        if name == "bert":
            base = scratch / "base"
            parameters = random_bert(base, Line(fleet, "tiny", ROOT, scratch, print, None).base)
            title = f"BERT, {parameters / 1e6:.0f} million, random"
        print(f"walks the line: {title}", file=sys.stderr)
        found, bundle, said = stages(fleet, base, scratch / "build")
        size = sum(file["bytes"] for file in said["files"])
        return title, {
            "bundle_bytes": size, "stages": found, "archives": archives(bundle, scratch),
            "upload": uploads(bundle, said | {"bytes": size}),
        }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench")
    parser.add_argument("--model", choices=MODELS, help="one of the two alone")
    chosen = parser.parse_args()
    out = chosen.out
    out.mkdir(parents=True, exist_ok=True)
    before = os.getloadavg()[0]
    console = Console(width=110)
    if not shutil.which("aws"):
        console.print("the AWS CLI is not installed (aws): uploads are those of shipyard alone")
    result = {"machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(),
                          "torch_threads": torch.get_num_threads()},
              "versions": {name: version(name) for name in ("torch", "onnxruntime", "onnx", "boto3", "moto")},
              "models": {}}  # fmt: skip
    for name in MODELS if chosen.model is None else [chosen.model]:
        # a process for each, for memory that one has taken is not given back to the next
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
            title, found = alone.submit(measure, name).result()
        result["models"][title] = found
    for title, model in result["models"].items():
        table = Table(
            "stage", "seconds", "peak memory, MB", title=f"{title}: bundle of {model['bundle_bytes'] / 1e6:.0f} MB"
        )
        for row in model["stages"]:
            table.add_row(row["stage"], f"{row['seconds']:.2f}", f"{row['peak_mb']:.0f}")
        console.print(table)
        table = Table("archive", "seconds", "MB")
        for name, row in model["archives"].items():
            table.add_row(name, f"{row['seconds']:.2f}", f"{row['bytes'] / 1e6:.1f}")
        console.print(table)
        table = Table("upload", "seconds", "MB/s")
        for name, row in model["upload"].items():
            table.add_row(name, f"{row['seconds']:.2f}", f"{row['mb_per_s']:.0f}")
        console.print(table)
    result["machine"]["load"] = [round(before, 2), round(os.getloadavg()[0], 2)]
    console.print(f"load of the machine before and after: {result['machine']['load']}, on {os.cpu_count()} cores")
    (out / "artifacts.json").write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"wrote {out / 'artifacts.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
