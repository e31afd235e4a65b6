"""The one door to storage: a folder on a local disk, on S3, or on any other fsspec store.

    out = Storage("s3://bucket/out", {"endpoint_url": "http://…"})
    out.create("data/part-000000-….parquet", data)      # False: somebody else was first
    storage, name = locate("s3://bucket/prompts/a.parquet")
    pyarrow.parquet.ParquetFile(storage.open_input(name))

Every operation may raise `StorageError` (the store refuses: mend it), `TransientStorageError` (it did not answer
properly for `patience_s` seconds) or FileNotFoundError (no such object). Nothing here is cached: a listing shows what
the store holds now. A `Storage` is two plain values, so it travels to Ray workers; connections are made on first use,
once per process, and may be used from many threads.

| store | `create` | `replace`, `delete(version=)` |
|---|---|---|
| local folder | exclusive link | under a lock file |
| S3 | If-None-Match | If-Match |
| S3 protocol, not AWS | a look, then If-None-Match | a look, then If-Match |
| other | a look, then a write: see `storage_other` for the window | the same |

Servers of the third line that ignore conditions (rclone's does) leave the window of the last; their answers do not
tell, `check_writable` finds out.
"""

from __future__ import annotations

import io
import os
import re
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any, BinaryIO, cast

from pipelines.errors import OutputError, StorageDenied, StorageError
from pipelines.storage_backend import Backend, ObjectInfo, VersionChanged
from pipelines.storage_faults import explained
from pipelines.storage_local import LocalBackend
from pipelines.storage_other import OtherBackend
from pipelines.storage_s3 import S3Backend

__all__ = ["ObjectInfo", "Storage", "VersionChanged", "locate"]

_URL = re.compile(r"(?P<protocol>[a-zA-Z][a-zA-Z0-9+.-]*)://(?P<path>.*)", re.DOTALL)
#: Temporary files older than this are a killed process's; no write takes so long.
_SWEEP_S = 24 * 3600.0


