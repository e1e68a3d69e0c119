"""What the verbs of the cost review understand."""

import argparse
from decimal import Decimal, InvalidOperation
from pathlib import Path

from infra.cost.document import DOCUMENTS
from infra.cost.places import Load

BOOK = Path("infra/cost/prices/aws.csv")

ABOUT = """\
Prices synthesized templates offline: `make synth`, then `shipyard cost`. Every resource is priced, free with a reason, or
unknown. docs/cost.md tells the usage file, the price book and the JSON.
"""

EXAMPLES = """\
examples:
  shipyard cost --env prod --usage usage.toml --html cost.html
  shipyard cost diff old/cdk.out cdk.out --markdown
  shipyard cost compare --env prod --submodel recommend --html places.html
  shipyard cost schema                  the JSON schema of --json; so are `schema difference` and `schema places`

exit codes: 0 done; 1 an error, told in one line; 2 wrong usage; 3 a guardrail of fleet.toml is crossed
"""


def cost_grammar(verb: str) -> argparse.ArgumentParser:
    """Return that of `cost`, or of `cost diff`."""
    top = argparse.ArgumentParser(
        prog="shipyard cost" + (" diff" if verb == "diff" else ""), description=ABOUT, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    if verb == "diff":
        for name in ("old", "new"):
            top.add_argument(name, type=Path, help="cdk.out, a template, or a report that --save wrote")
    else:
        top.add_argument("templates", type=Path, nargs="?", default=Path("cdk.out"), help="cdk.out or a template")
        top.add_argument("--all", action="store_true", help="the free resources too, and what each line rests on")
        top.add_argument("--save", type=Path, metavar="FILE", help="also write the JSON there")
    top.add_argument("--env", default="", help="environments, with commas between (default: all)")
    top.add_argument("--usage", type=Path, metavar="FILE", help="usage file (docs/cost.md)")
    top.add_argument("--prices", type=Path, metavar="FILE", help="price book (default: the project's own)")
    top.add_argument("--region", default="us-east-1", help="of templates that name none (default: us-east-1)")
    top.add_argument(
        "--parameter", action="append", default=[], metavar="NAME=VALUE", help="of templates; may be repeated"
    )
    top.add_argument("--fleet", type=Path, help="where guardrails are (default: ./fleet.toml, if it is there)")
    form = top.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--markdown", action="store_true", help="print Markdown for a pull request")
    top.add_argument("--html", type=Path, metavar="FILE", help="also write a page that needs nothing beside itself")
    return top


def schema_grammar() -> argparse.ArgumentParser:
    """Return that of `cost schema`."""
    top = argparse.ArgumentParser(prog="shipyard cost schema", description="Prints the JSON schema of a document.")
    top.add_argument(
        "document", nargs="?", choices=DOCUMENTS, default="report", help="of which command (default: report)"
    )
    return top


def prices_grammar() -> argparse.ArgumentParser:
    """Return that of `prices`."""
    top = argparse.ArgumentParser(prog="shipyard prices", description=(
        "Reads the AWS Price List API with your credentials and brings the rows of the price book up to date. A change "
        "of more than 10 % is held back and listed until --confirm; the book is replaced whole, or not at all."
    ))  # fmt: skip
    top.add_argument("what", choices=["refresh"])
    top.add_argument("--book", type=Path, default=BOOK, metavar="FILE", help="price book (default: %(default)s)")
    top.add_argument(
        "--region", action="append", default=[], help="regions to read (default: those of the book's rows)"
    )
    top.add_argument("--confirm", action="store_true", help="take changes of more than 10 %% too")
    top.add_argument("--dry-run", action="store_true", help="print what would change")
    return top


def compare_grammar() -> argparse.ArgumentParser:
    """Return that of `cost compare`."""
    top = argparse.ArgumentParser(prog="shipyard cost compare", description=(
        "Puts the same load on the GPU endpoint, on the private cluster and on devices, network included: cost a month and "
        "cost a million predictions against requests a second, with the crossing points."
    ))  # fmt: skip
    top.add_argument("--env", help="environment of fleet.toml that sizes the places (default: the first)")
    top.add_argument("--submodel", help="whose bundles are compared (default: the first of the release)")
    top.add_argument("--release", type=Path, help="release file (default: the environment's)")
    top.add_argument(
        "--throughput",
        type=Path,
        metavar="FILE",
        help="measured throughput: TOML, or bench.json of `make bench` (default: the release's latency)",
    )
    for name, told in (("request-kb", "size of a request, KB"), ("response-kb", "size of a response, KB"),
                       ("device-cost", "what a device costs a month besides the cloud")):  # fmt: skip
        top.add_argument(f"--{name}", type=_quantity, default=getattr(Load, name.replace("-", "_")), metavar="N",
                         help=f"{told} (default: %(default)s)")  # fmt: skip
    top.add_argument("--devices", type=int, default=Load.devices, metavar="N", help="devices at least (default: 1)")
    top.add_argument("--prices", type=Path, metavar="FILE", help="price book (default: the project's own)")
    top.add_argument("--fleet", type=Path, default=Path("fleet.toml"), help="configuration (default: ./fleet.toml)")
    form = top.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--markdown", action="store_true", help="print Markdown (as without it)")
    top.add_argument("--html", type=Path, metavar="FILE", help="also write a page with the curves")
    return top


def _quantity(text: str) -> Decimal:
    try:
        found = Decimal(text)
    except InvalidOperation:
        found = Decimal("NaN")
    if not found.is_finite() or found < 0:
        raise argparse.ArgumentTypeError(f"{text} is not a quantity of 0 or more")
    return found
