"""What a sample of JSONL and CSV files tells before any of them is read: columns, types, bytes per row."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import pyarrow as pa

from pipelines.contracts import InputFile
from pipelines.errors import InputError
from pipelines.messages import image_sources
from pipelines.read_csv import INTEGER, NUMBER, header_names, parse
from pipelines.read_jsonl import JSON_TEXT
from pipelines.settings import InputSettings
from pipelines.source import open_binary

#: A schema sees this much of each sampled file; a size estimate sees `DENSITY_BYTES`.
SAMPLE_BYTES, SAMPLE_ROWS = 4 << 20, 1000
DENSITY_BYTES = 64 << 10
SAMPLE_FILES = 8
_BOM = b"\xef\xbb\xbf"
#: An object with more keys than this in the sample is a mapping, not a record.
_MOST_KEYS = 1000

T = TypeVar("T")


def spread(items: Sequence[T], most: int = SAMPLE_FILES) -> list[T]:
    """At most `most` of them: the first half from the front, the rest evenly over what follows."""
    if len(items) <= most:
        return list(items)
    front, rest = most // 2, most - most // 2
    step = (len(items) - front) / rest
    return [*items[:front], *(items[front + int((i + 1) * step) - 1] for i in range(rest))]


# ── Reading the head of a file ──────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Head:
    """The first bytes of a file, unpacked."""

    data: bytes
    complete: bool
    """Whether this is the whole file."""
    packing: float
    """Unpacked bytes per stored byte, as far as the head tells."""

    def whole_lines(self) -> list[bytes]:
        """Lines that are not cut off, blank ones left out."""
        lines = self.data.removeprefix(_BOM).split(b"\n")
        return [line for line in (lines if self.complete else lines[:-1]) if line.strip()]


def head(file: InputFile, settings: InputSettings, limit: int = SAMPLE_BYTES) -> Head:
    """Read about `limit` bytes. Raises InputError for data that is not gzip under a gzip ending."""
    with open_binary(file.path, settings.storage_options) as raw:
        stored = raw.read(limit)
    if file.compression == "none":
        return Head(stored, len(stored) >= file.size, 1.0)
    try:
        # GzipFile, not one decompressor: a gzip file may consist of many members.
        unpacked, complete = bytearray(), len(stored) >= file.size
        with gzip.GzipFile(fileobj=io.BytesIO(stored)) as content:
            while len(unpacked) < limit * 8 and (block := content.read1(1 << 20)):
                unpacked += block
    except EOFError:
        if complete:
            raise InputError(f"{file.path}: the gzip data is cut off; write the file again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{file.path}: not readable as gzip: {error}; write the file again") from None
    return Head(bytes(unpacked), complete, max(len(unpacked), 1) / max(len(stored), 1))


@dataclass(frozen=True)
class Density:
    """How text files of one format are filled, by a sample."""

    row_bytes: float
    """Unpacked bytes per row."""
    packing: float
    """Unpacked bytes per stored byte of gzip files."""
    row_images: float
    """Images per row."""
    image_share: float
    """Of the unpacked bytes, those of images."""

    def estimate(self, file: InputFile) -> InputFile:
        """The file with a guess at its rows, unpacked bytes and images."""
        data = int(file.size * (self.packing if file.compression == "gzip" else 1.0))
        rows = max(round(data / self.row_bytes), 1) if data else 0
        return replace(
            file,
            estimated_rows=rows,
            data_bytes=data,
            images=round(rows * self.row_images),
            image_bytes=int(data * self.image_share),
        )


def density(
    files: Sequence[InputFile],
    settings: InputSettings,
    images: Collection[str] = frozenset(),
    messages: Collection[str] = frozenset(),
) -> Density:
    """From the first `DENSITY_BYTES` of a few of the files (of one format), or more where no line ends in them.

    `images`: columns that hold some; `messages`: columns of messages whose parts may.
    """
    rows, size, packing = 0, 0, [1.0]
    seen, image_bytes = 0, 0
    for file in spread([f for f in files if f.size]):
        sample = head(file, settings, DENSITY_BYTES)
        if not sample.whole_lines():
            sample = head(file, settings)
        size += len(sample.data)
        rows += max(len(sample.whole_lines()), 1)  # a CSV record with line breaks counts as several: a guess
        if file.compression == "gzip":
            packing.append(sample.packing)
        for record in _records(file, sample) if images or messages else ():
            for value in (record[name] for name in images if record.get(name) is not None):
                seen += len(value) if isinstance(value, list) else 1
                image_bytes += len(str(value))
            for source in (source for name in messages for source in image_sources(record.get(name))):
                seen += 1
                image_bytes += len(str(source))
    return Density(
        row_bytes=max(size / max(rows, 1), 1.0),
        packing=sum(packing[1:]) / len(packing[1:]) if packing[1:] else 4.0,
        row_images=seen / max(rows, 1),
        image_share=min(image_bytes / max(size, 1), 1.0),
    )


def _records(file: InputFile, sample: Head) -> Iterator[dict[str, Any]]:
    """What can be read of the sample, row by row."""
    if file.format == "csv":
        records = parse(io.BytesIO(sample.data))
        names = next(records, [])
        if isinstance(names, list):
            yield from (dict(zip(names, one, strict=False)) for one in records if isinstance(one, list))
        return
    for line in sample.whole_lines():
        try:
            found = json.loads(line.decode("utf-8", "surrogateescape"))
        except (ValueError, RecursionError):
            continue
        if type(found) is dict:
            yield found


# ── JSONL ───────────────────────────────────────────────────────────────────────────────────────────────────────


def jsonl_schema(files: Sequence[InputFile], settings: InputSettings) -> pa.Schema | None:
    """The union of the sampled lines' keys; of several kinds of value the commonest wins, the others become errors.

    None without files. Raises InputError for a file in which no sampled line is a JSON object.
    """
    keys: dict[str, _Kinds] = {}
    for file in files:
        lines = head(file, settings).whole_lines()[:SAMPLE_ROWS]
        objects = 0
        for line in lines:
            try:
                found = json.loads(line.decode("utf-8", "surrogateescape"))
            except (ValueError, RecursionError):
                continue
            if type(found) is dict:
                objects += 1
                for key, value in found.items():
                    keys.setdefault(key, _Kinds()).see(value)
        if lines and not objects:
            array = lines[0].lstrip()[:1] == b"["
            raise InputError(
                f"{file.path}: {'a JSON array' if array else 'no line is a JSON object'}; JSON Lines has one object "
                "per line (`jq -c '.[]'` converts an array, `jq -c .` an object over several lines)"
            )
    if not files:
        return None
    for key in keys:
        _check_text(files[0].path, key)
    return pa.schema([kinds.field(key) for key, kinds in keys.items()])


@dataclass
class _Kinds:
    """How often a place in the objects held which kind of value."""

    counts: dict[str, int] = field(default_factory=dict)
    items: _Kinds | None = None
    keys: dict[str, _Kinds] = field(default_factory=dict)

    def see(self, value: Any) -> None:
        if value is None:
            return
        kind = type(value).__name__
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if kind == "list":
            self.items = self.items or _Kinds()
            for inner in value:
                self.items.see(inner)
        elif kind == "dict":
            for key, inner in value.items():
                if len(self.keys) <= _MOST_KEYS:
                    self.keys.setdefault(key, _Kinds()).see(inner)

    def field(self, name: str) -> pa.Field:
        counts = dict(self.counts)
        if "int" in counts and "float" in counts:
            counts["float"] += counts.pop("int")
        kind = max(counts, key=lambda k: counts[k]) if counts else "str"
        if kind == "list":
            return pa.field(name, pa.list_((self.items or _Kinds()).field("item")))
        if kind == "dict":
            if not self.keys or len(self.keys) > _MOST_KEYS:  # Parquet has no empty struct
                return pa.field(name, pa.string(), metadata=JSON_TEXT)
            return pa.field(name, pa.struct([kinds.field(key) for key, kinds in self.keys.items()]))
        types = {"str": pa.string(), "bool": pa.bool_(), "int": pa.int64(), "float": pa.float64()}
        return pa.field(name, types[kind])


# ── CSV ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def csv_columns(file: InputFile, settings: InputSettings) -> list[str]:
    """The names in the header line."""
    records = parse(io.BytesIO(head(file, settings, DENSITY_BYTES).data))
    names = header_names(file.path, next(records, []))
    for name in names:
        _check_text(file.path, name)
    return names


def csv_schema(files: Sequence[InputFile], settings: InputSettings) -> dict[str, pa.DataType]:
    """Column → type: int64, double or bool where every sampled value is one, else text."""
    kinds: dict[str, set[str]] = {}
    for file in files:
        sample = head(file, settings)
        records = parse(io.BytesIO(sample.data))
        names = header_names(file.path, next(records, []))
        rows = []
        for record in records:
            rows.append(record)
            if len(rows) > SAMPLE_ROWS:
                break
        if not sample.complete or len(rows) > SAMPLE_ROWS:
            rows = rows[:-1]  # may be cut off
        for name in names:
            kinds.setdefault(name, set())
        for record in rows:
            if isinstance(record, list):
                for name, text in zip(names, record, strict=False):
                    if text:
                        kinds[name].add(_csv_kind(text))
    return {name: _csv_type(found) for name, found in kinds.items()}


def _csv_kind(text: str) -> str:
    if text.lower() in ("true", "false"):
        return "bool"
    digits = text.strip().lstrip("+-")
    if INTEGER.fullmatch(text.strip()):
        # 007 is a code, and what int64 cannot hold is an id: as numbers both would lose digits
        return "int" if (digits == "0" or digits[0] != "0") and abs(int(text)) < 1 << 63 else "text"
    return "float" if NUMBER.fullmatch(text.strip()) else "text"


def _csv_type(kinds: set[str]) -> pa.DataType:
    if kinds == {"int"}:
        return pa.int64()
    if kinds and kinds <= {"int", "float"}:
        return pa.float64()
    return pa.bool_() if kinds == {"bool"} else pa.string()


def _check_text(path: str, name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise InputError(f"{path}: the column name {name!a} is not UTF-8; rename it") from None
