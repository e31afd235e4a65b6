"""The sections of a job file that the data plane reads: frozen, and without unknown keys.

`jobs.spec.JobSpec` composes them; each stage of the pipeline takes only the sections it needs. Settings are plain
values: live objects (storage, tokenizer, engine) are built from them inside the worker that uses them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from pipelines.chat_options import NO_PROMPTS


def _distinct(names: list[str]) -> list[str]:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"names {', '.join(map(repr, twice))} more than once")
    return names


#: vLLM holds numbers and ids of tokens in 32 bits: a larger one ends its engine process.
MOST_TOKENS = 2**31 - 1
Rate = Annotated[float, Field(ge=0.0, le=1.0)]
Text = Annotated[str, Field(min_length=1)]
#: `package.module:name` of something in a package of the user's own.
Function = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$")]
Names = Annotated[list[Text], AfterValidator(_distinct)]


class Settings(BaseModel):
    """Base of every section: immutable, and a key it does not know is an error."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,  # the text under a field is what `dray` and the docs say about the key
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        # Pydantic reads `true` as 1: `n: true` or `max_tokens: on` would pass as numbers.
        annotation = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and annotation is not bool and bool not in get_args(annotation):
            raise PydanticCustomError("bool_given", "true and false are not allowed here")
        return value


class InputSettings(Settings):
    """Where the rows come from."""

    path: Text | Annotated[list[Text], Field(min_length=1)]
    """A file, folder, glob or list of them; a local path or any fsspec URL."""
    format: Literal["auto", "parquet", "jsonl", "csv"] = "auto"
    """`auto` goes by the file's ending; `.gz` after it means gzip."""
    columns: Annotated[Names, Field(min_length=1)] | None = None
    """The columns to read and carry into the output (with `id_column`); all when not given. The prompt and the
    filter can only use columns that are read."""
    filter: Text | None = None
    """A row condition such as `lang == 'en' and score > 0.5`; rows are numbered before it applies."""
    id_column: Text | None = None
    """A column of the user's own ids, carried along; never Dray's row identity."""
    on_changed: Literal["refuse", "replace"] = "refuse"
    """What to do when a file that is already planned has other content now."""
    images_folder: Text | None = None
    """The folder or URL below which the images lie that rows name by path; nothing else is read, and without it no path is."""
    storage_options: dict[str, Any] = Field(default_factory=dict, repr=False)
    """Passed to fsspec's file system, for example `endpoint_url`, `profile`, `key`, `secret`, `anon`."""


