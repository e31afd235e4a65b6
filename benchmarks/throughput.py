"""Dray against a bare AsyncLLM script (`bare_async_llm.py`): the same rows, prompts, engine settings and sampling.

Each repetition is a process of its own, in turns (bare, Dray, bare, Dray …), because the speed of a machine drifts.
*Steady state* is from the engine being ready to the last row being written: for the script by its own clock, for Dray from
the parts' footers (`engine_ready_at`) to the last part's modification time. Everything before counts as start-up, everything
after as finish; both are reported, and so is the whole. The script has read, rendered and tokenised all rows before its
engine is ready, Dray does most of that in its steady state: the comparison leans towards the script.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from benchmarks import child
from benchmarks.machine import ROOT

TARGET_RATIO = 0.90
"""Dray's steady state over the script's."""

TEMPLATE = "Summarise what this Python {{ kind }} does, in one sentence.\n\n{{ name }}:\n{{ doc }}"
MOST_CHARACTERS = 400  # of a docstring: the tiny model has room for 512 tokens
_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What both do."""

    model: Path
    rows: int
    max_tokens: int
    threads: int
    """Cores of the model's computation (OMP_NUM_THREADS); the engine's front end is a process beside it."""
    engine: dict[str, Any]
    """vLLM's EngineArgs."""

    @property
    def sampling(self) -> dict[str, Any]:
        # Greedy, and as long as allowed: both have the same tokens to make, and their texts can be compared.
        return {"temperature": 0, "max_tokens": self.max_tokens, "ignore_eos": True}

    @property
    def in_flight(self) -> int:
        return int(self.engine["max_num_seqs"])

    @property
    def environment(self) -> dict[str, str]:
        """What Dray sets for an engine on a CPU, given to both."""
        return {
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(self.threads),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }


@dataclass(frozen=True, kw_only=True)
class Run:
    """One repetition of one side. Rows and tokens are counted in the files that it wrote."""

    side: str
    rows: int
    output_tokens: int
    prompt_tokens: int
    startup_s: float
    """From the start of the process to the engine being ready."""
    steady_s: float
    """From then to the last row being written."""
    finish_s: float
    """From then to the end of the process."""
    wall_s: float
    phases_s: dict[str, float]
    """What the side itself says about its phases; Dray's may overlap."""
    cpu_s: float
    """Of all its processes, start-up included."""
    cpu_by_process_s: dict[str, float]
    processes: dict[str, int]

    @property
    def rows_per_s(self) -> float:
        return self.rows / self.steady_s

    @property
    def tokens_per_s(self) -> float:
        return self.output_tokens / self.steady_s


def workload(*, model: Path, rows: int, max_tokens: int, threads: int, in_flight: int | None) -> Workload:
    """The tiny model's own engine settings (`conf/models/tiny.yaml`), for any model."""
    engine = yaml.safe_load((ROOT / "conf/models/tiny.yaml").read_text())["model"]["engine"]
    engine |= {"kv_cache_memory_bytes": _GIB}
    if in_flight:
        engine["max_num_seqs"] = in_flight
    return Workload(model=model, rows=rows, max_tokens=max_tokens, threads=threads, engine=engine)


