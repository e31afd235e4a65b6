"""The input schema: which columns are read and as what types, pinned at the first plan.

Types are merged over the files only where no value can change its meaning (int32 → int64, string → large_string,
a struct that gained a field); integers may become doubles, and a value that no double can hold is its row's error.
A column that a later file lacks is null there; an extra or incompatible one is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import pyarrow as pa

from pipelines.contracts import InputFile
from pipelines.errors import InputError
from pipelines.read_parquet import footer_of
from pipelines.sample import csv_columns, csv_schema, jsonl_schema, spread
from pipelines.settings import InputSettings
from pipelines.wording import printable, unknown

#: CSV files whose header lines planning reads; the others are checked when they are read.
_HEADERS = 64
WAY_OUT = "name the columns to read in input.columns, or convert the file"


def infer_schema(
    files: Sequence[InputFile], settings: InputSettings, needed: frozenset[str] = frozenset()
) -> pa.Schema:
    """The columns of `files`, all nullable: of Parquet by the footers, of JSONL and CSV by a sample.

    With `input.columns`: those, in that order, then what `needed` names beyond them (columns of the filter and the
    prompt; they are read and carried like the others). Raises InputError for files that do not go together and for
    columns that no file has.
    """
    merged = _Merged(wanted_columns(settings, needed))
    for path, schema in _schemas(files, settings):
        merged.add(path, schema)
    return merged.schema(needed | frozenset(settings.columns or ()))


def wanted_columns(settings: InputSettings, needed: frozenset[str]) -> tuple[str, ...] | None:
    """Names of the columns to read, in order; None for all."""
    if settings.columns is None:
        return None
    return (*dict.fromkeys(settings.columns), *sorted(needed - set(settings.columns)))


def conform(path: str, schema: pa.Schema, pinned: pa.Schema, settings: InputSettings) -> None:
    """Check a file's schema against the pinned one. Raises InputError for an extra or incompatible column."""
    check_names(path, schema.names)
    for item in schema:
        if item.name not in pinned.names:
            if settings.columns is None:
                raise InputError(
                    f"{path}: column {item.name!r} is not in the planned schema ({_shown(pinned.names)}); "
                    "set input.columns to the planned columns to leave it out"
                )
            continue
        planned = pinned.field(item.name).type
        if not _fits(item.type, planned):
            raise InputError(
                f"{path}: column {item.name!r} is {item.type}, but {planned} is planned; "
                "convert the file, or start a new output"
            )


def conform_all(files: Sequence[InputFile], pinned: pa.Schema, settings: InputSettings) -> None:
    """`conform` for the files of a later listing: Parquet by the footers, CSV by the header lines of some of them.

    JSONL has no header: an extra key or another type is its row's error.
    """
    for path, schema in _schemas([file for file in files if file.format == "parquet"], settings):
        conform(path, schema, pinned, settings)
    for file in spread([file for file in files if file.format == "csv" and file.size], most=_HEADERS):
        names = csv_columns(file, settings)
        types = {name: pinned.field(name).type for name in names if name in pinned.names}
        conform(
            file.path, pa.schema([(name, types.get(name, pa.string())) for name in names]), pinned, settings
        )


def _fits(found: pa.DataType, planned: pa.DataType) -> bool:
    if pa.types.is_dictionary(planned):
        return _fits(found.value_type if pa.types.is_dictionary(found) else found, planned.value_type)
    return bool(merge_types(planned, found) == planned)


def check_names(path: str, names: Sequence[str]) -> None:
    """Raises InputError when two columns share a name: neither the prompt nor the output could tell them apart."""
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{path}: two columns are named {twice!r}; rename one")


