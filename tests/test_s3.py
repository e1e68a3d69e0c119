"""Upload to S3 under accidents: a real client against a local S3 that fails, stalls, or is asked by two at once."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from random import Random
from urllib.parse import parse_qs

import boto3
import pytest
from botocore.config import Config
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from serve.errors import ShipyardError
from shipyard import s3
from shipyard.s3 import PART, S3Store
from shipyard.upload import upload
from tests.test_upload import make_artifact, quiet

BUCKET = "shipyard-accidents"
LARGE = {"model.onnx": Random(0).randbytes(20 << 20), "catalogue.json": b"{}"}  # three parts


class Faulty:
    """A WSGI application that passes requests on, notes them, and fails those that `fault` names."""

    def __init__(self):
        self.inner = DomainDispatcherApplication(create_backend_app)
        self.requests, self.fault, self.lock, self.parts = [], None, threading.Lock(), threading.Lock()

    def __call__(self, environ, start_response):
        length = int(environ.get("CONTENT_LENGTH") or 0)
        with self.lock:
            self.requests.append((environ["REQUEST_METHOD"], environ["PATH_INFO"], environ["QUERY_STRING"], length))
            status = self.fault(environ) if self.fault else None
        if status is not None:
            environ["wsgi.input"].read(length)
            start_response(f"{status} Fault", [("Content-Type", "application/xml")])
            return [f"<Error><Code>{'SlowDown' if status == 503 else 'InternalError'}</Code></Error>".encode()]
        upload_id = parse_qs(environ["QUERY_STRING"]).get("uploadId")
        if not upload_id:
            return self.inner(environ, start_response)
        # a part of an upload that has ended: S3 says 404, moto fails with 500
        with self.parts:
            if upload_id[0] in s3_backends[DEFAULT_ACCOUNT_ID]["aws"].buckets[BUCKET].multiparts:
                return self.inner(environ, start_response)
        environ["wsgi.input"].read(length)
        start_response("404 Not Found", [("Content-Type", "application/xml")])
        return [b"<Error><Code>NoSuchUpload</Code></Error>"]

    def sent(self):
        return sum(length for method, *_, length in self.requests if method == "PUT")


@pytest.fixture(scope="module")
def server():
    app = Faulty()
    served = make_server("127.0.0.1", 0, app, threaded=True)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    app.url = f"http://127.0.0.1:{served.server_port}"
    yield app
    served.shutdown()


@pytest.fixture
def client(server, monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {
        "AWS_ENDPOINT_URL": server.url, "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"), "AWS_EC2_METADATA_DISABLED": "true",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    quick = Config(retries={"mode": "standard", "total_max_attempts": 4}, read_timeout=1)
    found = boto3.client("s3", config=quick)
    found.create_bucket(Bucket=BUCKET)
    server.fault = None
    server.requests.clear()
    yield found
    server.fault = None
    for upload_ in found.list_multipart_uploads(Bucket=BUCKET).get("Uploads", []):
        found.abort_multipart_upload(Bucket=BUCKET, Key=upload_["Key"], UploadId=upload_["UploadId"])
    for item in found.list_objects_v2(Bucket=BUCKET).get("Contents", []):
        found.delete_object(Bucket=BUCKET, Key=item["Key"])
    found.delete_bucket(Bucket=BUCKET)


@pytest.fixture
def large(tmp_path):
    return make_artifact(tmp_path / "bundle", LARGE)


def there(client):
    listed = client.list_objects_v2(Bucket=BUCKET).get("Contents", [])
    return {o["Key"].rpartition("/")[2]: client.get_object(Bucket=BUCKET, Key=o["Key"])["Body"].read() for o in listed}


def test_a_large_file_goes_in_parts_that_s3_holds_the_checksums_of(client, server, large, tmp_path):
    store = S3Store(BUCKET, client)
    assert upload(store, large, tmp_path / "bundle", quiet) == sum(map(len, LARGE.values()))
    assert there(client) == LARGE
    parts = [query for method, _, query, _ in server.requests if method == "PUT" and "partNumber" in query]
    assert len(parts) == 3
    before = server.sent()
    assert upload(store, large, tmp_path / "bundle", quiet) == 0
    assert server.sent() == before
    assert not any(method == "GET" and not query for method, _, query, _ in server.requests if "key" in query)


def test_parts_that_arrived_are_not_sent_again(client, server, large, tmp_path):
    store, key = S3Store(BUCKET, client), large["key"] + "model.onnx"
    # the third part fails until retries end
    server.fault = lambda environ: 500 if "partNumber=3" in environ["QUERY_STRING"] else None
    with pytest.raises(ShipyardError, match=f"s3://{BUCKET}/{key}"):
        upload(store, large, tmp_path / "bundle", quiet)
    assert "model.onnx" not in there(client)
    server.fault = None
    server.requests.clear()
    upload(store, large, tmp_path / "bundle", quiet)
    assert there(client) == LARGE
    parts = [query for method, _, query, _ in server.requests if "partNumber" in query]
    assert len(parts) == 1
    assert "partNumber=3" in parts[0]


def test_a_part_of_another_content_is_sent_again(client, server, large, tmp_path):
    key = large["key"] + "model.onnx"
    begun = client.create_multipart_upload(Bucket=BUCKET, Key=key, ChecksumAlgorithm="SHA256")["UploadId"]
    client.upload_part(
        Bucket=BUCKET, Key=key, UploadId=begun, PartNumber=1, Body=b"!" * PART, ChecksumAlgorithm="SHA256"
    )
    upload(S3Store(BUCKET, client), large, tmp_path / "bundle", quiet)
    assert there(client) == LARGE


@pytest.mark.parametrize("status", [500, 503])
def test_a_service_that_fails_now_and_then_is_asked_again(client, server, large, tmp_path, status):
    seen = set()

    def once(environ):  # every request fails the first time that it is made
        request = environ["REQUEST_METHOD"], environ["PATH_INFO"], environ["QUERY_STRING"]
        return None if request in seen else seen.add(request) or status

    server.fault = once
    upload(S3Store(BUCKET, client), large, tmp_path / "bundle", quiet)
    server.fault = None
    assert there(client) == LARGE


def test_a_service_that_stalls_is_asked_again(client, server, large, tmp_path):
    stalled = []

    def stall(environ):
        if "partNumber=2" in environ["QUERY_STRING"] and not stalled:
            stalled.append(1)
            time.sleep(1.5)  # longer than this client waits
        return None

    server.fault = stall
    upload(S3Store(BUCKET, client), large, tmp_path / "bundle", quiet)
    assert stalled and there(client) == LARGE


def test_a_service_that_always_fails_is_told_in_one_line(client, server, large, tmp_path):
    server.fault = lambda environ: 503
    with pytest.raises(ShipyardError) as fault:
        upload(S3Store(BUCKET, client), large, tmp_path / "bundle", quiet)
    assert "check the bucket" in str(fault.value) and "\n" not in str(fault.value)


def test_two_uploads_at_once_leave_one_whole_object(client, large, tmp_path):
    faults = []

    def run():
        try:
            upload(S3Store(BUCKET, client), large, tmp_path / "bundle", quiet)
        except Exception as fault:
            faults.append(fault)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert there(client) == LARGE


KILLED = """
import os, signal, sys
from pathlib import Path
from shipyard.s3 import open_bucket
left = int(sys.argv[4])
def told(count):
    global left
    left -= count
    if left <= 0:
        os.kill(os.getpid(), signal.SIGKILL)
