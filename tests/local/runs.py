"""Jobs for tests: the tiny model on questions whose answers are known, run in this process or by the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples" / "tiny-model"
CONF = ROOT / "conf"
_SCRIPT = Path(sys.executable).with_name("dray")
#: The command line; as a module where the console script is not installed.
DRAY = [str(_SCRIPT)] if _SCRIPT.exists() else [sys.executable, "-m", "jobs.cli"]

sys.path.append(str(ROOT / "examples"))
from questions import held_out  # noqa: E402


def write_questions(folder: Path, rows: int, files: int = 1) -> pa.Table:
    """Questions with their answers, as Parquet files in `folder`; returns all of them in order."""
    folder.mkdir(parents=True, exist_ok=True)
    asked = pa.Table.from_pylist([question._asdict() for question in held_out(rows)])
    step = -(-rows // files)
    for i in range(files):
        pq.write_table(asked.slice(i * step, step), folder / f"q{i:03d}.parquet")
    return asked


def job(source: Path | str, target: Path | str, /, **sections: Any) -> dict[str, Any]:
    """A job from `source` to `target` on the tiny model, as a mapping for `load`; greedy and simulated unless `sections` say otherwise."""
    base: dict[str, Any] = {
        "name": "test",
        "extends": [str(CONF / "models" / "tiny.yaml"), str(CONF / "clusters" / "local.yaml")],
        "input": {"path": str(source)},
        "prompt": {"template": "{{ question }}"},
        # So fast that no test waits for its answers; one that needs a run to last says how fast.
        "model": {"source": str(TINY), "backend": "simulated", "simulated": {"tokens_per_s": 1e7}},
        "sampling": {"temperature": 0, "max_tokens": 48},
        "output": {"path": str(target)},
    }
    for name, section in sections.items():
        if name == "prompt":
            base[name] = section
        elif isinstance(section, Mapping):
            base[name] = {**base.get(name, {}), **section}
        else:
            base[name] = section
    return base


REAL: dict[str, Any] = {"backend": "vllm"}


def rows_of(output: Path | str, folder: str = "data") -> pa.Table:
    """What an independent reader finds in an output: all rows, by row id and sample."""
    found = ds.dataset(f"{output}/{folder}", format="parquet").to_table()
    return found.sort_by([("row_id", "ascending"), ("sample_index", "ascending")])


def content(output: Path | str) -> list[dict[str, Any]]:
    """`rows_of` without what differs between two equal runs."""
    found = rows_of(output)
    return found.select([n for n in found.column_names if n not in ("run_id", "cached_tokens")]).to_pylist()


def dray(
    *args: str, env: Mapping[str, str] | None = None, cwd: Path | None = None, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user would."""
    return subprocess.run(
        [*DRAY, *args],
        env={**os.environ, **(env or {})},
        cwd=cwd or ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
