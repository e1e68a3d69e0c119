"""A rollout over all targets: whatever fails or is killed, all of them end on one release."""

import dataclasses
import itertools

import pytest

from serve.errors import ShipyardError
from shipyard.delivery import register as registers
from shipyard.delivery.orchestrate import STATE, roll_out
from shipyard.delivery.places import Place, cdk_fault, deployer
from shipyard.delivery.register import LOCK, Entry, Lost, lock
from shipyard.delivery.standing import Row
from tests.test_delivery import aws, project  # noqa: F401 -- fixtures

OLD, NEW, NEXT = "0.1.0-g000000000001", "0.1.0-g000000000002", "0.1.0-g000000000003"
NAMES = ("gpu", "cpu", "gateway", "edge", "rest")


MOMENTS = list(itertools.product(NAMES, ("before", "after", "check")))


class Killed(BaseException):
    """What a kill does: nothing runs after it."""


class Memory:
    """A register in memory, with S3's conditions (tests/test_delivery.py holds the real one to them)."""

    bucket = "memory"

    def __init__(self):
        self.there, self.writes, self.dies_at = {}, 0, None

    def read(self, key):
        return None if key not in self.there else Entry(*self.there[key], age_s=1e9)

    def write(self, key, content, over):
        if self.dead:
            raise Lost(key)  # what a killed process would still do in its `finally`
        if (self.there[key][1] if key in self.there else None) != over:
            raise Lost(key)
        if key == STATE:
            self.writes += 1
            if self.writes == self.dies_at:
                raise Killed
        tag = str(int(over or "0") + 1)
        self.there[key] = (content, tag)
        return tag

    dead = False

    def below(self, prefix):
        return [content for key, (content, _) in sorted(self.there.items()) if key.startswith(prefix)]


class World:
    """Targets that hold what was brought last; `faults` are (target, action, version) that fail, or kill once."""

    def __init__(self):
        self.live, self.faults, self.did = dict.fromkeys(NAMES, OLD), {}, []
        self.targets = [Fake(name, self) for name in NAMES]

    def meet(self, name, action, version):
        self.did.append((name, action, version))
        fault = self.faults.get((name, action, version))
        if fault is not None:
            self.faults[name, action, version] = None if fault is Killed else fault
            raise fault("injected") if fault is ShipyardError else fault


@dataclasses.dataclass
class Fake:
    name: str
    world: World

    def bring(self, version):
        self.world.meet(self.name, "before", version)
        self.world.live[self.name] = version
        self.world.meet(self.name, "after", version)

    def check(self, version):
        self.world.meet(self.name, "check", version)
        if self.world.live[self.name] != version:
            raise ShipyardError(f"{self.name}: serves {self.world.live[self.name]}")


def go(register, world, release=NEW, good=OLD, **more):
    return roll_out(register, world.targets, release, good, "test", lambda _: None, **more)


@pytest.fixture
def world():
    return World()


@pytest.fixture
def register():
    return Memory()


def state(register):
    return register.there[STATE][0]


def one_release(world):
    [release] = set(world.live.values())
    return release


def test_a_rollout_brings_each_target_in_turn_and_checks_it_before_the_next(world, register):
    done = go(register, world)
    assert (done.phase, done.stands, one_release(world)) == ("done", NEW, NEW)
    brought = [(name, action) for name, action, _ in world.did if action != "after"]
    each = [(name, action) for name in NAMES for action in ("before", "check")]
    assert brought == each + [(name, "check") for name in NAMES]
    assert register.there[LOCK][0]["holder"] is None


@pytest.mark.parametrize(("name", "action"), MOMENTS)
def test_a_target_that_fails_brings_all_back(world, register, name, action):
    world.faults[name, action, NEW] = ShipyardError
    with pytest.raises(ShipyardError, match=f"rollout of {NEW}: injected; all targets are back on {OLD}"):
        go(register, world)
    assert one_release(world) == OLD and state(register)["phase"] == "returned"
    # what was not begun was not touched
    touched = {target for target, _, version in world.did}
    assert touched == set(NAMES[: NAMES.index(name) + 1])
    # the next release goes its way, and returns to the same good one
    world.faults.clear()
    assert go(register, world, NEXT, good=None).good == OLD
    assert one_release(world) == NEXT


