"""Dray on a CPU against a bare AsyncLLM script and Ray Data LLM: the same rows, prompts, engine settings and sampling.

Each repetition is a process of its own and the sides take turns. The script has read, rendered and tokenised all rows before
its engine is ready, Dray does most of that in its steady state: that comparison leans towards the script, start-up included it
leans to nobody. Texts are compared row by row between the script and Dray.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from benchmarks import measuring
from benchmarks.machine import ROOT
from benchmarks.measuring import Tell
from benchmarks.sides import SIDES, Run, Task, answers

#: Dray's steady state over the script's, and its whole process over that of the faster Ray Data LLM.
TARGET_STEADY, TARGET_WHOLE = 0.95, 1.0
NAMES = ("async_llm", "dray", "ray_data", "ray_data_tuned")

TEMPLATE = "Summarise what this Python {{ kind }} does, in one sentence.\n\n{{ name }}:\n{{ doc }}"
MOST_CHARACTERS = 400  # of a docstring: the tiny model has room for 512 tokens
_GIB = 2**30


def task(
    *, model: Path, rows: int, max_tokens: int, threads: int, in_flight: int | None, folder: Path
) -> Task:
    """The tiny model's own engine settings (`conf/models/tiny.yaml`), for any model, and the rows on disk."""
    shutil.rmtree(folder, ignore_errors=True)
    engine = yaml.safe_load((ROOT / "conf/models/tiny.yaml").read_text())["model"]["engine"]
    engine |= {"kv_cache_memory_bytes": _GIB}
    if in_flight:
        engine["max_num_seqs"] = in_flight
    most = int(engine["max_num_seqs"])
    return Task(
        input=_write_input(folder / "input", rows),
        rows=rows,
        template=TEMPLATE,
        chat=_has_chat_template(model),
        model=model,
        engine=engine,
        # Greedy, and as long as allowed: all have the same tokens to make, and their texts can be compared.
        sampling={"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True},
        in_flight=[most],
        ray_data={"batch_size": 2 * most, "max_concurrent_batches": 4},
        limits=("max_num_seqs", "max_num_batched_tokens"),
        device="cpu",
        # What Dray sets for an engine on a CPU, given to all.
        environment={
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(threads),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        },
    )


def measure(
    work: Task, folder: Path, repetitions: int, tell: Tell, names: Sequence[str] = NAMES
) -> dict[str, Any]:
    """Run all sides in turns; figures as JSON values. `folder` keeps the outputs."""
    measured = measuring.measure({name: SIDES[name] for name in names}, work, folder, repetitions, tell)
    sides = measured.by_name()
    return {
        "task": {
            key: str(value) if isinstance(value, Path) else value for key, value in asdict(work).items()
        },
        **measured.json(),
        "ratios": ratios(sides),
        "rows_with_other_text": _differing(sides),
        "problems": measured.problems(work.rows, work.rows * int(work.sampling["max_tokens"]))
        + [f"{name} cannot run: {why}" for name, why in measured.cannot.items()],
        "table": measuring.table(measured),
    }


def ratios(sides: Mapping[str, Sequence[Run]]) -> dict[str, float]:
    """Dray over the others; above 1 Dray is faster."""

    def median(name: str, figure: str) -> float:
        return statistics.median(getattr(run, figure) for run in sides[name])

    found = {}
    if "dray" in sides and "async_llm" in sides:
        found["steady_of_async_llm"] = median("dray", "tokens_per_s") / median("async_llm", "tokens_per_s")
    ray = [median(name, "wall_s") for name in ("ray_data", "ray_data_tuned") if name in sides]
    if "dray" in sides and ray:
        found["whole_of_ray_data"] = min(ray) / median("dray", "wall_s")
    return found


def table(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Lines of the table on stdout."""
    other, found = result["rows_with_other_text"], result["ratios"]
    lines = [*result["table"]]
    if other:
        lines.append(("rows whose text differs: " + ", ".join(f"{name} {n:,}" for name, n in other.items()),))
    for key, what, target in (
        ("steady_of_async_llm", "steady state over bare AsyncLLM's", TARGET_STEADY),
        ("whole_of_ray_data", "whole process over Ray Data LLM's", TARGET_WHOLE),
    ):
        if key in found:
            verdict = "reached" if found[key] >= target else "MISSED"
            lines.append((f"{what}: {found[key]:.3f}, target {target:.2f} {verdict}",))
    return lines


def _differing(sides: Mapping[str, Sequence[Run]]) -> dict[str, int]:
    """Rounding depends on which requests share a step, so a near-tie can fall either way on either side."""
    runs = [run for name in ("async_llm", "dray") for run in list(sides.get(name, ()))[:2]]
    if not runs:
        return {}
    texts = [answers(run, ["id", "generated_text"]) for run in runs]
    return {
        f"{runs[0].side} against {run.side}": int(
            pc.sum(pc.not_equal(texts[0]["generated_text"], text["generated_text"])).as_py() or 0
        )
        for run, text in zip(runs[1:], texts[1:], strict=True)
    }


def _has_chat_template(model: Path) -> bool:
    config = json.loads((model / "tokenizer_config.json").read_text())
    return bool(config.get("chat_template")) or (model / "chat_template.jinja").exists()


def _write_input(folder: Path, rows: int) -> Path:
    """The standard library's short docstrings, numbered, in one file; from the start again where there are too few."""
    command = [sys.executable, str(ROOT / "examples/docstrings.py"), str(folder / "all"), "--files", "1"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    docs = pq.read_table(folder / "all", columns=["name", "kind", "doc"])
    docs = docs.filter(pc.less_equal(pc.utf8_length(docs["doc"]), MOST_CHARACTERS))
    docs = docs.take([row % docs.num_rows for row in range(rows)])
    path = folder / "docstrings.parquet"
    pq.write_table(docs.add_column(0, "id", pa.array(range(rows))), path)
    return path
