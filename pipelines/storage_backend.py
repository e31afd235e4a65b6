"""What a store must be able to do for `pipelines.storage`, and what a listing tells.

Three backends implement it: `storage_local` (a POSIX folder), `storage_s3` (S3 and what speaks its protocol) and
`storage_other` (any other fsspec file system). They take full paths, raise whatever their library raises, and leave
the words to `storage_faults`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectInfo:
    """One object (or local file) as the store describes it now."""

    name: str
    """Relative to the storage's root, with `/` between its parts."""
    size: int
    """Bytes."""
    version: str
    """Changes when the content does: the ETag on S3, `size-mtime_ns` locally."""
    modified: float
    """Unix time of the last change, by the store's clock; 0.0 where it does not tell."""


class Backend(Protocol):
    """The operations of a store on full paths (`bucket/key`, or an absolute local path)."""

    def list(self, folder: str) -> list[ObjectInfo]:
        """Everything below `folder`, named relative to it; empty when there is no such folder."""

    def is_empty(self, folder: str) -> bool:
        """Whether nothing lies below `folder`, or there is no such folder; one small request, however much lies there."""

    def info(self, path: str) -> ObjectInfo:
        """FileNotFoundError when missing."""

    def read(self, path: str) -> tuple[bytes, str]:
        """The content and the version that it belongs to."""

    def read_range(self, path: str, start: int, stop: int, version: str | None) -> bytes:
        """Bytes [start, stop). `VersionChanged` when `version` is given and the store can tell that it is gone."""

    def create(self, path: str, data: bytes) -> bool:
        """Whether this call made the object; False when one was there."""

    def replace(self, path: str, data: bytes, version: str) -> bool:
        """Whether the object still had `version` and has `data` now."""

    def write(self, path: str, data: bytes) -> None:
        """Make or overwrite, atomically."""

    def put(self, path: str, file: str) -> None:
        """Make or overwrite with the content of a local file, atomically. A local folder's backend takes the file itself."""

    def delete(self, path: str, version: str | None) -> bool:
        """Whether it is gone; False only when `version` is given and the object has another one."""

    def is_exclusive(self, path: str) -> bool:
        """Whether the store itself keeps a second writer from creating `path`, which exists."""


class VersionChanged(OSError):
    """An object was replaced while it was being read."""
