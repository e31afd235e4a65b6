"""What a trial came to: rows, by the independent reader, and what the fault cost, by the watch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.chaos.reader import check
from tests.chaos.stage import SHARD_ROWS

if TYPE_CHECKING:
    from tests.chaos.trial import Trial


def settle(trial: Trial, *, bounded: bool) -> None:
    """Read what stands there, and count what it cost."""
    result, watch = trial.result, trial.watch
    assert watch is not None
    watch.stop()
    watch.look()
    found = check(trial.source, trial.output, trial.answers, trial.errors)
    for name in ("rows", "lost", "doubled", "wrong", "misjudged"):
        setattr(result, name, getattr(found, name))
    if not found.sound:
        result.problem = found.example or "no _SUCCESS"
    if watch.begun:
        sizes = dict.fromkeys(watch.parts, SHARD_ROWS)
        given = {
            shard: sum(SHARD_ROWS if rows is None else rows for _, rows in watch.begun.get(shard, []))
            for shard in sizes
        }
        result.repeated_rows = sum(max(0, given[shard] - rows) for shard, rows in sizes.items())
        result.in_flight_rows = sum(len(watch.in_flight(at)) for at in trial.strikes) * SHARD_ROWS
        if bounded:
            by_settings = len(trial.strikes) * trial.engines * trial.shards_each * SHARD_ROWS
            result.allowed_rows = max(by_settings, result.in_flight_rows)
            if result.repeated_rows > result.allowed_rows and not result.problem:
                result.problem = f"{result.repeated_rows} rows were run again, {result.allowed_rows} may be"
    result.recover_s = max(
        (took for at in trial.strikes if (took := _recovered(trial, at)) is not None), default=None
    )


def _recovered(trial: Trial, at: float) -> float | None:
    assert trial.watch is not None
    parts = trial.watch.parts
    waited_for = [parts[shard] for shard in trial.watch.in_flight(at) if shard in parts]
    later = [when for when in parts.values() if when > at]
    if waited_for:
        return max(waited_for) - at
    return min(later) - at if later else None
