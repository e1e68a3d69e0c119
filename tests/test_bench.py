"""The benchmark of servers: what it finds of a server whose limit is known, and the tables that it prints."""

import types

import pytest

from shipyard.bench import command, load

CAPACITY = 1000.0


def known(limit, asked):
    """Stand for a server that is in time up to `limit` requests a second."""

    def opened(port, requests, seconds, rate, connections=64):
        asked.append(rate)
        late = rate > limit
        told = {"throughput": rate, "p50_ms": 1.0, "p99_ms": 200.0 if late else 10.0, "others": {}}
        return types.SimpleNamespace(record=lambda: told)

    return opened


@pytest.mark.parametrize("limit", [0.0, 60.0, 130.0, 333.0, 500.0, 501.0, 700.0, 930.0, 2000.0])
def test_the_rate_within_the_budget_is_found_to_a_sixteenth_of_the_capacity(monkeypatch, limit):
    asked = []
    monkeypatch.setattr(load, "opened", known(limit, asked))
    half = load.opened(0, [], 1.0, CAPACITY / 2).record()
    found = command._within(types.SimpleNamespace(port=0), [], 1.0, CAPACITY / 2, half)
    assert found <= limit and len(asked) == 4
    assert limit - found < CAPACITY / 16 or found == CAPACITY * 15 / 16


@pytest.mark.parametrize("change", [{"throughput": 400.0}, {"others": {"503": 1}}, {"p99_ms": float("nan")}])
def test_what_is_not_answered_is_not_within_it(monkeypatch, change):
    monkeypatch.setattr(load, "opened", known(2000.0, []))
    half = load.opened(0, [], 1.0, CAPACITY / 2).record() | change
    assert command._within(types.SimpleNamespace(port=0), [], 1.0, CAPACITY / 2, half) < CAPACITY / 2
