"""Storage on real S3 servers: moto (conditions), moto behind a faulty proxy (retries), rclone (refusals)."""

from __future__ import annotations

import dataclasses
import io
import multiprocessing
import os
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.lock import LOCK_NAME, Holder, OutputLock
from pipelines import storage_s3
from pipelines.errors import OutputLocked, StorageError, TransientStorageError
from pipelines.storage import Storage, VersionChanged
from tests.local.fault_proxy import Fault, FaultProxy
from tests.local.s3_server import S3Server
from tests.unit.test_storage import ExclusiveContract, StorageContract


@pytest.fixture
def storage(s3: S3Server) -> Storage:
    return Storage(f"{s3.url}/out", s3.storage_options, patience_s=10)


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(s3.endpoint_url) as running:
        yield running


@pytest.fixture
def through(s3: S3Server, proxy: FaultProxy) -> Storage:
    """The same bucket by way of the proxy; gives up a silent socket after a second."""
    options = {"endpoint_url": proxy.url, "config_kwargs": {"read_timeout": 1}}
    return Storage(f"{s3.url}/out", {**s3.storage_options, **options}, patience_s=10)


class TestMoto(StorageContract, ExclusiveContract):
    pass


class TestBucketRoot(StorageContract):
    @pytest.fixture
    def storage(self, s3: S3Server) -> Storage:
        return Storage(s3.url, s3.storage_options, patience_s=10)


def test_settings_from_the_environment(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    assert Storage(f"{s3.url}/out").create("a", b"1")


def test_more_than_a_thousand_objects(storage: Storage) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: storage.write(f"data/{i:04d}", b""), range(1203)))
    assert [info.name for info in storage.list("data")] == [f"data/{i:04d}" for i in range(1203)]


def test_large_objects_go_in_parts_and_are_created_once(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_s3, "PART_BYTES", 5 * 2**20)
    start = threading.Barrier(3)

    def create(number: int) -> bool:
        start.wait()
        return storage.create("big", bytes([number]) * (12 * 2**20))

    with ThreadPoolExecutor(3) as pool:
        won = list(pool.map(create, range(3)))
    assert won.count(True) == 1
    data, version = storage.read_versioned("big") or (b"", "")
    assert data == bytes([won.index(True)]) * (12 * 2**20)
    assert re.fullmatch(r"[0-9a-f]{32}-3", version), "the ETag of an upload in three parts"


def test_a_large_file_goes_in_parts(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_s3, "PART_BYTES", 5 * 2**20)
    with storage.writing("big") as file:
        for number in range(12):
            file.write(bytes([number]) * 2**20)
    data, version = storage.read_versioned("big") or (b"", "")
    assert data == b"".join(bytes([number]) * 2**20 for number in range(12))
    assert re.fullmatch(r"[0-9a-f]{32}-3", version), "the ETag of an upload in three parts"


def test_no_upload_is_left_behind(s3: S3Server, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_s3, "PART_BYTES", 5 * 2**20)
    data = bytes(11 * 2**20)
    monkeypatch.setattr(storage_s3.S3Backend, "_look", lambda self, path: None)  # as on AWS
    assert storage.create("big", data)
    assert not storage.create("big", data)
    fs = storage_s3._connect(s3.storage_options).fs
    assert fs.call_s3("list_multipart_uploads", Bucket=s3.bucket).get("Uploads", []) == []


def test_a_parquet_footer_costs_a_head_and_a_small_range(through: Storage, proxy: FaultProxy) -> None:
    table = pa.table({f"c{i}": pa.array(os.urandom(8) for _ in range(20_000)) for i in range(4)})
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="none", use_dictionary=False)
    through.write("a.parquet", sink.getvalue())
    proxy.requests.clear()
    with through.open_input("a.parquet") as source, pq.ParquetFile(source) as file:
        assert file.metadata.num_rows == 20_000
        assert (proxy.count("HEAD"), proxy.count("GET")) == (1, 1)
        spans = [re.findall(r"\d+", headers["range"]) for m, _, headers in proxy.requests if m == "GET"]
        assert all(int(stop) - int(start) < 70_000 for start, stop in spans)
        assert file.read(columns=["c2"])["c2"] == table["c2"]
        assert proxy.count("GET") == 2, "one request a column chunk"


def test_a_file_that_changes_while_it_is_read(storage: Storage) -> None:
    storage.write("a", b"1" * 100)
    with storage.open_input("a") as file:
        assert file.read(10) == b"1" * 10
        storage.write("a", b"2" * 100)
        with pytest.raises(VersionChanged, match="replaced"):
            file.read(10)


def _child(root: str, options: dict[str, Any], results: Any) -> None:
    results.put(Storage(root, options).read("a"))


def test_after_fork(s3: S3Server, storage: Storage) -> None:
    storage.write("a", b"1")
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=_child, args=(storage.root, s3.storage_options, results))
    child.start()
    assert results.get(timeout=20) == b"1"
    child.join()


# ── faults on the way ───────────────────────────────────────────────────────────────────────────────────────────

