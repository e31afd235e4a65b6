"""S3, and what speaks its protocol, as a store: every request is one attempt of ours, conditions are the server's.

s3fs and botocore would both try again on their own. Here they may not (`retries`, `max_attempts`): a PUT that a
library repeats behind our back after a lost answer looks like somebody else's object. All repeating is `persist`,
but for aiohttp, which sends a request once more when a kept-alive connection breaks under it: see `_put`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import mmap
import os
import uuid
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import s3fs
from fsspec.asyn import sync

from pipelines.errors import StorageError
from pipelines.storage_backend import ObjectInfo, VersionChanged
from pipelines.storage_faults import answer, is_unreachable, persist

CONNECT_S = 5
READ_S = 30
"""Longest silence within one answer."""
SLOWEST_BYTES_PER_S = 500_000
"""A request has READ_S plus its bytes at this speed; a socket that swallows an upload would hang for ever."""
PART_BYTES = 32 * 2**20
"""Larger objects go up in parts of this size, so that a fault costs one part; S3 allows 5 MiB to 5 GiB."""
PARALLEL_PARTS = 4
#: Metadata key that tells our own object from another writer's after an answer was lost.
_MARK = "dray-write"


class _Connection:
    """One s3fs file system, and whether its server has ever answered."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        config = {
            "connect_timeout": CONNECT_S,
            "read_timeout": READ_S,
            "retries": {"max_attempts": 0},
            "max_pool_connections": 50,
            **options.get("config_kwargs", {}),
        }
        endpoint = options.get("endpoint_url") or options.get("client_kwargs", {}).get("endpoint_url")
        custom = endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        if custom and "AWS_REQUEST_CHECKSUM_CALCULATION" not in os.environ:
            # botocore's default since 1.36 sends a trailing checksum that several S3 servers (Ceph) refuse
            config.setdefault("request_checksum_calculation", "when_required")
        self.fs = s3fs.S3FileSystem(
            **{**options, "config_kwargs": config}, skip_instance_cache=True, use_listings_cache=False
        )
        self.fs.retries = 1
        self.fs.connect()
        self.endpoint = str(self.fs.s3.meta.endpoint_url)
        self.is_aws = "amazonaws.com" in self.endpoint
        """Other servers may ignore conditions without a word (rclone does), so they are looked at first."""
        self.answered = False


#: A session costs 0.2 s, so storages with equal options share one. The process id keeps it out of forked children
#: (fsspec's loop thread does not survive), the environment makes new credentials count at once.
_connections: dict[tuple[int, str], _Connection] = {}


def _connect(options: Mapping[str, Any]) -> _Connection:
    settings = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    text = json.dumps([dict(options), settings, os.environ.get("HOME")], sort_keys=True, default=repr)
    key = (os.getpid(), hashlib.sha256(text.encode()).hexdigest())  # hashed: it contains secrets
    if key not in _connections:
        _connections.setdefault(key, _Connection(options))
    return _connections[key]


