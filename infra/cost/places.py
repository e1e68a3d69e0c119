"""The same load on the GPU endpoint, on the private cluster and on devices, with the network that each needs."""

import json
import math
import statistics
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from infra.cost.networking import begun, units_application
from infra.cost.prices import Book, charge
from infra.cost.usage import HOURS, KB_PER_GB, MB_PER_GB
from models.config import Environment, Settings, explain
from models.release import Release, ShipyardError

BUSY = Decimal("0.6")
"""What part of its throughput a unit is given, as the autoscaling of our stacks aims at 60 % of the processor."""

ASSUMED_SPEEDUP = Decimal(8)
"""Requests a second of a GPU over one core, where no GPU was measured."""

FORMS = {"gpu": ("fp16", "fp32"), "cpu": ("int8", "fp32"), "edge": ("int8", "fp32")}
"""Which format of a bundle serves where, the first that a release has."""

LOWEST, HIGHEST, STEPS = -1, 4, 24
"""Powers of ten of the loads that are compared, in requests a second, and points between two of them."""


class Measured(Settings):
    """Say what one instance, task or device takes, and who measured it; with `cores` what so many processor cores take."""

    requests_per_second: Annotated[float, Field(gt=0)]
    measured: Annotated[str, Field(min_length=1)]
    cores: Annotated[float, Field(gt=0)] | None = None


class Throughput(Settings):
    """Hold a file of measured throughput: a table for each place that was measured."""

    gpu: Measured | None = None
    cpu: Measured | None = None
    edge: Measured | None = None


@dataclass(frozen=True)
class Load:
    """Describe a request, and the devices among which the edge's share of the load is spread."""

    request_kb: Decimal = Decimal(2)
    response_kb: Decimal = Decimal(6)
    devices: int = 1
    device_cost: Decimal = Decimal(0)
    sync_minutes: Decimal = Decimal(15)
    message_kb: Decimal = Decimal(4)


@dataclass(frozen=True)
class Place:
    """A place of inference: what it costs a month with a number of units under a load, and what a unit takes."""

    name: str
    unit: str
    least: int
    unit_rate: Decimal
    grounds: str
    assumed: bool
    month: Callable[[Decimal, Decimal], Decimal]

    @property
    def told(self) -> str:
        """Return what a unit takes, and how that is known."""
        return (
            f"{self.name}: one {self.unit} takes {loads(self.unit_rate)} requests a second ({self.grounds}); "
            f"at least {self.least}, each given 60 % of that"
        )

    def units(self, rate: Decimal) -> Decimal:
        """Return how many units a load wants, at 60 % of what each takes."""
        return max(Decimal(self.least), (rate / (self.unit_rate * BUSY)).to_integral_value(ROUND_CEILING))

    def cost(self, rate: Decimal) -> Decimal:
        """Return what a load costs a month."""
        return self.month(self.units(rate), rate)

    def million(self, rate: Decimal) -> Decimal:
        """Return what a million predictions cost under a load."""
        return self.cost(rate) / (rate * 3600 * HOURS) * 1_000_000


@dataclass(frozen=True)
class Crossing:
    """Say from which load on one place costs less than another."""

    rate: Decimal
    cheaper: str
    dearer: str