open_bucket(sys.argv[1]).put(sys.argv[2], Path(sys.argv[3]), sys.argv[5], told)
"""


@pytest.mark.parametrize("parts", [1, 3])
def test_an_upload_that_is_killed_leaves_nothing_and_goes_on(client, server, large, tmp_path, parts):
    file, key = tmp_path / "bundle" / "model.onnx", large["key"] + "model.onnx"
    digest = hashlib.sha256(LARGE["model.onnx"]).hexdigest()
    most = min(parts * PART, len(LARGE["model.onnx"]))
    done = subprocess.run([sys.executable, "-c", KILLED, BUCKET, key, str(file), str(most), digest], timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert there(client) == {}
    server.requests.clear()
    upload(S3Store(BUCKET, client), large, tmp_path / "bundle", quiet)
    assert there(client) == LARGE
    resent = sum(length for method, _, query, length in server.requests if "partNumber" in query)
    assert resent < len(LARGE["model.onnx"])  # at least the part that was told of had arrived


def test_a_file_that_changes_while_it_is_sent_is_not_completed(client, large, tmp_path):
    file, key = tmp_path / "bundle" / "model.onnx", large["key"] + "model.onnx"
    with pytest.raises(ShipyardError, match="not the file of the release"):
        S3Store(BUCKET, client).put(key, file, "0" * 64, lambda count: None)
    assert there(client) == {}
    assert "Uploads" not in client.list_multipart_uploads(Bucket=BUCKET)


def test_truncated_and_longer_objects_are_not_taken_for_the_file(client, large, tmp_path):
    file, store = tmp_path / "bundle" / "model.onnx", S3Store(BUCKET, client)
    content = LARGE["model.onnx"]
    digest = hashlib.sha256(content).hexdigest()
    other = bytes([content[-1] ^ 1])
    for wrong in (content[:-1], content + b"!", content[:-1] + other, b""):
        client.put_object(Bucket=BUCKET, Key="key", Body=wrong, ChecksumAlgorithm="SHA256")
        assert store.holds("key", file, digest) is False
    client.put_object(Bucket=BUCKET, Key="key", Body=content, ChecksumAlgorithm="SHA256")
    assert store.holds("key", file, digest) is True
    assert store.holds("nothing", file, digest) is None


def test_encryption_and_owner_are_asked_for(client, large, tmp_path):
    asked = []
    client.meta.events.register("provide-client-params.s3.*", lambda params, **_: asked.append(dict(params)))
    store = S3Store(BUCKET, client, kms_key="alias/shipyard", owner="123456789012")
    upload(store, large, tmp_path / "bundle", quiet)
    assert all(request["ExpectedBucketOwner"] == "123456789012" for request in asked)
    # those that begin an object; parts inherit it
    begun = [request for request in asked if "ServerSideEncryption" in request]
    assert len(begun) == 2
    assert {request["SSEKMSKeyId"] for request in begun} == {"alias/shipyard"}
    head = client.head_object(Bucket=BUCKET, Key=large["key"] + "model.onnx")
    assert head["ServerSideEncryption"] == "aws:kms"


def test_parts_of_the_largest_files_are_few_enough():
    assert s3._part(20 << 20) == PART
    for size in (79 << 30, 5 << 40):
        assert -(-size // s3._part(size)) <= s3.MOST_PARTS
