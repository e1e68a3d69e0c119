"""Accidents at every write: kill -9, a full disk, flipped bytes in each kind of file, swapped artifacts, a wrong clock."""

import json
import os
import re
import resource
import shutil
import signal
import sys
import tarfile
import threading
import time
from contextlib import contextmanager
from email.utils import formatdate
from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from models.release import check_papers, dump, read_release, sign
from serve.errors import ShipyardError
from serve.files import sha256_file
from serve.trust import MANIFEST, check_bundle, load_keys
from shipyard import release as releasing
from shipyard.archive import write_tar_gz
from shipyard.bundle import write_zip
from shipyard.gc import unused
from shipyard.publish import publish
from shipyard.s3 import S3Store
from shipyard.stage import Stage, write
from shipyard.upload import FolderStore, upload
from shipyard.verify import verify_bundle, verify_store
from tests.conftest import ROOT
from tests.test_contents import Released, key, made, quiet  # noqa: F401 - fixtures
from tests.test_s3 import BUCKET, client, server, there  # noqa: F401 - fixtures
from tests.test_trust import sample_body, write_release
from tests.test_upload import make_artifact

EACH_KIND = {
    "model_repository/search/1/model.onnx": b"\x08\x0a" * 500,
    "model_repository/search/config.pbtxt": b'name: "search"\n',
    "model.tar.gz": b"\x1f\x8b" * 100,
    "catalogue.json": b'{"rows": []}',
    "tokenizer.json": b'{"model": {}}',
    "texts.json": b'{"texts": []}',
    "Dockerfile": b"FROM python\n",
    "requirements.txt": b"numpy==2\n",
    "serve/server.py": b"pass\n",
    "install.sh": b"python3 -c ''\n",
    "edge.zip": b"PK\x03\x04" * 100,
}


# --- a flipped byte in each kind of file -----------------------------------------------------------------------------


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", [*EACH_KIND, MANIFEST])
def test_a_flipped_byte_is_found_at_load_at_upload_and_in_the_store(tmp_path, name):
    folder = tmp_path / "bundle"
    make_artifact(folder, EACH_KIND)
    files = [{"path": path, "sha256": sha256_file(folder / path)} for path in EACH_KIND]
    manifest = json.dumps({"files": files}).encode()
    artifact = make_artifact(folder, EACH_KIND | {MANIFEST: manifest})
    digest, store = sha256_file(folder / MANIFEST), FolderStore(tmp_path / "store")
    release = SimpleNamespace(
        artifacts=[
            SimpleNamespace(
                name="search",
                key=artifact["key"],
                bytes=1,
                files=[SimpleNamespace(**file) for file in artifact["files"]],
            )
        ]
    )
    check_bundle(folder, digest)
    upload(store, artifact, folder, quiet)
    verify_store(release, store, quiet)

    flip(tmp_path / "store" / artifact["key"] / name)
    with pytest.raises(ShipyardError, match="not what the release names"):
        verify_store(release, store, quiet)
    with pytest.raises(ShipyardError, match="the store holds another content"):
        upload(store, artifact, folder, quiet)
    flip(folder / name)
    with pytest.raises(ShipyardError, match=r"digest differs|not the one of the release"):
        check_bundle(folder, digest)
    with pytest.raises(ShipyardError, match="not the file of the release"):
        upload(FolderStore(tmp_path / "empty"), artifact, folder, quiet)


def test_an_object_more_below_an_artifacts_key_is_found_and_collected(made):  # noqa: F811
    made.upload()
    extra = made.store.root / made.release.artifacts[0].key / "model_repository" / "evil" / "1" / "model.onnx"
    extra.parent.mkdir(parents=True)
    extra.write_bytes(b"evil")
    with pytest.raises(ShipyardError, match=r"evil.*not part of the release"):
        verify_store(made.release, made.store, quiet)
    [found] = unused(made.store, [made.release], -1)
    made.store.remove([found.key])
    verify_store(made.release, made.store, quiet)


# --- artifacts of two releases, swapped ------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path, key):  # noqa: F811
    """Two releases of the same key, an older and a newer one."""
    return Released(tmp_path / "old", key, sequence=1), Released(tmp_path / "new", key, '{"new": 1}', sequence=2)