def measure(work: Workload, folder: Path, repetitions: int, tell: Callable[[str], None]) -> dict[str, Any]:
    """Run both sides in turns; figures as JSON values. `folder` keeps the input and the last outputs."""
    shutil.rmtree(folder, ignore_errors=True)
    source = _write_input(folder / "input", work.rows)
    runs: list[Run] = []
    texts: dict[str, list[pa.Table]] = {"bare": [], "dray": []}
    for repetition in range(1, repetitions + 1):
        for side, do in (("bare", _bare), ("dray", _dray)):
            done, table = do(work, source, folder / f"{side}-{repetition}")
            runs.append(done)
            texts[side].append(table)
            tell(
                f"  {side:4} {repetition}: {done.tokens_per_s:8,.0f} output tokens/s over {done.steady_s:.1f} s, "
                f"start-up {done.startup_s:.1f} s, finish {done.finish_s:.1f} s"
            )
    bare = [run for run in runs if run.side == "bare"]
    dray = [run for run in runs if run.side == "dray"]
    problems = [
        f"{run.side}: {run.rows:,} rows with {run.output_tokens:,} tokens were written, not "
        f"{source.num_rows:,} with {source.num_rows * work.max_tokens:,}"
        for run in runs
        if (run.rows, run.output_tokens) != (source.num_rows, source.num_rows * work.max_tokens)
    ]
    problems += ["the two sides made prompts of different lengths"] * (
        len({run.prompt_tokens for run in runs}) > 1
    )
    ratio = statistics.median(run.tokens_per_s for run in dray) / statistics.median(
        run.tokens_per_s for run in bare
    )
    return {
        "workload": {
            **asdict(work),
            "model": str(work.model),
            "rows": source.num_rows,
            "sampling": work.sampling,
        },
        "environment": work.environment,
        "runs": [
            {**asdict(run), "rows_per_s": run.rows_per_s, "output_tokens_per_s": run.tokens_per_s}
            for run in runs
        ],
        "bare": _summary(bare),
        "dray": _summary(dray),
        "steady_ratio": ratio,
        "wall_ratio": statistics.median(run.wall_s for run in bare)
        / statistics.median(run.wall_s for run in dray),
        "target_ratio": TARGET_RATIO,
        "rows_with_other_text": {
            "dray against bare": _differing(texts["bare"][0], texts["dray"][0]),
            # Rounding depends on which requests share a step, so a near-tie can fall either way on either side.
            **(
                {"bare against bare": _differing(texts["bare"][0], texts["bare"][1])}
                if repetitions > 1
                else {}
            ),
            **(
                {"dray against dray": _differing(texts["dray"][0], texts["dray"][1])}
                if repetitions > 1
                else {}
            ),
        },
        "problems": problems,
    }


