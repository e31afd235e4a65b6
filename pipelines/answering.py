"""The requests of one shard on a started engine, and its answers as a table."""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.admission import Candidate, Gate, gate_of
from pipelines.answer_keys import drawn
from pipelines.answer_parsers import AnswerParser
from pipelines.contracts import Work
from pipelines.engine import Answer, Engine, EngineInfo
from pipelines.errors import EngineDied, RowError
from pipelines.generation_table import generation_table
from pipelines.histogram import Histogram
from pipelines.images import Image, images_of, without_data
from pipelines.lengths import HELD, Lengths, Rows
from pipelines.row_settings import RowSettings, limit_again
from pipelines.seeds import row_seed
from pipelines.settings import ModelSettings, PoolSettings, SamplingSettings
from pipelines.shard_stats import START_PARTS, Turn
from pipelines.stage import Parcel
from pipelines.structured import Structured

#: Takes each row that was asked, and what came of it.
Tell = Callable[[int, Answer | RowError], None]


@dataclass(frozen=True)
class Started:
    """An engine that is ready, the gate before it, and how long its answers are."""

    engine: Engine
    info: EngineInfo
    gate: Gate
    lengths: Lengths
    settings: RowSettings
    sampling: SamplingSettings | None = None
    """Of a generation that shares the engine; None: the engine's own."""

    @classmethod
    def of(cls, engine: Engine, info: EngineInfo, work: Work) -> Started:
        gate = gate_of(work.pool.admission, engine, info)
        return cls(engine, info, gate, Lengths(work.sampling, info.max_model_len), RowSettings(work.sampling))

    def serving(self, work: Work) -> Started:
        """The same engine for another generation of the job, whose answers have lengths of their own."""
        lengths = Lengths(work.sampling, self.info.max_model_len)
        settings = RowSettings(work.sampling)
        return replace(self, sampling=work.sampling, lengths=lengths, settings=settings)


