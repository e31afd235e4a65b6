"""The images of prompts: where their bytes come from, and whether they are images at all.

    bytes | {bytes, path} | data: URL | path below `input.images_folder` ──► the file's bytes, its header looked at

Nothing is decoded here but a header. Pixels, ten to fifty times the bytes, are made where the engine takes them (docs/decisions/0016).
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from urllib.parse import unquote

import pyarrow as pa

from pipelines.errors import RowError, StorageDenied, StorageError
from pipelines.storage import Storage
from pipelines.template import one_line

#: Of one prompt: its images in order, each with its digest; `data` is null once they are answered.
IMAGES_TYPE = pa.list_(pa.struct([pa.field("sha256", pa.binary(32)), pa.field("data", pa.large_binary())]))
#: Largest file of one image, in bytes.
MAX_BYTES = 64 << 20
#: Most pixels of one image: Pillow's own bound, above which it warns of a decompression bomb; 268 MB decoded.
MAX_PIXELS = 89_478_485
#: What is taken for an image. Others of Pillow's formats run programs (EPS), or are no photographs.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
#: Files read side by side.
_READERS = 16


@dataclass(frozen=True)
class Image:
    """One image of a prompt: its file."""

    data: bytes | memoryview

    @cached_property
    def sha256(self) -> bytes:
        """What it is known by, 32 bytes."""
        return hashlib.sha256(self.data).digest()


def check_folder(folder: str, options: Mapping[str, Any]) -> None:
    """Raise StorageError where no image can lie below `input.images_folder`: nothing does, the bucket is not there, or S3 does not
    take the credentials. A folder that may not be listed passes, also by a 401 of another store, which says so to whoever reads a
    public bucket without credentials. Raises TransientStorageError where a store does not answer.
    """
    key = "input.images_folder"
    try:
        empty = Storage(folder, options).is_empty()
    except StorageDenied:
        return
    except StorageError as error:
        raise StorageError(f"{key}: {error}") from None
    if empty:
        raise StorageError(
            f"{key}: {folder}: nothing lies below it; correct the path, or leave the key out where no row names an image by "
            "its path"
        )


class ImageReader:
    """Makes images of what a row says. `folder`: below which paths lie; None: rows may give no paths. `options` of its store."""

    def __init__(self, folder: str | None = None, options: Mapping[str, Any] | None = None) -> None:
        self._storage = None if folder is None else Storage(folder, options)

    def read(self, sources: Sequence[Sequence[Any]]) -> list[list[Image] | RowError]:
        """The images of each row, or the error of its first that is none (`bad_image`).

        Raises TransientStorageError where a store does not answer.
        """
        if not any(isinstance(_plain(source), str) for row in sources for source in row):
            return [self._of_row(row) for row in sources]
        with ThreadPoolExecutor(_READERS) as pool:
            return list(pool.map(self._of_row, sources))

    def _of_row(self, sources: Sequence[Any]) -> list[Image] | RowError:
        images = []
        for number, source in enumerate(sources, 1):
            try:
                images.append(_checked(self._bytes(_plain(source))))
            except RowError as error:
                return RowError(error.code, f"image {number}: {error}")
        return images

    def _bytes(self, source: Any) -> bytes:
        if isinstance(source, bytes | bytearray | memoryview):
            return bytes(source)
        if not isinstance(source, str):
            found = "null" if source is None else type(source).__name__
            raise _bad(f"expected bytes, {{bytes, path}}, a data: URL or a path, found {found}")
        return _of_data_url(source) if source[:5].lower() == "data:" else self._of_path(source)

    def _of_path(self, path: str) -> bytes:
        storage, name = self._storage, self._name(path)
        assert storage is not None
        try:
            data = storage.read_range(name, 0, MAX_BYTES + 1)
        except FileNotFoundError:
            raise _bad(f"{_short(path)}: there is no such file") from None
        except StorageDenied as error:
            raise _bad(
                f"{_short(path)}: {one_line(error)}; where it may not be listed, a store says so of missing objects too"
            ) from None
        except StorageError as error:  # it may be this one object that we are refused
            raise _bad(f"{_short(path)}: {one_line(error)}") from None
        except OSError as error:
            if not storage.is_local:
                raise
            raise _bad(f"{_short(path)}: cannot be read: {error.strerror}") from None
        return data

    def _name(self, path: str) -> str:
        """The name of a path below the folder; everything else is refused, whatever its scheme."""
        if self._storage is None:
            raise _bad(
                f"{_short(path)}: paths are read below input.images_folder only, which the job does not give"
            )
        name = path
        if "://" in path or "::" in path or os.path.isabs(path):
            try:
                root, name = f"{self._storage.root}/", Storage(path).root
            except StorageError as error:
                raise _bad(f"{_short(path)}: {one_line(error)}") from None
            if not name.startswith(root):
                raise _bad(f"{_short(path)}: lies outside of input.images_folder")
            name = name[len(root) :]
        # An HTTP client undoes %2e before it asks.
        if not name or "\0" in name or ".." in unquote(name).replace("\\", "/").split("/"):
            raise _bad(f"{_short(path)}: is no path below input.images_folder")
        return name


def images_array(rows: Sequence[Sequence[Image] | None]) -> pa.Array:
    """`IMAGES_TYPE` of these rows; null for None."""
    values = [
        None if row is None else [{"sha256": image.sha256, "data": image.data} for image in row]
        for row in rows
    ]
    return pa.array(values, IMAGES_TYPE)


def images_of(images: pa.Scalar) -> list[Image]:
    """The images of one row of `IMAGES_TYPE`; none for null. Their bytes are not copied."""
    if not images.is_valid:
        return []
    data = images.values.field("data")
    return [Image(memoryview(data[place].as_buffer())) for place in range(len(data))]


def digests_of(images: pa.Scalar) -> bytes:
    """What tells the images of one row from another's: their digests, one after the other; empty for none."""
    return b"".join(images.values.field("sha256").to_pylist()) if images.is_valid else b""