PASSING: list[Fault] = ["slow_down", "error_500", "reset_before", "stall"]


@pytest.mark.parametrize("fault", PASSING)
def test_reads_and_writes_outlive_passing_faults(through: Storage, proxy: FaultProxy, fault: Fault) -> None:
    through.write("a", b"1")
    for method, act in {
        "PUT": lambda: through.write("b", b"2"),
        "GET": lambda: through.read("a"),
        "HEAD": lambda: through.info("a"),
        "DELETE": lambda: through.delete("b"),
    }.items():
        proxy.requests.clear()
        proxy.fail(fault, times=1 if fault == "stall" else 2, method=method)
        act()
        assert proxy.count(method) == (2 if fault == "stall" else 3)
    proxy.fail(fault, method="GET", query="list-type")
    assert [info.name for info in through.list()] == ["a"]


@pytest.mark.parametrize("fault", PASSING)
def test_we_alone_try_again_and_no_library_below_us(
    through: Storage, proxy: FaultProxy, fault: Fault
) -> None:
    impatient = Storage(through.root, through.options, patience_s=0)
    proxy.fail(fault, times=1000)
    with pytest.raises(TransientStorageError):
        impatient.write("a", b"1")
    # aiohttp itself repeats a request when a kept-alive connection breaks; the mark on the object covers that
    assert proxy.count("PUT") <= (2 if fault == "reset_before" else 1)


def test_two_conditional_writes_that_meet(through: Storage, proxy: FaultProxy) -> None:
    proxy.fail("conflict", times=2, method="PUT")
    assert through.create("a", b"1")
    proxy.fail("conflict", method="PUT")
    assert through.replace("a", b"2", through.info("a").version)


def test_a_body_that_breaks_off_is_read_again(through: Storage, proxy: FaultProxy) -> None:
    data = os.urandom(300_000)
    through.write("a", data)
    proxy.fail("cut", times=2, method="GET")
    assert through.read("a") == data
    proxy.fail("cut", times=1, method="GET")
    assert through.read_range("a", 1000, 200_000) == data[1000:200_000]


@pytest.mark.parametrize("fault", ["reset_after", "stall"])
def test_a_create_whose_answer_was_lost_is_our_own(through: Storage, proxy: FaultProxy, fault: Fault) -> None:
    proxy.fail(fault, method="PUT")
    assert through.create("a", b"1"), "the second attempt meets our own object"
    assert proxy.count("PUT") == 2
    assert through.read("a") == b"1"
    proxy.fail(fault, method="PUT")
    seen = through.info("a").version
    assert through.replace("a", b"2", seen)
    assert through.read("a") == b"2"


