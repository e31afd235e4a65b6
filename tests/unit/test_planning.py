"""Cutting files into shards, and the plan that keeps them: deterministic, append-only, complete."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs import cutting, segment
from jobs.cutting import MAX_BYTES, MAX_ROWS, MIN_ROWS, cut, cut_lazily
from jobs.planning import Plan, extend, load_plan, new_plan, save_plan, summary
from jobs.segment import decode, encode
from pipelines.contracts import InputFile, Shard
from pipelines.errors import InputError, OutputError, OutputLocked, SpecError
from pipelines.lengths import IMAGE_TOKENS
from pipelines.storage import Storage

SCHEMA = pa.schema([("doc", pa.large_string()), ("kind", pa.dictionary(pa.int32(), pa.string()))])


def parquet(
    name: str, rows: int, row_bytes: int = 1000, groups: Sequence[int] = (), version: str = "v1"
) -> InputFile:
    return InputFile(
        path=f"s3://bucket/{name}",
        size=rows * row_bytes // 2 + 100,
        version=version,
        format="parquet",
        rows=rows,
        estimated_rows=rows,
        row_groups=tuple(groups) or (rows,),
        data_bytes=rows * row_bytes,
    )


def jsonl(name: str, rows: int, row_bytes: int = 1000, gzip: bool = False, version: str = "v1") -> InputFile:
    return InputFile(
        path=f"s3://bucket/{name}",
        size=rows * row_bytes // (5 if gzip else 1),
        version=version,
        format="jsonl",
        compression="gzip" if gzip else "none",
        estimated_rows=rows,
        data_bytes=rows * row_bytes,
    )


def csv(name: str, rows: int, row_bytes: int = 1000) -> InputFile:
    return replace(jsonl(name, rows, row_bytes), format="csv")


def rows_of(shards: Sequence[Shard]) -> list[int | None]:
    return [shard.rows for shard in shards]


def names_of(shards: Sequence[Shard]) -> list[list[str]]:
    return [[span.path.rpartition("/")[2] for span in shard.spans] for shard in shards]


# ── Cutting ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_small_files_are_packed_and_large_ones_split() -> None:
    files = [parquet("a", 30), parquet("b", 40), parquet("c", 50), parquet("d", 250), parquet("e", 10)]
    shards = cut(files, "f", rows=100)
    assert names_of(shards) == [["a", "b"], ["c"], ["d"], ["d"], ["d"], ["e"]]
    assert rows_of(shards) == [70, 50, 100, 100, 50, 10]
    assert [shard.ordinal for shard in shards] == list(range(6))
    assert [(s.spans[0].start, s.spans[0].stop) for s in shards[2:5]] == [(0, 100), (100, 200), (200, 250)]
    assert shards[0].part_name == f"part-000000-{shards[0].id}.parquet"


def test_text_that_cannot_be_entered_in_the_middle_stays_whole() -> None:
    shards = cut(
        [csv("a.csv", 1000), jsonl("b.jsonl.gz", 1000, gzip=True), jsonl("c.jsonl", 1000)], "", rows=400
    )
    assert names_of(shards) == [["a.csv"], ["b.jsonl.gz"], ["c.jsonl"], ["c.jsonl"], ["c.jsonl"]]
    assert [shard.spans[0].unit for shard in shards] == ["file", "file", "bytes", "bytes", "bytes"]
    assert rows_of(shards) == [None] * 5


def test_empty_files_get_no_shard() -> None:
    assert cut([parquet("a", 0), jsonl("b", 0), csv("c", 0)], "") == []
    assert names_of(cut([parquet("a", 0), parquet("b", 5)], "")) == [["b"]]


def test_auto_ends_shards_at_row_groups_where_one_is_near() -> None:
    groups = [1000] * 10
    shards = cut(
        [parquet("a", 10_000, groups=groups)], "", target_tokens=2400 * (250 + 256), output_tokens=256
    )
    ends = [shard.spans[0].stop for shard in shards]
    assert ends == [2000, 4000, 6000, 8000, 10_000]
    shards = cut(
        [parquet("a", 9900, groups=[1100] * 9)], "", target_tokens=2400 * (250 + 256), output_tokens=256
    )
    assert [shard.spans[0].stop for shard in shards] == [2200, 4400, 5500, 7700, 9900]
    shards = cut([parquet("a", 10_000)], "", target_tokens=2400 * (250 + 256), output_tokens=256)
    assert rows_of(shards) == [2000] * 5


def test_auto_aims_at_engine_work() -> None:
    files = [parquet("a", 100_000, row_bytes=2000)]
    shards = cut(files, "", target_tokens=240_000, output_tokens=500)
    assert rows_of(shards)[0] == pytest.approx(240_000 / (2000 / 4 + 500), rel=0.02)
    # twice the answer tokens, fewer rows
    assert len(cut(files, "", target_tokens=240_000, output_tokens=2000)) > 2 * len(shards)
    # a row that is more work than a shard
    assert rows_of(cut([parquet("a", 3)], "", target_tokens=10, output_tokens=500)) == [1, 1, 1]
    # short rows and answers
    assert (
        max(n or 0 for n in rows_of(cut([parquet("a", 200_000, row_bytes=10)], "", output_tokens=1)))
        <= MAX_ROWS
    )


def test_auto_bounds_the_bytes_of_a_shard() -> None:
    shards = cut([parquet("a", 1000, row_bytes=1 << 20)], "", target_tokens=1e12)
    assert max(shard.bytes for shard in shards) <= MAX_BYTES
    assert len(shards) == 8


def test_auto_takes_images_for_tokens_whatever_their_bytes() -> None:
    def seeing(row_bytes: int, images: int = 1) -> list[Shard]:
        file = parquet("a", 10_000, row_bytes=2000 + row_bytes)
        file = replace(file, image_bytes=10_000 * row_bytes, images=10_000 * images)
        return cut([file], "", target_tokens=240_000, output_tokens=500)

    wanted = pytest.approx(240_000 / (2000 / 4 + IMAGE_TOKENS + 500), rel=0.02)
    assert rows_of(seeing(100_000))[0] == rows_of(seeing(100))[0] == wanted
    assert rows_of(seeing(100, images=2))[0] == pytest.approx(240_000 / (1000 + 2 * IMAGE_TOKENS), rel=0.02)
    # What travels as one piece stays bounded, to the row.
    assert max(shard.bytes for shard in seeing(3 << 20)) <= MAX_BYTES + (3 << 20)


def test_a_small_input_feeds_all_engines_but_not_with_crumbs() -> None:
    files = [parquet("a", 1000, row_bytes=100)]
    assert len(cut(files, "", output_tokens=1)) == 1
    assert rows_of(cut(files, "", output_tokens=1, feed=12)) == [
        83,
        83,
        84,
        83,
        83,
        84,
        83,
        83,
        84,
        83,
        83,
        84,
    ]
    assert min(n or 0 for n in rows_of(cut(files, "", feed=1000))) >= MIN_ROWS - 2
    assert len(cut(files, "", rows=10)) == 100  # asked for


def test_auto_cuts_finer_towards_the_end() -> None:
    """The last shards are small enough that engines end together, and large enough to fill one."""
    files = [parquet("a", 70_000), parquet("b", 60_000)]
    how = {"target_tokens": 8_000 * (250 + 256), "output_tokens": 256.0}
    sizes = [n or 0 for n in rows_of(cut(files, "", feed=6, **how))]
    largest = max(sizes)
    assert sum(sizes) == 130_000
    assert sizes[0] >= largest - 1
    assert largest / 5 < sizes[-1] <= largest / 3
    done = 0
    for size in sizes:
        assert size <= max((130_000 - done) / 12, largest / 4) * 1.01 or done + size > 130_000 - largest
        done += size
    assert len(set(rows_of(cut(files[:1], "", feed=1, **how)))) <= 2  # a shard at a time: nothing to balance
    assert (
        max(rows_of(cut([parquet("c", 4_000)], "", target_tokens=400 * 506, output_tokens=256, feed=6)))
        == 400
    )


def test_a_job_has_a_bounded_number_of_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutting, "MAX_SHARDS", 100)
    many = [parquet(f"{i:04}", 50 if i % 2 else 1) for i in range(1000)]
    assert 50 < len(cut(many, "", target_tokens=1000)) <= 100
    assert 50 < len(cut([jsonl("a", 10**9)], "")) <= 100
    assert len(cut(many, "", first_ordinal=90)) <= 10
    with pytest.raises(
        SpecError, match=r"shards\.rows: 1 cuts 25,500 rows into more than 100 shards.*use 255 or more"
    ):
        cut(many, "", rows=1)
    with pytest.raises(SpecError, match="new output"):
        cut(many, "", first_ordinal=100)


def test_a_preview_takes_what_it_needs() -> None:
    shards = cut_lazily([parquet("a", 10**12)], 5)
    assert rows_of([next(shards), next(shards)]) == [5, 5]


FILES = st.lists(
    st.one_of(
        st.builds(
            lambda groups: parquet("p", sum(groups), groups=groups), st.lists(st.integers(0, 50), max_size=6)
        ),
        st.builds(
            lambda n, size, gz: jsonl("j", n, size, gz),
            st.integers(0, 300),
            st.integers(1, 50),
            st.booleans(),
        ),
        st.builds(lambda n, size: csv("c", n, size), st.integers(0, 300), st.integers(1, 50)),
    ),
    max_size=12,
).map(lambda files: [replace(file, path=f"{file.path}{i}") for i, file in enumerate(files)])
CUTTING = st.fixed_dictionaries(
    {
        "rows": st.one_of(st.just("auto"), st.integers(1, 400)),
        "target_tokens": st.integers(1, 10**6),
        "output_tokens": st.integers(0, 1000),
        "feed": st.integers(1, 20),
    }
)


@pytest.mark.slow
@settings(deadline=None)
@given(FILES, CUTTING)
def test_each_place_of_each_file_is_in_one_shard_and_in_order(
    files: list[InputFile], how: dict[str, Any]
) -> None:
    shards = cut(files, "f", **how)
    assert shards == cut(files, "f", **how)
    assert [shard.ordinal for shard in shards] == list(range(len(shards)))
    assert len({shard.id for shard in shards}) == len(shards)
    spans = [span for shard in shards for span in shard.spans]
    for file in files:
        whole = file.rows if file.format == "parquet" else file.size
        covered = [(span.start, span.stop) for span in spans if span.path == file.path]
        assert all(start < stop for start, stop in covered)
        assert [start for start, _ in covered] == [0, *(stop for _, stop in covered)][: len(covered)]
        assert (covered[-1][1] if covered else 0) == (whole if file.size and file.rows != 0 else 0)
    order = [file.path for file in files]
    assert [order.index(span.path) for span in spans] == sorted(order.index(span.path) for span in spans)
    for shard in shards:
        known = all(span.unit == "rows" for span in shard.spans)
        assert shard.rows == (sum(span.stop - span.start for span in shard.spans) if known else None)
        if how["rows"] != "auto" and shard.rows is not None:
            assert shard.rows <= how["rows"]


@settings(deadline=None)
@given(FILES, CUTTING)
def test_a_shard_is_a_piece_of_one_file_or_whole_files(files: list[InputFile], how: dict[str, Any]) -> None:
    """What makes replacing a file simple: it never takes a part of another file along."""
    whole = {file.path: file.rows if file.format == "parquet" else file.size for file in files}
    for shard in cut(files, "f", **how):
        if len(shard.spans) > 1:
            assert all((span.start, span.stop) == (0, whole[span.path]) for span in shard.spans)


# ── Storing ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "out"))


@settings(deadline=None)
@given(FILES, CUTTING)
def test_a_segment_comes_back_as_it_was(files: list[InputFile], how: dict[str, Any]) -> None:
    plan = new_plan(files, SCHEMA, "f", **how)
    (one,) = plan.segments
    back = decode(0, encode(one), "x")
    assert back.shards == one.shards
    assert back.schema.equals(one.schema, check_metadata=True)
    assert back.files == tuple(replace(file, row_groups=()) for file in files)
    assert replace(back, files=()) == replace(one, files=())


def test_a_plan_is_saved_once_and_loaded_as_it_was(storage: Storage) -> None:
    assert load_plan(storage) is None
    plan = new_plan([parquet("a", 100), jsonl("b", 100)], SCHEMA, "f", rows=30)
    assert (plan.saved, len(plan.new_shards)) == (0, len(plan.shards))
    saved = save_plan(storage, plan)
    assert (saved.saved, saved.new_shards) == (1, ())
    loaded = load_plan(storage)
    assert loaded is not None
    assert loaded.shards == plan.shards
    assert (loaded.fingerprint, loaded.input_schema, loaded.saved) == ("f", SCHEMA, 1)
    before = storage.info(".dray/plan/000000.arrow")
    save_plan(storage, loaded)
    assert storage.info(".dray/plan/000000.arrow") == before


def test_a_saved_plan_knows_its_images(storage: Storage) -> None:
    file = replace(parquet("a", 30), image_bytes=12_345, images=40)
    assert load_plan(storage) is None
    save_plan(storage, new_plan([file], SCHEMA, "f"))
    (found,) = load_plan(storage).files
    assert (found.image_bytes, found.images) == (12_345, 40)


def test_two_drivers_cannot_save_the_same_segment(storage: Storage) -> None:
    plan = new_plan([parquet("a", 100)], SCHEMA, "f")
    save_plan(storage, plan)
    with pytest.raises(OutputLocked, match="another run"):
        save_plan(storage, plan)


def test_damaged_and_newer_plans_are_refused(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = save_plan(storage, new_plan([parquet("a", 100)], SCHEMA, "f"))
    save_plan(storage, extend(plan, [parquet("b", 100)]))
    monkeypatch.setattr(segment, "FORMAT_VERSION", 0)
    with pytest.raises(OutputError, match="newer Dray"):
        load_plan(storage)
    monkeypatch.undo()
    storage.delete(".dray/plan/000000.arrow")
    with pytest.raises(OutputError, match=r"segment 000000\.arrow is missing"):
        load_plan(storage)
    storage.write(".dray/plan/000000.arrow", b"nonsense")
    with pytest.raises(OutputError, match="damaged"):
        load_plan(storage)


# ── Extending ───────────────────────────────────────────────────────────────────────────────────────────────────


def planned(storage: Storage, files: Sequence[InputFile], **how: Any) -> Plan:
    return save_plan(storage, new_plan(files, SCHEMA, "f", **{"rows": 100, **how}))


def test_nothing_new_is_no_extension(storage: Storage) -> None:
    files = [parquet("a", 50), parquet("b", 50), parquet("empty", 0)]
    plan = planned(storage, files)
    assert extend(plan, files, rows=7) is plan  # also where shards would be cut in another way now
    assert extend(plan, files[:1], rows=7) is plan  # a file that is gone stays planned


def test_only_unseen_files_get_shards_with_the_next_ordinals(storage: Storage) -> None:
    plan = planned(storage, [parquet("b", 50)])
    longer = extend(plan, [parquet("a", 50), parquet("b", 50), parquet("c", 70)], rows=60)
    assert longer.shards[: len(plan.shards)] == plan.shards
    assert names_of(longer.new_shards) == [["a"], ["c"], ["c"]]
    assert [shard.ordinal for shard in longer.shards] == [0, 1, 2, 3]
    save_plan(storage, longer)
    loaded = load_plan(storage)
    assert loaded is not None
    assert loaded.shards == longer.shards
    assert [item.name for item in storage.list(".dray/plan")] == [
        ".dray/plan/000000.arrow",
        ".dray/plan/000001.arrow",
    ]
    assert set(loaded.by_path) == {f"s3://bucket/{name}" for name in "abc"}


def test_changed_content_is_refused_by_default(storage: Storage) -> None:
    plan = planned(storage, [parquet("a", 50), parquet("b", 50)])
    with pytest.raises(InputError) as caught:
        extend(plan, [parquet("a", 51, version="v2"), parquet("b", 50, version="v2")])
    for part in ("s3://bucket/a (and 1 more files)", "version v1", "now v2", "input.on_changed: replace"):
        assert part in str(caught.value)


def test_replacing_plans_the_rows_of_the_shard_anew(storage: Storage) -> None:
    files = [parquet("a", 30), parquet("b", 30), parquet("c", 250)]
    plan = planned(storage, files)  # [a b] [c] [c] [c]
    changed = [parquet("a", 40, version="v2"), *files[1:]]
    longer = extend(plan, changed, on_changed="replace", rows=100)
    assert names_of(longer.new_shards) == [["a", "b"]]
    assert names_of(longer.shards) == [["c"], ["c"], ["c"], ["a", "b"]]
    assert longer.shards[-1].ordinal == 4
    assert [span.version for span in longer.shards[-1].spans] == ["v2", "v1"]
    (gone,) = longer.superseded
    assert gone.shard == plan.shards[0]
    assert gone.by == longer.new_shards
    save_plan(storage, longer)
    loaded = load_plan(storage)
    assert loaded is not None
    assert (loaded.shards, loaded.superseded) == (longer.shards, longer.superseded)
    assert loaded.by_path["s3://bucket/a"].version == "v2"
    assert extend(loaded, changed, on_changed="refuse") is loaded


def test_content_that_comes_back_is_done_again(storage: Storage) -> None:
    first, second = [parquet("a", 50)], [parquet("a", 60, version="v2")]
    plan = planned(storage, first)
    back = extend(extend(plan, second, on_changed="replace"), first, on_changed="replace", rows=100)
    assert [shard.id for shard in back.shards] == [shard.id for shard in plan.shards]
    assert [shard.ordinal for shard in back.shards] == [
        2
    ]  # another part, or the delete of the first would hit it
    assert [gone.shard.ordinal for gone in back.superseded] == [0, 1]


def test_a_large_changed_file_supersedes_all_its_shards(storage: Storage) -> None:
    plan = planned(storage, [parquet("c", 250)])
    longer = extend(plan, [parquet("c", 150, version="v2")], on_changed="replace", rows=100)
    assert [gone.shard for gone in longer.superseded] == list(plan.shards)
    assert all(gone.by == longer.shards for gone in longer.superseded)
    # once more: the first shards' successors are the newest ones, for the second were never needed
    again = extend(longer, [parquet("c", 90, version="v3")], on_changed="replace", rows=100)
    assert rows_of(again.shards) == [90]
    assert len(again.superseded) == 5
    assert all(gone.by == again.shards for gone in again.superseded)


def test_a_file_that_became_empty_leaves_no_rows(storage: Storage) -> None:
    plan = planned(storage, [parquet("a", 50)])
    longer = extend(plan, [parquet("a", 0, version="v2")], on_changed="replace")
    assert longer.shards == ()
    assert [gone.by for gone in longer.superseded] == [()]


def test_a_neighbour_that_is_gone_cannot_be_planned_anew(storage: Storage) -> None:
    plan = planned(storage, [parquet("a", 30), parquet("b", 30)])
    with pytest.raises(InputError, match="s3://bucket/b: shares a shard with a changed file"):
        extend(plan, [parquet("a", 30, version="v2")], on_changed="replace")


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 120), min_size=1), min_size=1, max_size=5
    ),
    st.integers(20, 150),
)
def test_whatever_happens_to_the_files_the_plan_holds_their_newest_content_once(
    listings: list[dict[str, int]], rows: int
) -> None:
    now: dict[str, int] = {}
    plan: Plan | None = None
    for listing in listings:
        now |= listing  # files never vanish here
        files = [parquet(name, now[name], version=f"v{now[name]}") for name in sorted(now)]
        if plan is None:
            plan = new_plan(files, SCHEMA, "f", rows=rows)
        else:
            before, plan = plan, extend(plan, files, on_changed="replace", rows=rows)
            assert plan.segments[: len(before.segments)] == before.segments
        covered = dict.fromkeys(now, 0)
        for shard in plan.shards:
            for span in shard.spans:
                name = span.path[-1]
                assert (span.version, span.start) == (f"v{now[name]}", covered[name])
                covered[name] = span.stop
        assert covered == now
        ordinals = [shard.ordinal for one in plan.segments for shard in one.shards]
        assert ordinals == list(range(len(ordinals)))
        gone = [one.shard.part_name for one in plan.superseded]
        assert sorted([*gone, *(s.part_name for s in plan.shards)]) == sorted(
            s.part_name for one in plan.segments for s in one.shards
        )
        decoded = tuple(decode(i, encode(one), "x") for i, one in enumerate(plan.segments))
        assert Plan(decoded).shards == plan.shards


# ── In numbers ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_summary() -> None:
    plan = new_plan([parquet("a", 250), parquet("b", 10)], SCHEMA, "f", rows=100)
    found = summary(plan)
    assert (
        found | {"fingerprint": "f", "files": 2, "shards": 4, "new_shards": 4, "rows": 260, "bytes": 260_000}
        == found
    )
    assert (found["smallest_shard"]["rows"], found["largest_shard"]["rows"]) == (10, 100)
    found = summary(new_plan([jsonl("a", 1000)], SCHEMA, "f"))
    assert (found["rows"], found["rows_estimated"]) == (None, 1000)
    assert summary(new_plan([], SCHEMA, "f"))["largest_shard"] is None


@pytest.mark.slow
def test_ten_thousand_files_are_planned_in_a_moment(storage: Storage) -> None:
    """100,000 took 2.3 s to cut, 0.6 to save and 1.2 to load on a quiet core; here a tenth, with room for noise."""
    files = [
        parquet(f"year=2026/month=01/part-{i:06d}.parquet", 1000, version=f"{i:032x}") for i in range(10_000)
    ]
    began = time.monotonic()
    save_plan(storage, new_plan(files, SCHEMA, "f", rows=1000))
    loaded = load_plan(storage)
    assert loaded is not None
    assert len(loaded.shards) == 10_000
    assert extend(loaded, files) is loaded
    assert time.monotonic() - began < 6
