"""Time `cdk synth` of one environment against an empty app, in turns, both without the CDK's own validator.

python tests/bench_synth.py [ENVIRONMENT] exits with 1 where it takes more than 2.5 times as long as the empty app. The
fastest of five turns counts, as in timeit: what makes a turn slower is other work on the machine.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CDK = ROOT / "node_modules" / ".bin" / "cdk"
MOST = 2.5
TURNS = 5
EMPTY = "import aws_cdk; app = aws_cdk.App(); aws_cdk.Stack(app, 'empty'); app.synth()"


def seconds(app: str, *options: str) -> float:
    """Return how long a synth takes, from the start of the CLI to its end."""
    environment = {**os.environ, "CDK_VALIDATION": "false"}
    with tempfile.TemporaryDirectory() as out:
        command = [str(CDK), "synth", "--quiet", "--app", app, "--output", out, *options]
        start = time.perf_counter()
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
        return time.perf_counter() - start


def main() -> int:
    """Print both times and their ratio."""
    name = sys.argv[1] if len(sys.argv) > 1 else "prod"
    took: dict[str, list[float]] = {"empty": [], name: []}
    for turn in range(TURNS + 1):
        for what, app, options in (
            ("empty", f'{sys.executable} -c "{EMPTY}"', ()),
            (name, f"{sys.executable} app.py", ("--context", f"env={name}")),
        ):
            spent = seconds(app, *options)
            if turn:  # the first turn fills caches
                took[what].append(spent)
    ratio = min(took[name]) / min(took["empty"])
    for what, times in took.items():
        print(f"{what:10} {min(times):6.2f} s   up to {max(times):.2f} in {TURNS} turns")
    print(f"ratio      {ratio:6.2f}     at most {MOST}")
    return int(ratio > MOST)


if __name__ == "__main__":
    sys.exit(main())
