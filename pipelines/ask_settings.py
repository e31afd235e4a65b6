"""The steps that ask a model: `generate`, `judge`, which asks for nothing but a verdict, and those that ask for numbers.

steps:
  - generate: {column: summary, prompt: {template: "Shorten: {{ generated_text }}"}}
  - judge:    {column: score, rubric: "Is the summary true to the text?", columns: [text, summary], votes: 3}
  - judge:    {column: better, rubric: "Which answer is right?", columns: [question], compare: [first_try, second_try]}
  - embed:    {column: vector, prompt: {prompt_column: summary}, model: {source: org/embedding-model, revision: 0123abc}}
  - classify: {column: topic, prompt: {prompt_column: summary}, model: {source: org/classifier, revision: 0123abc}}
  - score:    {column: fit, prompt: {template: "{{ question }}"}, answer: summary}
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from pipelines.settings import (
    ModelSettings,
    Names,
    PoolSettings,
    PromptSettings,
    SamplingSettings,
    Settings,
    StructuredOutputs,
    Text,
)
from pipelines.task import GENERATE, UNSAMPLED, Task

Column = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")]
#: The two answers that a judge compares, as its prompt names them.
FIRST, SECOND = "first", "second"
#: Most values of a judge's scale.
_MOST_VALUES = 101


class AskStep(Settings):
    """What the steps that ask a model have in common."""

    column: Column
    model: ModelSettings | None = None
    """Which model answers; default: the job's. Consecutive steps with one model, pool and kind of engine share their engines."""
    pool: PoolSettings | None = None
    """The engines of `model`; default: the job's `pool`."""

    @property
    def asked_prompt(self) -> PromptSettings:
        """What the model is asked."""
        raise NotImplementedError

    @property
    def asked_sampling(self) -> SamplingSettings:
        """How it answers."""
        raise NotImplementedError

    @property
    def task(self) -> Task:
        """What it is asked to do."""
        return GENERATE

    @property
    def adds(self) -> dict[str, str]:
        """The columns that the step adds, and the names of their types."""
        raise NotImplementedError

    def key_of(self, key: str) -> str:
        """Which key of the step says what a key of `asked_prompt` does."""
        return key


class GenerateStep(AskStep):
    """Ask a model about each record; the answer is a column more."""

    column: Column
    """The column of the answers' texts. Beside it come `…_finish_reason`, `…_prompt_tokens` and `…_completion_tokens`, and
    what `sampling` adds: `…_reasoning`, `…_reasoning_tokens`, `…_tool_calls`, `…_parsed`."""
    prompt: PromptSettings
    """As the job's own, over all columns that are there by now."""
    sampling: SamplingSettings = SamplingSettings()
    """As the job's own, whose values it does not take over; one answer for each record."""
    conversation: Column | None = None
    """A column more: the messages that were asked, and the answer as the assistant's; what `messages_column` of a later
    prompt goes on with."""

    @property
    def asked_prompt(self) -> PromptSettings:
        return self.prompt

    @property
    def asked_sampling(self) -> SamplingSettings:
        return self.sampling

    @property
    def adds(self) -> dict[str, str]:
        kinds = {
            "": "string",
            "_finish_reason": "string",
            "_prompt_tokens": "int32",
            "_completion_tokens": "int32",
        }
        return {f"{self.column}{suffix}": kind for suffix, kind in kinds.items()}

    @model_validator(mode="after")
    def _one_answer(self) -> GenerateStep:
        if self.sampling.n > 1:
            raise ValueError(
                "sampling.n: a generate step makes one answer for each record; draw several first (sampling.n of the job)"
            )
        for key in ("logprobs", "max_tokens_column", "params_column"):
            if getattr(self.sampling, key) is not None:
                raise ValueError(f"sampling.{key}: only for the job's own prompt")
        if self.conversation is not None:
            if self.prompt.chat is False:
                raise ValueError("conversation: needs the chat template; remove `prompt.chat: false`")
            if self.prompt.images_column is not None:
                raise ValueError(
                    "conversation: the column holds text only; leave it out, or prompt.images_column"
                )
            if self.conversation in (*self.adds, f"{self.column}_parsed"):
                raise ValueError(
                    f"conversation: {self.conversation!r} is the name of another of the step's columns; choose another"
                )
        return self