class S3Backend:
    """Objects as `bucket/key`. `options` are s3fs's; requests are repeated for up to `patience_s` seconds."""

    def __init__(self, options: Mapping[str, Any], patience_s: float) -> None:
        self._options = options
        self._patience_s = patience_s

    def list(self, folder: str) -> list[ObjectInfo]:
        bucket, prefix = _folder(folder)
        found: list[ObjectInfo] = []
        page: dict[str, Any] = {}
        more: dict[str, str] = {}
        while not page or page.get("IsTruncated"):
            page = self._ask("list_objects_v2", f"s3://{folder}", Bucket=bucket, Prefix=prefix, **more)
            more = {"ContinuationToken": page.get("NextContinuationToken", "")}
            found += [
                _info(item["Key"][len(prefix) :], item["Size"], item)
                for item in page.get("Contents", ())
                if not item["Key"].endswith("/")  # markers that consoles make for empty folders
            ]
        return sorted(found, key=lambda info: info.name)

    def is_empty(self, folder: str) -> bool:
        bucket, prefix = _folder(folder)
        # two: the first may be the folder's own marker, which consoles make
        page = self._ask("list_objects_v2", f"s3://{folder}", Bucket=bucket, Prefix=prefix, MaxKeys=2)
        return all(item["Key"] == prefix for item in page.get("Contents", ()))

    def info(self, path: str) -> ObjectInfo:
        head = self._head(path)
        return _info(path.rpartition("/")[2], head["ContentLength"], head)

    def read(self, path: str) -> tuple[bytes, str]:
        return self._get(path, {})

    def read_range(self, path: str, start: int, stop: int, version: str | None) -> bytes:
        if stop <= start:
            return b""
        match = {"IfMatch": f'"{version}"'} if version else {}
        try:
            data, _ = self._get(path, {"Range": f"bytes={start}-{stop - 1}", **match})
        except Exception as error:
            if answer(error)[1] == 416:  # starts at or behind the end
                return b""
            if answer(error)[1] == 412:
                raise VersionChanged(f"s3://{path} was replaced while it was being read") from None
            raise
        return data

    def create(self, path: str, data: bytes) -> bool:
        if not self._connection().is_aws and self._look(path):
            return False
        return self._put(path, data, {"IfNoneMatch": "*"})

    def replace(self, path: str, data: bytes, version: str) -> bool:
        if not self._connection().is_aws:
            there = self._look(path)
            if not there or _info("", 0, there).version != version:
                return False
        return self._put(path, data, {"IfMatch": f'"{version}"'})

    def write(self, path: str, data: bytes) -> None:
        self._put(path, data, {})

    def put(self, path: str, file: str) -> None:
        with open(file, "rb") as written:
            large = os.fstat(written.fileno()).st_size > 2 * PART_BYTES
            # In parts it is never in memory as a whole.
            data = mmap.mmap(written.fileno(), 0, access=mmap.ACCESS_READ) if large else written.read()
        self._put(path, data, {})

    def delete(self, path: str, version: str | None) -> bool:
        match = {"IfMatch": f'"{version}"'} if version else {}
        try:
            if version and self.info(path).version != version:  # for servers that ignore the condition below
                return False
            self._ask("delete_object", f"s3://{path}", **_place(path), **match)
        except Exception as error:
            code, status = answer(error)
            if status == 501 and version:
                return self.delete(path, None)
            if status == 404 and code != "NoSuchBucket":
                return True
            if status == 412:
                return False
            raise
        return True

    def is_exclusive(self, path: str) -> bool:
        return not self._put(path, b"", {"IfNoneMatch": "*"})

    # ── requests ────────────────────────────────────────────────────────────────────────────────────────────────

    def _put(self, path: str, data: bytes | mmap.mmap, condition: dict[str, str]) -> bool:
        """Whether the object is the one of this call. A refused condition may be the echo of our own success:
        the answer to an earlier attempt was lost, or aiohttp or a proxy repeated it. The mark in the metadata tells."""
        mark = uuid.uuid4().hex
        tags = {"Metadata": {_MARK: mark}}
        try:
            if len(data) <= 2 * PART_BYTES:
                self._ask(
                    "put_object", f"s3://{path}", len(data), **_place(path), Body=data, **tags, **condition
                )
            else:
                self._put_parts(path, data, condition, tags)
        except Exception as error:
            code, status = answer(error)
            if status != 412 and code not in ("NoSuchKey", "NoSuchUpload"):
                raise
            there = self._look(path)
            if there and there.get("Metadata", {}).get(_MARK) == mark:
                return True
            if not condition or (code == "NoSuchUpload" and not there):
                raise
            return False
        return True

    def _put_parts(
        self, path: str, data: bytes | mmap.mmap, condition: dict[str, str], tags: dict[str, Any]
    ) -> None:
        """Only the last request makes the object, so only it carries the condition."""
        url, place = f"s3://{path}", _place(path)
        upload = self._ask("create_multipart_upload", url, **place, **tags)["UploadId"]
        view = memoryview(data)
        starts = range(0, len(data), PART_BYTES)

        def send(number: int) -> dict[str, Any]:
            body = bytes(view[starts[number] : starts[number] + PART_BYTES])
            sent = self._ask(
                "upload_part", url, len(body), **place, Body=body, UploadId=upload, PartNumber=number + 1
            )
            return {"PartNumber": number + 1, "ETag": sent["ETag"]}

        try:
            with ThreadPoolExecutor(PARALLEL_PARTS) as pool:
                parts = list(pool.map(send, range(len(starts))))
            self._ask(
                "complete_multipart_upload",
                url,
                **place,
                UploadId=upload,
                MultipartUpload={"Parts": parts},
                **condition,
            )
        except BaseException:
            with contextlib.suppress(Exception):  # the fault that brought us here is the one to tell
                self._ask("abort_multipart_upload", url, **place, UploadId=upload)
            raise

    def _head(self, path: str) -> dict[str, Any]:
        return dict(self._ask("head_object", f"s3://{path}", **_place(path)))

    def _look(self, path: str) -> dict[str, Any] | None:
        try:
            return self._head(path)
        except FileNotFoundError:
            return None

    def _get(self, path: str, more: dict[str, Any]) -> tuple[bytes, str]:
        """Content and ETag from one answer; a body that breaks off is asked for again as a whole."""
        fs = self._connection().fs

        async def get() -> tuple[bytes, str]:
            found = await fs._call_s3("get_object", **_place(path), **more)
            async with found["Body"] as body:
                data = await asyncio.wait_for(body.read(), _allowed_s(found["ContentLength"]))
            return data, found["ETag"].strip('"')

        data, version = self._persist(get, f"s3://{path}", None)
        return data, version

    def _ask(self, method: str, url: str, size: int = 0, /, **arguments: Any) -> Any:
        """One API call, repeated while its fault is a passing one. `size`: bytes of its body."""
        fs = self._connection().fs
        return self._persist(lambda: fs._call_s3(method, **arguments), url, _allowed_s(size))

    def _persist(self, request: Callable[[], Awaitable[Any]], url: str, limit_s: float | None) -> Any:
        connection = self._connection()

        async def limited() -> Any:
            return await asyncio.wait_for(request(), limit_s)

        def attempt() -> Any:
            try:
                result = sync(connection.fs.loop, limited)
            except Exception as error:
                connection.answered = connection.answered or answer(error)[1] != 0
                raise
            connection.answered = True
            return result

        def never_there(error: BaseException) -> bool:
            return is_unreachable(error) and not connection.answered

        try:
            return persist(attempt, self._patience_s, give_up=never_there)
        except Exception as error:
            if never_there(error):
                raise StorageError(
                    f"{url}: no server answers at the endpoint {connection.endpoint}; correct AWS_ENDPOINT_URL "
                    "or endpoint_url in storage_options, or start the server"
                ) from None
            raise

    def _connection(self) -> _Connection:
        try:
            return _connect(self._options)
        except TypeError as error:
            unknown = str(error).rpartition("argument ")[2]
            raise StorageError(
                f"storage_options: S3 has no option {unknown}; see s3fs.S3FileSystem"
            ) from None
        except ValueError as error:
            raise StorageError(f"storage_options or AWS variables: {error}") from None


def _allowed_s(size: int) -> float:
    return CONNECT_S + READ_S + size / SLOWEST_BYTES_PER_S


def _split(path: str) -> tuple[str, str]:
    bucket, _, key = path.partition("/")
    return bucket, key


def _folder(path: str) -> tuple[str, str]:
    """Bucket, and what the keys below a folder begin with."""
    bucket, prefix = _split(path)
    return bucket, prefix.rstrip("/") + "/" if prefix else ""


def _place(path: str) -> dict[str, str]:
    bucket, key = _split(path)
    return {"Bucket": bucket, "Key": key}


def _info(name: str, size: int, described: Mapping[str, Any]) -> ObjectInfo:
    return ObjectInfo(
        name=name,
        size=size,
        version=described["ETag"].strip('"'),
        modified=described["LastModified"].timestamp(),
    )
