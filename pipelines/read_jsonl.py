"""Rows of a JSON Lines file by byte range. A range owns the lines whose first byte lies in it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import pyarrow as pa

from pipelines.columns import RowErrors, build_column, rows_schema
from pipelines.contracts import Span
from pipelines.source import BLOCK, open_span

#: Rows, and bytes of text, that are Python objects at once.
_ROWS, _BYTES = 8192, 32 << 20
#: Read beyond the end of a range at once, for the last line.
_TAIL = 64 << 10
_BOM = b"\xef\xbb\xbf"
#: Field metadata of a column of objects without fixed keys: each value is carried as its JSON text.
JSON_TEXT = {b"dray.json": b"text"}

Convert = Callable[[Any], Any]


def read_jsonl(span: Span, schema: pa.Schema, options: dict[str, Any], *, strict: bool) -> Iterator[pa.Table]:
    """The span's rows in order, as chunks of `schema` + row_id, error_code, error_message.

    Blank lines are no rows. `strict`: a key that `schema` does not have is the row's error.
    """
    record = Record(schema, strict=strict)
    with open_span(span, options) as file:
        chunk: list[tuple[int, bytes]] = []
        size = 0
        for offset, line in _lines(file, span):
            chunk.append((offset, line))
            size += len(line)
            if len(chunk) >= _ROWS or size >= _BYTES:
                yield record.table(chunk, span.path)
                chunk, size = [], 0
        if chunk:
            yield record.table(chunk, span.path)


def _lines(file: BinaryIO, span: Span) -> Iterator[tuple[int, bytes]]:
    """(offset of the first byte, line without its end) of each line that is not blank."""
    start, stop = (span.start, span.stop) if span.unit == "bytes" else (0, None)
    if start:
        file.seek(start - 1)  # a newline right before `start` means that a line begins there
    position, rest, skipping = max(start - 1, 0), b"", start > 0
    while stop is None or position < stop:
        block = file.read(BLOCK if stop is None else min(BLOCK, stop - position + _TAIL))
        if not block:
            last = _unmarked(position, rest)
            if last.strip() and not skipping:
                yield position, last
            return
        *lines, rest = (rest + block).split(b"\n") if b"\n" in block else (rest + block,)
        for line in lines:
            begin, position = position, position + len(line) + 1
            if skipping:
                skipping = False
            elif stop is not None and begin >= stop:
                return
            else:
                text = _unmarked(begin, line)
                if text.strip():
                    yield begin, text


def _unmarked(begin: int, line: bytes) -> bytes:
    return line.removeprefix(_BOM) if begin == 0 else line


class Record:
    """Turns lines into columns of one schema."""

    def __init__(self, schema: pa.Schema, *, strict: bool) -> None:
        self.schema = schema
        self.strict = strict
        self._converters = [(item.name, _converter(item)) for item in schema]
        self._known = frozenset(schema.names)

    def table(self, lines: list[tuple[int, bytes]], path: str) -> pa.Table:
        """One row per (offset, line)."""
        errors = RowErrors()
        columns: list[list[Any]] = [[None] * len(lines) for _ in self._converters]
        for row, (_, line) in enumerate(lines):
            self._fill(row, line, columns, errors)
        arrays = [
            build_column(values, item, errors) for values, item in zip(columns, self.schema, strict=True)
        ]
        row_ids = pa.array([f"{path}#{offset}" for offset, _ in lines], pa.string())
        return pa.table([*arrays, row_ids, *errors.columns(0, len(lines))], schema=rows_schema(self.schema))

    def _fill(self, row: int, line: bytes, columns: list[list[Any]], errors: RowErrors) -> None:
        try:
            # surrogateescape: one bad byte costs its own value (see build_column), not the whole line
            found = json.loads(line.decode("utf-8", "surrogateescape"))
        except (ValueError, RecursionError) as error:
            errors.add(row, "invalid_row", f"not JSON: {error}")
            return
        if type(found) is not dict:
            errors.add(row, "invalid_row", f"not a JSON object but {_shown(found)}")
            return
        for i, (name, convert) in enumerate(self._converters):
            value = found.get(name)
            if value is None:
                continue
            try:
                columns[i][row] = convert(value)
            except Misfit as misfit:
                errors.add(row, "invalid_row", f"column {name!r}{misfit.place}: {misfit.problem}")
        if self.strict and not self._known.issuperset(found):
            extra = next(key for key in found if key not in self._known)
            errors.add(row, "invalid_row", f"key {extra!r} is not in the planned columns; see input.columns")


class Misfit(Exception):
    """A JSON value that its column's type cannot hold; `place` is the path inside the column."""

    def __init__(self, problem: str, place: str = "") -> None:
        super().__init__(problem)
        self.problem, self.place = problem, place


