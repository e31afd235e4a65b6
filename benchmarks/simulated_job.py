"""One `dray run` with the SIMULATED engine over rows made on the spot, and what was seen of it from outside."""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from benchmarks import child
from benchmarks.machine import ROOT

_MIB = 2**20
_ROWS_PER_FILE = 50_000


def run_simulated(
    *, model: Path, rows: int, shard_rows: int, folder: Path, answer_tokens: int = 8
) -> dict[str, Any]:
    """Run it to its end; figures as JSON values. The model is only asked for its tokenizer."""
    shutil.rmtree(folder, ignore_errors=True)
    _write_input(folder / "input", rows)
    output, job = folder / "out", folder / "job.yaml"
    job.write_text(
        yaml.safe_dump(
            {
                "name": "simulated",
                "input": {"path": str(folder / "input")},
                "prompt": {"template": "Is {{ number }} even?"},
                "model": {
                    "source": str(model),
                    "backend": "simulated",
                    "simulated": {
                        "tokens_per_s": 1e9,
                        "min_tokens": answer_tokens,
                        "max_tokens": answer_tokens,
                    },
                },
                "sampling": {"temperature": 0, "max_tokens": answer_tokens},
                "output": {"path": str(output)},
                "pool": {"device": "cpu"},
                "shards": {"rows": shard_rows},
            },
            sort_keys=False,
        )
    )
    watched = child.run(
        child.dray("run", str(job), "--json", "--quiet"),
        log=folder / "log.txt",
        env=child.environment({"DRAY_LOGS": str(folder)}),
        cwd=ROOT,
    )
    parts = sorted((output / "data").glob("*.parquet"))
    metadata = [pq.read_metadata(part) for part in parts]
    footers = [json.loads(m.metadata[b"dray"]) for m in metadata]
    written_at = sorted(part.stat().st_mtime for part in parts)
    ready_at = min(footer["provenance"]["engine_ready_at"] for footer in footers)
    written = sum(m.num_rows for m in metadata)
    tenth = len(parts) // 10
    middle = written_at[tenth : len(parts) - tenth]
    engines = {footer["provenance"]["engine"] for footer in footers}
    problems = [f"{written:,} rows were written, not {rows:,}"] * (written != rows)
    problems += [f"the engine was {engines}, not the simulated one"] * (engines != {"simulated"})
    stats = [footer["stats"] for footer in footers]
    return {
        "rows": written,
        "shards": len(parts),
        "shard_rows": shard_rows,
        "startup_s": ready_at - watched.began_at,
        "steady_s": written_at[-1] - ready_at,
        "finish_s": watched.ended_at - written_at[-1],
        "wall_s": watched.wall_s,
        "middle_s_per_part": (middle[-1] - middle[0]) / max(1, len(middle) - 1),
        **{name: sum(s[name] for s in stats) for name in ("prepare_s", "generate_s", "commit_s")},
        "driver_peak_mib": watched.peak_rss / _MIB,
        "driver_cpu_s": watched.cpu_s,
        "cpu_by_process_s": watched.tree_cpu_s,
        "processes": watched.processes,
        "largest_worker_mib": watched.largest_descendant_rss / _MIB,
        "driver_mib_by_second": [(at, round(rss / _MIB, 1)) for at, rss in watched.rss_curve],
        "driver_mib_median": statistics.median(rss for _, rss in watched.rss_curve) / _MIB,
        "problems": problems,
    }


def _write_input(folder: Path, rows: int) -> None:
    folder.mkdir(parents=True)
    for start in range(0, rows, _ROWS_PER_FILE):
        numbers = range(start, min(start + _ROWS_PER_FILE, rows))
        pq.write_table(pa.table({"number": list(numbers)}), folder / f"numbers-{start:09d}.parquet")