class JudgeStep(AskStep):
    """Let a model judge each record: by a score, by one of some labels, or which of two columns is better."""

    column: Column
    """The column of the verdicts. Beside it come `…_votes`, a list, `…_prompt_tokens` and `…_completion_tokens`."""
    rubric: Text | None = None
    """What to judge by: a Jinja template over all columns, in a prompt that Dray writes around it."""
    columns: Names = Field(default_factory=list)
    """Only with `rubric`: what the judge sees of a record. Default: `generated_text`; of `compare` the two columns alone."""
    prompt: PromptSettings | None = None
    """Instead of `rubric`: the whole prompt. Of `compare` it has the two answers as `first` and `second`."""
    scale: tuple[int, int] | None = None
    """The least and the largest score, whole numbers; the larger the better. Default: `[1, 5]`."""
    choices: Annotated[Names, Field(min_length=2)] | None = None
    """Instead of `scale`: the labels to choose from."""
    compare: tuple[Text, Text] | None = None
    """Instead of `scale`: two columns of text. The verdict is `a` for the first, `b` for the second, or `tie`."""
    swap: bool = True
    """Only with `compare`: ask in both orders, since judges prefer a place; where the two disagree it is a tie."""
    votes: PositiveInt = 1
    """How often each question is asked; the verdict is the commonest vote, of equally common ones the first of the
    scale or the choices, of `compare` a tie."""
    verdict: Literal["majority", "mean"] = "majority"
    """`mean`: of the votes for a score, a number with a fraction."""
    temperature: Annotated[float, Field(ge=0.0)] | None = None
    """Default: 0 for one vote, 1 for several, which then are drawn as the model's own odds are."""
    seed: int | None = None
    """As `sampling.seed`."""

    @property
    def labels(self) -> tuple[str, ...]:
        """What the model may say, the worst score first."""
        if self.compare is not None:
            return ("1", "2")
        if self.choices is not None:
            return tuple(self.choices)
        low, high = self.bounds
        return tuple(str(score) for score in range(low, high + 1))

    @property
    def bounds(self) -> tuple[int, int]:
        """The least and the largest score."""
        return self.scale or (1, 5)

    @property
    def is_score(self) -> bool:
        return self.compare is None and self.choices is None

    @property
    def asked_prompt(self) -> PromptSettings:
        return self.prompt or PromptSettings(template=self._template)

    @property
    def _template(self) -> str:
        """The rubric comes first: what is the same for all records is computed once."""
        shown = {name: name for name in self.columns or ([] if self.compare else ["generated_text"])}
        if self.compare is not None:
            shown |= {"Answer 1": FIRST, "Answer 2": SECOND}
        record = "\n\n".join(f"{title}:\n{{{{ {name} }}}}" for title, name in shown.items())
        return f"Judge by this rubric:\n{self.rubric}\n\n{record}\n\n{self._ending}"

    @property
    def _ending(self) -> str:
        if self.compare is not None:
            return "Which answer is better by the rubric? Say 1 or 2, and nothing else."
        if self.choices is not None:
            return f"Say one of these, and nothing else: {', '.join(self.choices)}."
        low, high = self.bounds
        return f"Say a whole number from {low} (worst) to {high} (best), and nothing else."

    @property
    def asked_sampling(self) -> SamplingSettings:
        temperature = self.temperature
        return SamplingSettings(
            temperature=float(self.votes > 1) if temperature is None else temperature,
            n=self.votes,
            seed=self.seed,
            max_tokens=1 + max(len(label.encode()) for label in self.labels),
            structured_outputs=StructuredOutputs(choice=list(self.labels)),
        )

    @property
    def adds(self) -> dict[str, str]:
        vote = "int64" if self.is_score else "string"
        kinds = {
            "": "float64" if self.verdict == "mean" else vote,
            "_votes": f"list<{vote}>",
            "_prompt_tokens": "int32",
            "_completion_tokens": "int32",
        }
        return {f"{self.column}{suffix}": kind for suffix, kind in kinds.items()}

    def key_of(self, key: str) -> str:
        return key if self.prompt is not None else "rubric"

    @model_validator(mode="after")
    def _consistent(self) -> JudgeStep:
        if (self.rubric is None) == (self.prompt is None):
            raise ValueError("give exactly one of rubric, prompt")
        if self.columns and self.rubric is None:
            raise ValueError("columns: only with rubric; a prompt names what it shows")
        kinds = [name for name in ("scale", "choices", "compare") if getattr(self, name) is not None]
        if len(kinds) > 1:
            raise ValueError(f"give one of scale, choices, compare; found {' and '.join(kinds)}")
        if self.compare is None and "swap" in self.model_fields_set:
            raise ValueError("swap: only with compare")
        if self.compare is not None and self.compare[0] == self.compare[1]:
            raise ValueError(f"compare: {self.compare[0]!r} twice; name two columns")
        if self.verdict == "mean" and not self.is_score:
            raise ValueError("verdict: the mean of scores only; leave it out, or give a scale")
        if self.temperature == 0 and self.votes > 1:
            raise ValueError(
                f"temperature: {self.votes} votes at 0 are the same vote; raise it (default 1), or leave votes out"
            )
        low, high = self.bounds
        if not low < high < low + _MOST_VALUES:
            raise ValueError(f"scale: [{low}, {high}] is not a scale of 2 to {_MOST_VALUES} whole numbers")
        return self