class Storage:
    """The objects below one folder. Names are relative to it, with `/` between their parts.

    `root` is a URL or a local path (made absolute); `options` are fsspec's for its protocol (for S3: `endpoint_url`,
    `key`, `secret`, `profile`, `anon`, …), beside the usual AWS variables. `patience_s`: for how many seconds a
    passing fault is tried again.
    """

    def __init__(
        self, root: str, options: Mapping[str, Any] | None = None, *, patience_s: float = 60.0
    ) -> None:
        self.options = dict(options or {})
        self.patience_s = patience_s
        self._protocol, path = _parse(root)
        self.is_local = self._protocol == "file"
        self._folder = os.path.abspath(path) if self.is_local else path.rstrip("/")
        self.root = self._folder if self.is_local else f"{self._protocol}://{self._folder}"
        # fsspec's HTTP file system wants whole URLs, the others their own paths
        self._is_http = self._protocol in ("http", "https")
        self._base = (self.root if self._is_http else self._folder).rstrip("/")

    def __reduce__(self) -> Any:
        return _rebuild, (self.root, self.options, self.patience_s)

    def __repr__(self) -> str:
        return f"Storage({self.root!r})"  # without the options: they may hold keys

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Storage) and (self.root, self.options) == (other.root, other.options)

    def __hash__(self) -> int:
        return hash(self.root)

    def url(self, name: str = "") -> str:
        """The full URL (or absolute local path) of `name`, for messages and for `locate`."""
        return f"{self.root.rstrip('/')}/{name}" if name else self.root

    # ── look and read ───────────────────────────────────────────────────────────────────────────────────────────

    def list(self, folder: str = "") -> list[ObjectInfo]:
        """Every object below `folder`, at any depth, by name; empty when there is none. One bulk listing."""
        if self._is_http:
            raise StorageError(f"{self.root}: HTTP servers have no listing; name the files one by one")
        folder = folder.strip("/")
        with explained(self.url(folder)):
            found = self._backend.list(self._path(folder) if folder else self._base or "/")
        if not folder:
            return found
        return [
            ObjectInfo(name=f"{folder}/{i.name}", size=i.size, version=i.version, modified=i.modified)
            for i in found
        ]

    def is_empty(self) -> bool:
        """Whether nothing lies below `root`; one small request, however much does. Raises StorageDenied where it may not be
        listed."""
        if self._is_http:
            raise StorageDenied(f"{self.root}: HTTP servers have no listing")
        with explained(self.root):
            return self._backend.is_empty(self._base or "/")

    def info(self, name: str) -> ObjectInfo:
        """Size and version of one object."""
        with explained(self.url(name)):
            found = self._backend.info(self._path(name))
        return ObjectInfo(name=name, size=found.size, version=found.version, modified=found.modified)

    def exists(self, name: str) -> bool:
        """Whether there is an object (not a folder) of this name."""
        try:
            self.info(name)
        except FileNotFoundError:
            return False
        return True

    def read(self, name: str) -> bytes:
        """The whole content."""
        with explained(self.url(name)):
            return self._backend.read(self._path(name))[0]

    def read_versioned(self, name: str) -> tuple[bytes, str] | None:
        """The whole content and its version, for `replace`; None when missing."""
        try:
            with explained(self.url(name)):
                return self._backend.read(self._path(name))
        except FileNotFoundError:
            return None

    def read_range(self, name: str, start: int, stop: int, version: str | None = None) -> bytes:
        """Bytes [start, stop), fewer at the end. `VersionChanged` (S3) when `version` is not the object's any more."""
        with explained(self.url(name)):
            return self._backend.read_range(self._path(name), start, stop, version)

    def open_input(self, name: str) -> BinaryIO:
        """A seekable binary file for pyarrow: a read fetches the bytes asked for and no more.

        So a Parquet footer costs two small requests. Remote ones are not buffered: wrap them in io.BufferedReader
        to read lines.
        """
        with explained(self.url(name)):
            if self.is_local:
                return open(self._path(name), "rb")
        return cast(BinaryIO, _RangeFile(self, name))

    # ── write ───────────────────────────────────────────────────────────────────────────────────────────────────

    def create(self, name: str, data: bytes) -> bool:
        """Make the object whole, or leave the one that is there: False then. The commit of design §4.4."""
        with explained(self.url(name)):
            return self._backend.create(self._path(name), data)

    def replace(self, name: str, data: bytes, version: str) -> bool:
        """Compare and swap: False when the object has another version than `version`, or is gone."""
        with explained(self.url(name)):
            return self._backend.replace(self._path(name), data, version)

    def write(self, name: str, data: bytes) -> None:
        """Make or overwrite, atomically; for what can be rebuilt (statistics, README)."""
        with explained(self.url(name)):
            self._backend.write(self._path(name), data)

    @contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        """A file whose content makes or overwrites the object when the block ends, whole; nothing when it raises.

        It grows on a disk, beside its target in a local folder, so that it may be larger than the memory.
        """
        path = self._path(name)
        folder, _, base = path.rpartition("/") if self.is_local else (tempfile.gettempdir(), "", name)
        temp = f"{folder}/.{base.rpartition('/')[2]}.{uuid.uuid4().hex[:8]}.partial"
        try:
            with explained(self.url(name)):
                os.makedirs(folder, exist_ok=True)
                file = open(temp, "xb")  # noqa: SIM115 -- closed below, where a fault is the caller's own
            with file:
                yield file
            with explained(self.url(name)):
                self._backend.put(path, temp)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(temp)

    def delete(self, name: str, version: str | None = None) -> bool:
        """Remove the object; missing is well. With `version`: only that one, False when it is another by now."""
        with explained(self.url(name)):
            return self._backend.delete(self._path(name), version)

    def check_writable(self) -> bool:
        """Make and remove a probe below `.dray/tmp/`; StorageError or OutputError when that fails.

        Returns whether creation is exclusive on this store: False means that the window of `storage_other` is open.
        """
        if self._is_http:
            raise OutputError(f"{self.root}: cannot be written over HTTP; choose a folder or an object store")
        backend, path = self._backend, self._path(f".dray/tmp/probe-{uuid.uuid4().hex}")
        try:
            with explained(self.root):
                if isinstance(backend, LocalBackend):
                    backend.sweep(_SWEEP_S)
                backend.list(self._path(".dray/tmp"))  # a listing's refusal says why, a HEAD's only 403
                if not backend.create(path, b"dray") or backend.read(path)[0] != b"dray":
                    raise OutputError(f"{self.root}: the store does not give back what was written")
                exclusive = backend.is_exclusive(path)
                backend.delete(path, None)
        except (FileNotFoundError, NotImplementedError):
            raise OutputError(f"{self.root}: cannot be written; choose another path") from None
        return exclusive

    # ── inside ──────────────────────────────────────────────────────────────────────────────────────────────────

    @cached_property
    def _backend(self) -> Backend:
        return open_backend(self._protocol, self._folder, self.options, self.patience_s)

    def _path(self, name: str) -> str:
        if name.startswith("/") or not name or ".." in name.split("/"):
            raise ValueError(f"{name!r} is no name below {self.root}")
        return f"{self._base}/{name}"


