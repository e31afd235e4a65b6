"""Parquet files with every odd type, from planning to the part file through the real stages, on the simulated engine.

Whatever the file: it is refused with one line that names it, or each of its rows stands in the output once, as an answer
or an error, with its values as they were.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import decimal
import random
import shutil
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from jobs import load
from jobs.loading import LoadedJob
from jobs.proposal import propose, work_of
from pipelines.commit import Commit
from pipelines.errors import BadInput
from pipelines.generate import Generate
from pipelines.prepare import Prepare
from pipelines.settings import ModelSettings
from pipelines.stage import Parcel
from pipelines.tokenizer import load_tokenizer
from tests.unit.fuzz import FACTOR, examples, within

TINY = Path(__file__).parents[2] / "examples" / "tiny-model"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(0 if FACTOR > 1 else 300),
]  # `within` watches each example

leaves = st.sampled_from(
    [
        pa.null(), pa.bool_(), pa.int8(), pa.int64(), pa.uint8(), pa.uint64(), pa.float16(), pa.float32(), pa.float64(),
        pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(3), pa.binary(16),
        pa.date32(), pa.date64(), pa.time32("s"), pa.time32("ms"), pa.time64("us"), pa.time64("ns"),
        *(pa.timestamp(unit, tz) for unit in ("s", "ms", "us", "ns") for tz in (None, "UTC", "Europe/Berlin", "+05:30")),
        pa.duration("s"), pa.duration("us"), pa.duration("ns"), pa.decimal128(5, 2), pa.decimal128(38, 10), pa.decimal256(60, 5), pa.decimal32(5, 1),
        pa.decimal64(10, 3), pa.uuid(), pa.json_(),
    ]
)  # fmt: skip
dictionaries = st.builds(
    pa.dictionary,
    st.sampled_from([pa.int8(), pa.int32(), pa.uint16()]),
    st.sampled_from([pa.string(), pa.large_string(), pa.int64(), pa.binary(), pa.timestamp("us", "UTC"), pa.decimal128(5, 2)]),
)  # fmt: skip
types = st.recursive(
    leaves | dictionaries,
    lambda below: st.one_of(
        below.map(pa.list_),
        below.map(pa.large_list),
        below.map(pa.list_view),
        st.builds(pa.list_, below, st.integers(1, 3)),
        st.lists(below, max_size=3).map(lambda t: pa.struct([(f"f{i}", x) for i, x in enumerate(t)])),
        st.builds(pa.map_, st.sampled_from([pa.string(), pa.int64()]), below),
    ),
    max_leaves=4,
)
names = (
    st.sampled_from(["doc", "text", "row_id", "generated_text", "error_code", "a.b", "a b", "", "Ä", "run_id", "n" * 3000, "{{", "item", "x\ny"])
    | st.text(string.ascii_letters, min_size=1, max_size=3)
)  # fmt: skip


def value(type_: pa.DataType, dice: random.Random) -> Any:
    """A value of the type, of the ends of its range as often as of the middle; sometimes null."""
    t = pa.types
    if t.is_null(type_) or dice.random() < 0.2:
        return None
    if isinstance(type_, pa.BaseExtensionType):
        return dice.randbytes(16) if type_ == pa.uuid() else dice.choice(['{"a": 1}', "[]", "null"])
    if t.is_dictionary(type_):
        return value(type_.value_type, dice)
    if t.is_map(type_):
        keys = {value(type_.key_type, dice) for _ in range(dice.randrange(3))} - {None}
        return [(key, value(type_.item_type, dice)) for key in keys]
    if t.is_struct(type_):
        return {field.name: value(field.type, dice) for field in type_}
    if t.is_fixed_size_list(type_):
        return [value(type_.value_type, dice) for _ in range(type_.list_size)]
    if t.is_nested(type_):
        return [value(type_.value_type, dice) for _ in range(dice.randrange(4))]
    if t.is_boolean(type_):
        return dice.random() < 0.5
    if t.is_integer(type_):
        low = 0 if t.is_unsigned_integer(type_) else -(2 ** (type_.bit_width - 1))
        return dice.choice([low, low + 2**type_.bit_width - 1, 0, dice.randrange(100)])
    if t.is_floating(type_):
        return dice.choice([0.0, -0.0, 1.5, float("inf"), float("nan")])
    if t.is_decimal(type_):
        digits = type_.precision
        return decimal.Decimal(dice.choice([0, 1, -1, 10**digits - 1])).scaleb(-type_.scale)
    if t.is_date(type_):
        return dice.choice([dt.date(1, 1, 1), dt.date(1970, 1, 1), dt.date(9999, 12, 31)])
    if t.is_time(type_):
        return dice.choice([dt.time(0), dt.time(23, 59, 59)])
    if t.is_timestamp(type_):
        return dice.choice([0, 1, -1, 86_400_000, 2**40 if type_.unit in ("us", "ns") else 2**30])
    if t.is_duration(type_):
        return dice.choice([0, -1, 2**31])
    if t.is_fixed_size_binary(type_):
        return dice.randbytes(type_.byte_width)
    if t.is_binary(type_) or t.is_large_binary(type_) or type_ == pa.binary_view():
        return dice.randbytes(dice.randrange(5))
    return dice.choice(
        ["", " ", "text", "你好 🎉", "\x00", "x" * 300, "{{ doc }}", '[{"role": "user", "content": "hi"}]']
    )


def written(
    path: Path, columns: list[tuple[str, pa.DataType]], rows: int, seed: int, how: dict[str, Any]
) -> pa.Table | None:
    """The file's content as an independent reader finds it; None where pyarrow cannot write it."""
    dice = random.Random(seed)
    arrays = []
    try:
        for _, type_ in columns:
            arrays.append(pa.array([value(type_, dice) for _ in range(rows)], type_))
        table = pa.Table.from_arrays(arrays, names=[name for name, _ in columns])
        pq.write_table(table, path, **how)
        return pq.ParquetFile(path).read()
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        path.unlink(missing_ok=True)
        return None


