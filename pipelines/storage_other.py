"""Any other fsspec file system as a store: `memory://`, `gs://`, `az://`, `https://`, …

None of them offers conditional writes through fsspec. Creation therefore looks first and writes then: of two writers
that look within the same round trip both believe they were first, and the later one's bytes stay. Dray's parts bear
that (both hold the same shard, and the books are folded from the footers afterwards), the lock narrows it to drivers
that start within the same instant, and to one that sleeps between its look and its write.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import fsspec

from pipelines.errors import StorageError
from pipelines.storage_backend import ObjectInfo
from pipelines.storage_faults import persist

T = TypeVar("T")
#: Where file systems keep what changes with the content, the most reliable first.
_VERSION_KEYS = (
    "etag",
    "ETag",
    "generation",
    "md5Hash",
    "content_md5",
    "mtime",
    "LastModified",
    "last_modified",
)
_TIME_KEYS = ("mtime", "LastModified", "last_modified", "updated", "modified", "created")

#: One file system per process and set of options; see `storage_s3._connections`.
_file_systems: dict[tuple[int, str], Any] = {}


class OtherBackend:
    """Objects by the path that the file system of `protocol` itself uses."""

    def __init__(self, protocol: str, options: Mapping[str, Any], patience_s: float) -> None:
        self._protocol = protocol
        self._options = options
        self._patience_s = patience_s

    def list(self, folder: str) -> list[ObjectInfo]:
        def find() -> list[ObjectInfo]:
            fs = self._fs()
            fs.invalidate_cache()
            try:
                found = fs.find(folder, detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return []
            start = fs._strip_protocol(folder).rstrip("/") + "/"
            return [
                _info(path[len(start) :], described)
                for path, described in sorted(found.items())
                if path.startswith(start) and described.get("type") == "file"
            ]

        return persist(find, self._patience_s)

    def is_empty(self, folder: str) -> bool:
        def ask() -> bool:
            fs = self._fs()
            fs.invalidate_cache()
            try:
                fs.info(folder)  # gcsfs and adlfs list a single name for it; an `ls` would list all
            except FileNotFoundError:
                return True
            return False

        return persist(ask, self._patience_s)

    def info(self, path: str) -> ObjectInfo:
        def ask() -> ObjectInfo:
            fs = self._fs()
            fs.invalidate_cache()
            described = fs.info(path)
            if described.get("type") != "file":
                raise FileNotFoundError(path)
            return _info(path.rpartition("/")[2], described)

        return persist(ask, self._patience_s)

    def read(self, path: str) -> tuple[bytes, str]:
        version = self.info(path).version  # older than or equal to the content: a swap with it fails safely
        return bytes(persist(lambda: self._fs().cat_file(path), self._patience_s)), version

    def read_range(self, path: str, start: int, stop: int, version: str | None) -> bytes:
        if stop <= start:
            return b""
        return bytes(persist(lambda: self._fs().cat_file(path, start=start, end=stop), self._patience_s))

    def create(self, path: str, data: bytes) -> bool:
        if self._is_there(path):
            return False
        self.write(path, data)
        return True

    def replace(self, path: str, data: bytes, version: str) -> bool:
        try:
            if self.info(path).version != version:
                return False
        except FileNotFoundError:
            return False
        self.write(path, data)
        return True

    def write(self, path: str, data: bytes) -> None:
        persist(lambda: self._fs().pipe_file(path, data), self._patience_s)

    def put(self, path: str, file: str) -> None:
        persist(lambda: self._fs().put_file(file, path), self._patience_s)

    def delete(self, path: str, version: str | None) -> bool:
        try:
            if version is not None and self.info(path).version != version:
                return False
            persist(lambda: self._fs().rm_file(path), self._patience_s)
        except FileNotFoundError:
            pass
        return True

    def is_exclusive(self, path: str) -> bool:
        return False

    def _is_there(self, path: str) -> bool:
        try:
            self.info(path)
        except FileNotFoundError:
            return False
        return True

    def _fs(self) -> Any:
        text = json.dumps([self._protocol, dict(self._options)], sort_keys=True, default=repr)
        key = (os.getpid(), hashlib.sha256(text.encode()).hexdigest())
        if key not in _file_systems:
            _file_systems.setdefault(key, self._open())
        return _file_systems[key]

    def _open(self) -> Any:
        try:
            return fsspec.filesystem(self._protocol, **self._options, skip_instance_cache=True)
        except (ImportError, ValueError) as error:
            raise StorageError(f"{self._protocol}://: {error}") from None
        except TypeError as error:
            said = str(error).rpartition("()")[2].strip()
            raise StorageError(f"storage_options for {self._protocol}://: {said}") from None


def _info(name: str, described: Mapping[str, Any]) -> ObjectInfo:
    if described.get("size") is None:
        raise StorageError(f"{name}: the server does not tell the size; copy the file to storage that does")
    size = int(described["size"])
    when = _first(described, _TIME_KEYS)
    modified = _unix(when)  # memory:// gives a number in listings and a datetime elsewhere
    version = _first(described, _VERSION_KEYS) or f"{size}-{modified or when}"
    return ObjectInfo(name=name, size=size, version=str(version).strip('"'), modified=modified)


def _first(described: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    return next((described[key] for key in keys if described.get(key)), None)


def _unix(when: Any) -> float:
    """Seconds; fsspec's stores give datetimes or numbers. 0.0 for text and nothing."""
    stamp: Callable[[], float] | None = getattr(when, "timestamp", None)
    if stamp is not None:
        return stamp()
    return float(when) if isinstance(when, int | float) else 0.0