def open_backend(protocol: str, folder: str, options: Mapping[str, Any], patience_s: float) -> Backend:
    """The store of a protocol, as `Storage` uses it: once per process that the `Storage` comes to."""
    if protocol == "file":
        return LocalBackend(folder)
    if protocol == "s3":
        return S3Backend(options, patience_s)
    return OtherBackend(protocol, options, patience_s)


def locate(url: str, options: Mapping[str, Any] | None = None) -> tuple[Storage, str]:
    """The storage of the folder that holds the object at `url` (or local path), and the object's name in it."""
    protocol, path = _parse(url)
    if protocol == "file":
        folder, name = os.path.split(os.path.abspath(path))
        return Storage(folder, options), name
    folder, _, name = path.rpartition("/")
    if not folder or not name:
        raise StorageError(f"{url}: names no object; give the URL of a file")
    return Storage(f"{protocol}://{folder}", options), name


def _parse(url: str) -> tuple[str, str]:
    """Protocol and path; `file` for local paths."""
    if "::" in url and "://" in url:
        raise StorageError(f"{url}: chained URLs are not supported; name the object itself")
    match = _URL.fullmatch(url)
    if match is None:
        if not url:
            raise StorageError("the path is empty; give a URL or a local path")
        return "file", os.path.expanduser(url)
    protocol, path = match["protocol"].lower(), match["path"]
    if re.match(r"[^/@]*:[^/@]*@", path):
        raise StorageError(
            f"{protocol}://***@…: take the password out of the URL; storage_options holds secrets"
        )
    if protocol in ("file", "local"):
        return "file", path
    if not path.strip("/") and protocol != "memory":
        raise StorageError(f"{url}: names no bucket or host")
    return ("s3" if protocol == "s3a" else protocol), path


def _rebuild(root: str, options: dict[str, Any], patience_s: float) -> Storage:
    return Storage(root, options, patience_s=patience_s)


class _RangeFile(io.RawIOBase):
    """A remote object as a read-only file, fixed to the version that it had when opened."""

    def __init__(self, storage: Storage, name: str) -> None:
        self._storage = storage
        self._info = storage.info(name)
        self._position = 0

    def read(self, size: int | None = -1) -> bytes:
        rest = max(self._info.size - self._position, 0)
        count = rest if size is None or size < 0 else min(size, rest)
        start = self._position
        data = self._storage.read_range(self._info.name, start, start + count, self._info.version)
        self._position += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return self.read()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = (
            offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._info.size}[whence]
        )
        return self._position

    def tell(self) -> int:
        return self._position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True