hows = st.fixed_dictionaries(
    {},
    optional={
        "row_group_size": st.integers(1, 5),
        "use_dictionary": st.booleans(),
        "use_deprecated_int96_timestamps": st.just(True),
        "store_schema": st.booleans(),
        "version": st.sampled_from(["1.0", "2.4", "2.6"]),
        "data_page_version": st.sampled_from(["1.0", "2.0"]),
        "compression": st.sampled_from(["none", "gzip", "zstd"]),
        "write_statistics": st.booleans(),
    },
)
plain_names = st.sampled_from(["doc", "text", "a.b", "a b", "", "Ä", "n" * 3000, "{{", "item", "x\ny"])
columns = st.lists(st.tuples(plain_names, types), max_size=4, unique_by=lambda column: column[0]) | st.lists(
    st.tuples(names, types), max_size=3
)
files = st.tuples(columns, st.sampled_from([7, 3, 12, 1, 0]), st.integers(0, 2**32), hows)
prompts = st.just({"template": "{{ row_id }}"}) | st.sampled_from(
    [
        {"template": "{{ row_id }}"}, {"template": "say it"}, {"template": "{{ doc }}"}, {"template": "{{ doc | default('x') }} {{ text | tojson if text }}"},
        {"prompt_column": "doc"}, {"messages_column": "doc"}, {"prompt_column": ""}, {"prompt_column": "a.b"},
        {"template": "{% for x in doc %}{{ x }}{% endfor %}{{ doc.f0 }}"},
    ]
)  # fmt: skip
inputs = st.just({}) | st.fixed_dictionaries(
    {},
    optional={
        "columns": st.lists(names, min_size=1, max_size=3, unique=True),
        "filter": st.sampled_from(["doc == 'text'", "doc is None", "len(doc) > 0", "doc > 1", "doc in ('text', 'x')", "text != doc"]),
    },
)  # fmt: skip


@pytest.fixture(autouse=True)
def torch_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """An actor of the simulated engine keeps torch out of its process; this process has other tests to run."""
    monkeypatch.setattr("pipelines.generate.do_without_torch", lambda model: None)


@pytest.fixture(autouse=True, scope="module")
def loaded_tokenizer() -> None:
    """Before the watchdog looks on: the first one imports transformers."""
    load_tokenizer(ModelSettings(source=str(TINY)))


def job(folder: Path, **sections: Any) -> LoadedJob:
    shutil.rmtree(folder / "out", ignore_errors=True)
    base = {
        "name": "fuzz",
        "input": {"path": str(folder / "in"), **sections.pop("input", {})},
        "prompt": {"template": "{{ row_id }}"},
        "model": {
            "source": str(TINY),
            "backend": "simulated",
            "engine": {"max_model_len": 256},
            "simulated": {"tokens_per_s": 1e9, "min_tokens": 1, "max_tokens": 3},
        },
        "sampling": {"temperature": 0, "max_tokens": 4},
        "output": {"path": str(folder / "out"), **sections.pop("output", {})},
        "shards": {"rows": 5},
    }
    return load({**base, **sections})


def outcome(job: LoadedJob) -> list[dict[str, Any]] | BadInput:
    """What the three stages say of each shard of the plan; or why there is no plan."""
    try:
        plan = propose(job).save()
    except BadInput as error:
        return error
    work = work_of(job, plan.input_schema, fingerprint=plan.fingerprint, run_id="fuzz")
    return list(through_the_stages(work, plan.shards))