class PromptSettings(Settings):
    """How a row becomes a prompt; exactly one of `template`, `messages_column`, `prompt_column`, `function`, or a
    `messages_column` and the next user turn as a `template` or `prompt_column`."""

    template: str | None = None
    """Jinja, sandboxed; renders the user turn. A missing or null column is that row's error."""
    messages_column: str | None = None
    """A column of OpenAI-shaped messages (a list of structs, or JSON text). With `template` or `prompt_column` these make
    one more user turn behind them."""
    prompt_column: str | None = None
    """A column that holds the user turn itself."""
    images_column: str | None = None
    """A column of images for the user turn, where they come before its text: one or a list of them, each as bytes, as
    `{bytes, path}`, as a `data:` URL, or as a path below `input.images_folder`."""
    function: Function | None = None
    """`package.module:name` of a function `(row: dict) -> str | list[message]` in a package of your own."""
    system: str | None = None
    """The system turn, a Jinja template as well. Needs a chat model. A row whose messages begin with a system turn of
    their own keeps that one."""
    chat: bool | None = None
    """Apply the model's chat template; default: whenever the model has one."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Extra variables for the model's chat template, for example `enable_thinking`; `chat_template` is another template."""
    tools: Annotated[list[dict[str, Any]], Field(min_length=1)] | None = None
    """Functions that the model may call, as OpenAI's API takes them; the chat template writes them into the prompt."""

    @field_validator("tools")
    @classmethod
    def _functions(cls, tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        for number, tool in enumerate(tools or (), 1):
            function = tool.get("function")
            named = isinstance(function, dict) and isinstance(function.get("name"), str) and function["name"]
            if tool.get("type") != "function" or not named:
                raise ValueError(
                    f"tool {number} is not of the form {{type: function, function: {{name: …, description: …, parameters: …}}}}"
                )
        return tools

    @model_validator(mode="after")
    def _one_source(self) -> PromptSettings:
        given = [k for k in ("template", "messages_column", "prompt_column", "function") if getattr(self, k)]
        continues = given in (["template", "messages_column"], ["messages_column", "prompt_column"])
        if len(given) != 1 and not continues:
            found = " and ".join(given) or "none of them"
            raise ValueError(
                f"give exactly one of template, messages_column, prompt_column, function; found {found}. To go on with a "
                "conversation give messages_column, and the next user turn as template or prompt_column"
            )
        if self.chat is False and (self.system or self.messages_column or self.tools):
            raise ValueError("system, messages_column and tools need the chat template; remove `chat: false`")
        if self.tools and "tools" in self.chat_template_kwargs:
            raise ValueError("give tools or chat_template_kwargs.tools, not both")
        for name in sorted(NO_PROMPTS & self.chat_template_kwargs.keys()):
            raise ValueError(
                f"chat_template_kwargs.{name} is no variable of chat templates: it says how they are applied; leave it out"
            )
        return self


class SimulatedSettings(Settings):
    """The simulated engine: answers derived from a hash of the prompt, in simulated time. Never a default."""

    start_s: Annotated[float, Field(ge=0)] = 0.0
    """Seconds that the engine takes to start."""
    tokens_per_s: PositiveFloat = 100_000.0
    """Output tokens per second over all requests in flight."""
    min_tokens: PositiveInt = 4
    """Fewest tokens of an answer; how many it has is chosen by the prompt's hash."""
    max_tokens: PositiveInt = 32
    """Most tokens of an answer."""
    dies_of: Annotated[int, Field(ge=0)] | None = None
    """The engine dies of every prompt that holds this token id; to try out what happens then."""
    prefix: str = ""
    """What every answer begins with, for example `<think>so</think>` or a tool call; to try out parsers."""
    stalls_of: Annotated[int, Field(ge=0)] | None = None
    """From a prompt with this token id on, the engine answers nothing any more, until it is replaced."""

    @model_validator(mode="after")
    def _ordered(self) -> SimulatedSettings:
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}")
        return self


class LoraSettings(Settings):
    """A LoRA adapter on top of the model."""

    source: Text
    """A hub id, a local folder with `adapter_config.json`, or the URL of one."""
    revision: Text | None = None
    """As `model.revision`."""


class ModelSettings(Settings):
    """Which model answers, and the engine that hosts it."""

    source: Text
    """A hub id, a local folder with `config.json`, or the URL of one (`s3://…`), which each node copies into its cache."""
    revision: Text | None = None
    """The hub revision, or what `dray models pull` says of a URL's; the first plan pins what it stands for then."""
    storage_options: dict[str, Any] = Field(default_factory=dict, repr=False)
    """As `input.storage_options`, for a source that is a URL."""
    lora: LoraSettings | None = None
    """A LoRA adapter that all requests use."""
    tokenizer: Text | None = None
    """Where the tokenizer lives if not with the model."""
    backend: Literal["vllm", "simulated"] = "vllm"
    """`simulated` answers without a model, for tests and dry runs."""
    engine: dict[str, Any] = Field(default_factory=dict)
    """vLLM's own EngineArgs, verbatim."""
    simulated: SimulatedSettings = SimulatedSettings()
    """Only for `backend: simulated`."""

    @property
    def gpus_per_engine(self) -> int:
        """Tensor times pipeline parallel size."""
        return self.tensor_parallel_size * int(self.engine.get("pipeline_parallel_size", 1))

    @property
    def tensor_parallel_size(self) -> int:
        """GPUs of one engine (vLLM's `tensor_parallel_size`)."""
        return int(self.engine.get("tensor_parallel_size", 1))


