"""What passes between the stages, and what a part file holds: shards, columns, Arrow schemas.

    Shard ──prepare──► prompts ──generate──► generations ──commit──► part file + `shard_stats.ShardStats`

Stages exchange one row per shard; the shard's own rows travel inside it as Arrow IPC bytes (`pack`, `unpack`).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Literal

import pyarrow as pa

from pipelines.answer_parsers import parser_fields
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
    image_bytes: int = 0
    """Of `data_bytes`, those of the prompts' images."""
    images: int = 0
    """Estimated number of the prompts' images, those that lie elsewhere included."""
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
    equal_prompts: Literal["greedy", "all", "none"] = "greedy"
    """See `settings.ReuseSettings`."""
    retry: Retry | None = None
    """Set: only failed rows are run, and their results are merged into the parts that stand."""

    @property
    def asks_once(self) -> bool:
        """Whether rows with equal prompts may have one answer, asked for once; of one generation."""
        may_be_greedy = self.sampling.temperature == 0 or self.sampling.params_column is not None
        return self.equal_prompts == "all" or (self.equal_prompts == "greedy" and may_be_greedy)

    @property
    def may_ask_nothing(self) -> bool:
        """Whether earlier jobs may have answered all of it, so that its engines start with the first row that is to be asked."""
        return self.reuse is not None and bool(self.reuse.sources) and self.retry is None

    def attempts_key(self, shard: Shard) -> str:
        """Where `pipelines.attempts` records this work's attempts at a shard: each retry's apart from the first run's.

        What killed engines by other settings, or was condemned then, says nothing about a retry.
        """
        return shard.id if self.retry is None else f"{self.run_id}/{shard.id}"


# ── What passes between the stages ──────────────────────────────────────────────────────────────────────────────

#: Added to the input columns by reading; the row's place, or why it cannot be read.
ROW_ID = pa.field("row_id", pa.string(), nullable=False)
ERROR_FIELDS = (pa.field("error_code", pa.string()), pa.field("error_message", pa.string()))

#: Most rows that have sampling parameters of their own share a few.
PARAMS_TYPE = pa.dictionary(pa.int32(), pa.string())

#: One row per input row, in the same order as the shard's rows.
PROMPT_SCHEMA = pa.schema(
    [
        ROW_ID,
        pa.field("token_ids", pa.list_(pa.int32())),  # null: see error_code
        pa.field("max_tokens", pa.int32()),  # null: the job's
        pa.field("seed", pa.int64()),  # the row's own, as the engine takes it
        pa.field("params", PARAMS_TYPE),  # see `row_params.Own`
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


def carried_columns(input_schema: pa.Schema, output: OutputSettings) -> list[str]:
    """The input columns that a part holds, in its order."""
    names: list[str] = input_schema.names if output.columns == "all" else output.columns
    return names


def result_schema(
    input_schema: pa.Schema, output: OutputSettings, sampling: SamplingSettings, *, prompted: bool = True
) -> pa.Schema:
    """The explicit schema of a shard's answers, errors and logprobs columns included; steps add columns to it.

    `prompted`: whether the job has a prompt of its own.
    """
    carried = [
        input_schema.field(name).with_name(output.rename.get(name, name)).with_nullable(True)
        for name in carried_columns(input_schema, output)
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
