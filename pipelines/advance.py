"""From the answers of one generation to the prompts of the next: detokenise, run the steps between them, render."""

from __future__ import annotations

from functools import cached_property

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.answer_parsers import AnswerParser, Said, open_parser, parsed_columns
from pipelines.ask_settings import ScoreStep
from pipelines.attempts import Attempts
from pipelines.code import check_code
from pipelines.contracts import PROMPT_SCHEMA, Work
from pipelines.detokenize import Detokenizer
from pipelines.generations import Generation, pools_of
from pipelines.images import ImageReader
from pipelines.judge import views
from pipelines.orphans import end_with_parent
from pipelines.policy import check_model_allowed
from pipelines.prompt import PromptBuilder
from pipelines.result import records_of
from pipelines.shard_stats import Counts
from pipelines.stage import Failure, Parcel
from pipelines.steps import DROPPED, Steps, is_good
from pipelines.storage import Storage
from pipelines.tokenizer import do_without_torch, load_tokenizer
from pipelines.vision import Vision


class Reading:
    """What becomes of one generation's answers: their texts, and what its steps make of them."""

    def __init__(self, generation: Generation) -> None:
        self.generation = generation

    @cached_property
    def parser(self) -> AnswerParser | None:
        work = self.generation.work
        return open_parser(work.model, work.sampling, work.prompt)

    @cached_property
    def detokenizer(self) -> Detokenizer:
        sampling = self.generation.work.sampling
        if self.parser is not None and self.parser.keeps_special_tokens:
            sampling = sampling.model_copy(update={"skip_special_tokens": False})
        return Detokenizer(load_tokenizer(self.generation.work.model), sampling)

    @cached_property
    def steps(self) -> Steps:
        g = self.generation
        return Steps(g.steps, g.work.user_modules, g.step_names)

    def records(self, parcel: Parcel) -> tuple[pa.Table, Parcel]:
        """(all records of the shard with the answers, before the generation's steps; the parcel with what was counted)."""
        records, counts = records_of(parcel, self.generation, self._says)
        return records, with_counts(parcel, counts)

    def _says(self, prompts: pa.Table, generations: pa.Table) -> Said:
        texts = self._texts(prompts, generations)
        if self.parser is None:
            return Said(texts)
        return parsed_columns(self.parser, self.generation.work.sampling, texts, generations)

    def _texts(self, prompts: pa.Table, generations: pa.Table) -> pa.ChunkedArray:
        """The text of each sample: the engine's where it had to detokenise, ours elsewhere, null for failed rows."""
        missing = pc.and_(generations["token_ids"].is_valid(), generations["text"].is_null())
        answers = generations.filter(missing)
        texts = self.detokenizer.texts(
            prompts["token_ids"].take(answers["row"]).to_pylist(),
            answers["token_ids"].to_pylist(),
            answers["finish_reason"].to_pylist(),
        )
        engine_texts = generations["text"].cast(pa.string())
        return pc.replace_with_mask(engine_texts, missing.combine_chunks(), pa.array(texts, pa.string()))


def with_counts(parcel: Parcel, counts: Counts) -> Parcel:
    """The parcel, noting what some more steps have counted."""
    return parcel.noting(steps={**parcel.notes.get("steps", {}), **counts}) if counts else parcel


def prompts_of(generation: Generation) -> PromptBuilder:
    """What renders and tokenises the prompts of a generation that asks."""
    work, step = generation.work, generation.step
    assert work.prompt is not None
    return PromptBuilder(
        work.prompt,
        load_tokenizer(work.model),
        work.user_modules,
        work.sampling,
        key=f"steps.{generation.name}.prompt" if step else "prompt",
        answer=step.answer if isinstance(step, ScoreStep) else None,
        conversation=generation.conversation_key,
        vision=Vision(work.model, ImageReader(work.input.images_folder, work.input.storage_options)),
    )


def row_of(request_id: str) -> str:
    """The row that a request is about, by the `row_id` among its prompts."""
    sample, of_step, _ = request_id.rpartition("~@")
    return sample.rpartition("~")[0] if of_step else request_id


class Advance:
    """One step onwards from a generation: the same shard, ready for `after`."""

    def __init__(self, before: Generation, after: Generation) -> None:
        self._reading, self._after = Reading(before), after

    @cached_property
    def builder(self) -> PromptBuilder:
        return prompts_of(self._after)

    def __call__(self, parcel: Parcel) -> Parcel:
        """The parcel with its records as rows, and a prompt for each of them that is still good."""
        records, parcel = self._reading.records(parcel)
        records, counts = self._reading.steps.run(records)
        good = records.filter(is_good(records))
        if DROPPED in good.column_names:
            good = good.drop_columns([DROPPED])
        assert self._after.step is not None
        prompts = pa.concat_tables(
            self._prompts(view, number) for number, view in enumerate(views(self._after.step, good))
        )
        onwards = Parcel(shard=parcel.shard, rows=records, prompts=prompts, notes=parcel.notes)
        return with_counts(onwards, counts)

    def _prompts(self, records: pa.Table, view: int) -> pa.Table:
        """A prompt for each record. Each sample of a row, and each view of it, is a request of its own: other seed, other
        suspect."""
        prompts = self.builder.build(records)
        asks = f"@{self._after.name}" + (f"~{view}" if view else "")
        samples = records["sample_index"].cast(pa.string())
        ids = pc.binary_join_element_wise(records["row_id"], samples, asks, "~")
        return prompts.set_column(0, PROMPT_SCHEMA.field(0), ids)


class Between:
    """The stage between two pools of engines, on CPU actors."""

    def __init__(self, work: Work, pool: int, *, own_process: bool = False) -> None:
        """`pool`: the place of the next one in `generations.pools_of`."""
        if own_process:
            end_with_parent()
        self.work = work
        pools = pools_of(work)
        if own_process and not pools[pool - 1][-1].parses:
            do_without_torch(work.model)
        self._advance = Advance(pools[pool - 1][-1], pools[pool][0])
        self._model = pools[pool][0].work.model
        self._attempts = Attempts(
            Storage(work.output.path, work.output.storage_options), f"between-{pool}", work.run_id
        )

    def __call__(self, batch: pa.Table) -> pa.Table:
        parcel = Parcel.from_batch(batch)
        if parcel.failure or parcel.notes.get("committed"):
            return parcel.to_batch()
        try:
            check_code(self.work.code_digest, self.work.code_path)
            check_model_allowed(self._model)  # by this machine's own policy
            self._attempts.begin_whole(
                self.work.attempts_key(parcel.shard),
                parcel.notes["pass"],
                name=parcel.shard.part_name,
                most=self.work.errors.max_attempts,
            )
            return self._advance(parcel).to_batch()
        except Exception as error:  # noqa: BLE001 - classified by Failure.of
            return parcel.failed(Failure.of("between", error)).to_batch()
