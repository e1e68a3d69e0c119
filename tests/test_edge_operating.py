"""What an operator of many devices meets: a way back that is repeated, two hands at once, and devices that talk nonsense."""

import dataclasses
import json

import pytest

from serve.errors import ShipyardError
from serve.greengrass.words import SHADOW, read_told
from shipyard.console import Reporter
from shipyard.edge import command as edge
from shipyard.edge import components, devices, rollout
from shipyard.edge.merge import Terms
from shipyard.edge.reports import read_report
from tests.test_edge_cloud import BUCKET, ENV, NAME, WHERE, aws  # noqa: F401 -- a fixture

CANARIES, FLEET = devices.groups(ENV.edge).values()


def before(aws):  # noqa: F811
    return rollout.before(aws.clients, ENV.edge, **WHERE)


def serve_all(aws, found):  # noqa: F811
    aws.publish(found)
    aws.rollout(found, then=aws.canaries)
    for thing in devices.things(aws.clients, FLEET):
        aws.device(thing)


def say(aws, thing, **reported):  # noqa: F811
    """Put into a shadow what no sound device reports."""
    payload = json.dumps({"state": {"reported": reported}})
    aws.clients.shadows.update_thing_shadow(thingName=thing, shadowName=SHADOW, payload=payload)


# --- the way back -----------------------------------------------------------------------------------------------------


def test_a_rollback_that_is_repeated_does_not_go_forward(aws):  # noqa: F811
    one, two = aws.made.release(1), aws.made.release(2)
    serve_all(aws, one)
    serve_all(aws, two)
    for _ in range(2):  # the second as after one that was cut off
        assert before(aws) == one.version
        aws.rollout(one, canary=False)
    three = aws.made.release(3)
    serve_all(aws, three)
    assert before(aws) == one.version


def test_a_rollback_passes_by_what_only_canaries_tried(aws):  # noqa: F811
    one, two, three = (aws.made.release(number) for number in (1, 2, 3))
    serve_all(aws, one)
    for bad in (two, three):
        aws.publish(bad)
        with pytest.raises(ShipyardError, match="canaries failed"):
            aws.rollout(bad, then=lambda: aws.canaries(fault="golden answer 0 differs"))
    assert before(aws) == one.version


def test_a_way_back_needs_no_archive_on_this_machine(aws, tmp_path):  # noqa: F811
    found = aws.made.release(1)
    aws.publish(found)

    def publish():
        return components.publish_edge(
            found, [], tmp_path / "nothing", aws.store, aws.clients.greengrass, BUCKET, **WHERE,
            progress=lambda *_: None, pause=0,
        )  # fmt: skip

    said, deltas = publish()
    assert said["bytes_sent"] == 0 and said["created"] == [] and deltas == {}
    aws.store.remove([found.artifacts[0].key + found.artifacts[0].files[0].path])
    with pytest.raises(ShipyardError, match="not the file of the release"):
        publish()


# --- canaries ---------------------------------------------------------------------------------------------------------


def test_a_rollout_ends_where_the_canaries_are_told_otherwise_meanwhile(aws):  # noqa: F811
    one, two = aws.made.release(1), aws.made.release(2)
    serve_all(aws, one)
    aws.publish(two)

    def another():
        aws.rollout(one, canary=False)
        aws.canaries()

    with pytest.raises(ShipyardError, match="canaries were told otherwise meanwhile"):
        aws.rollout(two, then=another)
    assert {device.told.models[NAME].manifest for device in devices.look_all(
        aws.clients, devices.things(aws.clients, FLEET)
    )} == {one.artifacts[0].manifest}  # fmt: skip


def test_the_fleet_is_told_above_what_it_heard_while_the_canaries_were_tried(aws):  # noqa: F811
    one, two = aws.made.release(1), aws.made.release(2)
    serve_all(aws, one)
    aws.publish(two)
    thing = devices.things(aws.clients, FLEET)[0]

    def meanwhile():
        aws.canaries()
        told = json.loads(_desired(aws, thing))
        word = json.dumps({**told, "generation": 40}, sort_keys=True, separators=(",", ":"))
        payload = json.dumps({"state": {"desired": {"told": word}}})
        aws.clients.shadows.update_thing_shadow(thingName=thing, shadowName=SHADOW, payload=payload)

    aws.rollout(two, then=meanwhile)
    assert devices.look(aws.clients, thing).told.generation > 40


def _desired(aws, thing):  # noqa: F811
    answer = aws.clients.shadows.get_thing_shadow(thingName=thing, shadowName=SHADOW)
    return json.loads(answer["payload"].read())["state"]["desired"]["told"]