def through_the_stages(work: Any, shards: Any) -> Iterator[dict[str, Any]]:
    prepare, generate, commit = Prepare(work), Generate(work), Commit(work)
    generate.leave = lambda: pytest.fail("the engine died")  # type: ignore[assignment]

    async def all_shards() -> list[dict[str, Any]]:
        rows = []
        for shard in shards:
            batch = pa.Table.from_pylist([Parcel.row(shard, **{"pass": 0})])
            rows += commit(await generate(prepare(batch))).to_pylist()
        await generate._start.result().engine.stop()
        return rows

    yield from asyncio.run(all_shards())


def plain(column: pa.ChunkedArray) -> list[str]:
    """Values as texts: NaN equals NaN, and a dictionary what it stands for."""
    return [
        repr(scalar.as_py()) if scalar.type.id != pa.float16().id else repr(float(scalar.as_py() or 0))
        for scalar in column
    ]


def check(folder: Path, job: LoadedJob, inputs: dict[str, pa.Table]) -> None:
    """Refused in one line that names a file or key; or every row once, with its values."""
    told = within(lambda: outcome(job))
    if isinstance(told, BadInput):
        text = str(told)
        assert text
        assert "\n" not in text.strip(), text
        text.encode()
        wanted = (str(folder / "in"), "input", "prompt", "output", ".parquet")
        assert any(name in text for name in wanted), text
        return
    for row in told:
        assert row["failure"] is None, row["failure"]
    parts = sorted((folder / "out" / "data").glob("part-*.parquet"))
    assert len(parts) == len(told)
    found = pa.concat_tables([pq.read_table(part) for part in parts])
    if job.spec.input.filter is None:
        assert len(found) == sum(map(len, inputs.values()))
    ids = found["row_id"].to_pylist()
    assert len(set(ids)) == len(ids)
    for path, table in inputs.items():
        mine = [place for place, row_id in enumerate(ids) if row_id.rpartition("#")[0] == path]
        positions = [int(ids[place].rpartition("#")[2]) for place in mine]
        rows = found.take(pa.array(mine, pa.int64()))
        sound = [
            not code or code not in ("invalid_utf8", "invalid_row") for code in rows["error_code"].to_pylist()
        ]
        for name in set(found.column_names[: found.column_names.index("row_id")]):
            got = plain(rows[name])
            want = (
                plain(table[name].take(pa.array(positions, pa.int64())))
                if name in table.column_names
                else ["None"] * len(mine)
            )
            for ok, a, b in zip(sound, got, want, strict=True):
                assert not ok or a == b, (name, rows.schema.field(name).type)


@examples(15)
@given(
    made=st.lists(files, min_size=1, max_size=2),
    prompt=prompts,
    input_=inputs,
    same=st.just(True) | st.booleans(),
)
def test_any_files(
    tmp_path: Path, made: list[Any], prompt: dict[str, Any], input_: dict[str, Any], same: bool
) -> None:
    shutil.rmtree(tmp_path / "in", ignore_errors=True)
    (tmp_path / "in").mkdir()
    read = {}
    for number, (columns_, rows, seed, how) in enumerate(made):
        path = tmp_path / "in" / f"{number}.parquet"
        table = written(path, made[0][0] if same else columns_, rows, seed, how)
        if table is not None:
            read[str(path)] = table
    assume(read)
    try:
        job_ = job(tmp_path, prompt=prompt, input=input_)
    except BadInput:
        return
    check(tmp_path, job_, read)


def test_a_column_name_of_two_lines_stays_in_one(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"x\ny": [1], "a": [2]}), tmp_path / "in" / "0.parquet")
    check(tmp_path, job(tmp_path, prompt={"template": "{{ nothing }}"}), {})


@examples(15)
@given(type_=types, seed=st.integers(0, 2**32), how=hows)
def test_one_column_of_any_type(tmp_path: Path, type_: pa.DataType, seed: int, how: dict[str, Any]) -> None:
    shutil.rmtree(tmp_path / "in", ignore_errors=True)
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "0.parquet"
    table = written(path, [("x", type_)], 7, seed, how)
    assume(table is not None)
    assert table is not None
    check(tmp_path, job(tmp_path), {str(path): table})


@examples(15)
@given(data=st.data(), how=hows)
def test_damaged_files(tmp_path: Path, data: Any, how: dict[str, Any]) -> None:
    """A bit, a byte or an end that is not what it was: an error that names the file, or an output all the same."""
    shutil.rmtree(tmp_path / "in", ignore_errors=True)
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "0.parquet"
    columns_ = [
        ("doc", pa.string()),
        ("x", pa.list_(pa.int64())),
        ("d", pa.dictionary(pa.int8(), pa.string())),
    ]
    if written(path, columns_, 12, 1, how) is None:
        return
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    path.write_bytes(content if data.draw(st.booleans()) else content[:cut])
    told = within(lambda: outcome(job(tmp_path)))
    if isinstance(told, BadInput):
        assert "0.parquet" in str(told) or "no rows" in str(told), told
        return
    for row in told:
        if row["failure"] is not None:
            assert '"kind": "InputError"' in row["failure"], row["failure"]
            assert "0.parquet" in row["failure"]