def without_data(images: pa.ChunkedArray) -> pa.Array:
    """The same, with the digests alone."""
    images = images.combine_chunks()
    flat = images.flatten()
    bare = pa.StructArray.from_arrays(
        [flat.field("sha256"), pa.nulls(len(flat), pa.large_binary())], fields=[*IMAGES_TYPE.value_type]
    )
    counts = images.value_lengths().fill_null(0).to_pylist()
    offsets = [0]
    for count in counts:
        offsets.append(offsets[-1] + count)
    return pa.ListArray.from_arrays(
        pa.array(offsets, pa.int32()), bare, type=IMAGES_TYPE, mask=images.is_null()
    )


def _plain(source: Any) -> Any:
    """Bytes or text: of `{bytes, path}` the bytes, where they are there."""
    if isinstance(source, Mapping):
        return source.get("path") if source.get("bytes") is None else source["bytes"]
    return source


def _of_data_url(url: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise _bad("a data: URL must be of the form data:image/png;base64,…")
    if len(body) > MAX_BYTES * 4 // 3 + 4:
        raise _bad(f"has more than {MAX_BYTES >> 20} MiB")
    try:
        return base64.b64decode(body, validate=True)
    except ValueError as error:
        raise _bad(f"a data: URL whose base64 cannot be read: {error}") from None


def _checked(data: bytes) -> Image:
    """The bytes as an image, by their header."""
    from PIL import Image as Pillow

    if len(data) > MAX_BYTES:
        raise _bad(f"has more than {MAX_BYTES >> 20} MiB")
    try:
        with Pillow.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
    except Exception as error:  # noqa: BLE001 -- Pillow's readers raise anything of damaged files, and for bombs
        reason = "not one of " + ", ".join(FORMATS) if "cannot identify" in str(error) else one_line(error)
        raise _bad(f"is no image: {reason}") from None
    if width * height > MAX_PIXELS:
        raise _bad(f"has {width} × {height} pixels, more than {MAX_PIXELS:,}")
    return Image(data)


def _bad(message: str) -> RowError:
    return RowError("bad_image", message)


def _short(path: str) -> str:
    return repr(path if len(path) <= 120 else path[:119] + "…")
