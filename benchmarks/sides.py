"""The sides that are compared: each does one task in processes of its own, and is judged by the files that it wrote.

A side takes a `Task` and an empty folder and gives `Run`s: one for each pass over the rows. Rows and tokens are counted in the
Parquet files. *Steady state* is from the engine being ready to the last row being written: by its own clock for a bare
script, from `engine_ready_at` in the parts' footers to the last part's modification time for Dray.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from benchmarks import child
from benchmarks.machine import ROOT


@dataclass(frozen=True, kw_only=True)
class Task:
    """What every side does."""

    input: Path
    """One Parquet file with a column `id`."""
    rows: int
    template: str
    chat: bool
    """Whether the model has a chat template, which is applied then."""
    model: Path
    engine: Mapping[str, Any]
    """vLLM's EngineArgs, with the limits that all tuned sides share."""
    sampling: Mapping[str, Any]
    max_tokens_column: str | None = None
    in_flight: Sequence[int]
    """For AsyncLLM with a semaphore: one pass for each."""
    ray_data: Mapping[str, Any]
    """`ray_data_tuned`: batch_size, max_concurrent_batches … of vLLMEngineProcessorConfig."""
    limits: Sequence[str] = ()
    """Of `engine`, what Ray Data LLM's default side leaves to vLLM."""
    device: str
    replicas: int = 1
    packed: int = 1
    """Engines per GPU of the side `dray_packed`."""
    warmup_rows: int = 0
    """Answered before the first pass of the bare sides; Dray and Ray Data begin cold."""
    shard_rows: int | None = None
    pool: Mapping[str, Any] = field(default_factory=dict)
    """Further settings of Dray's pool."""
    environment: Mapping[str, str] = field(default_factory=dict)
    deadline: float | None = None
    """By `time.monotonic`: a side that is not done by then is stopped."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One pass of one side. Rows and tokens are counted in the files that it wrote."""

    side: str
    variant: str
    """`512 in flight`, where a side has several settings."""
    rows: int
    output_tokens: int
    prompt_tokens: int
    startup_s: float
    """From the start of the process to the engine being ready (0 for a pass on a running engine)."""
    steady_s: float
    """From then to the last row being written."""
    finish_s: float | None
    """From then to the end of the process; None but for the last pass."""
    wall_s: float | None
    """The whole process, where it made one pass only."""
    cpu_s: float | None
    """Of all its processes, start-up included, where it made one pass only."""
    phases_s: dict[str, float]
    """What the side itself says about its phases; Dray's may overlap."""
    cpu_by_process_s: dict[str, float]
    processes: dict[str, int]
    output: list[str]
    rows_reused: int = 0
    """Rows whose answer was not asked for, as an equal prompt's was there."""

    @property
    def name(self) -> str:
        return f"{self.side} ({self.variant})" if self.variant else self.side

    @property
    def tokens_per_s(self) -> float:
        return self.output_tokens / self.steady_s

    @property
    def rows_per_s(self) -> float:
        return self.rows / self.steady_s

    @property
    def total_tokens_per_s(self) -> float:
        """Prompt and output tokens."""
        return (self.output_tokens + self.prompt_tokens) / self.steady_s


Side = Callable[[Task, Path], list[Run]]


def answers(run: Run, columns: Sequence[str]) -> pa.Table:
    """What the run wrote, sorted by id."""
    return pa.concat_tables([pq.read_table(path, columns=list(columns)) for path in run.output]).sort_by("id")


def llm_generate(task: Task, folder: Path) -> list[Run]:
    """One `LLM.generate` call per engine."""
    return _script("llm_generate", "bare_vllm.py", task, folder, {"in_flight": [0]})


def async_llm(task: Task, folder: Path) -> list[Run]:
    """AsyncLLM with a semaphore; one pass for each of `task.in_flight`."""
    return _script("async_llm", "bare_vllm.py", task, folder, {"in_flight": list(task.in_flight)})


def ray_data(task: Task, folder: Path) -> list[Run]:
    """Ray Data LLM with its own and vLLM's defaults."""
    engine = {key: value for key, value in task.engine.items() if key not in task.limits}
    return _script("ray_data", "ray_data_llm.py", task, folder, {"engine": engine, "processor": {}})


def ray_data_tuned(task: Task, folder: Path) -> list[Run]:
    """Ray Data LLM with the task's engine limits and its own settings tuned."""
    return _script("ray_data_tuned", "ray_data_llm.py", task, folder, {"processor": dict(task.ray_data)})


def dray(task: Task, folder: Path) -> list[Run]:
    """`dray run` as it comes."""
    return _dray("dray", task, folder, {})


