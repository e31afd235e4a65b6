"""One generation of a pool as one engine answers it: a shard's prompts, what of their answers is there already, and the rest."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from functools import cached_property

from pipelines.advance import Advance
from pipelines.answer_keys import answer_keys
from pipelines.answer_parsers import AnswerParser
from pipelines.answering import Answering, Started
from pipelines.contracts import Work
from pipelines.generations import Generation
from pipelines.kept import KeptAnswers
from pipelines.shared_answers import SharedAnswers, Shelves
from pipelines.stage import Parcel
from pipelines.structured import checking_parser


class Asking:
    """For all shards of one engine; loads what it needs with the first."""

    def __init__(
        self,
        work: Work,
        generation: Generation,
        before: Generation | None,
        shelf: Shelves,
        request_numbers: itertools.count[int],
    ) -> None:
        """`before`: the generation before it, where this engine answers that as well. `request_numbers`: the engine's."""
        self._generation, self._work = generation, generation.work
        self._advance = None if before is None else Advance(before, generation)
        self._kept = KeptAnswers(work, generation) if work.reuse is not None and not work.retry else None
        self._shared = SharedAnswers(generation, shelf) if self._work.asks_once else None
        self._numbers = request_numbers
        self._serving: Started | None = None

    async def of(self, parcel: Parcel, started: Callable[[], Awaitable[Started]], arrival: int) -> Answering:
        """A shard's requests; `parcel` comes from the generation before. `started`: waits for the engine. `arrival`: shards of
        lower ones go first."""
        if self._advance is not None:
            parcel = await asyncio.to_thread(self._advance, parcel)
        wanted = self._kept or self._shared
        keys = await asyncio.to_thread(answer_keys, parcel.prompts, self._work) if wanted else {}
        recalled = await asyncio.to_thread(self._kept.recall, parcel, keys) if self._kept else {}
        asks_nothing = self._work.may_ask_nothing and len(recalled) == len(keys)
        return Answering(
            parcel,
            self._work,
            None if asks_nothing else self._served_by(await started()),
            self._numbers,
            arrival,
            self._generation.name,
            keys,
            recalled,
            await asyncio.to_thread(lambda: self._parser),
        )

    def _served_by(self, started: Started) -> Started:
        """The engine for this generation."""
        if self._advance is None:
            return started
        self._serving = self._serving or started.serving(self._work)
        return self._serving

    @cached_property
    def _parser(self) -> AnswerParser | None:
        return checking_parser(self._work)

    async def run(
        self, shard: str, answering: Answering, idle: Callable[[], AbstractContextManager[None]]
    ) -> None:
        """Have every answerable row answered. `idle`: entered while the engine has nothing of the shard."""
        if self._shared is None:
            await answering.run(answering.answerable)
        else:
            await self._shared.run(shard, answering, idle)

    def answered(self, answering: Answering, attempt: int, deaths: int) -> Parcel:
        """The shard with the generation's answers, which are kept where the job says so. Blocks."""
        parcel = answering.parcel(attempt=attempt, engine_deaths=deaths)
        if self._kept is not None:
            self._kept.keep(parcel, answering.keys)
        return parcel
