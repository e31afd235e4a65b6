"""What a run uses: rows, tokens and the GPU time of its engines, and what that costs.

GPU seconds of a pass over the stream, from the first engine actor's start `t0` to the end of the pass `t1`:

    gpus per engine × clamp(Σ over engines (last commit - actor's start), min × (t1 - t0), max × (t1 - t0))

`gpus per engine` is what Ray reserves: tensor parallel size / engines_per_gpu, 0 on a CPU. An engine's start is its
`engine_ready_at - engine_start_s`, from the footers of the parts that it answered; `min` and `max` are the pool's engines.
A pool of a fixed size holds its GPUs until the pass ends, so there min = max and the sum does not matter; an elastic
pool gives them back, and each engine counts until its last commit. Before the first commit `t0` is when the pass began.
Waiting for a cluster to grow within a pass is counted as if the engines were there. Times of workers are their hosts'.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pipelines.shard_stats import Provenance, ShardStats

Engine = TypeVar("Engine", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What one run did and used."""

    rows: int
    """Rows of the shards that it committed; in a retry those that it ran again."""
    failed: int
    prompt_tokens: int
    output_tokens: int
    gpu_s: float
    """GPU seconds; 0 on a CPU."""
    cost_usd: float | None
    """By `cost.gpu_hour_usd`; None where that is not set."""

    @classmethod
    def of(cls, stats: ShardStats, gpu_s: float, gpu_hour_usd: float | None) -> Usage:
        return cls(
            rows=stats.rows_in,
            failed=stats.rows_failed,
            prompt_tokens=stats.prompt_tokens,
            output_tokens=stats.completion_tokens,
            gpu_s=round(gpu_s, 3),
            cost_usd=cost_of(gpu_s, gpu_hour_usd),
        )

    @classmethod
    def from_dict(cls, data: Any) -> Usage | None:
        """None for a record without totals, or of another form."""
        try:
            return cls(**{name: data[name] for name in cls.__dataclass_fields__})
        except (KeyError, TypeError):
            return None


def cost_of(gpu_s: float, gpu_hour_usd: float | None) -> float | None:
    """US dollars for so many GPU seconds."""
    return None if gpu_hour_usd is None else round(gpu_s / 3600 * gpu_hour_usd, 4)


class Meter:
    """Counts the GPU seconds of one run, pass by pass."""

    def __init__(self, run_id: str, clock: Callable[[], float] = time.time) -> None:
        self._run_id, self._clock = run_id, clock
        self._past = 0.0
        self._began: float | None = None
        self._gpus = 0.0
        self._least = self._most = 0
        self._engines: dict[str, tuple[float, float]] = {}

    def begin(self, *, gpus_per_engine: float, least: int, most: int) -> None:
        """A pass begins, with `least` to `most` engines."""
        self._gpus, self._least, self._most = gpus_per_engine, least, most
        self._began, self._engines = self._clock(), {}

    def take(self, provenance: Provenance) -> None:
        """A part was committed; those of other runs do not count."""
        if provenance.run_id == self._run_id:
            _widen(self._engines, provenance.replica, started_at(provenance), provenance.committed_at)

    def end(self) -> None:
        """The pass has ended, and its engines with it."""
        self._past, self._began = self.gpu_s, None

    @property
    def gpu_s(self) -> float:
        """Up to now."""
        if self._began is None:
            return self._past
        now = self._clock()
        first = min((start for start, _ in self._engines.values()), default=self._began)
        lasted = max(0.0, now - max(first, self._began))
        held = sum(last - start for start, last in self._engines.values())
        return self._past + self._gpus * min(max(held, self._least * lasted), self._most * lasted)


def started_at(origin: Provenance) -> float:
    """Unix time at which the engine that wrote a part began to start."""
    return (origin.engine_ready_at or origin.started_at) - origin.engine_start_s


def _widen(engines: dict[Engine, tuple[float, float]], engine: Engine, start: float, end: float) -> None:
    """Let an engine's time, Unix times, hold another piece of it."""
    first, last = engines.get(engine, (start, start))
    engines[engine] = (min(first, start), max(last, end))


def gpu_seconds_of_runs(
    totals: Mapping[str, float], origins: Iterable[Provenance], gpus_per_engine: float
) -> float:
    """GPU seconds of an output's runs: `totals`, by run; of a run without, what its parts tell of the engines of all pools.

    That is each from its start to its last answer, of the pool that wrote the parts to its last commit: a lower bound.
    `gpus_per_engine`: for parts that do not tell (`tells_gpus`), of whose engines only that pool's are known.
    """
    engines: dict[tuple[str, str, float], tuple[float, float]] = {}
    for one in origins:
        if one.run_id in totals:
            continue
        if tells_gpus(one):
            for turn in one.turns:
                end = one.committed_at if turn is one.turns[-1] else turn.ended_at
                _widen(engines, (one.run_id, turn.replica, turn.gpus or 0.0), turn.engine_began_at, end)
        elif on_gpu(one):
            engine = (one.run_id, one.replica, gpus_per_engine)
            _widen(engines, engine, started_at(one), one.committed_at)
    held = sum(gpus * (last - start) for (_, _, gpus), (start, last) in engines.items())
    return sum(totals.values()) + held


def tells_gpus(origin: Provenance) -> bool:
    """Whether a part tells the GPUs of all engines that it passed through."""
    return bool(origin.turns) and all(turn.gpus is not None for turn in origin.turns)


def on_gpu(origin: Provenance) -> bool:
    """Whether a GPU made the part; simulated engines name no device."""
    return origin.device not in ("", "cpu")