class Answering:
    """One shard's way through the engine: all its prompts at once, or some at a time."""

    def __init__(
        self,
        parcel: Parcel,
        work: Work,
        started: Started | None,
        request_numbers: itertools.count[int],
        priority: int,
        name: str = "",
        keys: Mapping[int, bytes] = MappingProxyType({}),
        recalled: Mapping[int, Answer] = MappingProxyType({}),
        parser: AnswerParser | None = None,
    ) -> None:
        """`started`: None where all answers are `recalled`. `priority`: shards of lower ones enter first. `name`: of the generation. `keys`: `answer_keys` of the prompts, where
        anything asks for them. `recalled`: answers that are there already, by position. `parser`:
        `structured.checking_parser` of the generation."""
        assert parcel.prompts is not None
        self._parcel, self._prompts = parcel, parcel.prompts
        self._work, self._started = work, started
        self._numbers, self._priority, self._name = request_numbers, priority, name
        token_ids = self._prompts["token_ids"].combine_chunks()
        self._token_ids = token_ids.values.to_numpy()
        self._ends: list[int] = token_ids.offsets.to_pylist()
        self._max_tokens: list[int | None] = self._prompts["max_tokens"].to_pylist()
        self._seeds: list[int | None] = self._prompts["seed"].to_pylist()
        self._params: list[str | None] = self._prompts["params"].to_pylist()
        images = self._prompts["images"].combine_chunks()
        self._images: dict[int, pa.Scalar] = {
            row: images[row] for row in np.flatnonzero(images.is_valid()).tolist()
        }
        """Of the rows that have some, by position."""
        self.keys = keys
        self._reused = set(recalled)
        """Rows whose answer was there or at somebody else, by position."""
        asked = [row for row in np.flatnonzero(token_ids.is_valid()).tolist() if row not in recalled]
        self._same = self._repeats(asked) if keys and work.asks_once else {}
        """Rows whose answer is that of another row, by position."""
        self.answerable = [row for row in asked if row not in self._same]
        """Positions of the rows that are to be answered: those that have a prompt and no answer, of equal ones the first."""
        is_drawn = drawn(self._prompts, work) if keys and work.equal_prompts != "all" else ()
        self.alone = frozenset(row for row in self.answerable if is_drawn and is_drawn[row])
        """Of these, those whose answer no other row may have."""
        self._results: list[Answer | RowError | None] = [*map(recalled.get, range(len(self._prompts)))]
        self._latencies: list[float] = []
        self._variables = work.prompt.chat_template_kwargs if work.prompt else None
        self._structured = Structured(work.sampling, parser)
        self._began = time.monotonic()
        self._first_admitted: float | None = None
        self._last_answered: float | None = None

    @property
    def started(self) -> Started:
        """The engine, for whoever has a row to ask."""
        assert self._started is not None
        return self._started

    @cached_property
    def row_ids(self) -> list[str]:
        """Of all rows, by position."""
        ids: list[str] = self._prompts["row_id"].to_pylist()
        return ids

    def _repeats(self, asked: Sequence[int]) -> dict[int, int]:
        """Row → the first row with the same key, for all that are not the first."""
        first: dict[bytes, int] = {}
        found = ((row, first.setdefault(self.keys[row], row)) for row in asked)
        return {row: other for row, other in found if other != row}

    async def run(self, rows: Sequence[int], tell: Tell | None = None) -> None:
        """Answer the prompts at these positions. Raises what is not one row's fault, after aborting the rest."""
        if not rows:
            return
        gate = self.started.gate
        try:
            async with asyncio.TaskGroup() as group:
                line = _Line(self, rows, group, gate, tell)
                try:
                    gate.enter(self._priority, line)
                    await line.begun
                finally:
                    gate.withdraw(line)
        except* Exception as errors:  # noqa: BLE001 - re-raised as one
            # One cause is enough to fail the shard; an engine's death explains all the others.
            causes = list(_leaves(errors))
            raise next((e for e in causes if isinstance(e, EngineDied)), causes[0]) from None

    def take(self, row: int, answer: Answer) -> None:
        """An answerable row that is not run: its answer is there."""
        self._results[row] = answer
        self._reused.add(row)

    def fail(self, row: int, error: RowError) -> None:
        """A row that is not run."""
        self._results[row] = error

    def parcel(self, *, attempt: int, engine_deaths: int) -> Parcel:
        """The shard with its generations; every answerable row must have been run, taken or failed. Blocks for the table."""
        since = time.monotonic()
        asked = (row for row in self.answerable if row not in self._reused)
        answers = [answer for row in asked if isinstance(answer := self._results[row], Answer)]
        for row, other in self._same.items():
            self._results[row] = self._results[other]
        not_asked = (*self._same, *self._reused)
        reused = [answer for row in not_asked if isinstance(answer := self._results[row], Answer)]
        first, last = self._first_admitted or since, self._last_answered or since
        now = time.time()
        before = self._parcel.notes  # of the generations that the shard has behind it
        latency = Histogram.of(self._latencies) + Histogram.from_dict(before.get("latency_s", {}))
        ttft = Histogram.of(a.ttft_s for a in answers if a.ttft_s is not None)
        return Parcel(
            shard=self._parcel.shard,
            rows=self._parcel.rows,
            prompts=self._answered_prompts(),
            generations=generation_table(self._prompts, self._results),
            notes=self._parcel.notes,
        ).noting(
            attempt=attempt,
            engine_deaths=engine_deaths,
            queue_s=(first - self._began if self._first_admitted else 0.0) + before.get("queue_s", 0.0),
            generate_s=last - first + before.get("generate_s", 0.0),
            latency_s=latency.to_dict(),
            ttft_s=(ttft + Histogram.from_dict(before.get("ttft_s", {}))).to_dict(),
            rows_reused=len(reused) + before.get("rows_reused", 0),
            tokens_reused=sum(len(sample.token_ids) for answer in reused for sample in answer.samples)
            + before.get("tokens_reused", 0),
            repairs=self._structured.spent.repairs + before.get("repairs", 0),
            repair_tokens=self._structured.spent.tokens + before.get("repair_tokens", 0),
            preemptions=sum(a.preemptions for a in answers) + before.get("preemptions", 0),
            **self._of_engine(now - (since - first), now - (since - last)),
        )

    def _of_engine(self, began_at: float, ended_at: float) -> dict[str, Any]:
        """The notes on the engine, and on the shard's turn in it, Unix times; those of the generations before where none was needed."""
        before, here = self._parcel.notes, replica_name()
        if self._started is None:
            # No report may pass over kept answers of a simulated engine: they are no model's.
            none: dict[str, Any] = {
                "turns": [],
                "replica": here,
                "engine": "simulated" if self._work.model.backend == "simulated" else "",
                "device": "",
                "engine_start_s": 0.0,
                "engine_ready_at": 0.0,
                **dict.fromkeys(START_PARTS),
            }
            return {name: before.get(name, value) for name, value in none.items()}
        info = self._started.info
        turn = Turn(
            generation=self._name,
            replica=here,
            began_at=began_at,
            ended_at=ended_at,
            engine_began_at=info.ready_at - info.start_s,
            gpus=gpus_of(info, self._work.model, self._work.pool),
        )
        return {
            "turns": [*before.get("turns", []), asdict(turn)],
            "replica": here,
            "engine": info.name,
            "device": info.device,
            "engine_start_s": info.start_s,
            "engine_ready_at": info.ready_at,
            **{f"engine_{name}": seconds for name, seconds in asdict(info.start_parts).items()},
        }

    def _answered_prompts(self) -> pa.Table:
        """The prompts for the stages that follow, which need no image any more."""
        if not self._images:
            return self._prompts
        place = self._prompts.column_names.index("images")
        bare = without_data(self._prompts["images"])
        return self._prompts.set_column(place, self._prompts.schema.field(place), bare)

    def prompt_tokens(self, row: int) -> int:
        """Of the text, and what the row's images are expected to add."""
        images = len(self._images[row]) if row in self._images else 0
        return self._ends[row + 1] - self._ends[row] + images * self.started.lengths.image_tokens

    def max_tokens(self, row: int) -> int | None:
        """The row's own, where it has one."""
        return self._max_tokens[row]

    async def answer(self, row: int, tell: Tell | None) -> None:
        """One row that has entered the engine."""
        began = time.monotonic()
        self._first_admitted = self._first_admitted or began
        result: Answer | RowError
        try:
            result = answer = await self._structured.answer(partial(self._ask, row))
        except RowError as error:
            result = error
        else:
            self._latencies.append(time.monotonic() - began)
            if row in self._images:
                self.started.lengths.learn_images(len(self._images[row]), answer.image_tokens)
            tokens = sum(len(sample.token_ids) for sample in answer.samples)
            self.started.lengths.learn(self.prompt_tokens(row), tokens, self._max_tokens[row])
        self._last_answered = time.monotonic()
        self._results[row] = result
        if tell is not None:
            tell(row, result)

    async def _ask(self, row: int, number: int, cut: bool) -> Answer:
        """One try at a row; see `structured.Ask`. Raises RowError, and EngineDied where the engine is silent."""
        began, engine = time.monotonic(), self.started.engine
        sampling, limit = self._work.sampling, self._work.errors.request_timeout_s
        seed, longest, own = self._seeds[row], self._max_tokens[row], self.started.sampling
        if seed is None and (sampling.seed is not None or number):
            seed = row_seed(sampling.seed or 0, self.row_ids[row])
        if self._params[row] is not None:
            own = self.started.settings.of(self._params[row])
        if number:
            # The engine adds the sample's index to a seed.
            seed = (seed or 0) + number * sampling.n
            own = self.started.settings.again(self._params[row], cut)
            longest = longest and limit_again(longest, cut)
        token_ids = self._token_ids[self._ends[row] : self._ends[row + 1]]
        request, task = f"{self._work.run_id}-{next(self._numbers)}", self._work.task
        seen: dict[str, list[Image]] = {"images": images_of(self._images[row])} if row in self._images else {}
        try:
            async with asyncio.timeout(limit):
                if task.pools:
                    return await engine.encode(request, token_ids, task, **seen)
                if task.name == "score":
                    return await engine.score(request, token_ids, **seen)
                return await engine.generate(request, token_ids, seed, longest, own, self._variables, **seen)
        except TimeoutError:
            if engine.last_token_at < began:
                raise EngineDied(f"no token from any request for {limit:g} s") from None
            raise RowError("request_timeout", f"no answer within {limit:g} s") from None