def test_an_artifact_of_another_release_does_not_fit_into_a_release(two):
    old, new = two
    document = json.loads(new.path.read_text())
    document["artifacts"][0] = json.loads(old.path.read_text())["artifacts"][0]
    new.path.write_text(json.dumps(document))
    with pytest.raises(ShipyardError, match="changed after it was signed"):
        read_release(new.path, new.keys)


def test_an_artifact_of_another_release_is_found_in_the_store(two):
    old, new = two
    for released in two:
        released.upload()
    [before], [after] = ([a for a in released.release.artifacts if a.name == "recommend"] for released in two)
    shutil.rmtree(new.store.root / after.key)
    shutil.copytree(old.store.root / before.key, new.store.root / after.key)
    with pytest.raises(ShipyardError, match="not what the release names"):
        verify_store(new.release, new.store, quiet)


def test_an_artifact_of_another_release_is_not_uploaded(two):
    old, new = two
    [before], [after] = ([a for a in released.release.artifacts if a.name == "recommend"] for released in two)
    shutil.rmtree(new.root / "made" / after.key)
    shutil.copytree(old.root / "made" / before.key, new.root / "made" / after.key)
    with pytest.raises(ShipyardError, match="not the file of the release"):
        new.upload()


def test_one_artifact_in_the_folder_of_another_is_no_bundle_of_it(two):
    old, new = two
    with pytest.raises(ShipyardError, match="not a bundle of release"):
        verify_bundle(old.bundles["recommend"], new.release, new.keys)


# --- kill -9 at every write ------------------------------------------------------------------------------------------

WRITES = {"os.rename", "os.mkdir", "os.remove", "os.link", "os.utime"}


def killed_at(number, work, *given):
    """Run `work` in a process that is killed before its write of this number; return whether it was."""
    child = os.fork()
    if not child:
        left = number

        def count(event, arguments):
            nonlocal left
            opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if event in WRITES or opened:
                left -= 1
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)

        code = 1
        try:
            sys.addaudithook(count)
            work(*given)
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_upload_that_is_killed_at_any_write_leaves_whole_files_and_goes_on(tmp_path):
    artifact = make_artifact(tmp_path / "bundle", {"model.onnx": b"w" * 4000, "deep/er/catalogue.json": b"{}"})
    wanted = {artifact["key"] + name: content for name, content in contents(tmp_path / "bundle").items()}
    number = 1
    while killed_at(number, upload, store := FolderStore(tmp_path / f"{number}"), artifact, tmp_path / "bundle", quiet):
        left = contents(store.root) if store.root.exists() else {}
        assert all(wanted[name] == content for name, content in left.items() if not name.endswith(".part"))
        upload(store, artifact, tmp_path / "bundle", quiet)
        assert contents(store.root) == wanted
        number += 1
    assert number > 6  # two folders, two files, two renames


def test_a_publication_that_is_killed_at_any_write_leaves_nothing_half_and_goes_on(tmp_path):
    local = write_release(tmp_path / "build" / "releases", Ed25519PrivateKey.generate())
    number = 1
    while killed_at(number, publish, local, releases := tmp_path / f"{number}"):
        if (releases / local.name).exists():
            read_release(releases / local.name, load_keys(releases / "keys"))
        publish(local, releases)
        read_release(releases / local.name, load_keys(releases / "keys"))
        assert len(contents(releases)) == 2
        number += 1
    assert number > 4  # a folder, the key's file and the release's, a rename of each


class Line(SimpleNamespace):
    """What `release` needs of a line whose stages have run."""

    def until(self, verb):
        return {"recommend": self.record}

    def bundle(self, unit):
        return self.record


@pytest.fixture
def line(tmp_path, monkeypatch, key):  # noqa: F811
    folder = tmp_path / "stage"
    files = make_artifact(folder / "bundle")
    said = files | {
        "submodel": None, "target": "cpu", "kind": "image-context", "manifest": "0" * 64, "folder": "bundle", "template": {}
    }  # fmt: skip
    monkeypatch.setattr(
        releasing, "_body", lambda line, artifacts: sample_body(key) | {"artifacts": list(artifacts.values())}
    )
    monkeypatch.setattr(releasing, "make_papers", lambda *given: {"model-card.md": b"# a card\n"})
    project = SimpleNamespace(project=SimpleNamespace(version="0.1.0"))
    return lambda build: Line(
        record=SimpleNamespace(said=said, folder=folder),
        root=tmp_path,
        fleet=project,
        report=quiet,
        build=build / "small",
    )