def test_a_create_that_lost_is_not_taken_for_our_own(
    s3: S3Server, through: Storage, storage: Storage, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal bytes, a fault, and another writer in between: still somebody else's."""
    real = storage_s3.S3Backend._look
    looked = []

    def look(self: storage_s3.S3Backend, path: str) -> dict[str, Any] | None:
        looked.append(path)
        if len(looked) == 1:  # the look before the PUT; then another writer comes
            storage.write("a", b"1")
            return None
        return real(self, path)

    monkeypatch.setattr(storage_s3.S3Backend, "_look", look)
    proxy.fail("reset_before", method="PUT")
    assert not through.create("a", b"1")


def test_a_multipart_create_outlives_faults(
    through: Storage, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_s3, "PART_BYTES", 5 * 2**20)
    data = os.urandom(11 * 2**20)
    proxy.fail("slow_down", method="POST", query="uploads")
    proxy.fail("reset_after", method="PUT", query="partNumber=2")
    proxy.fail("reset_after", method="POST", query="uploadId")  # the answer that says it is complete
    assert through.create("big", data)
    assert through.read("big") == data
    assert proxy.count("PUT") == 4, "one fault costs one part"


def test_a_socket_that_swallows_an_upload(
    through: Storage, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No read timeout covers a server that does not take our bytes: the limit on the whole request does."""
    monkeypatch.setattr(storage_s3, "_allowed_s", lambda size: 1.0)
    proxy.fail("swallow", method="PUT")
    began = time.monotonic()
    assert through.create("a", bytes(30 * 2**20))
    assert time.monotonic() - began < 6


def test_exhausted_retries_name_the_object(through: Storage, proxy: FaultProxy) -> None:
    hasty = Storage(through.root, through.options, patience_s=1)
    proxy.fail("slow_down", times=1000)
    began = time.monotonic()
    with pytest.raises(TransientStorageError, match=r"s3://test-\w+/out/a: .*503") as told:
        hasty.create("a", b"1")
    assert time.monotonic() - began < 5
    assert told.value.__suppress_context__
    with pytest.raises(TransientStorageError):
        hasty.list()


def test_a_server_that_goes_away_is_a_passing_fault(s3: S3Server) -> None:
    with FaultProxy(s3.endpoint_url) as proxy:
        storage = Storage(f"{s3.url}/out", {**s3.storage_options, "endpoint_url": proxy.url}, patience_s=1)
        storage.write("a", b"1")
    with pytest.raises(TransientStorageError):
        storage.read("a")


# ── the output's lock ───────────────────────────────────────────────────────────────────────────────────────────


def take(lock: OutputLock) -> bool:
    try:
        lock.acquire()
    except OutputLocked:
        return False
    return True


def silent(line: str) -> None:
    pass


@pytest.mark.parametrize("before", ["free", "silent"])
def test_of_many_drivers_one_gets_the_lock(storage: Storage, before: str) -> None:
    if before == "silent":
        left = OutputLock(storage, "run-old", heartbeat_s=0.2)._mine
        storage.write(LOCK_NAME, dataclasses.replace(left, host="elsewhere").to_json())
    # storages of their own, as in processes of their own
    locks = [
        OutputLock(Storage(storage.root, storage.options), f"run-{i}", 0.2, 2.0, notify=silent)
        for i in range(8)
    ]
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(take, locks))
    assert won.count(True) == 1
    winner = locks[won.index(True)]
    time.sleep(0.5)
    winner.check()
    winner.release()
    assert not storage.exists(LOCK_NAME)


def test_a_lock_whose_first_answer_was_lost(through: Storage, proxy: FaultProxy) -> None:
    proxy.fail("reset_after", method="PUT")
    with OutputLock(through, "run-1", 0.2, 2.0) as lock:
        proxy.fail("reset_after", times=2, method="PUT")
        proxy.fail("slow_down", times=3)
        deadline = time.monotonic() + 20
        while Holder.from_json(through.read(LOCK_NAME)).beat < 3:  # type: ignore[union-attr]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        lock.check()
    assert not through.exists(LOCK_NAME)


def test_a_lock_on_a_server_that_ignores_conditions(rclone_server: S3Server) -> None:
    storage = Storage(f"s3://{rclone_server.new_bucket()}/out", rclone_server.storage_options)
    with OutputLock(storage, "run-1", 0.2, 2.0) as lock:
        assert not take(OutputLock(storage, "run-2", 0.2, 2.0, notify=silent))
        time.sleep(0.5)
        lock.check()
    assert not storage.exists(LOCK_NAME)


# ── refusals ────────────────────────────────────────────────────────────────────────────────────────────────────


def refused(storage: Storage, says: str, within_s: float = 5.0) -> None:
    """Reading and writing both say so in one line, soon, and without the secrets."""
    for act in (storage.list, storage.check_writable, lambda: storage.create("a", b"1")):
        began = time.monotonic()
        with pytest.raises(StorageError, match=says) as told:
            act()
        assert time.monotonic() - began < within_s
        assert storage.root in str(told.value)
        assert "\n" not in str(told.value)
        assert not any(str(secret) in str(told.value) for secret in ("dray-test-secret", "hunter2"))


def test_a_wrong_key(rclone_server: S3Server) -> None:
    wrong = dataclasses.replace(rclone_server, key="nobody", secret="hunter2")
    refused(Storage("s3://bucket/out", wrong.storage_options), "AWS_ACCESS_KEY_ID|access denied")


def test_a_wrong_secret(rclone_server: S3Server) -> None:
    wrong = dataclasses.replace(rclone_server, secret="hunter2")
    storage = Storage("s3://bucket/out", wrong.storage_options)
    refused(storage, "secret key does not match|access denied")
    for act in (storage.list, storage.check_writable):  # where a body tells more than a HEAD's status
        with pytest.raises(StorageError, match="secret key does not match"):
            act()


def test_a_missing_bucket(s3: S3Server, rclone_server: S3Server) -> None:
    for server in (s3, rclone_server):
        refused(Storage("s3://no-such-bucket/out", server.storage_options), "bucket does not exist")


def test_an_invalid_bucket_name(s3: S3Server) -> None:
    refused(Storage("s3://no bucket!/out", s3.storage_options), "bucket name")


def test_no_credentials(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(Storage("s3://bucket/out", {"endpoint_url": s3.endpoint_url}), "no S3 credentials found for s3")
    # the metadata service is asked where it is not switched off; without a network that ends at once as well
    monkeypatch.delenv("AWS_EC2_METADATA_DISABLED")
    refused(Storage("s3://bucket/out", {"endpoint_url": s3.endpoint_url}), "AWS_PROFILE")


def test_a_wrong_endpoint() -> None:
    options = {"endpoint_url": "http://127.0.0.1:9", "key": "k", "secret": "hunter2"}
    refused(Storage("s3://bucket/out", options), "no server answers at the endpoint http://127.0.0.1:9")


def test_a_server_that_ignores_conditions(rclone_server: S3Server) -> None:
    """rclone: `check_writable` finds out, and the look before the write keeps later ones out."""
    storage = Storage(f"s3://{rclone_server.new_bucket()}/out", rclone_server.storage_options)
    assert not storage.check_writable()
    assert storage.create("a", b"1")
    assert not storage.create("a", b"2")
    version = storage.info("a").version
    assert storage.replace("a", b"3", version)
    assert not storage.replace("a", b"4", version)
    assert storage.read("a") == b"3"
