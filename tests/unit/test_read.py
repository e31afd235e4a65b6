"""Rows of a shard: each exactly once and in order, whatever the format; and what happens to rows that cannot be read."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs.cutting import cut
from pipelines import read_jsonl
from pipelines.contracts import ERROR_FIELDS, ROW_ID, Shard, pack, unpack
from pipelines.errors import InputError, SpecError
from pipelines.listing import list_files
from pipelines.read import Rows, read_shard
from pipelines.schema import infer_schema
from pipelines.settings import InputSettings


def read_all(
    path: Path | str, schema: pa.Schema | None = None, rows: int | str = "auto", **options: Any
) -> Rows:
    """All shards of the input, one after the other."""
    given = InputSettings(path=str(path), **options)
    files = list_files(given)
    schema = schema if schema is not None else infer_schema(files, given)
    shards = cut(files, "", rows=rows)  # type: ignore[arg-type]
    found = [read_shard(shard, given, schema) for shard in shards]
    table = pa.concat_tables([one.table for one in found])
    table.validate(full=True)
    return Rows(table, sum(one.rows_read for one in found), sum(one.rows_filtered for one in found))


def errors(rows: Rows) -> list[str | None]:
    return rows.table["error_code"].to_pylist()


def bad_strings(*values: bytes | None) -> pa.Array:
    """A string array that nobody has validated, as Parquet gives it."""
    return pa.array(values, pa.binary()).view(pa.string()) if None not in values else _view(values)


def _view(values: tuple[bytes | None, ...]) -> pa.Array:
    binary = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(binary), binary.buffers(), binary.null_count)


# ── Parquet ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_rows_have_their_columns_and_place(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"b": [1, 2, 3], "a": ["x", "y", None]}), path, row_group_size=2)
    rows = read_all(path)
    assert rows.table.schema.equals(pa.schema([("b", pa.int64()), ("a", pa.string()), ROW_ID, *ERROR_FIELDS]))
    assert rows.table.to_pylist() == [
        {"b": b, "a": a, "row_id": f"{path}#{i}", "error_code": None, "error_message": None}
        for i, (b, a) in enumerate([(1, "x"), (2, "y"), (3, None)])
    ]


def test_only_the_needed_columns_and_row_groups_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np

    noise = np.random.default_rng(0).bytes(1 << 20)
    table = pa.table({"id": range(16), "big": [noise[i::16] for i in range(16)], "small": ["x"] * 16})
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, row_group_size=4, use_dictionary=False)
    given = InputSettings(path=str(path), columns=["id", "big"])
    (file,) = list_files(given)
    schema = infer_schema([file], given)
    shard = cut([file], "", rows=4)[2]
    read = 0

    import pipelines.source as source

    def counting(path: str, options: dict[str, Any]) -> Any:
        class Counting(io.FileIO):
            def readinto(self, buffer: Any) -> int:
                nonlocal read
                n = super().readinto(buffer)
                read += n or 0
                return n or 0

            def read(self, size: int = -1) -> bytes:
                nonlocal read
                data = super().read(size)
                read += len(data)
                return data

        return Counting(path)

    monkeypatch.setattr(source, "open_binary", counting)
    rows = read_shard(shard, given, schema)
    assert rows.table["id"].to_pylist() == [8, 9, 10, 11]
    assert (1 << 18) < read < 1.3 * (1 << 18)
    read = 0
    assert (
        read_shard(shard, given.model_copy(update={"columns": ["id"]}), schema.remove(1)).table.num_rows == 4
    )
    assert read < (1 << 16) + 20_000  # Arrow looks for the footer in the last 64 KB


def test_a_missing_column_is_null_and_types_are_widened(tmp_path: Path) -> None:
    schema = pa.schema(
        [
            ("id", pa.int64()),
            ("doc", pa.large_string()),
            ("kind", pa.dictionary(pa.int32(), pa.string())),
            ("meta", pa.struct([("a", pa.int64()), ("b", pa.string())])),
            ("turns", pa.list_(pa.struct([("role", pa.string()), ("n", pa.int64())]))),
            ("gone", pa.list_(pa.int8())),
        ]
    )
    table = pa.table(
        {
            "id": pa.array([1, 2], pa.int8()),
            "doc": ["x", None],
            "kind": ["p", "q"],
            "meta": [{"a": 1}, None],
            "turns": [[{"role": "user"}], []],
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    rows = read_all(tmp_path, schema)
    assert rows.table.drop_columns(["row_id", "error_code", "error_message"]).schema.equals(schema)
    assert errors(rows) == [None, None]
    assert rows.table["meta"].to_pylist() == [{"a": 1, "b": None}, None]
    assert rows.table["turns"].to_pylist() == [[{"role": "user", "n": None}], []]
    assert rows.table["gone"].null_count == 2


def test_a_file_with_none_of_the_columns_still_has_its_rows(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": range(10_000)}), tmp_path / "a.parquet", row_group_size=3000)
    rows = read_all(tmp_path, pa.schema([("y", pa.string())]), rows=4000, columns=["y"])
    assert rows.table["row_id"].to_pylist() == [f"{tmp_path}/a.parquet#{i}" for i in range(10_000)]
    assert rows.table["y"].null_count == 10_000


def test_dictionaries_of_several_row_groups_travel(tmp_path: Path) -> None:
    for name in "ab":
        table = pa.table({"kind": pa.array([f"{name}{i % 100}" for i in range(300)]).dictionary_encode()})
        table = table.set_column(0, "kind", table["kind"].cast(pa.dictionary(pa.int8(), pa.string())))
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=50)
    rows = read_all(tmp_path)
    assert unpack(pack(rows.table))["kind"].to_pylist() == [f"{n}{i % 100}" for n in "ab" for i in range(300)]


def test_text_that_is_not_utf8_becomes_null_and_an_error(tmp_path: Path) -> None:
    n = 10_000
    docs = bad_strings(*(b"\xff\xfe" if i in (3, 9_000) else None if i == 4 else b"ok" for i in range(n)))
    nested = pa.ListArray.from_arrays(pa.array(range(n + 1), pa.int32()), docs)
    struct = pa.StructArray.from_arrays([docs], ["s"])
    pq.write_table(pa.table({"doc": docs, "id": range(n)}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"list": nested, "struct": struct}), tmp_path / "b.parquet")
    for name in ("a.parquet", "b.parquet"):
        rows = read_all(tmp_path / name)
        assert [i for i, code in enumerate(errors(rows)) if code] == [3, 9_000], name
        assert set(errors(rows)) == {None, "invalid_utf8"}
        pq.write_table(rows.table, tmp_path / "out.parquet")
        pq.read_table(tmp_path / "out.parquet").validate(full=True)
    rows = read_all(tmp_path / "a.parquet")
    assert rows.table["doc"].to_pylist()[2:6] == ["ok", None, None, "ok"]
    assert rows.table["id"].to_pylist() == list(range(n))
    assert "column 'doc'" in rows.table["error_message"][3].as_py()


def test_bad_text_in_a_dictionary(tmp_path: Path) -> None:
    pq.write_table(pa.table({"kind": bad_strings(b"ok", b"\xff", b"ok")}), tmp_path / "a.parquet")
    rows = read_all(tmp_path, pa.schema([("kind", pa.dictionary(pa.int32(), pa.string()))]))
    assert rows.table["kind"].to_pylist() == ["ok", None, "ok"]
    assert errors(rows) == [None, "invalid_utf8", None]


def test_a_number_that_no_double_holds_is_its_rows_error(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": [1, 2**53 + 1, None]}), tmp_path / "a.parquet")
    rows = read_all(tmp_path, pa.schema([("x", pa.float64())]))
    assert errors(rows) == [None, "invalid_row", None]
    assert rows.table["x"].to_pylist() == [1.0, None, None]


def test_a_damaged_page_is_an_input_error(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"x": [str(i) * 50 for i in range(1000)]}), path, compression="zstd")
    given = InputSettings(path=str(path))
    data = bytearray(path.read_bytes())
    data[50:500] = b"\xff" * 450
    path.write_bytes(data)
    files = list_files(given)
    with pytest.raises(InputError, match=r"a\.parquet: not readable as Parquet"):
        read_shard(cut(files, "")[0], given, infer_schema(files, given))


# ── JSONL ───────────────────────────────────────────────────────────────────────────────────────────────────────

JSON_SCHEMA = pa.schema(
    [
        ("doc", pa.string()),
        ("n", pa.int32()),
        ("x", pa.float64()),
        ("ok", pa.bool_()),
        ("meta", pa.struct([("a", pa.list_(pa.int64()))])),
    ]
)


@pytest.mark.parametrize(
    ("line", "row", "code", "said"),
    [
        ('{"doc": "a", "n": 1, "x": 1, "ok": true}', ("a", 1, 1.0, True, None), None, None),
        ('{"n": 1.0, "x": 0.5}', (None, 1, 0.5, None, None), None, None),
        ('{"meta": {"a": [1, null]}}', (None, None, None, None, {"a": [1, None]}), None, None),
        ('{"meta": {}}', (None, None, None, None, {"a": None}), None, None),
        ("{}", (None,) * 5, None, None),
        ('{"doc": 1, "n": 1}', (None, 1, None, None, None), "invalid_row", "column 'doc': 1 where text"),
        ('{"doc": "a", "n": 1.5}', ("a", None, None, None, None), "invalid_row", "1.5 where int32"),
        ('{"n": 3000000000}', (None,) * 5, "invalid_row", "3000000000 where int32"),
        ('{"n": true}', (None,) * 5, "invalid_row", "true where int32"),
        ('{"x": 9007199254740993}', (None,) * 5, "invalid_row", "where double"),
        ('{"ok": 1}', (None,) * 5, "invalid_row", "1 where true or false"),
        ('{"meta": {"a": ["b"]}}', (None,) * 5, "invalid_row", "column 'meta'.a[0]: \"b\" where int64"),
        ('{"meta": {"b": 1}}', (None,) * 5, "invalid_row", "column 'meta'.b: this key"),
        ('{"meta": [1]}', (None,) * 5, "invalid_row", "[1] where an object"),
        ('{"doc": "a", "more": 1}', ("a", None, None, None, None), "invalid_row", "key 'more'"),
        ("[1]", (None,) * 5, "invalid_row", "not a JSON object but [1]"),
        ("{", (None,) * 5, "invalid_row", "not JSON"),
        ("[" * 100_000, (None,) * 5, "invalid_row", "not JSON"),
        (b'{"doc": "\xff", "n": 1}', (None, 1, None, None, None), "invalid_utf8", "column 'doc'"),
        ('{"doc": "\\ud800", "n": 1}', (None, 1, None, None, None), "invalid_utf8", "column 'doc'"),
        (b'{"\xff": 1, "n": 1}', (None, 1, None, None, None), "invalid_row", "key"),
    ],
)
def test_jsonl_lines(
    tmp_path: Path, line: str | bytes, row: tuple[Any, ...], code: str | None, said: str | None
) -> None:
    """Each between two good ones, which keep their values and places."""
    path = tmp_path / "a.jsonl"
    good = b'{"doc": "good"}\n'
    odd = line.encode() if isinstance(line, str) else line
    path.write_bytes(good + odd + b"\n" + good)
    rows = read_all(path, JSON_SCHEMA)
    first, found, last = rows.table.to_pylist()
    assert tuple(found[name] for name in JSON_SCHEMA.names) == row
    assert found["error_code"] == code
    assert (said or "") in (found["error_message"] or "")
    assert (found["error_message"] is None) == (said is None)
    assert first["doc"] == last["doc"] == "good"
    assert [r["row_id"] for r in rows.table.to_pylist()] == [
        f"{path}#{offset}" for offset in (0, len(good), len(good) + len(odd) + 1)
    ]


def test_input_columns_lets_other_keys_pass(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"doc": "a", "more": 1}\n')
    assert errors(read_all(tmp_path, columns=["doc"])) == [None]


def test_objects_without_fixed_keys_are_carried_as_their_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"free": {}}\n{"free": null}\n{}\n')
    (tmp_path / "b.jsonl").write_text("")
    given = InputSettings(path=str(tmp_path))
    schema = infer_schema(list_files(given), given)
    (tmp_path / "a.jsonl").write_text('{"free": {"k": ["ö"]}}\n{"free": null}\n{}\n')
    rows = read_all(tmp_path, schema)
    assert [v and json.loads(v) for v in rows.table["free"].to_pylist()] == [{"k": ["ö"]}, None, None]
    pq.write_table(rows.table, tmp_path / "out.parquet")


# ── CSV ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_csv_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(
        b"\xef\xbb\xbfid,doc,ok\r\n"
        b'1,"a ""b"", c\r\nd",true\r\n'
        b"\r\n"
        b"x,e,FALSE\r\n"
        b",,\r\n"
        b"4,f\r\n"
        b"5,g,true,h\r\n"
        b"6,\xff,true\r\n"
        b'7,"i"j,true\r\n'
        b'8,"never closed,true\r\n9,k,true'
    )
    schema = pa.schema([("id", pa.int64()), ("doc", pa.string()), ("ok", pa.bool_())])
    rows = read_all(path, schema)
    found = [
        (r["id"], r["doc"], r["ok"], r["error_code"], (r["error_message"] or "")[:40])
        for r in rows.table.to_pylist()
    ]
    assert found == [
        (1, 'a "b", c\r\nd', True, None, ""),
        (None, "e", False, "invalid_row", "column 'id': 'x' where int64 is expected"),
        (None, "", None, None, ""),
        (4, "f", None, "invalid_row", "2 fields where the header has 3"),
        (5, "g", True, "invalid_row", "4 fields where the header has 3"),
        (6, None, True, "invalid_utf8", "column 'doc' holds bytes that are not UT"),
        (None, None, None, "invalid_row", "not CSV: ',' expected after '\"'"),
        (None, None, None, "invalid_row", "not CSV: unexpected end of data"),
    ]
    assert rows.table["row_id"].to_pylist() == [f"{path}#{i}" for i in range(8)]


def test_long_csv_fields_and_many_rows(tmp_path: Path) -> None:
    with open(tmp_path / "a.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["doc", "n"])
        writer.writerow(["x" * 1_000_000, 0])
        writer.writerows([f"line\n{i}", i] for i in range(1, 20_000))
    rows = read_all(tmp_path)
    assert rows.table["n"].to_pylist() == list(range(20_000))
    assert pc.all(pc.is_null(rows.table["error_code"])).as_py()
    assert rows.table["row_id"][-1].as_py() == f"{tmp_path}/a.csv#19999"


def test_an_unplanned_csv_column_is_refused_unless_columns_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("doc,more\na,1\n")
    schema = pa.schema([("doc", pa.string())])
    with pytest.raises(InputError, match="column 'more' is not in the planned schema"):
        read_all(tmp_path, schema)
    assert read_all(tmp_path, schema, columns=["doc"]).table["doc"].to_pylist() == ["a"]


# ── Any format ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_filter_comes_after_numbering_and_spares_errors(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = ['{"n": 1}', '{"n": 5}', "broken", '{"n": null}', '{"n": 7}']
    path.write_text("\n".join(lines))
    rows = read_all(path, pa.schema([("n", pa.int64())]), filter="n > 4")
    assert rows.table["n"].to_pylist() == [5, None, 7]
    assert errors(rows) == [None, "invalid_row", None]
    assert (rows.rows_read, rows.rows_filtered) == (5, 2)
    places = [sum(len(line) + 1 for line in lines[:i]) for i in (1, 2, 4)]
    assert rows.table["row_id"].to_pylist() == [f"{path}#{place}" for place in places]


def test_a_filter_that_names_no_column_of_the_input(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("n\n1\n")
    with pytest.raises(SpecError, match="unknown column 'm'"):
        read_all(tmp_path, filter="m > 1")


def test_a_column_of_the_input_may_be_called_row_id(tmp_path: Path) -> None:
    """Chained jobs: the added columns are the last three, by place."""
    table = pa.table({"row_id": ["mine", None], "error_code": ["e", None], "x": [1, 2]})
    pq.write_table(table, tmp_path / "a.parquet")
    rows = read_all(tmp_path, filter="row_id == 'mine' or x == 2")
    assert rows.table.column(0).to_pylist() == ["mine", None]
    assert rows.table.column(3).to_pylist() == [f"{tmp_path}/a.parquet#{i}" for i in (0, 1)]
    assert rows.rows_filtered == 0


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.csv.gz"])
def test_a_file_that_changed_or_vanished_since_it_was_planned(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write(path, ["x", "y"])
    given = InputSettings(path=str(path))
    files = list_files(given)
    schema, (shard,) = infer_schema(files, given), cut(files, "")
    read_shard(shard, given, schema)
    write(path, ["x", "z", "z"])
    with pytest.raises(InputError, match=r"changed since it was planned.*input\.on_changed"):
        read_shard(shard, given, schema)
    path.unlink()
    with pytest.raises(InputError, match="is gone since it was planned"):
        read_shard(shard, given, schema)


def test_a_gzip_file_that_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    data = gzip.compress(b"".join(b'{"doc": "%d"}\n' % i for i in range(100_000)))
    path.write_bytes(data)
    given = InputSettings(path=str(path))
    schema = pa.schema([("doc", pa.string())])
    path.write_bytes(data[:-1000])
    files = list_files(given)
    with pytest.raises(InputError, match=r"a\.jsonl\.gz: not readable as gzip"):
        read_shard(cut(files, "")[0], given, schema)


def write(
    path: Path, docs: list[str], group: int = 3, crlf: bool = False, last: bool = True, bom: bool = False
) -> None:
    """`docs` in the format of the ending."""
    end = b"\r\n" if crlf else b"\n"
    if path.name.endswith(".parquet"):
        pq.write_table(pa.table({"doc": pa.array(docs, pa.string())}), path, row_group_size=group)
        return
    if ".jsonl" in path.name:
        data = end.join(json.dumps({"doc": doc}).encode() for doc in docs) + (end if last and docs else b"")
    else:
        sink = io.StringIO()
        writer = csv.writer(sink, quoting=csv.QUOTE_ALL, lineterminator=end.decode())
        writer.writerow(["doc"])
        writer.writerows([doc] for doc in docs)
        data = sink.getvalue().encode()
    data = (b"\xef\xbb\xbf" if bom and data else b"") + data
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


ENDINGS = st.sampled_from(["parquet", "jsonl", "jsonl.gz", "csv", "csv.gz"])
FILES = st.lists(
    st.tuples(
        ENDINGS,
        st.lists(st.text("ab\n\"',é\r{}", max_size=12), max_size=40),
        st.integers(1, 12),
        st.booleans(),
        st.booleans(),
        st.booleans(),
    ),
    min_size=1,
    max_size=6,
)


@pytest.mark.slow
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(FILES, st.integers(1, 30), st.integers(1, 30), st.integers(1, 64), st.integers(1, 5))
def test_every_row_once_and_in_order_however_it_is_cut(
    tmp_path_factory: pytest.TempPathFactory,
    inputs: list[tuple[str, list[str], int, bool, bool, bool]],
    some: int,
    other: int,
    block: int,
    chunk: int,
) -> None:
    folder = tmp_path_factory.mktemp("in")
    expected: list[str] = []
    for i, (ending, docs, group, crlf, last, bom) in enumerate(inputs):
        write(folder / f"{i}.{ending}", docs, group, crlf, last, bom)
        expected += docs
    given = InputSettings(path=str(folder))
    files = list_files(given)
    schema = pa.schema([("doc", pa.string())])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read_jsonl, "BLOCK", block)  # lines over many blocks
        patch.setattr(read_jsonl, "_TAIL", block)
        patch.setattr(read_jsonl, "_ROWS", chunk)
        found: list[list[tuple[str, str]]] = []
        for rows in (some, other, "auto"):
            shards = cut(files, "", rows=rows)  # type: ignore[arg-type]
            tables = [read_shard(shard, given, schema).table for shard in shards]
            found.append(
                [
                    (row_id, doc)
                    for table in tables
                    for row_id, doc in zip(table["row_id"].to_pylist(), table["doc"].to_pylist(), strict=True)
                ]
            )
            assert all(shard.rows in (None, t.num_rows) for shard, t in zip(shards, tables, strict=True))
    assert [doc for _, doc in found[0]] == expected
    assert found[0] == found[1] == found[2]
    assert len({row_id for row_id, _ in found[0]}) == len(expected)


def test_byte_ranges_own_the_lines_that_begin_in_them(tmp_path: Path) -> None:
    """Every cut of a small file with all kinds of line ends, blank lines and no final newline."""
    path = tmp_path / "a.jsonl"
    data = b'\xef\xbb\xbf{"n": 0}\r\n\n{"n": 1}\n   \n\r\n{"n": 22}\n{"n": 3}'
    path.write_bytes(data)
    given = InputSettings(path=str(path))
    (file,) = list_files(given)
    schema = pa.schema([("n", pa.int64())])
    (whole,) = cut([file], "")
    wanted = read_shard(whole, given, schema).table
    assert wanted["n"].to_pylist() == [0, 1, 22, 3]
    offsets = [int(row_id.rpartition("#")[2]) for row_id in wanted["row_id"].to_pylist()]
    assert [data[offset:].lstrip(b"\xef\xbb\xbf")[:1] for offset in offsets] == [b"{"] * 4
    from dataclasses import replace

    for at in range(1, len(data)):
        parts = []
        for start, stop in ((0, at), (at, len(data))):
            span = replace(whole.spans[0], start=start, stop=stop)
            shard = Shard(ordinal=0, id="", spans=(span,), rows=None, bytes=0)
            parts.append(read_shard(shard, given, schema).table)
        assert pa.concat_tables(parts).equals(wanted), at
        assert parts[0].num_rows == sum(offset < at for offset in offsets)