def test_a_release_that_is_killed_at_any_write_names_nothing_that_is_not_there(tmp_path, line, key):  # noqa: F811
    number = 1
    while killed_at(
        number, releasing.release, line(build := tmp_path / f"{number}"), key, str(store := build / "store")
    ):
        for path in (build / "releases").glob("*.json"):
            there = read_release(path, load_keys(build / "releases" / "keys"))
            check_papers(path, there.papers)
            verify_store(there, FolderStore(store), quiet)
        path, found = releasing.release(line(build), key, str(store))
        verify_store(found, FolderStore(store), quiet)
        check_papers(path, found.papers)
        assert not [name for name in contents(build) if name.endswith(".part")]
        assert len(contents(build / "releases")) == 3
        number += 1
    assert number > 10


# --- a full disk -----------------------------------------------------------------------------------------------------


@contextmanager
def full_disk(most):
    """Let no file become larger than `most` bytes: a write fails in its midst, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


MOST = 1 << 20


def test_a_full_disk_while_it_uploads_leaves_nothing_half(tmp_path):
    artifact = make_artifact(tmp_path / "bundle", {"model.onnx": bytes(3 * MOST)})
    store = FolderStore(tmp_path / "store")
    with full_disk(MOST):
        upload(store, artifact, tmp_path / "bundle", quiet)
    assert contents(store.root) == {}
    upload(store, artifact, tmp_path / "bundle", quiet)
    assert len(contents(store.root)) == 1


@pytest.mark.parametrize("way", [write_zip, write_tar_gz])
def test_a_full_disk_while_it_bundles_leaves_no_stage(tmp_path, way):
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "model.onnx").write_bytes(os.urandom(3 * MOST))

    def work(out):
        way(tmp_path / "tree", out / "archive")
        return {}

    stage = Stage("bundle", "search", (), {}, ("shipyard.gates",), work)
    with full_disk(MOST):
        stage.run(tmp_path / "build")
    assert stage.find(tmp_path / "build") is None
    assert not (tmp_path / "build" / "search" / "bundle").exists()
    assert not stage.run(tmp_path / "build").skipped
    assert stage.find(tmp_path / "build") is not None


def test_a_full_disk_while_a_release_is_written_leaves_the_old_one(tmp_path):
    write(tmp_path / "release.json", "old")
    with full_disk(MOST):
        write(tmp_path / "release.json", "new" * MOST)
    assert (tmp_path / "release.json").read_text() == "old"
    assert list(tmp_path.glob("*.json")) == [tmp_path / "release.json"]


# --- two at once, in a folder ----------------------------------------------------------------------------------------


def test_uploads_at_once_into_one_folder_leave_whole_files_alone(tmp_path):
    artifact = make_artifact(tmp_path / "bundle", {f"{n}.onnx": os.urandom(1 << 20) for n in range(6)})
    store, faults = FolderStore(tmp_path / "store"), []

    def run():
        try:
            upload(store, artifact, tmp_path / "bundle", quiet)
        except Exception as fault:
            faults.append(fault)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    wanted = contents(tmp_path / "bundle")
    assert contents(store.root) == {artifact["key"] + name: content for name, content in wanted.items()}


# --- a clock that is wrong -------------------------------------------------------------------------------------------

YEARS = 10 * 365 * 86_400


@pytest.mark.parametrize("way", [write_zip, write_tar_gz])
def test_a_wrong_clock_changes_no_byte_of_an_archive(tmp_path, monkeypatch, way):
    make_artifact(tmp_path / "tree", EACH_KIND)
    way(tmp_path / "tree", tmp_path / "now")
    for path in (tmp_path / "tree").rglob("*"):
        os.utime(path, (time.time() - YEARS,) * 2)
        path.chmod(0o700)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + YEARS)
    way(tmp_path / "tree", tmp_path / "later")
    assert (tmp_path / "now").read_bytes() == (tmp_path / "later").read_bytes()


@pytest.mark.parametrize("off", [-YEARS, YEARS])
def test_a_wrong_clock_changes_no_release(tmp_path, monkeypatch, key, off):  # noqa: F811
    body, now = sample_body(key), time.time()
    before = dump(sign(body, "0.1.0", key))
    monkeypatch.setattr(time, "time", lambda: now + off)
    assert dump(sign(body, "0.1.0", key)) == before
    path = write_release(tmp_path, key)
    assert read_release(path, load_keys(tmp_path / "keys")).sequence == 1  # what is old is told by number, not by time


def test_the_age_of_an_object_is_told_by_the_buckets_clock(client, tmp_path, monkeypatch):  # noqa: F811
    store = S3Store(BUCKET, client)
    upload(store, make_artifact(tmp_path / "bundle"), tmp_path / "bundle", quiet)
    assert unused(store, [], 7) == []
    now = time.time()
    # the time that the server tells with its answer, not the one that this machine would compare with
    monkeypatch.setattr(
        "werkzeug.serving.BaseHTTPRequestHandler.date_time_string", lambda *_: formatdate(now + YEARS, usegmt=True)
    )
    assert len(unused(store, [], 7)) == 3


def test_a_file_from_the_future_is_young(tmp_path):
    store = FolderStore(tmp_path / "store")
    upload(store, make_artifact(tmp_path / "bundle"), tmp_path / "bundle", quiet)
    for path in store.root.rglob("*"):
        os.utime(path, (time.time() + YEARS,) * 2)
    assert unused(store, [], 0) == []


def test_a_clock_that_s3_refuses_is_told_in_one_line(client, server, tmp_path):  # noqa: F811
    def late(environ, start_response):
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        start_response("403 Forbidden", [("Content-Type", "application/xml")])
        return [b"<Error><Code>RequestTimeTooSkewed</Code><Message>The difference is too large.</Message></Error>"]

    artifact, inner = make_artifact(tmp_path / "bundle"), server.inner
    server.inner = lambda environ, start: (late if environ["REQUEST_METHOD"] == "PUT" else inner)(environ, start)
    try:
        with pytest.raises(ShipyardError, match="RequestTimeTooSkewed") as fault:
            upload(S3Store(BUCKET, client), artifact, tmp_path / "bundle", quiet)
    finally:
        server.inner = inner
    assert "\n" not in str(fault.value)
    assert there(client) == {}


# --- model.tar.gz ----------------------------------------------------------------------------------------------------


def test_an_archive_is_the_same_bytes_wherever_it_is_made_and_holds_the_repository(tmp_path):
    for place in ("here", "elsewhere"):
        names = sorted(EACH_KIND, reverse=place == "here")  # another order of making
        make_artifact(tmp_path / place, {name: EACH_KIND[name] for name in names})
        write_tar_gz(tmp_path / place, tmp_path / f"{place}.tar.gz")
    content = (tmp_path / "here.tar.gz").read_bytes()
    assert content == (tmp_path / "elsewhere.tar.gz").read_bytes()
    assert content[:4] == b"\x1f\x8b\x08\x00" and content[4:8] == bytes(4)  # no name, no time
    with tarfile.open(tmp_path / "here.tar.gz") as stream:
        entries = stream.getmembers()
        assert {entry.name: stream.extractfile(entry).read() for entry in entries} == EACH_KIND
    assert [entry.name for entry in entries] == sorted(EACH_KIND)
    assert {(e.mode, e.uid, e.gid, e.uname, e.gname, e.mtime) for e in entries} == {(0o644, 0, 0, "", "", 0)}


# --- the page --------------------------------------------------------------------------------------------------------


def test_every_accident_of_the_page_has_its_test():
    named = re.findall(
        r"^\|[^|]+\|[^|]+\| `(tests/\w+\.py)::(\w+)` \|$", (ROOT / "docs/artifacts.md").read_text(), re.M
    )
    assert len(named) == len(set(named)) >= 40
    assert [test for file, test in named if f"def {test}(" not in (ROOT / file).read_text()] == []
