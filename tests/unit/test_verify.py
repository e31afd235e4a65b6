"""Damage of every kind is found, moved away and made anew; what is whole is left alone."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import load
from jobs.books import SUCCESS, clear_unreferenced_errors, fold
from jobs.inspect import report_of, verify
from jobs.output import read_spec
from jobs.repair import repair
from pipelines.errors import PartDamaged
from pipelines.part import FOOTER_KEY, Footer, body_digest, build_part, read_part
from pipelines.settings import OutputSettings
from pipelines.storage import Storage
from tests.local.runs import job, write_questions
from tests.unit.stages import Output, committed, run
from tests.unit.test_retry import ENOUGH, SEPARATE, everything, settings, write_rows

pytestmark = pytest.mark.slow


@pytest.fixture
def output(tmp_path: Path) -> Output:
    write_rows(tmp_path / "in")
    output = committed(settings(tmp_path, **SEPARATE))
    output.storage.write(SUCCESS, b"{}")
    return output


def rewritten(path: Path, change: Callable[[pa.Table], pa.Table], **claims: Any) -> None:
    """Put other rows into a part, as a bug of ours or another tool would, with a footer that fits its bytes."""
    storage = Storage(str(path.parent.parent))
    footer = read_part(storage, path.name).footer
    rows = change(pq.read_table(path).replace_schema_metadata(None))
    data, _ = build_part(storage, rows, replace(footer, **claims), OutputSettings(path="-"))
    # `build_part` takes the failed rows to be inline; the part's are where they were.
    plain = replace(read_footer(data), errors_object=footer.errors_object, errors_digest=footer.errors_digest)
    path.write_bytes(with_footer(data, plain))


def read_footer(data: bytes) -> Footer:
    return Footer.from_json(pq.read_metadata(pa.BufferReader(data)).metadata[FOOTER_KEY], "")


def with_footer(data: bytes, footer: Footer | None) -> bytes:
    """The same rows under another footer; None: without one."""
    table = pq.read_table(pa.BufferReader(data)).replace_schema_metadata(None)
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, table.schema, compression="zstd") as writer:
        writer.write_table(table, 16_384)
        if footer is not None:
            writer.add_key_value_metadata({FOOTER_KEY: footer.to_json()})
    return bytes(sink.getvalue())


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(data)


def parts(output: Output) -> list[Path]:
    return [output.folder / "data" / shard.part_name for shard in output.plan.shards]


def errors_of(path: Path) -> Path:
    (found,) = (path.parent.parent / "errors").glob(f"{path.stem}-*.parquet")
    return found


def last_row_twice(rows: pa.Table) -> pa.Table:
    return pa.concat_tables([rows.slice(0, len(rows) - 2), rows.slice(len(rows) - 1)] * 2).slice(0, len(rows))


def of_another_shard(rows: pa.Table) -> pa.Table:
    ids = [row_id.replace("#", "#9") for row_id in rows["row_id"].to_pylist()]
    place = rows.column_names.index("row_id")
    return rows.set_column(place, rows.schema.field("row_id"), pa.array(ids))


def more_tokens(rows: pa.Table) -> pa.Table:
    place = rows.column_names.index("completion_tokens")
    return rows.set_column(place, "completion_tokens", pa.array([1000] * len(rows), pa.int32()))


#: name → what happens to the first part, words of the verdict, whether only `--deep` sees it.
DAMAGE: dict[str, tuple[Callable[[Path], Any], str, bool]] = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-40]), "is damaged", False),
    "cut in half": (
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        "is damaged",
        False,
    ),
    "empty": (lambda path: path.write_bytes(b""), "is damaged", False),
    "no footer of ours": (
        lambda path: path.write_bytes(with_footer(path.read_bytes(), None)),
        "no part of a Dray",
        False,
    ),
    "a byte flipped": (lambda path: flip(path, path.stat().st_size // 4), "digest", True),
    "the first byte of a page flipped": (lambda path: flip(path, 4), "digest", True),
    "another part's content": (
        lambda path: path.write_bytes(sorted(path.parent.glob("*.parquet"))[1].read_bytes()),
        "holds shard",
        False,
    ),
    "a row less": (lambda path: rewritten(path, lambda rows: rows.slice(1)), "its footer counts", False),
    "a row twice": (lambda path: rewritten(path, last_row_twice), "occur twice", True),
    "rows in another order": (
        lambda path: rewritten(path, lambda rows: rows.take(list(range(len(rows)))[::-1])),
        "not in input order",
        True,
    ),
    "rows of nobody's": (lambda path: rewritten(path, of_another_shard), "rows are not its shard's", True),
    "other counts": (lambda path: rewritten(path, more_tokens), "come to completion_tokens", True),
    "another fingerprint": (
        lambda path: rewritten(path, lambda rows: rows, fingerprint="0" * 16),
        "was made from spec 0000",
        False,
    ),
    "another schema": (
        lambda path: rewritten(path, lambda rows: rows.append_column("extra", pa.nulls(len(rows)))),
        "has another schema than planned",
        False,
    ),
    "failed rows gone": (lambda path: errors_of(path).unlink(), "are gone", False),
    "failed rows flipped": (
        lambda path: flip(errors_of(path), errors_of(path).stat().st_size // 4),
        "are not those that were written",
        True,
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_moved_away_and_made_anew(output: Output, kind: str) -> None:
    harm, words, deep_only = DAMAGE[kind]
    clean = everything(output)
    assert verify(output.storage, deep=True)["ok"]
    path = parts(output)[0]
    harm(path)

    shallow, deep = (verify(output.storage, deep=deep) for deep in (False, True))
    assert shallow["ok"] is deep_only
    assert not deep["ok"]
    assert any(path.stem in problem and words in problem for problem in deep["problems"]), deep["problems"]

    mended = repair(output.storage, deep=True)
    assert mended["problems"] == []
    assert mended["missing"] == [path.name]
    assert any(f"moved data/{path.name} to .dray/damaged/" in done for done in mended["done"])
    assert f"removed {SUCCESS}" in mended["done"]
    assert not path.exists()
    assert not list((output.folder / ".dray").rglob("*.parquet"))
    assert report_of(output.storage).state == "incomplete"
    assert len(pq.read_table(output.folder / "stats" / "shards.parquet")) == 2
    assert "| shards | 2 of 3 |" in (output.folder / "README.md").read_text()

    run(output.work("anew"), fold(output.storage, output.plan).missing)
    assert everything(output) == clean
    assert verify(output.storage, deep=True)["ok"]


def test_strangers_are_moved_and_parts_that_are_gone_are_told(output: Output) -> None:
    clean = everything(output)
    first, second, _ = parts(output)
    (first.parent / "copy.parquet").write_bytes(second.read_bytes())
    (first.parent / "notes.txt").write_text("mine")
    first.unlink()
    mended = repair(output.storage, deep=False)
    assert not mended["ok"]
    assert mended["missing"] == [first.name]
    run(output.work("anew"), fold(output.storage, output.plan).missing)
    clear_unreferenced_errors(
        output.storage, output.plan, fold(output.storage, output.plan)
    )  # as each run's end does
    assert everything(output) == clean
    kept = {path.name: path.read_bytes() for path in (output.folder / ".dray" / "damaged").rglob("*.*")}
    assert kept == {"copy.parquet.damaged": second.read_bytes(), "notes.txt.damaged": b"mine"}
    again = repair(output.storage, deep=True)
    assert again["ok"]
    assert again["done"] == ["rebuilt stats/shards.parquet and README.md from the footers"]


def test_a_whole_output_is_left_as_it_is(output: Output) -> None:
    run(output.retry("second", ENOUGH), output.plan.shards)
    before = {path: path.read_bytes() for path in (output.folder / "data").iterdir()}
    assert repair(output.storage, deep=True)["ok"]
    assert {path: path.read_bytes() for path in (output.folder / "data").iterdir()} == before
    shards = pq.read_table(output.folder / "stats" / "shards.parquet")
    assert shards["retries"].to_pylist() == [1, 1, 1]


def test_parts_from_before_there_were_digests_are_no_error(output: Output) -> None:
    for path in parts(output):
        footer = json.loads(pq.read_metadata(path).metadata[FOOTER_KEY])
        for name in ("digest", "errors_digest", "retries"):
            del footer[name]
        table = pq.read_table(path).replace_schema_metadata({FOOTER_KEY: json.dumps(footer)})
        pq.write_table(table, path, compression="zstd")
    verdict = verify(output.storage, deep=True)
    assert verdict["ok"], verdict["problems"]
    assert verdict["without_digest"] == 3
    # A merge gives them one.
    run(output.retry("second", ENOUGH), output.plan.shards)
    verdict = verify(output.storage, deep=True)
    assert verdict["ok"]
    assert verdict["without_digest"] == 0


def test_no_flipped_byte_before_the_footer_goes_unseen(output: Output) -> None:
    path = parts(output)[1]
    whole = path.read_bytes()
    body = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    for at in random.Random(4).sample(range(body), 40):
        flip(path, at)
        assert body_digest(path.read_bytes()) != read_footer(whole).digest
        path.write_bytes(whole)
    assert body_digest(whole) == read_footer(whole).digest


def test_any_flipped_byte_of_the_footer_gives_a_verdict_and_no_traceback(output: Output) -> None:
    path = parts(output)[1]
    whole = path.read_bytes()
    body = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    damaged = 0
    for at in random.Random(4).sample(range(body, len(whole)), 60):
        flip(path, at)
        damaged += not verify(output.storage, deep=True)["ok"]
        path.write_bytes(whole)
    assert damaged > 30


def test_a_footer_that_is_no_json_is_a_damaged_part(output: Output) -> None:
    path = parts(output)[0]
    table = pq.read_table(path).replace_schema_metadata({FOOTER_KEY: "{"})
    pq.write_table(table, path)
    with pytest.raises(PartDamaged, match="its footer cannot be read"):
        read_part(output.storage, path.name)


def test_columns_of_a_step_stay_in_the_order_of_the_job_file(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", rows=3)
    columns = {"zeal": "int64", "aim": "string"}
    step = {"parse": {"column": "question", "json": columns, "on_error": "null"}}
    made = committed(job(tmp_path / "in", tmp_path / "out", steps=[step]))
    assert verify(made.storage, deep=True)["problems"] == []
    # `dray resume` goes by what is stored.
    stored = load(read_spec(made.storage)["spec"])
    (parse,) = (one.parse for one in stored.spec.steps)
    assert parse is not None
    assert list(parse.adds) == list(columns)