def table(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Lines of the table on stdout: what, bare, Dray, ratio."""

    def line(what: str, key: str, form: str, *, faster_is_more: bool | None = None) -> tuple[str, ...]:
        bare, dray = result["bare"][key], result["dray"][key]
        cells = [
            f"{side['median']:{form}} ({side['min']:{form}} – {side['max']:{form}})" for side in (bare, dray)
        ]
        ratio = dray["median"] / bare["median"] if bare["median"] else float("nan")
        return (
            what,
            *cells,
            "" if faster_is_more is None else f"{ratio if faster_is_more else 1 / ratio:.2f}",
        )

    other = result["rows_with_other_text"]
    return [
        ("", "bare AsyncLLM", "Dray", "Dray / bare"),
        line("steady state, output tokens/s", "output_tokens_per_s", ",.0f", faster_is_more=True),
        line("steady state, rows/s", "rows_per_s", ",.1f", faster_is_more=True),
        line("steady state, s", "steady_s", ",.1f"),
        line("start-up, s", "startup_s", ",.1f"),
        line("finish, s", "finish_s", ",.1f"),
        line("whole, s", "wall_s", ",.1f", faster_is_more=False),
        line("CPU of all processes, s", "cpu_s", ",.0f"),
        ("rows whose text differs", *(f"{name}: {n:,}" for name, n in other.items())),
        (_verdict(result["steady_ratio"]),),
    ]


def _verdict(ratio: float) -> str:
    return f"steady state {ratio:.3f} of the script's: target {TARGET_RATIO:.2f} {'reached' if ratio >= TARGET_RATIO else 'MISSED'}"


# ── The two sides ────────────────────────────────────────────────────────────────────────────────────────────────


def _bare(work: Workload, source: _Input, folder: Path) -> tuple[Run, pa.Table]:
    folder.mkdir(parents=True)
    task, times, output = folder / "task.json", folder / "times.json", folder / "answers.parquet"
    task.write_text(
        json.dumps(
            {
                "input": str(source.path),
                "output": str(output),
                "template": TEMPLATE,
                "model": str(work.model),
                "engine": work.engine,
                "sampling": work.sampling,
                "in_flight": work.in_flight,
            },
            indent=1,
        )
    )
    command = [sys.executable, str(ROOT / "benchmarks/bare_async_llm.py"), str(task), str(times)]
    watched = child.run(command, log=folder / "log.txt", env=child.environment(work.environment), cwd=folder)
    said = json.loads(times.read_text())
    ready_at, written_at = said.pop("engine_ready_at"), said.pop("written_at")
    return _run("bare", watched, ready_at, written_at, said, pq.read_table(output))


def _dray(work: Workload, source: _Input, folder: Path) -> tuple[Run, pa.Table]:
    folder.mkdir(parents=True)
    job, output = folder / "job.yaml", folder / "out"
    job.write_text(
        yaml.safe_dump(
            {
                "name": "throughput",
                "input": {"path": str(source.path)},
                "prompt": {"template": TEMPLATE},
                "model": {"source": str(work.model), "engine": work.engine},
                "sampling": work.sampling,
                "output": {"path": str(output)},
                "pool": {"device": "cpu"},
            },
            sort_keys=False,
        )
    )
    environment = {**work.environment, "DRAY_LOGS": str(folder)}
    watched = child.run(
        [str(Path(sys.executable).parent / "dray"), "run", str(job), "--json", "--quiet"],
        log=folder / "log.txt",
        env=child.environment(environment),
        cwd=ROOT,
    )
    parts = sorted((output / "data").glob("*.parquet"))
    footers = [json.loads(pq.read_metadata(part).metadata[b"dray"]) for part in parts]
    origins, stats = [f["provenance"] for f in footers], [f["stats"] for f in footers]
    ready_at = min(origin["engine_ready_at"] for origin in origins)
    written_at = max(part.stat().st_mtime for part in parts)
    said = {
        "to_first_prepare_s": min(origin["started_at"] for origin in origins) - watched.began_at,
        "engine_start_s": max(origin["engine_start_s"] for origin in origins),
        "shards": len(parts),
        **{
            f"all_{name}": sum(s[name] for s in stats)
            for name in ("prepare_s", "queue_s", "generate_s", "commit_s")
        },
    }
    return _run("dray", watched, ready_at, written_at, said, pa.concat_tables(map(pq.read_table, parts)))


def _run(
    side: str,
    watched: child.Watched,
    ready_at: float,
    written_at: float,
    phases: dict[str, float],
    written: pa.Table,
) -> tuple[Run, pa.Table]:
    return Run(
        side=side,
        rows=written.num_rows - written["generated_text"].null_count,
        output_tokens=pc.sum(written["completion_tokens"]).as_py(),
        prompt_tokens=pc.sum(written["prompt_tokens"]).as_py(),
        startup_s=ready_at - watched.began_at,
        steady_s=written_at - ready_at,
        finish_s=watched.ended_at - written_at,
        wall_s=watched.wall_s,
        phases_s=phases,
        cpu_s=sum(watched.tree_cpu_s.values()),
        cpu_by_process_s=watched.tree_cpu_s,
        processes=watched.processes,
    ), written.select(["id", "generated_text"])


# ── Input and figures ────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class _Input:
    path: Path
    num_rows: int


def _write_input(folder: Path, rows: int) -> _Input:
    """The standard library's short docstrings, numbered, in one file; from the start again where there are too few."""
    command = [sys.executable, str(ROOT / "examples/docstrings.py"), str(folder / "all"), "--files", "1"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    docs = pq.read_table(folder / "all", columns=["name", "kind", "doc"])
    docs = docs.filter(pc.less_equal(pc.utf8_length(docs["doc"]), MOST_CHARACTERS))
    docs = docs.take([row % docs.num_rows for row in range(rows)])
    path = folder / "docstrings.parquet"
    pq.write_table(docs.add_column(0, "id", pa.array(range(rows))), path)
    return _Input(path=path, num_rows=rows)


def _summary(runs: list[Run]) -> dict[str, dict[str, float]]:
    figures = {
        "output_tokens_per_s": [run.tokens_per_s for run in runs],
        "rows_per_s": [run.rows_per_s for run in runs],
        "startup_s": [run.startup_s for run in runs],
        "steady_s": [run.steady_s for run in runs],
        "finish_s": [run.finish_s for run in runs],
        "wall_s": [run.wall_s for run in runs],
        "cpu_s": [run.cpu_s for run in runs],
    }
    return {
        name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
        for name, values in figures.items()
    }


def _differing(one: pa.Table, other: pa.Table) -> int:
    one, other = one.sort_by("id"), other.sort_by("id")
    if not one["id"].equals(other["id"]):
        raise ValueError("the two sides wrote different rows")
    return int(pc.sum(pc.not_equal(one["generated_text"], other["generated_text"])).as_py() or 0)