def dray_continuous(task: Task, folder: Path) -> list[Run]:
    """`dray run` that admits a request as soon as one leaves."""
    return _dray("dray_continuous", task, folder, {"admission": {"policy": "continuous"}})


def dray_packed(task: Task, folder: Path) -> list[Run]:
    """`dray run` with several engines on each GPU."""
    pool = {"replicas": task.replicas * task.packed, "engines_per_gpu": task.packed}
    return [
        replace(run, variant=f"{task.packed} engines") for run in _dray("dray_packed", task, folder, pool)
    ]


def dray_loop(task: Task, folder: Path) -> list[Run]:
    """Dray's loop around the engine, without Ray, detokenising and parts."""
    folder.mkdir(parents=True)
    job, result, output = (
        _job("dray_loop", task, folder, {}),
        folder / "result.json",
        folder / "answers.parquet",
    )
    script = str(ROOT / "benchmarks" / "engine_loop.py")
    watched = child.run(
        [sys.executable, script, str(job), str(result), str(output)],
        log=folder / "log.txt",
        env=child.environment(task.environment),
        cwd=ROOT,
        deadline=task.deadline,
    )
    found = json.loads(result.read_text())
    (one,) = found["passes"]
    return [
        _run(
            "dray_loop",
            watched,
            ready_at=one["ready_at"],
            written_at=one["written_at"],
            phases=found["phases"],
            output=one["output"],
        )
    ]


SIDES: dict[str, Side] = {
    side.__name__: side
    for side in (
        llm_generate,
        async_llm,
        ray_data,
        ray_data_tuned,
        dray,
        dray_continuous,
        dray_packed,
        dray_loop,
    )
}


