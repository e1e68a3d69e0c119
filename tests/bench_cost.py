"""Time `shipyard cost` on the whole of cdk.out and on a template of 500 resources, each a process of its own.

python tests/bench_cost.py exits with 1 where the first takes more than one second, or the second more than two. Seconds of
the processor count, from the start of the process to its end, and the fastest of five turns, as in timeit: what makes a turn
slower is other work on the machine.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TURNS = 5
RESOURCES = 500
NAT = {"Type": "AWS::EC2::NatGateway", "Properties": {"SubnetId": "a"}}
SERVERS = {
    "Type": "AWS::SageMaker::EndpointConfig",
    "Properties": {
        "ProductionVariants": [{"VariantName": "a", "InstanceType": "ml.g5.xlarge", "InitialInstanceCount": 1}]
    },
}


def seconds(templates: Path) -> tuple[float, float]:
    """Return how long a report takes: of the processor, and on the clock."""
    began, start = os.times(), time.perf_counter()
    command = [sys.executable, "-m", "shipyard.cli", "cost", str(templates)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    ended = os.times()
    spent = ended.children_user + ended.children_system - began.children_user - began.children_system
    return spent, time.perf_counter() - start


def main() -> int:
    """Print both times and what they may be."""
    slow = 0
    with tempfile.TemporaryDirectory() as folder:
        large = Path(folder) / "large.json"
        large.write_text(json.dumps({"Resources": {f"R{k}": SERVERS if k % 2 else NAT for k in range(RESOURCES)}}))
        for templates, most in ((ROOT / "cdk.out", 1.0), (large, 2.0)):
            took = [seconds(templates) for _ in range(TURNS + 1)][1:]  # the first turn fills caches
            spent, wall = min(took)
            print(
                f"{templates.name:10} {spent:5.2f} s of the processor, {wall:5.2f} s on the clock, at most {most:.2f}"
            )
            slow += spent > most
    return int(slow > 0)


if __name__ == "__main__":
    sys.exit(main())