def test_a_failure_of_an_older_word_does_not_count_and_one_of_this_word_is_tried_again(aws):  # noqa: F811
    one, two, three = (aws.made.release(number) for number in (1, 2, 3))
    serve_all(aws, one)
    aws.publish(two)
    with pytest.raises(ShipyardError, match=r"canaries failed; .*value: '2 of 2'"):
        aws.rollout(two, then=lambda: aws.canaries(fault="generation 2: too slow"))
    aws.publish(three)
    # they have not spoken since; what they said was of release two
    with pytest.raises(ShipyardError, match="canaries did not come in step"):
        aws.rollout(three)
    assert devices.status(aws.clients, ENV)["canary"]["devices"]["behind"] == 2
    with pytest.raises(ShipyardError, match="canaries failed"):
        aws.rollout(three, then=lambda: aws.canaries(fault="generation 3: too slow"))
    # a device tries a generation once: the same command again is a new one
    assert aws.rollout(three, then=aws.canaries)["fleet"]["told"] == 3


def test_a_failure_by_the_runtime_before_waits_for_the_one_that_mends_it(aws):  # noqa: F811
    one, two = aws.made.release(1), aws.made.release(1, runtime="1.0.6")
    aws.publish(one)
    with pytest.raises(ShipyardError, match="canaries failed"):
        aws.rollout(one, then=lambda: aws.canaries(fault="generation 1: cannot be opened"))
    aws.publish(two)
    with pytest.raises(ShipyardError, match="canaries did not come in step"):
        aws.rollout(two, then=lambda: aws.canaries(fault="generation 2: cannot be opened"))
    assert aws.rollout(two, then=lambda: aws.canaries(runtime="1.0.6"))["canary"]["told"] == 2


# --- status -----------------------------------------------------------------------------------------------------------


def test_a_device_with_the_runtime_before_is_behind(aws):  # noqa: F811
    one, two = aws.made.release(1), aws.made.release(1, runtime="1.0.6")
    serve_all(aws, one)
    assert devices.status(aws.clients, ENV)["fleet"]["devices"]["in step"] == 3
    aws.publish(two)
    aws.rollout(two, then=lambda: aws.canaries(runtime="1.0.6"))
    told = devices.status(aws.clients, ENV)
    assert told["canary"]["devices"]["in step"] == 2
    assert told["fleet"]["devices"] == {"in step": 0, "behind": 3, "silent": 0, "failed": 0}
    aws.device(devices.things(aws.clients, FLEET)[0], runtime="1.0.6")
    assert devices.status(aws.clients, ENV)["fleet"]["devices"]["in step"] == 1


def test_devices_that_a_rollout_did_not_reach_any_more_are_behind(aws):  # noqa: F811
    one, two = aws.made.release(1), aws.made.release(2)
    serve_all(aws, one)
    aws.publish(two)
    first, *rest = devices.things(aws.clients, FLEET)
    rollout.tell(aws.clients, devices.look(aws.clients, first), two, 2, {})
    aws.device(first)
    assert devices.status(aws.clients, ENV)["fleet"]["devices"] == {
        "in step": 1, "behind": len(rest), "silent": 0, "failed": 0,
    }  # fmt: skip


# --- what devices say -------------------------------------------------------------------------------------------------

NONSENSE = (
    "{",
    "[1]",
    '{"phase": "serving", "models": ["x"]}',
    '{"phase": "serving", "models": {}, "floor": 1e400}',
    ["x"],
)


def test_a_device_that_talks_nonsense_is_behind_alone(aws):  # noqa: F811
    one, two = aws.made.release(1), aws.made.release(2)
    serve_all(aws, one)
    odd = devices.things(aws.clients, FLEET)[0]
    for report in NONSENSE:
        say(aws, odd, report=report)
        told = devices.status(aws.clients, ENV)["fleet"]
        where = "behind" if isinstance(report, str) else "silent"
        assert told["devices"] == {"in step": 2, "behind": 0, "silent": 0, "failed": 0} | {where: 1}
        assert told["faults"][odd].startswith("its report is not understood")
    aws.publish(two)
    assert aws.rollout(two, then=aws.canaries)["fleet"]["told"] == 3


def test_a_word_that_nobody_understands_is_told_anew(aws):  # noqa: F811
    one = aws.made.release(1)
    serve_all(aws, one)
    odd = devices.things(aws.clients, FLEET)[0]
    payload = json.dumps({"state": {"desired": {"told": "by hand"}}})
    aws.clients.shadows.update_thing_shadow(thingName=odd, shadowName=SHADOW, payload=payload)
    assert devices.status(aws.clients, ENV)["fleet"]["devices"]["behind"] == 1
    assert aws.rollout(one)["fleet"]["told"] == 1
    assert read_told(_desired(aws, odd)).models[NAME].manifest == one.artifacts[0].manifest


def test_a_word_below_a_device_s_floor_is_told_anew(aws):  # noqa: F811
    one = aws.made.release(1)
    serve_all(aws, one)
    odd = devices.things(aws.clients, FLEET)[0]
    # its shadow was removed since, and it remembers
    report = {"phase": "serving", "models": {NAME: "b" * 64}, "floor": 70, "runtime": "1.0.5"}
    say(aws, odd, report=json.dumps(report))
    assert aws.rollout(one)["fleet"]["told"] == 1
    assert devices.look(aws.clients, odd).told.generation == 71