@pytest.mark.parametrize(("name", "action"), MOMENTS)
@pytest.mark.parametrize("give_up", [False, True])
def test_a_rollout_that_is_killed_goes_on_or_returns(world, register, name, action, give_up):
    world.faults[name, action, NEW] = Killed
    with pytest.raises(Killed):
        go(register, world)
    assert state(register)["phase"] == "forward"
    if give_up:
        with pytest.raises(ShipyardError, match=f"given up by test; all targets are back on {OLD}"):
            go(register, world, give_up=True)
        assert one_release(world) == OLD
    else:
        assert go(register, world).phase == "done"
        assert one_release(world) == NEW


@pytest.mark.parametrize(("name", "action"), MOMENTS)
def test_a_return_that_is_killed_goes_on_returning(world, register, name, action):
    world.faults["rest", "check", NEW] = ShipyardError
    world.faults[name, action, OLD] = Killed
    with pytest.raises(Killed):
        go(register, world)
    assert state(register)["phase"] == "return"
    with pytest.raises(ShipyardError, match=f"all targets are back on {OLD}"):
        go(register, world)
    assert one_release(world) == OLD


@pytest.mark.parametrize("write", range(1, 14))
@pytest.mark.parametrize("fails", [False, True])
def test_a_kill_at_any_write_of_the_state_ends_on_one_release(world, register, write, fails):
    if fails:
        world.faults["edge", "check", NEW] = ShipyardError
    register.dies_at = write
    for _ in range(3):
        try:
            go(register, world)
        except (Killed, ShipyardError):
            continue
        break
    assert one_release(world) == (OLD if fails else NEW)
    assert state(register)["phase"] == ("returned" if fails else "done")


def test_a_return_that_fails_brings_the_others_back_and_can_be_tried_again(world, register):
    world.faults["edge", "check", NEW] = ShipyardError
    world.faults["cpu", "before", OLD] = ShipyardError
    with pytest.raises(ShipyardError, match=r"not all targets are back on .*; value: 'cpu: injected'"):
        go(register, world)
    assert {name for name, version in world.live.items() if version != OLD} == {"cpu"}
    del world.faults["cpu", "before", OLD]
    with pytest.raises(ShipyardError, match="all targets are back"):
        go(register, world)
    assert one_release(world) == OLD


def test_what_looks_at_all_targets_is_asked_once_all_are_back(world, register):
    """The last target sees the places of all, and is brought back first."""
    rest = world.targets[-1]

    def all_of_them(version):
        if set(world.live.values()) != {version}:
            raise ShipyardError("not all serve it")

    rest.check = all_of_them
    world.faults["rest", "before", NEW] = ShipyardError
    with pytest.raises(ShipyardError, match=f"; all targets are back on {OLD}"):
        go(register, world)
    assert (one_release(world), state(register)["phase"]) == (OLD, "returned")


def test_one_that_falls_over_after_its_turn_is_seen_at_the_end(world, register):
    seen = []
    check = world.targets[0].check

    def falls(version):
        seen.append(version)
        if version == NEW and seen.count(NEW) == 2:
            raise ShipyardError("taken back by an alarm")
        check(version)

    world.targets[0].check = falls
    with pytest.raises(ShipyardError, match="taken back by an alarm; all targets are back"):
        go(register, world)
    assert one_release(world) == OLD


def test_another_release_waits_until_the_unfinished_one_is_over(world, register):
    world.faults["cpu", "before", NEW] = Killed
    with pytest.raises(Killed):
        go(register, world)
    with pytest.raises(ShipyardError, match=f"rollout of {NEW} is not finished; value: '{NEXT}'"):
        go(register, world, NEXT)
    assert world.live["cpu"] == OLD


