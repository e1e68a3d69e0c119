"""Releases that are mixed during a rollout: a gateway of release N, and targets of N-1 and N+1, over the real wire."""

import asyncio
import json
import signal
import time

import pytest
from test_fusion_gateway import FUSION, GRAPH, HISTORY, Fleet, answering, told
from test_server import ITEMS, PRODUCTS, Bundle, make_bundle, serving

from serve.codec import Codec
from serve.feedback import Journal, files
from serve.files import read_json
from serve.fused import CODEC, Gateway, open_gateway
from serve.fusion import best, fuse, gather
from serve.resilience import Target
from serve.runtime import Model
from serve.targets import http_send, triton_send
from serve.trust import trusted

OLD = {"products": [PRODUCTS[0], *range(900, 906), *PRODUCTS[5:10]], "rows": None, "answers": None}
"""Six products that the release before had and this one does not, and six that both have."""

REQUEST = {"query": "milk", "history": HISTORY, "k": 8}


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """Release N: a gateway's bundle, and models that answer in this process."""
    found = Fleet(tmp_path_factory.mktemp("n"))
    member = found.members[0]
    found.pinned = open_gateway(member.bundle, member.name, member.attestation, trusted(found.key))
    return found


def ask(release, tmp_path, sends, request=REQUEST):
    """Let a gateway of release N ask; sources without a sender are answered by release N's own models."""

    def own(source):
        def send(call):
            answer = release.models[source].predict([call.document])[0]["products"]
            return [one["product"] for one in answer], [one["score"] for one in answer]

        return send

    async def go():
        targets = {source: Target(source, sends.get(source) or own(source), 20.0) for source in FUSION["sources"]}
        journal = Journal(files(tmp_path / "journal"), prompt=True)
        policies = {"search": "best-effort", "recommend": "best-effort"}
        gateway = Gateway(release.pinned, targets, journal, policies, 20.0, 0, "", None)
        body, sent = json.dumps(request).encode(), []

        async def receive():
            return {"type": "http.request", "body": body}

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "raw_path": b"/v1/search", "query_string": b"",
                 "headers": [(b"content-length", b"%d" % len(body))]}  # fmt: skip
        await gateway.app(scope, receive, send)
        await journal.close()
        for target in targets.values():
            target.close()
        assert sent[0]["status"] == 200, sent
        return json.loads(sent[1]["body"])

    return asyncio.run(go())


def offline(release, models, request=REQUEST):
    """Return what the models' answers are fused to; a source of None is missing."""
    heard = []
    for source in FUSION["sources"]:
        model = models.get(source, release.models[source])
        if model is None:
            heard.append(None)
            continue
        document = {key: value for key, value in request.items() if source == "search" or key != "query"}
        answer = model.predict([document | {"k": ITEMS}])[0]["products"]
        heard.append(([one["product"] for one in answer], [one["score"] for one in answer]))
    found = gather(heard)
    return [product for product, _ in best(found, fuse(found, FUSION["method"], FUSION["parameters"]), request["k"])]


def products(answer):
    return [one["product"] for one in answer["products"]]


def opened(bundle):
    return Model(bundle.folder, json.loads((bundle.folder / "bundle.json").read_text()), 1)


def test_a_server_with_another_catalogue_answers_by_products_and_never_by_rows(release, tmp_path):
    old = make_bundle(tmp_path / "old", catalogue=OLD)
    with serving(old, tmp_path / "log") as running:
        send = http_send(f"http://127.0.0.1:{running.port}/v1/recommend", "product")
        answer = ask(release, tmp_path, {"recommend": send})
    assert answer["targets"]["recommend"]["state"] == "spoke" and answer["complete"]
    assert products(answer) == offline(release, {"recommend": opened(old)})
    assert products(answer) != offline(release, {})


