"""A job of the repository's tiny model on a CPU, run as its user would run it, and what it has left: for benchmarks that compare such jobs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import child
from benchmarks.machine import ROOT

SHARD_ROWS = 250


@dataclass(frozen=True)
class TinyJob:
    """A finished job."""

    output: Path
    wall_s: float
    """The process from start to end."""

    def rows(self, *columns: str) -> pa.Table:
        """Of all parts; all columns where none is named."""
        return pq.read_table(self.output / "data", columns=list(columns) or None)

    @property
    def footers(self) -> list[dict[str, Any]]:
        """`pipelines.part.Footer` of each part."""
        parts = (self.output / "data").glob("*.parquet")
        return [json.loads(pq.read_metadata(part).metadata[b"dray"]) for part in parts]

    @property
    def stats(self) -> list[dict[str, Any]]:
        """`pipelines.shard_stats.ShardStats` of each part."""
        return [footer["stats"] for footer in self.footers]

    @property
    def asking_s(self) -> float:
        """From the first request to the last answer."""
        turns = [turn for footer in self.footers for turn in footer["provenance"]["turns"]]
        return float(max(turn["ended_at"] for turn in turns) - min(turn["began_at"] for turn in turns))

    @property
    def texts(self) -> dict[str, str]:
        """Row id → answer."""
        rows = self.rows("row_id", "generated_text")
        return dict(zip(rows["row_id"].to_pylist(), rows["generated_text"].to_pylist(), strict=True))


def write_questions(folder: Path, questions: Sequence[str]) -> None:
    """The input of `run`; an earlier one is replaced."""
    (folder / "in").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"question": questions}), folder / "in" / "rows.parquet")


def run(folder: Path, name: str, **sections: Any) -> TinyJob:
    """Run `<folder>/<name>.yaml` over the questions, with these sections; its output and log lie beside it."""
    job = {
        "name": name,
        "extends": [str(ROOT / "conf/base.yaml"), str(ROOT / "conf/models/tiny.yaml")],
        "input": {"path": str(folder / "in")},
        "prompt": {"template": "{{ question }}"},
        "model": {"source": str(ROOT / "examples/tiny-model")},
        "output": {"path": str(folder / name)},
        "shards": {"rows": SHARD_ROWS},
        **sections,
    }
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(job))
    watched = child.run(
        child.dray("run", str(file), "--quiet"),
        log=folder / f"{name}.txt",
        env=child.environment({"DRAY_LOGS": str(folder / "logs"), "VLLM_CPU_KVCACHE_SPACE": "1"}),
        cwd=ROOT,
    )
    return TinyJob(folder / name, watched.wall_s)
