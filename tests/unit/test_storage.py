"""Storage on a local folder and on `memory://`: one contract, then what only a file system does.

`StorageContract` also runs against S3 in tests/local/test_storage_s3.py.
"""

from __future__ import annotations

import errno
import io
import multiprocessing
import os
import pickle
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import botocore.exceptions as boto
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import storage_faults, storage_local
from pipelines.errors import DrayError, OutputError, StorageError, StorageFull, TransientStorageError
from pipelines.storage import Storage, locate


class StorageContract:
    """What every store does; a subclass gives the fixture `storage`, an empty one."""

    def test_an_empty_storage_has_nothing(self, storage: Storage) -> None:
        assert storage.is_empty()
        assert storage.list() == []
        assert storage.list("data") == []
        assert not storage.exists("a")
        assert storage.read_versioned("a") is None
        assert storage.delete("a")
        for ask in (storage.read, storage.info, storage.open_input, lambda n: storage.read_range(n, 0, 1)):
            with pytest.raises(FileNotFoundError, match="a"):
                ask("a")

    def test_create_makes_once(self, storage: Storage) -> None:
        assert storage.create("data/part.parquet", b"first")
        assert not storage.create("data/part.parquet", b"second")
        assert not storage.create("data/part.parquet", b"first"), "equal content is no excuse"
        assert storage.read("data/part.parquet") == b"first"

    def test_one_object_at_any_depth_is_not_nothing(self, storage: Storage) -> None:
        storage.write("deep/er/a", b"1")
        assert not storage.is_empty()
        assert not Storage(storage.url("deep"), storage.options).is_empty()
        assert Storage(storage.url("dee"), storage.options).is_empty()

    def test_create_after_delete(self, storage: Storage) -> None:
        assert storage.create("a", b"1")
        assert storage.delete("a")
        assert not storage.exists("a")
        assert storage.create("a", b"2")

    def test_replace_compares_and_swaps(self, storage: Storage) -> None:
        assert storage.create("a", b"1")
        seen = storage.read_versioned("a")
        assert seen is not None
        assert seen[0] == b"1"
        assert seen[1] == storage.info("a").version
        assert storage.replace("a", b"2", seen[1])
        assert not storage.replace("a", b"3", seen[1])
        assert storage.read("a") == b"2"

    def test_replace_needs_something_to_replace(self, storage: Storage) -> None:
        storage.write("a", b"1")
        version = storage.info("a").version
        storage.delete("a")
        assert not storage.replace("a", b"2", version)
        assert not storage.exists("a")

    def test_write_overwrites(self, storage: Storage) -> None:
        storage.write("stats/a", b"1")
        storage.write("stats/a", b"22")
        assert storage.read("stats/a") == b"22"
        assert storage.info("stats/a").size == 2

    def test_a_file_that_is_written_appears_whole_or_not_at_all(self, storage: Storage) -> None:
        with storage.writing("x/results") as file:
            file.write(b"12")
            file.write(b"34")
            assert not storage.exists("x/results")
        assert storage.read("x/results") == b"1234"
        with storage.writing("x/results"):
            pass
        assert storage.read("x/results") == b""

        def fail() -> None:
            with storage.writing("x/results") as file:
                file.write(b"half")
                raise RuntimeError("halfway")

        with pytest.raises(RuntimeError, match="halfway"):
            fail()
        assert storage.read("x/results") == b""
        assert [info.name for info in storage.list("x")] == ["x/results"]

    def test_delete_of_one_version(self, storage: Storage) -> None:
        storage.write("a", b"1")
        old = storage.info("a").version
        storage.write("a", b"22")
        assert not storage.delete("a", old)
        assert storage.exists("a")
        assert storage.delete("a", storage.info("a").version)
        assert not storage.exists("a")

    def test_list_is_recursive_ordered_and_by_folder(self, storage: Storage) -> None:
        for name in ("data/b", "data/a", "data/x/y", "database", "z", "data/Ü b#1%20"):
            storage.write(name, name.encode())
        names = [info.name for info in storage.list()]
        assert names == ["data/a", "data/b", "data/x/y", "data/Ü b#1%20", "database", "z"]
        assert [info.name for info in storage.list("data")] == names[:4]
        assert storage.list("data") == storage.list("data/")
        assert storage.list("dat") == []
        for info in storage.list():
            assert storage.info(info.name) == info
            assert storage.read(info.name) == info.name.encode()
            assert info.size == len(info.name.encode())
            assert abs(info.modified - time.time()) < 60

    def test_listings_are_never_cached(self, storage: Storage) -> None:
        other = Storage(storage.root, storage.options)
        assert storage.list("data") == []
        other.write("data/a", b"")
        assert len(storage.list("data")) == 1
        other.delete("data/a")
        assert storage.list("data") == []

    def test_ranges(self, storage: Storage) -> None:
        storage.write("a", b"0123456789")
        assert storage.read_range("a", 2, 5) == b"234"
        assert storage.read_range("a", 8, 50) == b"89"
        assert storage.read_range("a", 20, 30) == b""
        assert storage.read_range("a", 5, 5) == b""

    def test_empty_objects(self, storage: Storage) -> None:
        assert storage.create("a", b"")
        assert storage.read("a") == b""
        with storage.open_input("a") as file:
            assert file.read() == b""

    def test_open_input_is_a_seekable_file(self, storage: Storage) -> None:
        storage.write("a", b"line 1\nline 2\n")
        with storage.open_input("a") as file:
            assert file.seekable()
            file.seek(-7, io.SEEK_END)
            assert file.read(4) == b"line"
            assert file.tell() == 11
            file.seek(0)
            assert file.readlines() == [b"line 1\n", b"line 2\n"]

    def test_parquet_through_open_input(self, storage: Storage) -> None:
        table = pa.table({"a": range(1000), "b": ["x" * 100] * 1000})
        sink = io.BytesIO()
        pq.write_table(table, sink, row_group_size=100)
        storage.write("a.parquet", sink.getvalue())
        with storage.open_input("a.parquet") as source, pq.ParquetFile(source) as file:
            assert file.metadata.num_rows == 1000
            assert file.read_row_group(3) == table.slice(300, 100)
            assert file.read() == table

    def test_a_copy_by_pickle_and_in_threads(self, storage: Storage) -> None:
        copy = pickle.loads(pickle.dumps(storage))
        assert copy == storage
        assert copy.patience_s == storage.patience_s
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda i: copy.write(f"t/{i}", b"x"), range(24)))
        assert len(storage.list("t")) == 24

    async def test_inside_an_event_loop(self, storage: Storage) -> None:
        import asyncio

        storage.write("a", b"1")  # blocking, on the loop's own thread
        assert await asyncio.to_thread(storage.read, "a") == b"1"

    def test_locate(self, storage: Storage) -> None:
        storage.write("in/a b.jsonl", b"1")
        folder, name = locate(storage.url("in/a b.jsonl"), storage.options)
        assert (folder.root, name) == (storage.url("in"), "a b.jsonl")
        assert folder.read(name) == b"1"

    def test_check_writable_leaves_nothing(self, storage: Storage) -> None:
        storage.check_writable()
        assert [i.name for i in storage.list() if not i.name.endswith("swap.lock")] == []

    @pytest.mark.parametrize("name", ["", "/a", "../a", "a/../../b"])
    def test_names_stay_below_the_root(self, storage: Storage, name: str) -> None:
        with pytest.raises(ValueError, match="below"):
            storage.write(name, b"")