class NumbersStep(AskStep):
    """What the steps have in common that ask for numbers: nothing is sampled."""

    prompt: PromptSettings
    """As the job's own, over all columns that are there by now."""

    @property
    def asked_prompt(self) -> PromptSettings:
        return self.prompt

    @property
    def asked_sampling(self) -> SamplingSettings:
        return UNSAMPLED


class PoolingStep(NumbersStep):
    """Ask a pooling model."""

    prompt: PromptSettings
    """As the job's own, over all columns that are there by now, but plain text unless it says `chat: true` or needs a chat."""

    @field_validator("prompt")
    @classmethod
    def _plain(cls, prompt: PromptSettings) -> PromptSettings:
        # Embedding models made of chat models have their templates still, and are not to see them.
        if prompt.chat is None and not (prompt.system or prompt.messages_column or prompt.tools):
            return prompt.model_copy(update={"chat": False})
        return prompt


class EmbedStep(PoolingStep):
    """Turn a text of each record into a vector."""

    column: Column
    """The column of the vectors, `list<float32>`."""
    dimensions: PositiveInt | None = None
    """Keep only so many dimensions, of a Matryoshka model; default: all."""
    normalize: bool | None = None
    """Whether vectors have length 1; default: as the model's own configuration says, else true."""
    prompt_tokens: bool = False
    """Add `…_prompt_tokens`, how long the text is for the model."""

    @property
    def adds(self) -> dict[str, str]:
        tokens = {f"{self.column}_prompt_tokens": "int32"} if self.prompt_tokens else {}
        return {self.column: "list<float32>", **tokens}

    @property
    def task(self) -> Task:
        return Task(name="embed", dimensions=self.dimensions, use_activation=self.normalize)


class ClassifyStep(PoolingStep):
    """Give each record one of a classifier's labels."""

    column: Column
    """The column of the labels, names of the model's `id2label`. Beside it comes `…_probability`, the label's."""
    probabilities: bool = False
    """Add `…_probabilities`, `list<float32>`: of all classes, in the order of `id2label`."""

    @property
    def adds(self) -> dict[str, str]:
        every = {f"{self.column}_probabilities": "list<float32>"} if self.probabilities else {}
        return {self.column: "string", f"{self.column}_probability": "float32", **every}

    @property
    def task(self) -> Task:
        return Task(name="classify")


class ScoreStep(NumbersStep):
    """Ask a model how likely a given answer is after a prompt."""

    column: Column
    """What the columns' names begin with: `…_logprob`, the sum of the log-probabilities (natural logarithm) of the answer's
    tokens; `…_tokens`, how many they are; `…_perplexity`, `exp(-logprob / tokens)`."""
    answer: Text
    """The column of the answer's text. Its tokens follow the prompt's, without special tokens."""

    @property
    def adds(self) -> dict[str, str]:
        kinds = {"_logprob": "float64", "_tokens": "int32", "_perplexity": "float64"}
        return {f"{self.column}{suffix}": kind for suffix, kind in kinds.items()}

    @property
    def task(self) -> Task:
        return Task(name="score")
