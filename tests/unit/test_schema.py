"""The schema that files of an input have together, and whether later files keep to it."""

from __future__ import annotations

from collections.abc import Iterable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipelines.errors import InputError
from pipelines.listing import list_files
from pipelines.schema import conform, conform_all, infer_schema, merge_types
from pipelines.settings import InputSettings
from tests.unit.test_listing import lines, parquet, text

# ── The schema ──────────────────────────────────────────────────────────────────────────────────────────────────


def schema_of(path: Path | str, needed: Iterable[str] = (), **settings: Any) -> pa.Schema:
    given = InputSettings(path=str(path), **settings)
    return infer_schema(list_files(given, frozenset(needed)), given, frozenset(needed))


def test_parquet_types_are_carried_as_they_are(tmp_path: Path) -> None:
    schema = pa.schema(
        [
            pa.field("large", pa.large_string()),
            pa.field("kind", pa.dictionary(pa.int32(), pa.string())),
            pa.field("price", pa.decimal128(12, 3)),
            pa.field("at", pa.timestamp("us", "Europe/Berlin")),
            pa.field(
                "meta", pa.struct([("a", pa.list_(pa.int16())), ("b", pa.map_(pa.string(), pa.float32()))])
            ),
            pa.field("raw", pa.binary()),
            pa.field("fixed", pa.list_(pa.float32(), 3)),
        ]
    )
    parquet(tmp_path / "a.parquet", schema.empty_table())
    assert schema_of(tmp_path).equals(schema)


def test_columns_are_nullable_and_without_metadata(tmp_path: Path) -> None:
    schema = pa.schema(
        [pa.field("x", pa.int64(), nullable=False, metadata={"a": "b"})], metadata={"pandas": "{}"}
    )
    parquet(tmp_path / "a.parquet", schema.empty_table())
    assert schema_of(tmp_path).equals(pa.schema([("x", pa.int64())]), check_metadata=True)


