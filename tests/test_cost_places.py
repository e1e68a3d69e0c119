"""The comparison of places: its sums by hand, its crossings, what it says of the GPU."""

import json
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest

from infra.cost.comparison import comparison_markdown, comparison_page, crossing_lines
from infra.cost.document import write_places
from infra.cost.places import Load, Measured, Throughput, crossings, load_throughput, places, rates, verdict
from infra.cost.prices import load_book
from models.config import load_fleet
from models.release import ShipyardError, load_keys, read_release
from shipyard.cli import main

ROOT = Path(__file__).resolve().parents[1]
BOOK = load_book()
ENV = (
    load_fleet(ROOT / "fleet.toml")
    .env["dev"]
    .model_copy(
        update={
            "zones": ("us-east-1a", "us-east-1b"),
            "gpu": load_fleet(ROOT / "fleet.toml")
            .env["dev"]
            .gpu.model_copy(update={"instance_type": "ml.g5.xlarge", "instances": 1}),
            "cpu": load_fleet(ROOT / "fleet.toml")
            .env["dev"]
            .cpu.model_copy(update={"cpu": 1024, "memory_mib": 2048, "tasks": 1}),
        }
    )
)


LARGEST = {name: target.max_size_mb for name, target in load_fleet(ROOT / "fleet.toml").target.items()}


@pytest.fixture(scope="module")
def release():
    path = ROOT / "releases" / f"{load_fleet(ROOT / 'fleet.toml').env['dev'].release}.json"
    return read_release(path, load_keys(path.parent / "keys"))


def measured(gpu=1000, cpu=100, edge=50):
    tables = {name: Measured(requests_per_second=rate, measured="by hand") for name, rate in
              (("gpu", gpu), ("cpu", cpu), ("edge", edge))}  # fmt: skip
    return Throughput(**tables)


def compare(release, *, throughput=None, env=ENV, **load):
    shape = Load(**{"request_kb": Decimal(0), "response_kb": Decimal(0), **load})
    return places(
        BOOK, env, shape, release=release, submodel="search", measured=throughput or Throughput(), largest=LARGEST
    )


def test_a_place_costs_its_units_and_its_network(release):
    gpu, cpu, edge = compare(release, throughput=measured())
    # an instance 1,028.13, an interface endpoint in two zones 14.60 (published prices by 730 hours)
    assert float(gpu.cost(Decimal(1))) == pytest.approx(1028.132 + 14.60)
    # a task 23.64 and 5.20, a load balancer 16.425, three endpoints in two zones 43.80; a capacity unit of 25 requests
    assert float(cpu.cost(Decimal(25))) == pytest.approx(23.6374 + 5.1976 + 16.425 + 43.80 + 0.008 * 730)
    # a device 0.16, connected all the month 0.0035, 2,920 messages of 5 KB
    assert float(edge.cost(Decimal(1))) == pytest.approx(0.16 + 0.003504 + 0.00292)
    assert float(compare(release, throughput=measured(), device_cost=Decimal(10))[2].cost(Decimal(1))) == pytest.approx(
        10.166424
    )


def test_units_follow_the_load_at_sixty_per_cent(release):
    gpu, cpu, edge = compare(release, throughput=measured())
    assert [int(cpu.units(Decimal(rate))) for rate in (1, 60, 61, 600)] == [1, 1, 2, 10]
    assert [int(gpu.units(Decimal(rate))) for rate in (600, 601)] == [1, 2]
    assert int(compare(release, throughput=measured(), devices=500)[2].units(Decimal(1))) == 500
    assert int(edge.units(Decimal(31))) == 2


def test_the_gpu_is_worth_its_price_from_the_crossing_on(release):
    found = compare(release, throughput=measured(gpu=20_000, cpu=100))
    gpu, cpu, _ = found
    points = [one for one in crossings(found) if {one.cheaper, one.dearer} == {gpu.name, cpu.name}]
    assert points
    first = points[0]
    assert (first.cheaper, first.dearer) == (gpu.name, cpu.name)
    assert gpu.cost(first.rate * Decimal("0.99")) > cpu.cost(first.rate * Decimal("0.99"))
    assert gpu.cost(first.rate * Decimal("1.01")) < cpu.cost(first.rate * Decimal("1.01"))
    assert verdict(found).startswith("Below ")
    assert "requests a second the GPU is not worth its price" in verdict(found)


def test_the_verdict_names_the_crossing_points(release):
    gpu, cpu, _ = compare(release, throughput=measured(gpu=20_000, cpu=100))

    def said(*dearer):
        """The verdict where the GPU costs more than the cluster in these spans of requests a second, less elsewhere."""

        def cost(units, rate):
            return Decimal(2 if any(low <= rate < high for low, high in dearer) else 0)

        return verdict([replace(gpu, month=cost), replace(cpu, month=lambda units, rate: Decimal(1))])

    assert said((0, 10**9)).startswith("The GPU is not worth its price: up to 10,000 requests")
    assert said() == "The GPU costs less than the private cluster at every load."
    assert said((0, 1234)).endswith("It pays from 1,230 requests a second on.")
    assert said((0, 10), (500, 10**9)).endswith("It pays from 10 requests a second to 500.")
    assert said((0, 10), (50, 60)).endswith("It pays from 10 requests a second on, with gaps between up to 60.")
    assert said((50, 60)) == (
        "The GPU costs less than the private cluster from 0.1 requests a second on, with gaps between up to 60."
    )
    assert said((50, 10**9)) == "The GPU costs less than the private cluster from 0.1 requests a second to 50."