def test_a_server_that_returns_fewer_or_takes_no_offers_is_left_out_and_the_rest_is_fused(release, tmp_path):
    short = make_bundle(tmp_path / "short")
    short.rewrite(lambda document: document.update(returned=4, golden=[]))
    bare = make_bundle(tmp_path / "bare", offers=False)
    offers = REQUEST | {"offers": [{"product": PRODUCTS[7], "display": 1}]}
    with serving(short, tmp_path / "a") as one, serving(bare, tmp_path / "b") as other:
        sends = [http_send(f"http://127.0.0.1:{r.port}/v1/recommend", "product") for r in (one, other)]
        few = ask(release, tmp_path, {"recommend": sends[0]})
        told = ask(release, tmp_path, {"recommend": sends[1]}, offers)
        plain = ask(release, tmp_path, {"recommend": sends[1]})
    assert [answer["targets"]["recommend"]["state"] for answer in (few, told, plain)] == ["refused", "refused", "spoke"]
    assert [answer["complete"] for answer in (few, told, plain)] == [False, False, True]
    assert products(few) == offline(release, {"recommend": None})
    assert products(told) == offline(release, {"recommend": None}, offers)
    assert products(plain) == offline(release, {"recommend": opened(bare)})


def test_an_endpoint_of_another_catalogue_is_left_out_and_one_of_the_same_speaks(release, tmp_path):
    same = make_bundle(tmp_path / "same", search=True, graph=GRAPH)
    other = make_bundle(tmp_path / "other", search=True, graph=GRAPH.replace("77", "76"), catalogue=OLD)
    codec = release.pinned.codec
    found = {}
    for name, bundle in (("same", same), ("other", other)):
        with serving(bundle, tmp_path / f"{name}.log") as running:
            send = triton_send(f"http://127.0.0.1:{running.port}/v2/models/search/infer", codec)
            found[name] = ask(release, tmp_path, {"search": send})
    assert found["same"]["targets"]["search"]["state"] == "spoke"
    assert products(found["same"]) == offline(release, {})
    assert found["other"]["targets"]["search"]["state"] == "another-release"
    assert products(found["other"]) == offline(release, {"search": None})


@pytest.mark.parametrize(
    ("body", "state"),
    [
        (b'{"products": [{"product": 1014, "score": 2, "why": "new"}], "unknown": [], "version": 3}', "spoke"),
        (b'{"types": [{"type": "milk", "score": 2}], "unknown": []}', "corrupt"),
        (b'{"items": [{"id": 1014, "score": 2}]}', "corrupt"),
    ],
    ids=["more keys", "another level", "another form"],
)
def test_what_a_later_release_adds_to_an_answer_is_no_fault_and_another_form_is(release, tmp_path, body, state):
    with answering(told(body)) as url:
        answer = ask(release, tmp_path, {"recommend": http_send(url, "product")})
    assert answer["targets"]["recommend"]["state"] == state
    if state == "corrupt":
        assert products(answer) == offline(release, {"recommend": None})


def test_while_a_server_is_swapped_each_answer_is_of_one_release(release, tmp_path):
    old, new = make_bundle(tmp_path / "old", catalogue=OLD), make_bundle(tmp_path / "new")
    new = Bundle(new.folder, new.name, old.key)
    swap = tmp_path / "swap.json"
    right = [offline(release, {"recommend": opened(bundle)}) for bundle in (old, new)]
    with serving(old, tmp_path / "log", swap=swap) as running:
        send = http_send(f"http://127.0.0.1:{running.port}/v1/recommend", "product")
        seen = [products(ask(release, tmp_path, {"recommend": send})) for _ in range(3)]
        swap.write_text(json.dumps({"bundle": str(new.folder), "attestation": new.attestation}))
        running.process.send_signal(signal.SIGHUP)
        end = time.monotonic() + 30
        while seen[-1] != right[1]:
            assert time.monotonic() < end, running.log.read_text()
            seen.append(products(ask(release, tmp_path, {"recommend": send})))
    assert seen[0] == right[0] and all(answer in right for answer in seen)


def test_the_codec_of_the_gateway_is_the_one_of_search(release):
    folder = release.members[0].bundle
    assert Codec(folder, read_json(folder / CODEC)).answers == release.models["search"].answers
