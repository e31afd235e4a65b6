"""What passes between the stages, and what a part file holds: shards, columns, Arrow schemas, statistics.

    Shard ──prepare──► prompts ──generate──► generations ──commit──► part file + ShardStats

Stages exchange one row per shard; the shard's own rows travel inside it as Arrow IPC bytes (`pack`, `unpack`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import pyarrow as pa

from pipelines.answer_parsers import parser_fields
from pipelines.histogram import Histogram
from pipelines.images import IMAGES_TYPE
from pipelines.messages import CONVERSATION_TYPE
from pipelines.output_schema import arrow_type_of
from pipelines.settings import (
    ErrorSettings,
    InputSettings,
    ModelSettings,
    OutputSettings,
    PoolSettings,
    PromptSettings,
    SamplingSettings,
)
from pipelines.step_settings import StepSettings
from pipelines.task import GENERATE, Task

#: Version of the output layout, in `.dray/spec.json` and in every part's footer.
FORMAT_VERSION = 1


# ── What to read ─────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """One file of the input as the listing found it. `version` changes when its content does."""

    path: str
    """Full URL or absolute local path: the file's part of every row id."""
    size: int
    """Bytes as stored."""
    version: str
    """ETag, or size and modification time where the store has none."""
    format: Literal["parquet", "jsonl", "csv"]
    compression: Literal["none", "gzip"] = "none"
    rows: int | None = None
    """Known for Parquet, from its footer."""
    row_groups: tuple[int, ...] = ()
    """Parquet: rows of each row group."""
    data_bytes: int = 0
    """Estimated uncompressed bytes of the columns that will be read."""
    estimated_rows: int = 0
    """`rows` where known, else a guess from the size and a sample of lines; sizes shards, promises nothing."""
    schema: pa.Schema | None = field(default=None, compare=False, repr=False)
    """Parquet: from the footer, so that planning opens each file once; not stored with the plan."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """A contiguous piece of one input file."""

    path: str
    version: str
    size: int
    format: Literal["parquet", "jsonl", "csv"]
    compression: Literal["none", "gzip"]
    unit: Literal["rows", "bytes", "file"]
    start: int
    """First row (0-based) or byte; 0 for a whole file."""
    stop: int
    """One past the last row or byte; the file's size for a whole file."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """The unit of work, commit and retry."""

    ordinal: int
    """Position in the plan; fixes the order of parts, not the identity."""
    id: str
    """16 hex digits of `shard_id`: what is read, and the fingerprint of what is done with it."""
    spans: tuple[Span, ...]
    rows: int | None
    """Rows to read, where known before reading."""
    bytes: int
    """Estimated uncompressed bytes to read."""

    @property
    def part_name(self) -> str:
        """Object name below `data/`."""
        return f"part-{self.ordinal:06d}-{self.id}.parquet"

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Shard:
        data = json.loads(text)
        return cls(**{**data, "spans": tuple(Span(**span) for span in data["spans"])})


def shard_id(spans: tuple[Span, ...], fingerprint: str) -> str:
    """Identity of a shard by content: 16 hex digits over its spans and the spec's fingerprint."""
    canonical = json.dumps([fingerprint, [vars(span) for span in spans]], sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Retry:
    """What a retry runs again of the parts that stand, and by what."""

    error_codes: tuple[str, ...] | None
    """Failed rows with these codes; None: all failed rows."""
    fingerprint: str
    """Of the settings used, which may differ from the output's own."""


@dataclass(frozen=True, kw_only=True)
class Reuse:
    """What becomes of answers beyond this run, see `pipelines.kept`."""

    keep: bool
    sources: tuple[str, ...]
    """URLs of earlier outputs."""
    digests: tuple[str, ...]
    """For each generation, of its model and sampling settings."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """All that a worker needs to know of a job; built once by the driver, the same for every shard."""

    job: str
    run_id: str
    fingerprint: str
    code_digest: str
    """Digest of the driver's `pipelines` package; see `pipelines.code`."""
    code_path: str
    user_modules: tuple[str, ...]
    """Folders that hold the user's own packages, for the workers' import path."""
    input: InputSettings
    prompt: PromptSettings | None
    """None: the job begins with its steps."""
    model: ModelSettings
    sampling: SamplingSettings
    output: OutputSettings
    pool: PoolSettings
    errors: ErrorSettings
    input_schema: pa.Schema
    """The input columns that are read, pinned at the first plan."""
    steps: tuple[StepSettings, ...] = ()
    """What is made of the answers before they are written."""
    task: Task = GENERATE
    """What the model is asked to do; of one of the job's generations (`pipelines.generations`)."""
    reuse: Reuse | None = None
    """Set: answers are kept, or looked for among those kept before."""
    retry: Retry | None = None
    """Set: only failed rows are run, and their results are merged into the parts that stand."""

    def attempts_key(self, shard: Shard) -> str:
        """Where `pipelines.attempts` records this work's attempts at a shard: each retry's apart from the first run's.

        What killed engines by other settings, or was condemned then, says nothing about a retry.
        """
        return shard.id if self.retry is None else f"{self.run_id}/{shard.id}"


# ── What passes between the stages ──────────────────────────────────────────────────────────────────────────────

#: Added to the input columns by reading; the row's place, or why it cannot be read.
ROW_ID = pa.field("row_id", pa.string(), nullable=False)
ERROR_FIELDS = (pa.field("error_code", pa.string()), pa.field("error_message", pa.string()))

#: One row per input row, in the same order as the shard's rows.
PROMPT_SCHEMA = pa.schema(
    [
        ROW_ID,
        pa.field("token_ids", pa.list_(pa.int32())),  # null: see error_code
        pa.field("max_tokens", pa.int32()),  # null: the job's
        pa.field(
            "answer_tokens", pa.int32()
        ),  # of a `score` step: the last so many of `token_ids` are the answer's
        pa.field("messages", CONVERSATION_TYPE),  # what is asked, where the conversation becomes a column
        pa.field("images", IMAGES_TYPE),  # null: none
        *ERROR_FIELDS,
    ]
)

#: One row per (input row, sample); `row` is the position in the prompts table.
LOGPROBS_TYPE = pa.list_(
    pa.struct(
        [
            pa.field("token_id", pa.int32()),
            pa.field("logprob", pa.float32()),
            pa.field("top", pa.list_(pa.struct([("token_id", pa.int32()), ("logprob", pa.float32())]))),
        ]
    )
)
GENERATION_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int32(), nullable=False),
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("token_ids", pa.list_(pa.int32())),  # null: see error_code
        pa.field("text", pa.large_string()),  # null unless the engine detokenised (stop strings)
        pa.field("finish_reason", pa.string()),
        pa.field("cached_tokens", pa.int32()),
        pa.field("image_tokens", pa.int32()),  # that images added to the prompt's
        pa.field("logprobs", LOGPROBS_TYPE),
        pa.field("values", pa.list_(pa.float32())),  # see `engine.Sample`
        *ERROR_FIELDS,
    ]
)