def test_a_gpu_that_takes_little_is_never_worth_its_price(release):
    assert verdict(compare(release, throughput=measured(gpu=200))).startswith(
        "The GPU is not worth its price: up to 10,000"
    )


def test_what_is_assumed_is_said(release):
    found = compare(release)
    assert [place.assumed for place in found] == [True, False, False]
    assert "assumed, not measured" in found[0].grounds
    assert "measure it before you decide" in verdict(found)
    assert "measure it" not in verdict(compare(release, throughput=measured()))
    assert json.loads(write_places(found, "USD"))["assumed"] == ["GPU endpoint"]


def test_a_graph_that_its_target_does_not_take_is_said(release):
    gpu, cpu, edge = compare(release, throughput=measured())
    assert "[target." not in gpu.told
    assert "graph of 144.9 MB is over the 100 MB of [target.cpu]" in cpu.told
    assert "is over the 40 MB of [target.edge]: not deployed there as it is" in edge.told


def test_throughput_of_a_benched_bundle_is_that_of_its_cores(release, tmp_path):
    path = tmp_path / "bench.json"
    rounds = [{"recommend": {"throughput": rate}, "rank": {"throughput": 900.0}} for rate in (80.0, 20.0, 95.0)]
    record = {"servers": {"shipyard": {"rounds": rounds}}, "processor": "a CPU", "bundle": "ab" * 32}
    path.write_text(json.dumps(record))
    env = ENV.model_copy(update={"cpu": ENV.cpu.model_copy(update={"cpu": 4096})})
    gpu, cpu, _ = compare(release, throughput=load_throughput(path), env=env)
    assert cpu.unit_rate == 320
    assert "measured: shipyard bench of the bundle abababababab, its server on one core of a CPU, times 4" in cpu.told
    assert gpu.assumed
    path.write_text("{}")
    with pytest.raises(ShipyardError, match="not a file of throughput"):
        load_throughput(path)


def test_more_load_never_costs_less_and_a_million_of_one_unit_costs_less_and_less(release):
    for place in compare(release, request_kb=Decimal(2), response_kb=Decimal(6)):
        costs = [place.cost(rate) for rate in rates()]
        assert costs == sorted(costs)
        single = [place.million(rate) for rate in rates() if place.units(rate) == place.least]
        assert single == sorted(single, reverse=True)


def test_crossings_of_a_stair_are_told_by_first_and_last(release):
    found = compare(release, throughput=measured(gpu=3000, cpu=100))
    lines = crossing_lines(crossings(found))
    assert len(lines) <= 8
    assert all("requests a second" in line or "change places" in line for line in lines)
    same = [replace(found[1], name="a"), replace(found[1], name="b")]
    assert crossing_lines(crossings(same)) == ["the places keep their order at every load"]


def test_every_form_has_every_place(release):
    found = compare(release, throughput=measured(gpu=20_000))
    text, page = comparison_markdown(found, "USD"), comparison_page(found, "USD", "Where")
    assert len([line for line in text.splitlines() if line.startswith("| ")]) == 8
    assert page.count("<svg") == 2
    assert page.count("<tr>") == 1 + 6 + 1 + len(crossings(found))
    assert page.count('class="curve') == 2 * 2 * 3
    assert 'class="ring"' in page
    assert len(json.loads(write_places(found, "USD"))["loads"]) == len(rates())


def test_what_is_missing_is_an_error(release, tmp_path):
    with pytest.raises(ShipyardError, match="not in the release"):
        places(BOOK, ENV, Load(), release=release, submodel="nothing", measured=Throughput(), largest=LARGEST)
    with pytest.raises(ShipyardError, match=r"no price for .* in ap-northeast-3"):
        compare(release, env=ENV.model_copy(update={"region": "ap-northeast-3"}))[0].cost(Decimal(1))
    path = tmp_path / "t.toml"
    for text, told in (("[gpux]\n", 'did you mean "gpu"'), ("[gpu]\nrequests_per_second = 0\nmeasured = 'x'\n", "not allow"),
                       ("[", "not a file of throughput")):  # fmt: skip
        path.write_text(text)
        with pytest.raises(ShipyardError, match=told):
            load_throughput(path)


def test_the_verb_reads_fleet_release_and_measurements(tmp_path, capsys):
    measurements, page = tmp_path / "t.toml", tmp_path / "places.html"
    measurements.write_text('[gpu]\nrequests_per_second = 500\nmeasured = "perf_analyzer on an A10G"\n')
    arguments = ["cost", "compare", "--submodel", "search", "--fleet", str(ROOT / "fleet.toml"),
                 "--throughput", str(measurements), "--html", str(page)]  # fmt: skip
    assert main(arguments) == 0
    assert "measured: perf_analyzer on an A10G" in capsys.readouterr().out
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert main([*arguments, "--env", "nowhere"]) == 1
    assert "no such environment" in capsys.readouterr().err
