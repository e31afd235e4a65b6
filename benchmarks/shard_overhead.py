"""What a shard costs beside the engine's work: many small shards with the SIMULATED engine and one-token answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.simulated_job import run_simulated

SHARD_ROWS = 20


def measure(model: Path, shards: int, folder: Path, tell: Callable[[str], None]) -> dict[str, Any]:
    """One run of `shards` shards, and what each of them cost in milliseconds.

    The first part waits for the commit worker to load its tokenizer. `steady_ms` has that in it; `middle_ms`, from the
    times of the middle 80 % of the parts, is what one shard more costs.
    """
    run = run_simulated(
        model=model, rows=shards * SHARD_ROWS, shard_rows=SHARD_ROWS, folder=folder, answer_tokens=1
    )
    per_shard = {
        "steady_ms": 1000 * run["steady_s"] / run["shards"],
        "middle_ms": 1000 * run["middle_s_per_part"],
        "finish_ms": 1000 * run["finish_s"] / run["shards"],
        "driver_cpu_ms": 1000 * run["driver_cpu_s"] / run["shards"],
        **{
            f"{name}_ms": 1000 * run[f"{name}_s"] / run["shards"]
            for name in ("prepare", "generate", "commit")
        },
    }
    tell(
        f"  {run['shards']:,} shards: {per_shard['steady_ms']:.1f} ms per shard, {run['wall_s']:.0f} s in all"
    )
    return {"engine": "SIMULATED", "run": run, "per_shard": per_shard, "problems": run["problems"]}


def table(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Lines of the table on stdout."""
    cost, run = result["per_shard"], result["run"]
    shape = f"{run['shards']:,} shards of {SHARD_ROWS} rows (SIMULATED engine)"
    return [
        (shape, "ms per shard"),
        ("engine ready to last part, the commit worker's start included", f"{cost['steady_ms']:.1f}"),
        ("one shard more (middle 80 % of the parts)", f"{cost['middle_ms']:.1f}"),
        (
            "  its stages: prepare, generate, commit",
            " · ".join(f"{cost[f'{s}_ms']:.1f}" for s in ("prepare", "generate", "commit")),
        ),
        ("finish: books, statistics, card, end of Ray", f"{cost['finish_ms']:.1f}"),
        ("CPU of the driver, start-up included", f"{cost['driver_cpu_ms']:.1f}"),
        ("peak memory of the driver", f"{run['driver_peak_mib']:,.0f} MiB"),
    ]
