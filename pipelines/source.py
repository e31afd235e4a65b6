"""Input files by their full path: whether each is still the planned one, and its bytes."""

from __future__ import annotations

import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

from pipelines.contracts import Span
from pipelines.errors import InputError
from pipelines.storage import ObjectInfo, VersionChanged, locate

#: Bytes asked from the store at once while reading text.
BLOCK = 4 << 20


def check_unchanged(span: Span, options: dict[str, Any]) -> None:
    """Raises InputError when the file is gone or is not the one that was planned."""
    storage, name = locate(span.path, options)
    try:
        found = storage.info(name)
    except FileNotFoundError:
        raise InputError(
            f"{span.path}: is gone since it was planned; put it back, or plan again (`dray plan`) without it"
        ) from None
    if (found.size, found.version) != (span.size, span.version):
        raise InputError(changed(span.path, span.version, span.size, found))


def changed(path: str, version: str, size: int, found: ObjectInfo | None = None) -> str:
    """The message for a file with other content than planned."""
    now = f"; now {found.version}, {found.size:,} bytes" if found else ""
    return (
        f"{path}: changed since it was planned (version {version}, {size:,} bytes{now}); put the planned content "
        "back, or set input.on_changed: replace and run `dray plan` again"
    )


def open_binary(path: str, options: dict[str, Any]) -> BinaryIO:
    """The stored bytes, seekable and not buffered. Raises InputError for a missing file."""
    storage, name = locate(path, options)
    try:
        return storage.open_input(name)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; correct input.path, or put the file back") from None


def buffered(raw: BinaryIO) -> io.BufferedIOBase:
    """For readers that ask for a few bytes at a time: one request to the store per `BLOCK`."""
    if isinstance(raw, io.BufferedIOBase):
        return raw
    return io.BufferedReader(cast(io.RawIOBase, raw), BLOCK)


@contextlib.contextmanager
def open_span(span: Span, options: dict[str, Any]) -> Iterator[BinaryIO]:
    """The span's whole file, unpacked where it is gzip. InputError for damaged gzip data and a replaced file."""
    try:
        with open_binary(span.path, options) as raw:
            if span.compression == "none":
                yield raw
                return
            with gzip.GzipFile(fileobj=buffered(raw)) as content:
                yield cast(BinaryIO, content)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise InputError(f"{span.path}: not readable as gzip: {error}; write the file again") from None
    except VersionChanged:
        raise InputError(changed(span.path, span.version, span.size)) from None
