"""Is the driver's memory flat in the number of rows? `dray run` with the SIMULATED engine on a small and a large input.

Only the driver process (`dray run` itself) is measured, from outside; Ray's processes and workers hold the rows of the few
shards in flight and are reported apart.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.simulated_job import run_simulated

SHARD_ROWS = 5_000
MOST_GROWTH = 1.10
"""Peak of the largest input over that of the smallest: rows and shards may cost no more than this."""


def measure(model: Path, rows: list[int], folder: Path, tell: Callable[[str], None]) -> dict[str, Any]:
    """One run for each number of rows."""
    runs = []
    for n in rows:
        done = run_simulated(model=model, rows=n, shard_rows=SHARD_ROWS, folder=folder / f"{n}-rows")
        runs.append(done)
        tell(f"  {n:9,} rows: driver peak {done['driver_peak_mib']:,.0f} MiB, {done['wall_s']:.0f} s")
    ratio = runs[-1]["driver_peak_mib"] / runs[0]["driver_peak_mib"]
    problems = [problem for run in runs for problem in run["problems"]]
    return {
        "engine": "SIMULATED",
        "runs": runs,
        "peak_ratio": ratio,
        "target_ratio": MOST_GROWTH,
        "problems": problems,
    }


def table(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Lines of the table on stdout."""
    lines: list[tuple[str, ...]] = [
        ("rows (SIMULATED engine)", "shards", "driver peak", "to the first", "largest worker", "whole")
    ]
    smallest = result["runs"][0]["driver_peak_mib"]
    lines += [
        (
            f"{run['rows']:,}",
            f"{run['shards']:,}",
            f"{run['driver_peak_mib']:,.0f} MiB",
            f"{run['driver_peak_mib'] / smallest:.2f}",
            f"{run['largest_worker_mib']:,.0f} MiB",
            f"{run['wall_s']:,.0f} s",
        )
        for run in result["runs"]
    ]
    return lines