def test_a_column_that_is_null_everywhere_is_text(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", pa.table({"x": pa.nulls(1), "y": pa.nulls(1)}))
    parquet(tmp_path / "b.parquet", pa.table({"x": pa.nulls(1), "y": [1]}))
    assert schema_of(tmp_path).equals(pa.schema([("x", pa.string()), ("y", pa.int64())]))


def test_small_dictionary_indices_are_widened(tmp_path: Path) -> None:
    """Each file's 100 values fit int8, those of a shard with both files do not."""
    for name in ("a", "b"):
        column = (
            pa.array([f"{name}{i}" for i in range(100)])
            .dictionary_encode()
            .cast(pa.dictionary(pa.int8(), pa.string()))
        )
        parquet(tmp_path / f"{name}.parquet", pa.table({"x": column}))
    assert schema_of(tmp_path).field("x").type == pa.dictionary(pa.int32(), pa.string())


DICT = pa.dictionary(pa.int32(), pa.string())


@pytest.mark.parametrize(
    ("a", "b", "merged"),
    [
        (pa.int32(), pa.int64(), pa.int64()),
        (pa.string(), pa.large_string(), pa.large_string()),
        (pa.int64(), pa.float64(), pa.float64()),
        (pa.null(), pa.int8(), pa.int8()),
        (pa.timestamp("s"), pa.timestamp("us"), pa.timestamp("us")),
        (pa.decimal128(5, 2), pa.decimal128(10, 4), pa.decimal128(10, 4)),
        (
            pa.struct([("a", pa.int32())]),
            pa.struct([("b", pa.int32())]),
            pa.struct([("a", pa.int32()), ("b", pa.int32())]),
        ),
        (pa.list_(pa.int32()), pa.list_(pa.int64()), pa.list_(pa.int64())),
        (DICT, pa.string(), pa.string()),
        (DICT, pa.dictionary(pa.int8(), pa.large_string()), pa.dictionary(pa.int32(), pa.large_string())),
        (pa.int64(), pa.string(), None),
        (pa.bool_(), pa.int64(), None),
        (pa.binary(), pa.string(), None),
        (pa.uint64(), pa.int64(), None),
        (pa.decimal128(5, 2), pa.float64(), None),
        (pa.timestamp("s"), pa.timestamp("s", "UTC"), None),
        (DICT, pa.int64(), None),
    ],
)
def test_types_merge_without_loss_or_not_at_all(
    a: pa.DataType, b: pa.DataType, merged: pa.DataType | None
) -> None:
    assert merge_types(a, b) == merged
    assert merge_types(b, a) in (merged, None if merged is None else merge_types(b, a))
    assert (merge_types(b, a) is None) == (merged is None)


def test_an_extra_column_is_refused_and_input_columns_is_the_way_out(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", pa.table({"x": [1], "y": [1]}))
    parquet(tmp_path / "b.parquet", pa.table({"x": [1]}))  # a missing one is null
    parquet(tmp_path / "c.parquet", pa.table({"x": [1], "z": [1]}))
    with pytest.raises(InputError) as caught:
        schema_of(tmp_path)
    for part in ("c.parquet: column 'z' is not in", "a.parquet", "input.columns"):
        assert part in str(caught.value)
    assert schema_of(tmp_path, columns=["x"]).names == ["x"]
    assert schema_of(tmp_path, columns=["z", "x"]).names == ["z", "x"]


def test_an_incompatible_column_is_refused(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", pa.table({"x": [1], "y": [1]}))
    parquet(tmp_path / "b.parquet", pa.table({"x": ["1"], "y": [1]}))
    with pytest.raises(InputError) as caught:
        schema_of(tmp_path)
    for part in ("b.parquet: column 'x' is string, but int64 in", "a.parquet", "input.columns"):
        assert part in str(caught.value)
    assert schema_of(tmp_path, columns=["y"]).names == ["y"]


def test_needed_columns_are_read_beside_the_listed_ones(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", pa.table({"x": [1], "y": [1], "z": [1]}))
    assert schema_of(tmp_path, needed={"z"}, columns=["x"]).names == ["x", "z"]
    assert schema_of(tmp_path, needed={"z"}).names == ["x", "y", "z"]
    with pytest.raises(InputError, match="unknown column 'zz'"):
        schema_of(tmp_path, needed={"zz"})
    with pytest.raises(InputError, match="unknown column 'xx'; did you mean 'x'"):
        schema_of(tmp_path, columns=["xx"])


def test_jsonl_types_come_from_a_sample(tmp_path: Path) -> None:
    text(
        tmp_path / "a.jsonl",
        "\ufeff"
        + lines(
            {"id": 1, "score": 1, "doc": None, "none": None, "meta": {"a": [1]}, "tags": [], "free": {}},
            {"id": 2, "score": 0.5, "doc": "x", "meta": {"b": "y"}, "ok": True, "at": "2026-01-01T00:00:00"},
        )
        + "no json\n",
    )
    text(tmp_path / "b.jsonl.gz", lines({"id": 3, "doc": "x", "late": "y"}))
    text(tmp_path / "c.jsonl", "")
    schema = schema_of(tmp_path)
    assert schema.equals(
        pa.schema(
            [
                ("id", pa.int64()),
                ("score", pa.float64()),
                ("doc", pa.string()),
                ("none", pa.string()),
                ("meta", pa.struct([("a", pa.list_(pa.int64())), ("b", pa.string())])),
                ("tags", pa.list_(pa.string())),
                ("free", pa.string()),
                ("ok", pa.bool_()),
                ("at", pa.string()),  # text stays text
                ("late", pa.string()),
            ]
        )
    )


def test_of_several_kinds_of_value_the_commonest_is_the_type(tmp_path: Path) -> None:
    text(tmp_path / "a.jsonl", lines({"x": "bad"}, *({"x": i} for i in range(5))))
    assert schema_of(tmp_path).field("x").type == pa.int64()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('[{"a": 1},\n {"a": 2}]\n', "a JSON array"),
        ('{\n"a": 1\n}\n', "no line is a JSON object"),
        ("hello\n", "jq"),
    ],
)
def test_what_is_no_json_lines_is_refused(tmp_path: Path, content: str, said: str) -> None:
    text(tmp_path / "a.json", content)
    with pytest.raises(InputError, match=said):
        schema_of(tmp_path)


def test_csv_types_come_from_a_sample(tmp_path: Path) -> None:
    text(
        tmp_path / "a.csv",
        'id,score,zip,ok,mixed,empty,doc\n1,0.5,01234,true,1,,"a\nb, c"\n2,,9999,false,x,,d\n',
    )
    text(tmp_path / "b.csv.gz", "id,score\n3,7\n")
    assert schema_of(tmp_path).equals(
        pa.schema(
            [
                ("id", pa.int64()),
                ("score", pa.float64()),
                ("zip", pa.string()),
                ("ok", pa.bool_()),
                ("mixed", pa.string()),
                ("empty", pa.string()),
                ("doc", pa.string()),
            ]
        )
    )


def test_csv_headers_are_held_to_the_first(tmp_path: Path) -> None:
    text(tmp_path / "a.csv", "x\n1\n")
    text(tmp_path / "b.csv", "x,y\n1,2\n")
    with pytest.raises(InputError, match=r"b\.csv: column 'y' is not in .*a\.csv"):
        schema_of(tmp_path)
    text(tmp_path / "b.csv", "x,x\n1,2\n")
    with pytest.raises(InputError, match=r"b\.csv: two columns are named 'x'"):
        schema_of(tmp_path)


def test_formats_go_together(tmp_path: Path) -> None:
    parquet(
        tmp_path / "a.parquet",
        pa.table({"id": pa.array([1], pa.int32()), "doc": pa.array(["x"], pa.large_string())}),
    )
    text(tmp_path / "b.jsonl", lines({"id": 1, "doc": "x"}))
    text(tmp_path / "c.csv", "id,doc\n1,x\n")
    assert schema_of(tmp_path).equals(pa.schema([("id", pa.int64()), ("doc", pa.large_string())]))


# ── Later runs ──────────────────────────────────────────────────────────────────────────────────────────────────

PINNED = pa.schema([("id", pa.int64()), ("kind", DICT), ("doc", pa.string())])


@pytest.mark.parametrize(
    "schema",
    [
        PINNED,
        pa.schema([("doc", pa.string())]),
        pa.schema([("id", pa.int8()), ("kind", pa.string()), ("doc", pa.null())]),
        pa.schema([("doc", DICT)]),
    ],
)
def test_conforming_files(schema: pa.Schema) -> None:
    conform("new", schema, PINNED, InputSettings(path="x"))


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        (pa.schema([("id", pa.float64())]), "new: column 'id' is double, but int64 is planned"),
        (pa.schema([("kind", pa.int64())]), "new: column 'kind' is int64"),
        (pa.schema([("doc", pa.large_string())]), "new: column 'doc' is large_string"),
        (pa.schema([("more", pa.int64())]), "new: column 'more' is not in the planned schema"),
    ],
)
def test_files_that_do_not_conform(schema: pa.Schema, said: str) -> None:
    with pytest.raises(InputError, match=said):
        conform("new", schema, PINNED, InputSettings(path="x"))


def test_input_columns_leaves_extra_columns_of_later_files_out() -> None:
    conform("new", pa.schema([("more", pa.int64())]), PINNED, InputSettings(path="x", columns=["id"]))


def test_later_files_of_all_formats_are_held_to_the_pinned_schema(tmp_path: Path) -> None:
    settings = InputSettings(path=str(tmp_path))
    parquet(tmp_path / "a.parquet", pa.table({"id": [1]}))
    text(tmp_path / "b.csv", "id,doc\nx,1\n")  # its values are its rows' affair
    text(tmp_path / "c.jsonl", lines({"id": None, "more": 1}))
    conform_all(list_files(settings), PINNED, settings)
    text(tmp_path / "d.csv", "id,more\n1,1\n")
    with pytest.raises(InputError, match=r"d\.csv: column 'more'"):
        conform_all(list_files(settings), PINNED, settings)
    (tmp_path / "d.csv").unlink()
    parquet(tmp_path / "e.parquet", pa.table({"id": [Decimal("1.5")]}))
    with pytest.raises(InputError, match=r"e\.parquet: column 'id' is decimal"):
        conform_all(list_files(settings), PINNED, settings)
