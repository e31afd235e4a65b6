"""A local (or mounted) folder as a store: exclusive links for creation, a lock file and renames for the rest."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from pipelines.storage_backend import ObjectInfo

#: errno of a file system without hard links (vfat, some FUSE and network mounts).
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}


class LocalBackend:
    """Files below `root`. Temporary files and the lock of `replace` live in `<root>/.dray/`."""

    def __init__(self, root: str) -> None:
        self._own = Path(root) / ".dray"

    def list(self, folder: str) -> list[ObjectInfo]:
        return sorted(_walk(folder, "", set()), key=lambda info: info.name)

    def is_empty(self, folder: str) -> bool:
        try:
            with os.scandir(folder) as entries:
                return next(entries, None) is None
        except FileNotFoundError:
            return True

    def info(self, path: str) -> ObjectInfo:
        stat = os.stat(path)
        if not os.path.isfile(path):
            raise FileNotFoundError(errno.ENOENT, "not a file", path)
        return _info(os.path.basename(path), stat)

    def read(self, path: str) -> tuple[bytes, str]:
        with open(path, "rb") as file:
            version = _version(os.fstat(file.fileno()))
            return file.read(), version

    def read_range(self, path: str, start: int, stop: int, version: str | None) -> bytes:
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(max(stop - start, 0))

    def create(self, path: str, data: bytes) -> bool:
        with self._temporary(data) as temp:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            try:
                os.link(temp, path)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                # Every Dray on this file system ends here, so the lock alone makes the creation exclusive; the
                # rename keeps it whole, which opening the target with O_EXCL would not.
                with self._locked():
                    if os.path.lexists(path):
                        return False
                    os.rename(temp, path)
            _sync_folder(path)
            return True

    def replace(self, path: str, data: bytes, version: str) -> bool:
        with self._locked(), self._temporary(data) as temp:
            try:
                before = os.stat(path)
            except FileNotFoundError:
                return False
            if _version(before) != version:
                return False
            # The kernel stamps files with its tick (4 ms), so two quick writes of one size would share a version.
            for step in (1, 2 * 10**9):
                stamp = max(time.time_ns(), before.st_mtime_ns + step)
                os.utime(temp, ns=(stamp, stamp))
                if os.stat(temp).st_mtime_ns != before.st_mtime_ns:
                    break  # the second step is for file systems that keep whole seconds
            os.rename(temp, path)
            _sync_folder(path)
            return True

    def write(self, path: str, data: bytes) -> None:
        with self._temporary(data) as temp:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.rename(temp, path)
            _sync_folder(path)

    def put(self, path: str, file: str) -> None:
        with open(file, "rb") as written:
            os.fsync(written.fileno())
        os.rename(file, path)
        _sync_folder(path)

    def delete(self, path: str, version: str | None) -> bool:
        try:
            if version is None:
                os.unlink(path)
                return True
            with self._locked():
                if _version(os.stat(path)) != version:
                    return False
                os.unlink(path)
        except (FileNotFoundError, NotADirectoryError):
            pass
        return True

    def is_exclusive(self, path: str) -> bool:
        return True

    def sweep(self, older_s: float) -> None:
        """Removes temporary files that a killed process left behind and nobody has touched for `older_s`."""
        with contextlib.suppress(FileNotFoundError):
            for entry in os.scandir(self._own / "tmp"):
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - entry.stat().st_mtime > older_s:
                        os.unlink(entry.path)

    @contextlib.contextmanager
    def _temporary(self, data: bytes) -> Iterator[Path]:
        """A file with `data`, safe on disk, on the same file system as its target; removed unless renamed."""
        folder = self._own / "tmp"
        folder.mkdir(parents=True, exist_ok=True)
        temp = folder / f"{os.getpid()}-{uuid.uuid4().hex}"
        try:
            with open(temp, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield temp
        finally:
            temp.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One compare-and-swap at a time below this root, between threads and processes."""
        self._own.mkdir(parents=True, exist_ok=True)
        with open(self._own / "swap.lock", "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # closing the file gives it back
            yield


def _walk(folder: str, prefix: str, seen: set[tuple[int, int]]) -> Iterator[ObjectInfo]:
    """Files below `folder`. Links are followed (hub caches consist of them), each folder once."""
    try:
        stat = os.stat(folder)
        entries = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    if (stat.st_dev, stat.st_ino) in seen:
        return
    seen.add((stat.st_dev, stat.st_ino))
    for entry in entries:
        name = prefix + entry.name
        try:
            if entry.is_dir():
                yield from _walk(entry.path, name + "/", seen)
            elif entry.is_file():
                yield _info(name, entry.stat())
            elif entry.is_symlink():
                raise OSError(errno.ENOLINK, "symbolic link to nothing", entry.path)
        except FileNotFoundError:
            continue  # deleted while we listed


def _info(name: str, stat: os.stat_result) -> ObjectInfo:
    return ObjectInfo(name=name, size=stat.st_size, version=_version(stat), modified=stat.st_mtime)


def _version(stat: os.stat_result) -> str:
    return f"{stat.st_size}-{stat.st_mtime_ns}"


def _sync_folder(path: str) -> None:
    """Makes the name durable: a file's fsync does not cover its directory entry."""
    fd = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # file systems that cannot sync a folder say EINVAL
            raise
    finally:
        os.close(fd)
