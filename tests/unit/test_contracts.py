"""Shards, statistics and the parcels between stages survive their journeys; statistics add."""

from __future__ import annotations

import math

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.contracts import PROMPT_SCHEMA, Shard, Span, pack, shard_id, unpack
from pipelines.errors import RowError
from pipelines.histogram import GROWTH, Histogram
from pipelines.shard_stats import ShardStats
from pipelines.stage import Failure, Parcel

durations = st.lists(st.floats(1e-5, 1e5), max_size=50)
counts = st.dictionaries(st.sampled_from(["a", "b", "c"]), st.integers(1, 9))
stats = st.builds(
    ShardStats,
    rows_read=st.integers(0, 99),
    rows_ok=st.integers(0, 99),
    prompt_tokens=st.integers(0, 10**12),
    error_codes=counts,
    finish_reasons=counts,
    latency_s=durations.map(Histogram.of),
)


def a_shard(start: int = 0) -> Shard:
    span = Span(
        path="/in/a.parquet",
        version="v",
        size=9,
        format="parquet",
        compression="none",
        unit="rows",
        start=start,
        stop=start + 5,
    )
    return Shard(ordinal=3, id=shard_id((span,), "f"), spans=(span,), rows=5, bytes=9)


def test_a_shard_survives_json_and_is_named_by_content() -> None:
    shard = a_shard()
    assert Shard.from_json(shard.to_json()) == shard
    assert shard.part_name == f"part-000003-{shard.id}.parquet"
    assert a_shard(start=5).id != shard.id
    assert shard_id(shard.spans, "g") != shard.id


@given(durations.filter(bool))
def test_quantiles_are_within_the_promised_error(values: list[float]) -> None:
    histogram = Histogram.of(values)
    for q in (0.0, 0.5, 0.95, 1.0):
        exact = sorted(values)[max(0, math.ceil(q * len(values)) - 1)]
        got = histogram.quantile(q)
        assert got is not None
        assert exact / GROWTH**0.51 <= got <= exact * GROWTH**0.51
    assert histogram.count == len(values)
    assert histogram.total == pytest.approx(sum(values))


@given(durations, durations)
def test_histograms_merge_like_their_values(a: list[float], b: list[float]) -> None:
    merged, whole = Histogram.of(a) + Histogram.of(b), Histogram.of(a + b)
    assert merged.counts == whole.counts
    assert merged.total == pytest.approx(whole.total)


@given(stats, stats, stats)
def test_stats_add_in_any_order_and_survive_json(a: ShardStats, b: ShardStats, c: ShardStats) -> None:
    left, right = (a + b) + c, a + (c + b)
    assert left.to_dict()["error_codes"] == right.to_dict()["error_codes"]
    assert (left.prompt_tokens, left.rows_ok, left.shards) == (right.prompt_tokens, right.rows_ok, 3)
    assert left.latency_s.counts == right.latency_s.counts
    assert ShardStats.from_dict(a.to_dict()) == a


def test_the_books_balance_only_when_every_row_is_accounted_for() -> None:
    good = ShardStats(rows_read=5, rows_filtered=1, rows_in=4, rows_ok=3, rows_failed=1, error_codes={"x": 1})
    assert good.balanced
    assert not (good + ShardStats(rows_read=1)).balanced
    assert not ShardStats(rows_read=1, rows_in=1, rows_failed=1).balanced


def test_a_parcel_survives_the_journey_between_stages() -> None:
    rows = pa.table({"doc": ["a", None], "row_id": ["f#0", "f#1"]})
    prompts = pa.table(
        [
            ["f#0", "f#1"],
            [[1, 2], None],
            [9, None],
            [5, None],
            ['{"top_p": 0.5}', None],
            [1, None],
            [[{"role": "user", "content": "a"}], None],
            [[{"sha256": bytes(32), "data": b"file"}], None],
            [None, "missing_value"],
            [None, "no doc"],
        ],
        schema=PROMPT_SCHEMA,
    )
    sent = Parcel(shard=a_shard(), rows=rows, prompts=prompts, notes={"rows_read": 2})
    got = Parcel.from_batch(sent.to_batch())
    assert got.shard == sent.shard
    assert got.notes == sent.notes
    assert got.prompts == prompts
    assert isinstance(got.rows, bytes)
    assert unpack(got.rows) == rows
    failed = got.failed(Failure.of("generate", ValueError("no such thing")))
    again = Parcel.from_batch(failed.to_batch())
    assert again.rows is None
    assert again.failure is not None
    assert (again.failure.kind, again.failure.scope) == ("ValueError", "shard")


def test_a_row_error_can_always_be_written_down() -> None:
    """User code may put anything into a message; Arrow holds no lone surrogates."""
    assert pa.array([str(RowError("prompt_error", "bad \ud800 text"))]).to_pylist() == ["bad ? text"]


def test_packing_keeps_an_empty_table() -> None:
    empty = PROMPT_SCHEMA.empty_table()
    assert unpack(pack(empty)) == empty