class ExclusiveContract:
    """What stores with conditional writes do besides."""

    def test_create_has_one_winner(self, storage: Storage) -> None:
        for round_ in range(10):
            start = threading.Barrier(8)

            def create(data: bytes, name: str = f"data/{round_}", start: threading.Barrier = start) -> bool:
                start.wait()
                return storage.create(name, data)

            with ThreadPoolExecutor(8) as pool:
                datas = [f"writer {i}".encode() for i in range(8)]
                won = list(pool.map(create, datas))
            assert won.count(True) == 1
            assert storage.read(f"data/{round_}") == datas[won.index(True)]

    def test_a_counter_by_compare_and_swap_loses_nothing(self, storage: Storage) -> None:
        storage.write("counter", b"00")

        def add() -> None:
            while True:
                data, version = storage.read_versioned("counter") or (b"", "")
                if storage.replace("counter", b"%02d" % (int(data) + 1), version):
                    return

        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(add) for _ in range(12)]:
                done.result()
        assert storage.read("counter") == b"12"

    def test_check_writable_says_that_creation_is_exclusive(self, storage: Storage) -> None:
        assert storage.check_writable()


class TestLocal(StorageContract, ExclusiveContract):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        return Storage(str(tmp_path / "out"))


class TestLocalWithoutLinks(StorageContract, ExclusiveContract):
    @pytest.fixture
    def storage(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
        def link(source: Any, target: Any) -> None:
            raise OSError(errno.EPERM, "no hard links here")

        monkeypatch.setattr(storage_local.os, "link", link)
        return Storage(str(tmp_path / "out"))


class TestMemory(StorageContract):
    @pytest.fixture
    def storage(self) -> Storage:
        return Storage(f"memory://{uuid.uuid4().hex}/out")

    def test_check_writable_says_that_creation_is_not_exclusive(self, storage: Storage) -> None:
        assert not storage.check_writable()


# ── local files ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for root in ("out", "./out/", str(tmp_path / "out"), f"file://{tmp_path}/out", "~/out"):
        storage = Storage(root)
        assert storage.root == str(tmp_path / "out")
        assert storage.url("a/b") == str(tmp_path / "out/a/b")
        assert storage.is_local
    assert Storage("s3a://b/x/").root == "s3://b/x"
    assert not Storage("s3://b").is_local
    assert Storage("s3://b").url("a") == "s3://b/a"


@pytest.mark.parametrize("url", ["", "s3://", "https://", "zip://a::s3://b/c", "sftp://me:hunter2@host/x"])
def test_urls_that_are_refused(url: str) -> None:
    with pytest.raises(StorageError) as refused:
        Storage(url)
    assert "hunter2" not in str(refused.value)


def test_http_cannot_be_listed_or_written() -> None:
    with pytest.raises(StorageError, match="no listing"):
        Storage("https://127.0.0.1/x").list()
    with pytest.raises(OutputError, match="HTTP"):
        Storage("https://127.0.0.1/x").check_writable()


@pytest.mark.parametrize(
    ("root", "options", "says"),
    [
        ("gs://b/x", {}, "install gcsfs"),
        ("nope://b/x", {}, "nope"),
        ("s3://b/x", {"colour": 1}, "'colour'"),
        ("s3://b/x", {"endpoint_url": "not a url"}, "not a url"),
        ("s3://b/x", {"profile": "missing"}, "profile"),
    ],
)
def test_stores_that_cannot_be_opened(root: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(StorageError, match=says):
        Storage(root, options).list()


def test_repr_holds_no_secrets() -> None:
    assert "hunter2" not in repr(Storage("s3://b/x", {"secret": "hunter2"}))


def test_nothing_is_seen_before_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(str(tmp_path))

    def fail(fd: int) -> None:
        assert [i for i in storage.list() if not i.name.startswith(".dray/tmp/")] == []
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(storage_local.os, "fsync", fail)
    for put in (storage.create, storage.write):
        with pytest.raises(StorageFull, match="no space left") as error:
            put("a", b"data")
        assert str(tmp_path / "a") in str(error.value)
    assert storage.list() == [], "the temporary file is removed as well"


def test_two_quick_replacements_have_two_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(str(tmp_path))
    storage.write("a", b"0")
    monkeypatch.setattr(storage_local.time, "time_ns", lambda: 1_000)  # a clock that stands
    monkeypatch.setattr(storage_local.os, "fsync", lambda fd: None)
    versions = [storage.info("a").version]
    for _ in range(20):  # within one tick of the kernel's clock for time stamps
        assert storage.replace("a", b"1", versions[-1])
        versions.append(storage.info("a").version)
    assert len(set(versions)) == len(versions)


def _create(root: str, name: str, start: Any, results: Any) -> None:
    storage = Storage(root)
    start.wait()
    results.put(storage.create(name, str(os.getpid()).encode()))


def test_create_has_one_winner_between_processes(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(6), context.Queue()
    children = [context.Process(target=_create, args=(str(tmp_path), "a", start, results)) for _ in range(6)]
    for child in children:
        child.start()
    won = [results.get(timeout=20) for _ in children]
    for child in children:
        child.join()
    assert won.count(True) == 1


def test_links_are_followed_once_and_dangling_ones_are_told(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs/1").write_bytes(b"1")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.parquet").symlink_to(tmp_path / "blobs/1")
    (tmp_path / "in/loop").symlink_to(tmp_path / "in")
    assert [i.name for i in Storage(str(tmp_path / "in")).list()] == ["a.parquet"]
    (tmp_path / "in/b.parquet").symlink_to(tmp_path / "gone")
    with pytest.raises(StorageError, match="points to nothing"):
        Storage(str(tmp_path / "in")).list()


def test_old_temporary_files_are_swept(tmp_path: Path) -> None:
    old, new = tmp_path / ".dray/tmp/1-old", tmp_path / ".dray/tmp/2-new"
    old.parent.mkdir(parents=True)
    for file in (old, new):
        file.write_bytes(b"")
    os.utime(old, (0, 0))
    Storage(str(tmp_path)).check_writable()
    assert not old.exists()
    assert new.exists()


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="is a file, not a folder"):
        Storage(str(tmp_path / "file")).check_writable()
    assert Storage(str(tmp_path / "file")).list() == []


def test_a_folder_is_no_object(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    assert not Storage(str(tmp_path)).exists("folder")


# ── faults ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _answer(code: str, status: int) -> boto.ClientError:
    said = {"Error": {"Code": code, "Message": "AKIASECRET"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return boto.ClientError(said, "PutObject")


@pytest.mark.parametrize(
    "error",
    [
        _answer("SlowDown", 503),
        _answer("InternalError", 500),
        _answer("", 502),
        _answer("ConditionalRequestConflict", 409),
        boto.ReadTimeoutError(endpoint_url="http://x"),
        boto.ConnectionClosedError(endpoint_url="http://x"),
        boto.EndpointConnectionError(endpoint_url="http://x"),
        ConnectionResetError(errno.ECONNRESET, "reset"),
        TimeoutError(),
        OSError(errno.EIO, "io"),
    ],
)
def test_passing_faults(error: Exception) -> None:
    assert storage_faults.is_passing(error)
    assert isinstance(storage_faults.explain(error, "s3://b/x"), TransientStorageError)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (_answer("AccessDenied", 403), "access denied"),
        (_answer("403", 403), "access denied"),
        (_answer("InvalidAccessKeyId", 403), "AWS_ACCESS_KEY_ID"),
        (_answer("SignatureDoesNotMatch", 403), "secret key"),
        (_answer("NoSuchBucket", 404), "bucket does not exist"),
        (_answer("ExpiredToken", 400), "expired"),
        (_answer("PermanentRedirect", 301), "AWS_REGION"),
        (_answer("NeverHeardOf", 400), "NeverHeardOf"),
        (_answer("NotImplemented", 501), "refused"),
        (boto.NoCredentialsError(), "no S3 credentials found for s3://b/x"),
        (boto.PartialCredentialsError(provider="env", cred_var="x"), "no S3 credentials"),
        (boto.ProfileNotFound(profile="p"), "AWS_PROFILE"),
        (boto.SSLError(endpoint_url="https://x", error="bad"), "TLS"),
        (boto.ParamValidationError(report="Invalid bucket name"), "bucket name"),
        (boto.NoRegionError(), "region"),
        (PermissionError(errno.EACCES, "no"), "permission denied"),
        (OSError(errno.EROFS, "ro"), "read-only"),
        (NotADirectoryError(errno.ENOTDIR, "no"), "not a folder"),
        (
            OSError("Forbidden: b/o\nno storage.objects.list access"),
            "access denied",
        ),  # gcsfs's, of status 403
    ],
)
def test_refusals_say_what_and_the_way_out(error: Exception, says: str) -> None:
    assert not storage_faults.is_passing(error)
    with pytest.raises(StorageError, match=says) as told, storage_faults.explained("s3://b/x"):
        raise error
    assert "\n" not in str(told.value)
    assert "AKIASECRET" not in str(told.value)
    assert told.value.__suppress_context__, "library tracebacks end here"


def test_the_unknown_and_our_own_go_through() -> None:
    for error in (ZeroDivisionError(), DrayError("x"), MemoryError()):
        with pytest.raises(type(error)) as raised, storage_faults.explained("s3://b/x"):
            raise error
        assert raised.value is error


def test_a_missing_object_stays_a_file_not_found_error() -> None:
    wrapped = FileNotFoundError("s3fs says")
    wrapped.__cause__ = _answer("NoSuchKey", 404)
    with pytest.raises(FileNotFoundError, match="s3://b/x"), storage_faults.explained("s3://b/x"):
        raise wrapped
    wrapped.__cause__ = _answer("NoSuchBucket", 404)
    with pytest.raises(StorageError, match="bucket"), storage_faults.explained("s3://b/x"):
        raise wrapped


def test_persist_tries_passing_faults_again_and_no_others() -> None:
    calls = []

    def call(*faults: Exception) -> int:
        calls.append(1)
        if len(calls) <= len(faults):
            raise faults[len(calls) - 1]
        return 7

    assert storage_faults.persist(lambda: call(TimeoutError(), _answer("SlowDown", 503)), 5) == 7
    assert len(calls) == 3
    calls.clear()
    with pytest.raises(PermissionError):
        storage_faults.persist(lambda: call(PermissionError(), PermissionError()), 5)
    assert len(calls) == 1


def test_persist_is_bounded_in_time() -> None:
    def call() -> None:
        raise TimeoutError

    began = time.monotonic()
    with pytest.raises(TimeoutError):
        storage_faults.persist(call, 0.5)
    assert time.monotonic() - began < 1.0