class StructuredOutputs(Settings):
    """vLLM's StructuredOutputsParams: exactly one of `choice`, `regex`, `grammar`. For JSON see `output_schema`."""

    choice: Annotated[list[Text], Field(min_length=1)] | None = None
    """The answer is one of these texts."""
    regex: Text | None = None
    """The answer matches this regular expression as a whole."""
    grammar: Text | None = None
    """The answer is a sentence of this grammar (EBNF as vLLM's backends read it)."""

    @model_validator(mode="after")
    def _one(self) -> StructuredOutputs:
        given = [name for name in ("choice", "regex", "grammar") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of choice, regex, grammar; found {' and '.join(given) or 'none of them'}"
            )
        return self


class SamplingSettings(Settings):
    """vLLM's SamplingParams, verbatim where the names agree."""

    temperature: Annotated[float, Field(ge=0.0)] = 1.0
    """0: greedy."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Sample among the most likely tokens that together reach this probability."""
    top_k: Annotated[int, Field(ge=-1, le=MOST_TOKENS)] = 0
    """Sample among this many most likely tokens; 0 (or -1): all of them."""
    min_p: Rate = 0.0
    """Leave out tokens less likely than this share of the most likely one."""
    max_tokens: Annotated[int, Field(gt=0, le=MOST_TOKENS)] | None = 512
    """null: as far as `max_model_len` allows."""
    max_tokens_column: Text | None = None
    """A column of whole numbers: each row's own `max_tokens`; where it is null, the job's."""
    params_column: Text | None = None
    """A column of each row's own sampling parameters, a struct or the JSON text of an object; what is absent or null there is
    the job's. Its keys are those of `ROW_PARAMS`; a row's own `seed` is the engine's, not hashed with the row's id."""
    min_tokens: Annotated[int, Field(ge=0, le=2**30)] = 0  # vLLM adds the prompt's tokens
    """No stopping before this many tokens."""
    n: PositiveInt = 1
    """Answers per row: one output row each, told apart by `sample_index`."""
    seed: int | None = None
    """The job's seed; each row gets hash(seed, row_id). Opt-in: seeded sampling is slower."""
    stop: Text | list[Text] | None = None
    """Strings that end an answer."""
    stop_token_ids: list[Annotated[int, Field(ge=0, le=MOST_TOKENS)]] | None = None
    """Tokens that end an answer, besides the model's own."""
    include_stop_str_in_output: bool = False
    """Keep the stop string at the end of the text."""
    bad_words: list[Text] | None = None
    """Words that no answer may contain."""
    ignore_eos: bool = False
    """Generate on to `max_tokens`, past the model's end token."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""
    presence_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] = 0.0
    """Above 0: rather tokens that the answer does not have yet."""
    frequency_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] = 0.0
    """The same, in proportion to how often the answer has them."""
    repetition_penalty: PositiveFloat = 1.0
    """Above 1: rather tokens that neither prompt nor answer have yet."""
    logprobs: Annotated[int, Field(ge=0)] | None = None
    """Log probabilities of each output token and of this many alternatives, in the column `logprobs`."""
    output_schema: dict[str, Any] | Function | None = None
    """A JSON Schema, or `package.module:Class` of a pydantic model in a package of your own: answers are decoded so that
    they follow it, and stand in the column `parsed` with Arrow's types."""
    structured_outputs: StructuredOutputs | None = None
    """Other constraints on the text of answers."""
    repairs: Annotated[int, Field(ge=0, le=10)] | None = None
    """How often an answer that was cut off or is not what `output_schema` or `structured_outputs` asks for is tried again;
    then it is the row's error. Default: once."""
    reasoning_parser: Text | None = None
    """vLLM's name of the parser that tells a model's reasoning from its answer, for example `qwen3`, `deepseek_r1`. The
    reasoning stands in the columns `reasoning` and `reasoning_tokens`; constraints hold for the answer alone."""
    tool_call_parser: Text | None = None
    """vLLM's name of the parser that finds a model's calls of `prompt.tools`, for example `hermes`. They stand in the column
    `tool_calls`, what is said besides in the text."""

    @property
    def is_parsed(self) -> bool:
        """Whether answers are taken apart by vLLM's parsers (`pipelines.answer_parsers`)."""
        return self.reasoning_parser is not None or self.tool_call_parser is not None

    @property
    def is_structured(self) -> bool:
        """Whether answers are constrained, and checked."""
        return self.output_schema is not None or self.structured_outputs is not None

    @property
    def may_be_seeded(self) -> bool:
        """Whether first tries at some rows may have a seed."""
        return self.seed is not None or self.params_column is not None

    @model_validator(mode="after")
    def _consistent(self) -> SamplingSettings:
        if self.max_tokens_column is not None and self.params_column is not None:
            raise ValueError(
                "give max_tokens_column or params_column, not both; a row's own parameters may have max_tokens"
            )
        if self.output_schema is not None and self.structured_outputs is not None:
            raise ValueError("give output_schema or structured_outputs, not both")
        if self.output_schema is not None and self.tool_call_parser is not None:
            raise ValueError(
                "an answer that follows output_schema calls no tools; leave out one of output_schema, tool_call_parser"
            )
        if self.temperature == 0.0 and self.n > 1:
            raise ValueError("n > 1 with temperature 0 gives n equal answers; raise the temperature")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}")
        return self