def load_throughput(path: Path) -> Throughput:
    """Read a file of measured throughput: TOML, or the bench.json that `shipyard bench` writes of a bundle on one core.

    Raises:
        ShipyardError: it is missing, neither of these, or has an unknown key.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if text.lstrip().startswith("{"):
            return _benched(json.loads(text))
        return Throughput.model_validate(tomllib.loads(text))
    except (OSError, ValueError, KeyError, TypeError) as fault:
        if isinstance(fault, ValidationError):
            raise explain(fault, Throughput, str(path)) from None
        raise ShipyardError(f"{path}: not a file of throughput: {fault}", mend="see docs/cost.md") from None


def _benched(record: Mapping[str, Any]) -> Throughput:
    rounds = [one["recommend"]["throughput"] for one in record["servers"]["shipyard"]["rounds"]]
    told = f"shipyard bench of the bundle {record['bundle'][:12]}, its server on one core of {record['processor']}"
    return Throughput(cpu=Measured(requests_per_second=statistics.median(rounds), measured=told, cores=1))


def places(
    book: Book,
    env: Environment,
    load: Load,
    *,
    release: Release,
    submodel: str,
    measured: Throughput,
    largest: Mapping[str, float],
) -> list[Place]:
    """Return the three places for a sub-model, sized as an environment of fleet.toml has them; `largest` in MB by target.

    Raises:
        ShipyardError: the release has no such sub-model, or a price that is needed is in no book.
    """
    if submodel not in release.submodels:
        raise ShipyardError("--submodel: not in the release", value=submodel, allowed=", ".join(release.submodels))
    forms = {form.precision: form for form in release.submodels[submodel].formats}
    zones, gigabytes = len(env.zones), (load.request_kb + load.response_kb) * 3600 * HOURS / KB_PER_GB

    def price(sku: str, quantity: Decimal) -> Decimal:
        tiers = book.find(sku, env.region)
        if not tiers:
            raise ShipyardError(f"cost compare: no price for {sku} in {env.region}", mend="shipyard prices refresh")
        return charge(tiers, quantity)

    def endpoints(count: int) -> Decimal:
        return price("vpce.interface.hour_per_az", HOURS * zones * count)

    def gpu(units: Decimal, rate: Decimal) -> Decimal:
        data = rate * gigabytes
        instances = price(f"sagemaker.hosting.{env.gpu.instance_type}", units * HOURS)
        # callers in the VPC reach the endpoint through one interface endpoint, sagemaker.runtime
        return (
            instances
            + price("sagemaker.hosting.data_processed", data)
            + endpoints(1)
            + price("vpce.interface.data", data)
        )

    vcpu, memory = Decimal(env.cpu.cpu) / 1024, Decimal(env.cpu.memory_mib) / MB_PER_GB

    def cpu(units: Decimal, rate: Decimal) -> Decimal:
        tasks = price("fargate.linux.arm.vcpu", units * vcpu * HOURS) + price(
            "fargate.linux.arm.memory", units * memory * HOURS
        )
        shape = {"request_kb": load.request_kb, "response_kb": load.response_kb, "connection_seconds": Decimal(0)}
        balancer = price("alb.hour", HOURS) + price("alb.lcu", units_application(rate, shape, 1) * HOURS)
        # tasks fetch their image and write their logs through three: ecr.api, ecr.dkr, logs
        return tasks + balancer + endpoints(3)

    def edge(units: Decimal, rate: Decimal) -> Decimal:
        minutes = units * HOURS * 60
        messages = minutes / load.sync_minutes * begun(load.message_kb, 5)
        cloud = price("greengrass.active_core_device", units) + price("iot.connectivity", minutes)
        return cloud + price("iot.messaging", messages) + units * load.device_cost

    def place(
        name: str, target: str, unit: str, least: int, cores: Decimal, month: Callable[[Decimal, Decimal], Decimal]
    ) -> Place:
        form = next(forms[name] for name in (*FORMS[target], *forms) if name in forms)
        size = form.bytes / 1e6
        over = (
            f"; its {form.precision} graph of {size:.1f} MB is over the {largest[target]:g} MB of [target.{target}]: not "
            "deployed there as it is"
            if size > largest[target]
            else ""
        )
        given: Measured | None = getattr(measured, target)
        if given is not None:
            rate = Decimal(str(given.requests_per_second)) * (cores / Decimal(str(given.cores)) if given.cores else 1)
            scaled = f", times {cores / Decimal(str(given.cores)):f} for its cores" if given.cores else ""
            return Place(name, unit, least, rate, f"measured: {given.measured}{scaled}{over}", False, month)
        core = Decimal(1000) / Decimal(str(form.latency_ms))
        told = f"{form.latency_ms:g} ms a request of the {form.precision} graph on one core of the machine that made it"
        if target == "gpu":
            rate, told = core * ASSUMED_SPEEDUP, f"assumed, not measured: {ASSUMED_SPEEDUP} times one core; {told}"
        else:
            rate = core * cores
            told += "" if cores == 1 else f", times {cores.normalize():f} cores"
            told += (
                ", ARM taken as equal"
                if target == "cpu"
                else f", the device taken as equal and as {load.device_cost:f} a month"
            )
        return Place(name, unit, least, rate, told + over, target == "gpu", month)

    return [
        place("GPU endpoint", "gpu", f"instance {env.gpu.instance_type}", env.gpu.instances, Decimal(1), gpu),
        place("private cluster", "cpu", f"task of {vcpu.normalize():f} vCPU on ARM", env.cpu.tasks, vcpu, cpu),
        place("edge", "edge", "device", load.devices, Decimal(1), edge),
    ]  # fmt: skip


def rates() -> list[Decimal]:
    """Return the loads that are compared, evenly spread over powers of ten."""
    steps = range((HIGHEST - LOWEST) * STEPS + 1)
    return [Decimal(f"{10 ** (LOWEST + step / STEPS):.6g}") for step in steps]


def crossings(found: Sequence[Place]) -> list[Crossing]:
    """Return the loads from which on one place costs less than another, in rising order, by bisection."""
    out = []
    for k, left in enumerate(found):
        for right in found[k + 1 :]:
            for low, high in zip(rates(), rates()[1:], strict=False):
                before, after = (left.cost(rate) < right.cost(rate) for rate in (low, high))
                if before != after:
                    for _ in range(40):
                        middle = Decimal(math.sqrt(low * high))
                        low, high = (
                            (middle, high) if (left.cost(middle) < right.cost(middle)) == before else (low, middle)
                        )
                    names = (left.name, right.name) if after else (right.name, left.name)
                    out.append(Crossing(high, *names))
    return sorted(out, key=lambda crossing: crossing.rate)


def verdict(found: Sequence[Place]) -> str:
    """Say at which loads the GPU costs less than the private cluster, or that it is not worth its price."""
    gpu, cluster = found[0], found[1]
    points = crossings([gpu, cluster])
    worth = [one.rate for one in points if one.cheaper == gpu.name]
    first = gpu.cost(rates()[0]) < cluster.cost(rates()[0])
    doubt = " Its throughput is assumed: measure it before you decide." if gpu.assumed else ""
    if not worth and not first:
        most = loads(rates()[-1])
        return f"The GPU is not worth its price: up to {most} requests a second the private cluster costs less.{doubt}"
    if not points:
        return f"The GPU costs less than the private cluster at every load.{doubt}"
    last = points[-1]
    end = "on" if last.cheaper == gpu.name else f"to {loads(last.rate)}"
    gaps = (
        f", with gaps between{f' up to {loads(last.rate)}' if end == 'on' else ''}"
        if len(points) > (1 if first else 2)
        else ""
    )
    if first:
        return f"The GPU costs less than the private cluster from {loads(rates()[0])} requests a second {end}{gaps}.{doubt}"
    return (
        f"Below {loads(worth[0])} requests a second the GPU is not worth its price: the private cluster costs less. "
        f"It pays from {loads(worth[0])} requests a second {end}{gaps}.{doubt}"
    )


def loads(rate: Decimal) -> str:
    """Return requests a second as people write them: three digits that count, no exponent."""
    return f"{Decimal(f'{rate:.3g}').normalize():,f}"