def _script(name: str, script: str, task: Task, folder: Path, own: dict[str, Any]) -> list[Run]:
    """A baseline. `bare_vllm.py` knows one engine: for several, a process each with a GPU and a share of the rows."""
    folder.mkdir(parents=True)
    alone = script == "ray_data_llm.py"
    many = 1 if alone else task.replicas
    gpus = int(task.engine.get("tensor_parallel_size", 1))

    def one(number: int) -> tuple[child.Watched, dict[str, Any]]:
        place, result = folder / f"task-{number}.json", folder / f"result-{number}.json"
        values = {
            "input": str(task.input),
            "output": str(folder / f"answers-{number}"),
            "rows": [task.rows * number // many, task.rows * (number + 1) // many],
            "template": task.template,
            "chat": task.chat,
            "model": str(task.model),
            "engine": dict(task.engine),
            "sampling": dict(task.sampling),
            "max_tokens_column": task.max_tokens_column,
            "warmup_rows": task.warmup_rows,
            "device": task.device,
            "replicas": task.replicas,
            **own,
        }
        place.write_text(json.dumps(values, indent=1))
        extra = dict(task.environment)
        if many > 1:
            extra["CUDA_VISIBLE_DEVICES"] = ",".join(str(number * gpus + gpu) for gpu in range(gpus))
        watched = child.run(
            [sys.executable, str(ROOT / "benchmarks" / script), str(place), str(result)],
            log=folder / f"log-{number}.txt",
            env=child.environment(extra),
            cwd=folder,
            deadline=task.deadline,
        )
        return watched, json.loads(result.read_text())

    with ThreadPoolExecutor(many) as pool:
        done = list(pool.map(one, range(many)))
    passes = list(zip(*(found["passes"] for _, found in done), strict=True))
    phases = {key: max(found["phases"][key] for _, found in done) for key in done[0][1]["phases"]}
    watched = _together([each for each, _ in done])
    return [
        _run(
            name,
            watched,
            ready_at=min(part["ready_at"] for part in parts),
            written_at=max(part["written_at"] for part in parts),
            phases=phases if number == 0 else {},
            output=[path for part in parts for path in part["output"]],
            variant=parts[0]["variant"] if len(passes) > 1 else "",
            first=number == 0,
            last=number == len(passes) - 1,
        )
        for number, parts in enumerate(passes)
    ]


def _job(name: str, task: Task, folder: Path, pool: dict[str, Any]) -> Path:
    """The task as a job file; its output is `out` beside it."""
    limit = {"max_tokens_column": task.max_tokens_column} if task.max_tokens_column else {}
    spec = {
        "name": name.replace("_", "-"),
        "input": {"path": str(task.input)},
        "prompt": {"template": task.template, "chat": task.chat},
        "model": {"source": str(task.model), "engine": dict(task.engine)},
        "sampling": {**task.sampling, **limit},
        "output": {"path": str(folder / "out")},
        "pool": {"device": task.device, "replicas": task.replicas, **task.pool, **pool},
    }
    if task.shard_rows:
        spec["shards"] = {"rows": task.shard_rows}
    job = folder / "job.yaml"
    job.write_text(yaml.safe_dump(spec, sort_keys=False))
    return job


def _dray(name: str, task: Task, folder: Path, pool: dict[str, Any]) -> list[Run]:
    folder.mkdir(parents=True)
    job, output = _job(name, task, folder, pool), folder / "out"
    watched = child.run(
        child.dray("run", str(job), "--json", "--quiet"),
        log=folder / "log.txt",
        env=child.environment({**task.environment, "DRAY_LOGS": str(folder)}),
        cwd=ROOT,
        deadline=task.deadline,
    )
    parts = sorted((output / "data").glob("*.parquet"))
    footers = [json.loads(pq.read_metadata(part).metadata[b"dray"]) for part in parts]
    origins, stats = [f["provenance"] for f in footers], [f["stats"] for f in footers]
    phases = {
        "to_first_prepare_s": min(origin["started_at"] for origin in origins) - watched.began_at,
        "engine_start_s": max(origin["engine_start_s"] for origin in origins),
        **_start_parts(origins),
        "shards": len(parts),
        **{
            f"all_{key}": sum(s[key] for s in stats)
            for key in ("prepare_s", "queue_s", "generate_s", "commit_s")
        },
    }
    phases |= _engines(origins, watched.began_at)
    run = _run(
        name,
        watched,
        ready_at=min(origin["engine_ready_at"] for origin in origins),
        written_at=max(part.stat().st_mtime for part in parts),
        phases=phases,
        output=[str(part) for part in parts],
    )
    return [replace(run, rows_reused=sum(s["rows_reused"] for s in stats))]


def _start_parts(origins: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of `engine_start_s`: the longest import, weights, compile and graphs of an engine, where it tells them."""
    names = [f"engine_{part}_s" for part in ("import", "weights", "compile", "graphs")]
    told = {name: [origin[name] for origin in origins if origin.get(name) is not None] for name in names}
    return {name: max(seconds) for name, seconds in told.items() if seconds}


def _engines(origins: Sequence[Mapping[str, Any]], began_at: float) -> dict[str, float]:
    """When each engine was ready and when its last part was there, in seconds from the process's start; in the order of the former.

    Where several engines share a job, what one of them does not work between the first being ready and the last part is lost.
    """
    replicas = {origin["replica"]: origin["engine_ready_at"] for origin in origins}
    found = {}
    for number, replica in enumerate(sorted(replicas, key=replicas.__getitem__), 1):
        last = max(origin["committed_at"] for origin in origins if origin["replica"] == replica)
        found[f"engine_{number}_ready_s"] = replicas[replica] - began_at
        found[f"engine_{number}_done_s"] = last - began_at
    return found


def _run(
    side: str,
    watched: child.Watched,
    *,
    ready_at: float,
    written_at: float,
    phases: dict[str, float],
    output: list[str],
    variant: str = "",
    first: bool = True,
    last: bool = True,
) -> Run:
    counted = pa.concat_tables(
        [
            pq.read_table(path, columns=["generated_text", "prompt_tokens", "completion_tokens"])
            for path in output
        ]
    )
    return Run(
        side=side,
        variant=variant,
        rows=counted.num_rows - counted["generated_text"].null_count,
        output_tokens=pc.sum(counted["completion_tokens"]).as_py() or 0,
        prompt_tokens=pc.sum(counted["prompt_tokens"]).as_py() or 0,
        startup_s=ready_at - watched.began_at if first else 0.0,
        steady_s=written_at - ready_at,
        finish_s=watched.ended_at - written_at if last else None,
        wall_s=watched.wall_s if first and last else None,
        cpu_s=sum(watched.tree_cpu_s.values()) if first and last else None,
        phases_s=phases,
        cpu_by_process_s=watched.tree_cpu_s if first else {},
        processes=watched.processes if first else {},
        output=output,
    )


def _together(seen: list[child.Watched]) -> child.Watched:
    """Processes that ran side by side, as one."""
    cpu: dict[str, float] = {}
    many: dict[str, int] = {}
    for one in seen:
        for title, seconds in one.tree_cpu_s.items():
            cpu[title] = cpu.get(title, 0.0) + seconds
        for title, number in one.processes.items():
            many[title] = many.get(title, 0) + number
    began_at, ended_at = min(one.began_at for one in seen), max(one.ended_at for one in seen)
    return replace(
        seen[0],
        began_at=began_at,
        ended_at=ended_at,
        wall_s=ended_at - began_at,
        tree_cpu_s=cpu,
        processes=many,
    )