#: What a row may say for itself: what changes neither the output's columns nor the engine, nor how texts are made behind it.
ROW_PARAMS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "max_tokens",
    "min_tokens",
    "seed",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "bad_words",
    "ignore_eos",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)


class OutputSettings(Settings):
    """Where and how the dataset is written."""

    path: Text
    """A folder of its own: a local path or any fsspec URL."""
    columns: Literal["all"] | Names = "all"
    """Input columns to carry into the result."""
    rename: dict[Text, Text] = Field(default_factory=dict)
    """Input column → its name in the output; for inputs that use a result column's name."""
    compression: Literal["zstd", "snappy", "gzip", "lz4", "none"] = "zstd"
    """Compression of the parts' column chunks."""
    failed_rows: Literal["inline", "separate"] = "inline"
    """`separate` writes failed rows to `errors/` instead of `data/`."""
    storage_options: dict[str, Any] = Field(default_factory=dict, repr=False)
    """As `input.storage_options`, for the output's store."""
    provenance: bool | None = None
    """true adds to each row what made it: `model`, `model_revision`, `prompt_sha256` (of the prompt's token ids, 32-bit
    little-endian, and behind them the SHA-256 of each image's file) and `seed` (the row's own, with `sampling.seed` or in
    `sampling.params_column`), of the job's own prompt."""
    conversation: Text | None = None
    """A column to add: the messages that the job's own prompt asked, and the answer as the assistant's. A later prompt
    goes on with it as its `messages_column`."""


class AdmissionSettings(Settings):
    """When requests enter the engine (design §5). Under each policy no more than its KV cache holds."""

    policy: Literal["wave", "continuous", "adaptive"] = "wave"
    """`wave` fills to `high` and waits until `low` are left; `continuous` admits a request as soon as one leaves;
    `adaptive` measures in the run's first minutes which of both is faster, and with which watermarks."""
    high: PositiveInt | None = None
    """Most requests in flight; default: the engine's max_num_seqs."""
    low: PositiveInt | None = None
    """Only for `wave`, which admits again when this many are left; default: three quarters of `high`."""

    @model_validator(mode="after")
    def _ordered(self) -> AdmissionSettings:
        if self.low and self.policy != "wave":
            raise ValueError(f"low is the wave policy's; {self.policy} has none")
        if self.high and self.low and self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")
        return self