#: The answer to the job's own prompt.
ANSWER_FIELDS = (
    pa.field("generated_text", pa.string()),
    pa.field("finish_reason", pa.string()),
    pa.field("prompt_tokens", pa.int32()),
    pa.field("completion_tokens", pa.int32()),
    pa.field("cached_tokens", pa.int32()),
)
#: What a part holds after the input columns. Key: (row_id, sample_index).
RESULT_FIELDS = (
    ROW_ID,
    pa.field("sample_index", pa.int32(), nullable=False),
    *ANSWER_FIELDS,
    *ERROR_FIELDS,
    pa.field("run_id", pa.string(), nullable=False),
)
LOGPROBS_FIELD = pa.field("logprobs", LOGPROBS_TYPE)


def result_fields(*, prompted: bool) -> tuple[pa.Field, ...]:
    """`RESULT_FIELDS`; without the answer's where the job has no prompt of its own."""
    return tuple(field for field in RESULT_FIELDS if prompted or field not in ANSWER_FIELDS)


def result_schema(
    input_schema: pa.Schema, output: OutputSettings, sampling: SamplingSettings, *, prompted: bool = True
) -> pa.Schema:
    """The explicit schema of a shard's answers, errors and logprobs columns included; steps add columns to it.

    `prompted`: whether the job has a prompt of its own.
    """
    names = input_schema.names if output.columns == "all" else output.columns
    carried = [
        input_schema.field(name).with_name(output.rename.get(name, name)).with_nullable(True)
        for name in names
    ]
    return pa.schema([*carried, *result_fields(prompted=prompted), *extra_fields(output, sampling)])


#: With `output.provenance`, besides `run_id`.
PROVENANCE_FIELDS = (
    pa.field("model", pa.string()),
    pa.field("model_revision", pa.string()),
    pa.field("prompt_sha256", pa.string()),
    pa.field("seed", pa.int64()),
)


def extra_fields(output: OutputSettings, sampling: SamplingSettings) -> list[pa.Field]:
    """The columns behind `RESULT_FIELDS` that the job asks for."""
    fields = [*PROVENANCE_FIELDS] if output.provenance else []
    fields += parser_fields(sampling)
    fields += [LOGPROBS_FIELD] if sampling.logprobs is not None else []
    if isinstance(sampling.output_schema, dict):
        fields.append(pa.field("parsed", arrow_type_of(sampling.output_schema)[0]))
    if output.conversation is not None:
        fields.append(pa.field(output.conversation, CONVERSATION_TYPE))
    return fields


def pack(table: pa.Table) -> bytes:
    """A table as Arrow IPC bytes, for one cell of the row that carries a shard."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def unpack(data: bytes | pa.Buffer) -> pa.Table:
    """The table that `pack` packed; zero-copy for a buffer."""
    with pa.ipc.open_stream(data) as reader:
        return reader.read_all()


# ── What is counted ──────────────────────────────────────────────────────────────────────────────────────────────


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
    """Prompts that were not asked: greedy ones that another row of the shard has as well, and those with an answer kept
    before (`reuse`). All generations together."""
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