def test_the_first_rollout_has_nothing_to_return_to(world, register):
    world.faults["cpu", "before", NEW] = ShipyardError
    with pytest.raises(ShipyardError, match=r"there is no release before it to return to.*--good VERSION"):
        go(register, world, good=None)
    with pytest.raises(ShipyardError, match=f"all targets are back on {OLD}"):
        go(register, world, good=OLD)
    assert one_release(world) == OLD


def test_nothing_is_given_up_where_nothing_is_unfinished(world, register):
    with pytest.raises(ShipyardError, match="none is unfinished"):
        go(register, world, give_up=True)


def test_two_rollouts_at_once_one_wins_and_the_other_is_told(aws, project, world):  # noqa: F811
    bucket = project.register("dev")
    told = []

    def second(_):
        if not told:
            told.append("begun")
            with pytest.raises(ShipyardError, match=f"another run is delivering; value: 'rollout of {NEW} by test"):
                roll_out(bucket, world.targets, NEXT, OLD, "test", lambda _: None)

    assert roll_out(bucket, world.targets, NEW, OLD, "test", second).phase == "done"
    assert (told, one_release(world)) == (["begun"], NEW)
    # a promotion waits for it too
    with lock(bucket, "promotion to x", "other"), pytest.raises(ShipyardError, match="promotion to x by other"):
        roll_out(bucket, world.targets, NEXT, OLD, "test", lambda _: None)


def test_a_run_that_lost_its_lock_touches_nothing_more(world, register):
    def taken(_):
        register.there[LOCK] = ({"holder": "other", "what": "x", "by": "y"}, "99")

    with pytest.raises(ShipyardError, match="another run is delivering; value: 'x by y"):
        roll_out(register, world.targets, NEW, OLD, "test", taken)
    assert {name for name, version in world.live.items() if version == NEW} == {"gpu"}


def test_a_lock_is_renewed_while_a_step_takes_long(register, monkeypatch):
    beats = []
    monkeypatch.setattr(registers, "BEATS_S", 0.01)
    write = register.write

    def counted(key, content, over):
        beats.append(content)
        return write(key, content, over)

    register.write = counted
    with lock(register, "a", "b", lease_s=0.03):
        while len(beats) < 4:
            pass
    assert beats[-1]["holder"] is None


# --- a place, and the CDK CLI ------------------------------------------------------------------------------------------


def test_a_place_waits_for_what_is_not_ready_and_refuses_what_differs():
    rows = [[Row("gpu", "search", "a", "a", "not ready")], [Row("gpu", "search", "a", "a", "ok")]]
    Place("gpu", lambda _: None, lambda _: rows.pop(0), pause_s=0).check(NEW)
    assert rows == []
    differs = Place("gpu", lambda _: None, lambda _: [Row("gpu", "search", "a", "b", "differs")])
    with pytest.raises(ShipyardError, match=f"gpu: does not serve {NEW}; value: 'gpu search differs: b'; allowed: a"):
        differs.check(NEW)
    never = Place("gpu", lambda _: None, lambda _: [Row("gpu", "search", "a", "a", "not ready")], wait_s=0)
    with pytest.raises(ShipyardError, match="search not ready"):
        never.check(NEW)


def test_the_cli_is_told_which_stacks_and_says_why_it_fails(tmp_path):
    cli = tmp_path / "cdk"
    cli.write_text('#!/bin/sh\necho "$@" >> "$0.log"\n[ "$FAIL" = "" ] || { echo "no such role" >&2; exit 1; }\n')
    cli.chmod(0o755)
    deployer(cli, lambda version: tmp_path / version, "dev/gpu", {"FAIL": ""})(NEW)
    assert f"deploy dev/gpu --app {tmp_path / NEW} " in (tmp_path / "cdk.log").read_text()
    with pytest.raises(ShipyardError, match="cdk deploy dev/gpu: no such role"):
        deployer(cli, lambda version: tmp_path / version, "dev/gpu", {"FAIL": "1"})(NEW)
    # what the CLI marks, and not the outputs of other stacks before and after it
    told = "✅  dev/network\n\nOutputs:\n❌  dev/gpu failed: no such role\n"
    assert cdk_fault(told + "more\n" * 99).startswith("❌  dev/gpu failed: no such role | more | more")