class Replicas(Settings):
    """An elastic pool."""

    min: PositiveInt
    """Engines that are always kept."""
    max: PositiveInt
    """Most engines at once."""

    @model_validator(mode="after")
    def _ordered(self) -> Replicas:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self


class PoolSettings(Settings):
    """How many engines, and on what."""

    replicas: PositiveInt | Literal["auto"] | Replicas = 1
    """Engines, wherever they are: a number, `{min, max}` for a pool that grows and shrinks, or `auto`: as many as the
    cluster's GPUs hold, one on a CPU."""
    device: Literal["auto", "gpu", "cpu"] = "auto"
    """`auto`: GPUs where the cluster has any."""
    engines_per_gpu: Literal["auto"] | PositiveInt = "auto"
    """Engines that share one GPU and its memory. `auto`: where there are more engines than GPUs, several of a model below
    2 billion parameters on a GPU of 70 GiB or more, as far as they fit."""
    cpus_per_engine: Literal["auto"] | PositiveFloat = "auto"
    """CPU cores that Ray reserves for one engine of a CPU pool."""
    shards_in_flight: Literal["auto"] | PositiveInt = "auto"
    """Shards that one engine works on at once. `auto`: 3, and more of small ones, until six rows are in hand for each
    request that the engine runs at once."""
    admission: AdmissionSettings = AdmissionSettings()
    """When requests enter an engine."""

    @property
    def least_engines(self) -> int:
        """Engines that always run; 1 where `replicas: auto` is not settled yet."""
        if isinstance(self.replicas, Replicas):
            return self.replicas.min
        return 1 if self.replicas == "auto" else self.replicas

    @property
    def most_engines(self) -> int:
        """Most engines at once; 1 where `replicas: auto` is not settled yet."""
        return self.replicas.max if isinstance(self.replicas, Replicas) else self.least_engines


class ShardSettings(Settings):
    """How the input is cut."""

    rows: Literal["auto"] | PositiveInt = "auto"
    """Rows of a shard; `auto` aims at 30 to 120 seconds of engine work."""


class ReuseSettings(Settings):
    """Answers that need not be asked for again."""

    equal_prompts: Literal["greedy", "all", "none"] = "greedy"
    """Prompts of a job that are asked once if equal (tokens, images, own sampling), in each generation: `greedy` those with
    `temperature: 0`, and all of `embed`, `classify` and `score`; `all` sampled ones too, whose rows then have the same n answers,
    whatever seeds the job's gives them; `none` asks for each row."""
    outputs: tuple[Text, ...] = ()
    """Outputs of earlier jobs whose kept answers are taken over: to a prompt of the same tokens, by the same model and
    `sampling`; without `temperature: 0` only for the same row. They are read with `output.storage_options`."""
    keep: bool | None = None
    """Keep every answer, also of records that steps drop, under `.dray/answers/` of the output, for later jobs and for
    attempts at a shard that was lost; default: whether `outputs` is given."""


class ErrorSettings(Settings):
    """What may fail, and how often."""

    max_error_rate: Rate = 0.01
    """Share of failed rows above which the job is not a success, in the end and over the window."""
    window_rows: PositiveInt | None = 10_000
    """The latest rows, over which `max_error_rate` holds as well, so that a job which begins to fail stops early;
    null: only the total counts."""
    window_min_failed: PositiveInt = 100
    """Failed rows below which the window never stops a job."""
    max_attempts: PositiveInt = 3
    """Attempts of one shard in one run; and engine deaths after which a shard's rows are looked at in small groups."""
    request_timeout_s: PositiveFloat = 600.0
    """Seconds from admission to the answer of one request; a request that takes longer is that row's error."""
    engine_stall_s: PositiveFloat = 300.0
    """Seconds without a token from any request after which an engine counts as dead and is replaced."""
    shutdown_grace_s: Annotated[float, Field(ge=0)] = 20.0
    """Seconds that shards in flight get to finish when a run is stopped (Ctrl-C, SIGTERM, `dray cancel`)."""
