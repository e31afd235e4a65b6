"""A job's generations in this process, without Ray: one engine of each pool after the other, for a few rows."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable

from pipelines.advance import Advance
from pipelines.answer_keys import answer_keys
from pipelines.answering import Answering, Started
from pipelines.contracts import Work
from pipelines.generations import Generation, engine_of, pools_of
from pipelines.stage import Parcel
from pipelines.structured import checking_parser

#: Answers one generation's prompts; gives `Answering.parcel`.
Answer = Callable[[Generation, Answering], Awaitable[Parcel]]


async def answer_all(parcel: Parcel, work: Work, answer: Answer) -> tuple[Generation, Parcel]:
    """(the last generation, the parcel with its answers). `parcel` has the first one's prompts.

    Raises EngineStartError, EngineDied, and what `answer` raises.
    """
    generation: Generation | None = None
    for pool in pools_of(work):
        engine = engine_of(pool)
        try:
            started = Started.of(engine, await engine.start(), pool[0].work)
            for following in pool:
                if generation is not None:
                    parcel = Advance(generation, following)(parcel)
                generation = following
                serving = started if following is pool[0] else started.serving(following.work)
                parser = checking_parser(following.work)
                keys = answer_keys(parcel.prompts, following.work) if following.work.asks_once else {}
                answering = Answering(
                    parcel, following.work, serving, itertools.count(), priority=0, keys=keys, parser=parser
                )
                parcel = await answer(following, answering)
        finally:
            await engine.stop()
    assert generation is not None
    return generation, parcel


async def answered(_: Generation, answering: Answering) -> Parcel:
    """An `Answer` that asks for nothing more than the answers."""
    await answering.run(answering.answerable)
    return answering.parcel(attempt=1, engine_deaths=0)