def test_a_model_by_another_signer_is_told_anew(aws):  # noqa: F811
    one = aws.made.release(1)
    serve_all(aws, one)
    model, code = one.artifacts
    other = one.model_copy(update={"artifacts": (model.model_copy(update={"attestation": "another"}), code)})
    rollout.rollout(
        aws.clients, other, ENV.edge, {}, **WHERE, trusted_key="", said=lambda _: None, canary=False
    )  # fmt: skip
    assert {device.told.models[NAME].attestation for device in devices.look_all(
        aws.clients, devices.things(aws.clients, FLEET)
    )} == {"another"}  # fmt: skip


TOTALS = {"requests": 1, "failed": 0, "refused": 0, "ms": [0] * 9, "score": [1, 0.5, 0.0]}
POISON = (
    {"learned": {NAME: ["a" * 16, float("nan"), 0.0, 70]}},
    {"learned": {NAME: ["a" * 16, 1.1, 0.1, float("inf")]}},
    {"learned": {NAME: ["a" * 16, 1.1]}},
    {"learned": {NAME: ["a" * 16, 1.1, "x", 70]}},
    {"learned": {NAME: ["a" * 16, 1.1, 0.1, -5]}},
    {"models": {NAME: TOTALS | {"requests": "many"}}},
    {"models": {NAME: TOTALS | {"ms": [0] * 8}}},
    {"models": {NAME: TOTALS | {"score": [1, 1e308, 0.0]}}},
)


@pytest.mark.parametrize("wrong", POISON)
def test_telemetry_of_another_form_is_left_out_of_a_report(wrong):
    sound = {"phase": "serving", "models": {NAME: "b" * 64}}
    telemetry = {"sequence": 1, "models": {NAME: TOTALS}, "learned": {NAME: ["a" * 16, 1.1, 0.1, 70]}}
    report, why = read_report(json.dumps(sound | {"telemetry": telemetry, "a later key": 1}))
    assert json.loads(json.dumps(report)) == sound | {"telemetry": telemetry} and why == ""
    report, why = read_report(json.dumps(sound | {"telemetry": telemetry | wrong}))
    assert report == sound and why.startswith(f"not understood: {next(iter(wrong))}.{NAME}.")


def test_what_one_device_counts_wrong_ends_neither_merge_nor_status(aws):  # noqa: F811
    found = aws.made.release(1)
    aws.publish(found)
    aws.rollout(found, canary=False)
    things = [*devices.things(aws.clients, CANARIES), *devices.things(aws.clients, FLEET)]
    for thing in things[1:]:
        aws.device(thing, learned=[1.2, 0.1, 100])
    aws.device(things[0], learned=[1.1, 0.1, float("inf")])
    merged = edge._merge(found, aws.clients, ENV, Terms(devices=4, evidence=50), Reporter())["edge_recommend"]
    assert merged["correction"] == pytest.approx([1.2, 0.1]) and merged["devices"] == 4
    # nor does it count among the totals, and the device is named
    told = devices.status(aws.clients, ENV)["canary"]
    assert told["totals"][NAME]["requests"] == 7 and told["devices"]["in step"] == 2
    assert told["faults"][things[0]].startswith("its telemetry is not understood: ")


# --- words and their size ---------------------------------------------------------------------------------------------


def test_a_word_that_deltas_make_too_large_goes_without_them(aws):  # noqa: F811
    one, two = aws.made.release(1), aws.made.release(2)
    serve_all(aws, one)
    _, deltas = aws.publish(two, one)
    [model, code] = two.artifacts
    names = [NAME, *(f"edge-model-{number}" for number in range(4))]
    many = two.model_copy(update={"artifacts": (*(model.model_copy(update={"name": n}) for n in names), code)})
    report = {"phase": "serving", "models": dict.fromkeys(names, one.artifacts[0].manifest)}
    thing = devices.things(aws.clients, FLEET)[0]
    seen = dataclasses.replace(devices.look(aws.clients, thing), report=report)
    assert rollout.tell(aws.clients, seen, many, 9, {name: deltas[NAME] for name in names})
    assert {pointer.delta for pointer in read_told(_desired(aws, thing)).models.values()} == {None}


def test_a_word_that_no_shadow_takes_ends_a_rollout_before_it_begins(aws):  # noqa: F811
    two = aws.made.release(2)
    aws.publish(two)
    [model, code] = two.artifacts
    names = [f"edge-model-{number}" for number in range(9)]
    many = two.model_copy(update={"artifacts": (*(model.model_copy(update={"name": n}) for n in names), code)})
    with pytest.raises(ShipyardError, match="too much for a shadow"):
        aws.rollout(many)
    assert aws.endpoint.deployments == {}