def _converter(item: pa.Field) -> Convert:
    type_ = item.type
    if (item.metadata or {}).get(b"dray.json") == b"text":
        return json.dumps
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    if pa.types.is_string(type_) or pa.types.is_large_string(type_):
        return _exactly(str, "text")
    if pa.types.is_boolean(type_):
        return _exactly(bool, "true or false")
    if pa.types.is_integer(type_):
        return _integer(type_)
    if pa.types.is_floating(type_):
        return _floating(type_)
    if pa.types.is_struct(type_):
        return _struct(type_)
    if pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_):
        return _list(type_)
    return _other(type_)


def _exactly(kind: type, wanted: str) -> Convert:
    def convert(value: Any) -> Any:
        if type(value) is not kind:
            raise Misfit(f"{_shown(value)} where {wanted} is expected")
        return value

    return convert


def _integer(type_: pa.DataType) -> Convert:
    signed = pa.types.is_signed_integer(type_)
    low = -(1 << (type_.bit_width - 1)) if signed else 0
    high = (1 << (type_.bit_width - signed)) - 1

    def convert(value: Any) -> int:
        if type(value) is float and value.is_integer():  # some writers have no integers
            value = int(value)
        if type(value) is not int or not low <= value <= high:
            raise Misfit(f"{_shown(value)} where {type_} is expected")
        return value

    return convert


def _floating(type_: pa.DataType) -> Convert:
    exact = {16: 1 << 11, 32: 1 << 24, 64: 1 << 53}[type_.bit_width]

    def convert(value: Any) -> float:
        if type(value) is int and -exact <= value <= exact:
            return float(value)
        if type(value) is not float:
            raise Misfit(f"{_shown(value)} where {type_} is expected")
        return value

    return convert


def _struct(type_: pa.StructType) -> Convert:
    fields = {type_.field(i).name: _converter(type_.field(i)) for i in range(type_.num_fields)}

    def convert(value: Any) -> dict[str, Any]:
        if type(value) is not dict:
            raise Misfit(f"{_shown(value)} where an object is expected")
        out = {}
        for name, inner in value.items():
            if name not in fields:
                raise Misfit("this key is not in the planned type", f".{name}")
            try:
                out[name] = None if inner is None else fields[name](inner)
            except Misfit as misfit:
                raise Misfit(misfit.problem, f".{name}{misfit.place}") from None
        return out

    return convert


def _list(type_: Any) -> Convert:
    item = _converter(type_.value_field)

    def convert(value: Any) -> list[Any]:
        if type(value) is not list:
            raise Misfit(f"{_shown(value)} where a list is expected")
        out = []
        for i, inner in enumerate(value):
            try:
                out.append(None if inner is None else item(inner))
            except Misfit as misfit:
                raise Misfit(misfit.problem, f"[{i}]{misfit.place}") from None
        return out

    return convert


def _other(type_: pa.DataType) -> Convert:
    """Types that JSON has no word for; the schema has them from Parquet files of the same input."""

    def convert(value: Any) -> Any:
        try:
            return pa.scalar(value, type_).as_py()
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            raise Misfit(f"{_shown(value)} where {type_} is expected") from None

    return convert


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else text[:60] + "…"