def merge_types(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    """The type that holds the values of both; None where there is none."""
    if a == b:
        return a
    if pa.types.is_dictionary(a) or pa.types.is_dictionary(b):
        x = a.value_type if pa.types.is_dictionary(a) else a
        y = b.value_type if pa.types.is_dictionary(b) else b
        values = merge_types(x, y)
        both = pa.types.is_dictionary(a) and pa.types.is_dictionary(b)
        return pa.dictionary(pa.int32(), values) if both and values is not None else values
    if _loses(a, b) or _loses(b, a):
        return None
    try:
        schemas = [pa.schema([("x", a)]), pa.schema([("x", b)])]
        return pa.unify_schemas(schemas, promote_options="permissive").field("x").type
    except (pa.ArrowTypeError, pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return None


def _loses(a: pa.DataType, b: pa.DataType) -> bool:
    """Pairs that Arrow's "permissive" merging accepts although values or their meaning would be lost."""
    types = pa.types
    if types.is_uint64(a) and types.is_signed_integer(b):
        return True
    if types.is_decimal(a) and types.is_floating(b):
        return True
    is_binary = types.is_binary(a) or types.is_large_binary(a)
    return bool(is_binary and (types.is_string(b) or types.is_large_string(b)))


class _Merged:
    """Columns as they come together file by file, and which file each came from."""

    def __init__(self, wanted: tuple[str, ...] | None) -> None:
        self.wanted = wanted
        self.fields: dict[str, pa.Field] = {}
        self.source: dict[str, str] = {}
        self.first: str | None = None
        self.seen: dict[str, None] = {}

    def add(self, path: str, schema: pa.Schema) -> None:
        check_names(path, schema.names)
        self.seen.update(dict.fromkeys(schema.names))
        for item in schema:
            if self.wanted is not None and item.name not in self.wanted:
                continue
            if item.name not in self.fields:
                if self.first is not None and self.wanted is None:
                    raise InputError(f"{path}: column {item.name!r} is not in {self.first}; {WAY_OUT}")
                self.fields[item.name] = _pinnable(item)
                self.source[item.name] = path
                continue
            known = self.fields[item.name]
            type_ = merge_types(known.type, item.type)
            if type_ is None:
                raise InputError(
                    f"{path}: column {item.name!r} is {item.type}, but {known.type} in "
                    f"{self.source[item.name]}; {WAY_OUT}"
                )
            self.fields[item.name] = known.with_type(type_)
        self.first = self.first or path

    def schema(self, required: Iterable[str]) -> pa.Schema:
        for name in sorted(required):
            if name not in self.fields:
                raise InputError(f"input: {unknown(name, self.seen)}")
        fields = [self.fields[name] for name in self.wanted or self.fields]
        # null in every file: nothing tells the type, and later files must be able to have values
        return pa.schema([f.with_type(pa.string()) if pa.types.is_null(f.type) else f for f in fields])


def _pinnable(item: pa.Field) -> pa.Field:
    """Nullable (a row that cannot be read is null) and without writers' metadata."""
    type_ = item.type
    if pa.types.is_dictionary(type_):
        type_ = pa.dictionary(pa.int32(), type_.value_type)  # int8 indices overflow when files come together
    own = {key: value for key, value in (item.metadata or {}).items() if key.startswith(b"dray.")}
    return pa.field(item.name, type_, nullable=True, metadata=own or None)


def _schemas(files: Sequence[InputFile], settings: InputSettings) -> Iterator[tuple[str, pa.Schema]]:
    """(path, schema) of each distinct Parquet schema and of the sampled text files, in input order."""
    csv = [file for file in files if file.format == "csv" and file.size]
    csv_sample = csv_schema(spread(csv), settings) if csv else None
    jsonl_done, seen = False, set[pa.Schema]()
    headers = {file.path for file in spread(csv, most=_HEADERS)}
    for file in files:
        if file.format == "parquet":
            schema = file.schema or footer_of(file.path, settings.storage_options).schema
            if schema not in seen:
                seen.add(schema)
                yield file.path, schema
        elif file.format == "jsonl" and not jsonl_done:
            # Lines are sparse where tables are not: the sampled files count as one, with the union of their keys.
            jsonl_done = True
            found = jsonl_schema(spread([f for f in files if f.format == "jsonl" and f.size]), settings)
            if found is not None:
                yield file.path, found
        elif file.format == "csv" and csv_sample is not None and file.path in headers:
            names = csv_columns(file, settings)
            yield file.path, pa.schema([(n, csv_sample.get(n, pa.string())) for n in names])


def _shown(names: Sequence[str]) -> str:
    return printable(", ".join(names[:8])) + (", …" if len(names) > 8 else "")
