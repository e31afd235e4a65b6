"""What a part's footer tells beside its rows: what was counted, and who made it.

Statistics are added up over any set of shards; provenance is not. Both stand in `stats/shards.parquet` as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pipelines.histogram import Histogram

#: For each step by name the records `in`, `out`, `dropped` and `failed`; of an `explode` step those `added` as well, of a
#: `gather` step those `gathered` into others, of a step that asks a model its tokens.
Counts = dict[str, dict[str, int]]


@dataclass(frozen=True, kw_only=True)
class ShardStats:
    """The statistics of one shard, and by addition of any set of shards.

    Times are seconds of wall clock summed over shards (`generate_s` of shards that share an engine overlap).
    """

    shards: int = 1
    rows_read: int = 0
    rows_filtered: int = 0
    rows_in: int = 0
    """rows_read - rows_filtered."""
    rows_added: int = 0
    """By which `explode` steps have made the rows more: an element of a list is a row in its row's place, until a `gather`."""
    rows_ok: int = 0
    rows_failed: int = 0
    rows_dropped: int = 0
    """Rows of which the job's steps left no record."""
    samples: int = 0
    """Answers written; rows_ok × n where no step drops any."""
    prompt_tokens: int = 0
    """Counted once per row that got an answer, whatever n is, and whatever the steps made of it."""
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    """Those of `completion_tokens` that the columns `reasoning_tokens` count; answers whose parser does not tell have none."""
    cached_tokens: int = 0
    """Prompt tokens found in the engine's prefix cache."""
    prepare_s: float = 0.0
    queue_s: float = 0.0
    """From prepared to the first request admitted."""
    generate_s: float = 0.0
    commit_s: float = 0.0
    preemptions: int = 0
    rows_reused: int = 0
    """Prompts that were not asked: those that another row of the job has as well (`reuse.equal_prompts`), and those with an
    answer kept before. All generations together."""
    tokens_reused: int = 0
    """Output tokens of their answers, which count in `completion_tokens` and were not generated."""
    repairs: int = 0
    """Requests made again because the answer was not what `sampling` asks of it; their tokens count as `repair_tokens`."""
    repair_tokens: int = 0
    """Output tokens of answers that gave way to another try, not in `completion_tokens`."""
    engine_deaths: int = 0
    """Engines that died under the shard before it was answered; one death counts for each shard that it met."""
    error_codes: dict[str, int] = field(default_factory=dict)
    finish_reasons: dict[str, int] = field(default_factory=dict)
    steps: Counts = field(default_factory=dict)
    """Those of retries as well."""
    latency_s: Histogram = field(default_factory=Histogram)
    """Seconds from admission to the answer, per request."""
    ttft_s: Histogram = field(default_factory=Histogram)
    """Seconds from admission to the first token, per request."""

    @property
    def tokens_generated(self) -> int:
        """Output tokens that an engine made for these answers: without reused ones, with those of repaired ones."""
        return self.completion_tokens - self.tokens_reused + self.repair_tokens

    def __add__(self, other: ShardStats) -> ShardStats:
        merged = {name: getattr(self, name) + getattr(other, name) for name in _SUMMED}
        return ShardStats(
            **merged,
            error_codes=_add_counts(self.error_codes, other.error_codes),
            finish_reasons=_add_counts(self.finish_reasons, other.finish_reasons),
            steps={
                name: _add_counts(self.steps.get(name, {}), other.steps.get(name, {}))
                for name in {**self.steps, **other.steps}
            },
        )

    @property
    def rows(self) -> int:
        """Those of the input, elements in their lists' places."""
        return self.rows_in + self.rows_added

    @property
    def balanced(self) -> bool:
        """The books of design §4.6."""
        return (
            self.rows_read == self.rows_filtered + self.rows_in
            and self.rows == self.rows_ok + self.rows_failed + self.rows_dropped
            and sum(self.error_codes.values()) == self.rows_failed
            and all(
                n["in"] + n.get("added", 0) == n["out"] + n["dropped"] + n["failed"] + n.get("gathered", 0)
                for n in self.steps.values()
            )
        )

    @property
    def error_rate(self) -> float:
        """Failed rows over rows; 0 for no rows."""
        return self.rows_failed / self.rows if self.rows else 0.0

    def to_dict(self) -> dict[str, Any]:
        data = asdict(replace(self, latency_s=Histogram(), ttft_s=Histogram()))
        return {**data, "latency_s": self.latency_s.to_dict(), "ttft_s": self.ttft_s.to_dict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ShardStats:
        known = {name: data[name] for name in cls.__dataclass_fields__ if name in data}
        for name in ("latency_s", "ttft_s"):
            known[name] = Histogram.from_dict(known.get(name, {}))
        return cls(**known)


_SUMMED = tuple(
    name for name in ShardStats.__dataclass_fields__ if name not in ("error_codes", "finish_reasons", "steps")
)


def _add_counts(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
    return {key: a.get(key, 0) + b.get(key, 0) for key in sorted({*a, *b})}


#: The fields of `Provenance` that an engine's start is split into.
START_PARTS = ("engine_import_s", "engine_weights_s", "engine_compile_s", "engine_graphs_s")


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A shard's time in one engine, for one generation."""

    generation: str
    """Name of the `generate` step; `""` for the job's own prompt."""
    replica: str
    began_at: float
    """Unix time at which the first of the shard's requests was admitted."""
    ended_at: float
    """Unix time at which the last was answered."""
    engine_began_at: float = 0.0
    """Unix time at which the engine began to start."""
    gpus: float | None = None
    """That the engine had, a share where it was not alone on one; 0 on a CPU. None in parts written before it was told."""


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Who made a part: stands in its footer and in `stats/shards.parquet`, is not summed."""

    run_id: str
    job: str
    attempt: int = 1
    """1 for the first in this run."""
    replica: str = ""
    node: str = ""
    device: str = ""
    """GPU name, or `cpu`."""
    engine: str = ""
    """Engine and version, for example `vllm 0.32.0`, or `simulated`."""
    dray_version: str = ""
    started_at: float = 0.0
    """Unix time at which preparing began."""
    engine_start_s: float = 0.0
    """Seconds that the shard's engine took to start."""
    engine_ready_at: float = 0.0
    """Unix time at which it was ready."""
    engine_import_s: float | None = None
    """Parts of `engine_start_s`, see `pipelines.engine.StartParts`; None where the engine does not tell."""
    engine_weights_s: float | None = None
    engine_compile_s: float | None = None
    engine_graphs_s: float | None = None
    committed_at: float = 0.0
    turns: tuple[Turn, ...] = ()
    """One for each generation, in their order; the other fields on engines are of the last one. Parts written before
    there were any have none."""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Provenance:
        return cls(**{**data, "turns": tuple(Turn(**turn) for turn in data.get("turns", ()))})
