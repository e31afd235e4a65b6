"""How many rows may fail: over the latest rows and in total, and what the message says about them."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from jobs.budget import ErrorBudget
from pipelines.contracts import FORMAT_VERSION, Shard
from pipelines.errors import ErrorBudgetSpent
from pipelines.part import Footer
from pipelines.settings import ErrorSettings
from pipelines.shard_stats import Provenance, ShardStats

ROWS = 100


def footer(number: int, codes: Mapping[str, int] | None = None, rows: int = ROWS, deaths: int = 0) -> Footer:
    codes = dict(codes or {})
    failed = sum(codes.values())
    return Footer(
        format_version=FORMAT_VERSION,
        shard=Shard(ordinal=number, id=f"{number:016x}", spans=(), rows=rows, bytes=0),
        fingerprint="f",
        stats=ShardStats(
            rows_read=rows,
            rows_in=rows,
            rows_ok=rows - failed,
            rows_failed=failed,
            error_codes=codes,
            engine_deaths=deaths,
        ),
        provenance=Provenance(run_id="run-1", job="test"),
        error_examples={
            code: {"row_id": f"q{number}#{i}", "error_message": f"why {code}"} for i, code in enumerate(codes)
        },
    )


def budget(rows_total: int | None = None, **settings: object) -> ErrorBudget:
    return ErrorBudget(ErrorSettings.model_validate(settings), rows_total, "s3://bucket/out")


def taken(of: ErrorBudget, failed: list[int]) -> int | None:
    """After how many shards the budget is spent; None: never."""
    for number, count in enumerate(failed):
        try:
            of.take(footer(number, {"missing_value": count} if count else {}))
        except ErrorBudgetSpent:
            return number + 1
    return None


WINDOW = {"max_error_rate": 0.1, "window_rows": 500, "window_min_failed": 60}


@pytest.mark.parametrize(
    ("failed", "after"),
    [
        ([0] * 50, None),
        ([10] * 50, None),  # exactly at the rate
        ([100] * 4, None),  # a window that is not full says nothing
        ([20] * 50, 5),  # full, 100 of 500
        ([0] * 40 + [100] * 5, 41),  # 100 of the latest 500, whatever went well before them
        ([0] * 40 + [59] + [0] * 40, None),  # above 10 %, below the minimum count
        ([0] * 40 + [59, 0, 0, 0, 0, 59] + [0] * 40, None),  # the first has left the window by then
        ([0] * 40 + [59, 0, 0, 0, 59], 45),
    ],
)
def test_the_window_stops_a_job_that_begins_to_fail(failed: list[int], after: int | None) -> None:
    assert taken(budget(**WINDOW), failed) == after


def test_without_a_window_only_the_total_counts() -> None:
    assert taken(budget(max_error_rate=0.1, window_rows=None, window_min_failed=1), [100] * 20) is None
    assert taken(budget(2000, max_error_rate=0.1, window_rows=None), [100] * 20) == 3


def test_the_total_stops_as_soon_as_no_good_end_is_possible() -> None:
    """10 % of 2,000 rows may fail: the 201st ends it, however few rows are through."""
    assert taken(budget(2000, max_error_rate=0.1), [100, 100]) is None
    assert taken(budget(2000, max_error_rate=0.1), [100, 100, 1]) == 3


def test_shards_larger_and_smaller_than_the_window() -> None:
    small = budget(**WINDOW)
    for number in range(200):
        small.take(footer(number, {"x": 1}, rows=10))
    with pytest.raises(ErrorBudgetSpent, match="60 of the latest 500 rows failed"):
        small.take(footer(900, {"x": 12}, rows=20))
    large = budget(**WINDOW)
    large.take(footer(0, {"x": 100}, rows=1000))
    with pytest.raises(ErrorBudgetSpent, match="101 of the latest 1,000 rows failed"):
        large.take(footer(1, {"x": 101}, rows=1000))


def test_a_shard_without_rows_changes_nothing() -> None:
    of = budget(**WINDOW)
    for number in range(1000):
        of.take(footer(number, rows=0))
    assert taken(of, [20] * 5) == 5


def test_dead_engines_and_lost_attempts_are_no_row_errors() -> None:
    of = budget(10_000, max_error_rate=0.0, window_min_failed=1, window_rows=100)
    for number in range(50):
        of.take(footer(number, deaths=3))
    of.check_total(ShardStats(rows_in=5000, rows_ok=5000, engine_deaths=150), [])


def test_the_message_has_the_three_commonest_errors_with_a_row_each() -> None:
    of = budget(max_error_rate=0.01, window_rows=200, window_min_failed=1)
    of.take(footer(1, {"rare": 1, "common": 5}, rows=100))
    with pytest.raises(ErrorBudgetSpent) as spent:
        of.take(footer(2, {"middling": 4, "commonest": 30, "common": 5}))
    lines = str(spent.value).splitlines()
    assert lines == [
        "45 of the latest 200 rows failed (22.50%), errors.max_error_rate is 1.00%:",
        "  commonest: 30 rows, for example q2#1: why commonest",
        "  common: 10 rows, for example q1#1: why common",
        "  middling: 4 rows, for example q2#0: why middling",
        "Committed rows are kept in s3://bucket/out. `dray retry-failed s3://bucket/out` runs the failed ones again, "
        "with other settings if you add them; errors.max_error_rate=0.225 accepts them",
    ]


def test_an_example_stays_short_and_on_its_line() -> None:
    of = budget(max_error_rate=0.0, window_rows=100, window_min_failed=1)
    long = footer(1, {"prompt_error": 1})
    long.error_examples["prompt_error"]["error_message"] = "first\nsecond " + "x" * 500
    with pytest.raises(ErrorBudgetSpent) as spent:
        of.take(long)
    line = str(spent.value).splitlines()[1]
    assert line.startswith("  prompt_error: 1 rows, for example q1#0: first second xxx")
    assert line.endswith("x…")
    assert len(line) < 220


def test_the_last_word_is_over_all_parts_of_the_output() -> None:
    """Parts of earlier runs, which this one never saw, count; their examples are in their footers."""
    of = budget(1000, max_error_rate=0.05)
    of.take(footer(9, {"prompt_error": 1}))
    parts = [footer(n, {"missing_value": 10}) for n in range(10)]
    totals = sum((part.stats for part in parts), ShardStats(shards=0))
    with pytest.raises(
        ErrorBudgetSpent, match=r"100 of 1,000 rows failed .*\n  missing_value: 100 rows, .* q0#0"
    ):
        of.check_total(totals, parts)
    budget(1000, max_error_rate=0.1).check_total(totals, parts)


def test_the_rate_that_the_message_names_does_accept_the_rows() -> None:
    for failed in (1, 1000, 2000, 2999, 3000):
        one = footer(1, {"x": failed}, rows=3000)
        with pytest.raises(ErrorBudgetSpent) as spent:
            budget(max_error_rate=0.0).check_total(one.stats, [one])
        rate = float(str(spent.value).rpartition("errors.max_error_rate=")[2].split()[0])
        budget(max_error_rate=rate).check_total(one.stats, [one])