class _Line:
    """`pipelines.admission.Line` of the rows of one `run`."""

    def __init__(
        self,
        answering: Answering,
        rows: Iterable[int],
        group: asyncio.TaskGroup,
        gate: Gate,
        tell: Tell | None,
    ) -> None:
        self._answering, self._group, self._gate, self._tell = answering, group, gate, tell
        self._lengths = answering.started.lengths
        self._waiting = Rows(rows, answering.prompt_tokens, self._lengths, answering.max_tokens)
        self._first = -1
        self.begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when all rows have entered the engine."""

    def __len__(self) -> int:
        return len(self._waiting)

    def peek(self, longest: bool) -> Candidate:
        self._first = self._waiting.first(longest)
        prompt_tokens = self._answering.prompt_tokens(self._first)
        expected = self._lengths.predict(prompt_tokens, self._answering.max_tokens(self._first))
        return Candidate(expected, prompt_tokens + math.ceil(HELD * expected))

    def start(self, kv_tokens: int) -> None:
        self._waiting.take(self._first)
        # A callback, not a `finally`: a task that is cancelled before its first step never runs one.
        task = self._group.create_task(self._answering.answer(self._first, self._tell))
        task.add_done_callback(partial(self._ended, kv_tokens))
        if not self._waiting and not self.begun.done():
            self.begun.set_result(None)

    def fail(self, error: Exception) -> None:
        if not self.begun.done():
            self.begun.set_exception(error)

    def _ended(self, kv_tokens: int, task: asyncio.Task[None]) -> None:
        if task.cancelled() or task.exception() is not None:
            self._gate.withdraw(self)  # the group takes no new ones
        self._gate.leave(kv_tokens)


def gpus_of(info: EngineInfo, model: ModelSettings, pool: PoolSettings) -> float | None:
    """That one engine of a settled pool has; None where the pool leaves open how many share one."""
    if info.device == "cpu":
        return 0.0
    return None if pool.engines_per_gpu == "auto" else model.gpus_per_engine / pool.engines_per_gpu


def replica_name() -> str:
    """This process, as provenance and metrics name it: `host:pid`."""
    return f"{socket.gethostname()}:{os.getpid()}"


def _leaves(group: BaseExceptionGroup[Any]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error
