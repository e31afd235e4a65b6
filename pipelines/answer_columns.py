"""What a step that asks a model adds to the records: texts, verdicts, vectors, labels or scores as columns."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, singledispatch

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.answer_parsers import Says
from pipelines.ask_settings import AskStep, ClassifyStep, EmbedStep, GenerateStep, JudgeStep, ScoreStep
from pipelines.judge import ruling
from pipelines.output_schema import Checker
from pipelines.settings import SamplingSettings
from pipelines.step_settings import arrow_type

#: By suffix, a value for each of the records that a step has asked about.
Columns = Mapping[str, pa.Array | pa.ChunkedArray]


def prompt_tokens(prompts: pa.Table, generations: pa.Table) -> pa.ChunkedArray:
    """How long the prompt of each generation is, its images included where it has been answered; null without tokens."""
    text = pc.list_value_length(prompts["token_ids"]).take(generations["row"])
    return pc.add(text, pc.fill_null(generations["image_tokens"], 0))


class Answers:
    """The answers to a step's requests, by the records that it has asked about: `views` requests for each of them, all
    of one view after those of the other, with one or more samples each."""

    def __init__(self, prompts: pa.Table, generations: pa.Table, records: int) -> None:
        self.prompts, self.generations, self.records = prompts, generations, records
        self.views = len(prompts) // records if records else 0
        request = generations["row"].to_numpy()
        self.record = request % max(records, 1)
        """Of each sample."""
        self.view = request // max(records, 1)
        answered = generations["token_ids"].is_valid().to_numpy()
        first = answered & (generations["sample_index"].to_numpy() == 0)
        self.prompt_tokens = self._sum(prompt_tokens(prompts, generations), first)
        self.completion_tokens = self._sum(pc.list_value_length(generations["token_ids"]), answered)
        self.cached_tokens = self._sum(generations["cached_tokens"], first)

    def _sum(self, values: pa.ChunkedArray, where: npt.NDArray[np.bool_]) -> pa.Array:
        """For each record the sum over those of its samples; null where there are none."""
        weights = values.filter(pa.array(where)).to_numpy()
        sums = np.bincount(self.record[where], weights, self.records).astype(np.int32)
        none = np.bincount(self.record[where], minlength=self.records) == 0
        return pa.array(sums, mask=none)

    @cached_property
    def errors(self) -> dict[str, pa.Array]:
        """`error_code` and `error_message` of each record: of the first of its requests that has failed."""
        failed = np.flatnonzero(self.generations["error_code"].is_valid().to_numpy())
        first = np.full(self.records, -1)
        first[self.record[failed[::-1]]] = failed[::-1]
        index = pa.array(first, mask=first < 0)
        return {name: self.generations[name].take(index) for name in ("error_code", "error_message")}

    @property
    def values(self) -> list[npt.NDArray[np.float32] | None]:
        """The numbers of each generation (`engine.Sample`)."""
        lists = self.generations["values"]
        return [None if each.values is None else each.values.to_numpy() for each in lists]


@singledispatch
def answer_columns(step: AskStep, answers: Answers, says: Says) -> Columns:
    """The columns of `step.adds`; null where a record has failed. All but a judge make one request for each record."""
    raise NotImplementedError(type(step))


@answer_columns.register
def _generated(step: GenerateStep, answers: Answers, says: Says) -> Columns:
    said = says(answers.prompts, answers.generations)
    columns = {"": said.text, "_finish_reason": answers.generations["finish_reason"], **_tokens(answers)}
    columns |= {f"_{name}": values for name, values in said.beside.items()}
    if step.sampling.output_schema is not None:
        columns["_parsed"] = parsed(said.text, step.sampling)
    return columns


@answer_columns.register
def _judged(step: JudgeStep, answers: Answers, says: Says) -> Columns:
    said: dict[int, list[list[str]]] = {}
    every = says(answers.prompts, answers.generations).text.to_pylist()
    for record, view, text in zip(answers.record.tolist(), answers.view.tolist(), every, strict=True):
        said.setdefault(record, [[] for _ in range(answers.views)])[view].append(text)
    failed = answers.errors["error_code"].is_valid().to_pylist()
    rulings = [
        (None, None) if failed[record] else ruling(step, said[record]) for record in range(answers.records)
    ]
    types = [arrow_type(kind) for kind in step.adds.values()]
    verdicts, votes = ([one[column] for one in rulings] for column in (0, 1))
    return {"": pa.array(verdicts, types[0]), "_votes": pa.array(votes, types[1]), **_tokens(answers)}


@answer_columns.register
def _embedded(step: EmbedStep, answers: Answers, says: Says) -> Columns:
    tokens = {"_prompt_tokens": answers.prompt_tokens} if step.prompt_tokens else {}
    return {"": answers.generations["values"], **tokens}


@answer_columns.register
def _classified(step: ClassifyStep, answers: Answers, says: Says) -> Columns:
    likeliest = [None if values is None else values.max() for values in answers.values]
    columns = {
        "": answers.generations["text"].cast(pa.string()),
        "_probability": pa.array(likeliest, pa.float32()),
    }
    if step.probabilities:
        columns["_probabilities"] = answers.generations["values"]
    return columns


@answer_columns.register
def _scored(step: ScoreStep, answers: Answers, says: Says) -> Columns:
    counts = answers.prompts["answer_tokens"].to_pylist()
    sums = [
        None if values is None else float(values[-count:].sum(dtype=np.float64))
        for values, count in zip(answers.values, counts, strict=True)
    ]
    logprob, tokens = pa.array(sums, pa.float64()), pa.array(counts, pa.int32())
    return {
        "_logprob": logprob,
        "_tokens": pc.if_else(logprob.is_valid(), tokens, None),
        "_perplexity": pc.exp(pc.negate(pc.divide(logprob, tokens.cast(pa.float64())))),
    }


def parsed(texts: pa.ChunkedArray, sampling: SamplingSettings) -> pa.Array:
    """Answers to `sampling.output_schema` as Arrow's values."""
    return Checker(sampling).column(texts.to_pylist())


def _tokens(answers: Answers) -> Columns:
    return {"_prompt_tokens": answers.prompt_tokens, "_completion_tokens": answers.completion_tokens}
