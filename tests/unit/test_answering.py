"""One shard's requests through an engine: whatever ends them, the gate gets every place back."""

from __future__ import annotations

import asyncio
import itertools
import time
from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyarrow as pa
import pytest

from pipelines.answering import Answering, Started, replica_name
from pipelines.contracts import GENERATION_SCHEMA, PROMPT_SCHEMA, Shard, Work
from pipelines.engine import Answer, Engine, open_engine
from pipelines.errors import EngineDied
from pipelines.lengths import Lengths
from pipelines.settings import ErrorSettings, ModelSettings, PoolSettings, SamplingSettings
from pipelines.shard_stats import START_PARTS, Provenance
from pipelines.stage import Parcel
from pipelines.task import GENERATE
from pipelines.waves import Load
from tests.tiny_models import byte_level

POISON = 99


def work(folder: Path, **simulated: Any) -> Work:
    settings = {"tokens_per_s": 1e9, "dies_of": POISON, **simulated}
    return cast(
        "Work",
        SimpleNamespace(
            task=GENERATE,
            prompt=None,
            run_id="r",
            sampling=SamplingSettings(n=2),
            errors=ErrorSettings(),
            pool=PoolSettings.model_validate({"admission": {"high": 4}}),
            model=ModelSettings.model_validate(
                {"source": str(byte_level(folder / "model")), "backend": "simulated", "simulated": settings}
            ),
        ),
    )


def parcel(prompts: list[list[int] | None]) -> Parcel:
    rows = [
        {
            "row_id": f"f#{i}",
            "token_ids": ids,
            "error_code": None if ids else "prompt_error",
            "error_message": None,
        }
        for i, ids in enumerate(prompts)
    ]
    return Parcel(
        shard=Shard(ordinal=0, id="0" * 16, spans=(), rows=len(rows), bytes=0),
        prompts=pa.Table.from_pylist(rows, schema=PROMPT_SCHEMA),
    )


async def started_for(of: Work) -> tuple[Engine, Started]:
    engine = open_engine(of.model, of.sampling, of.pool)
    return engine, Started.of(engine, await engine.start(), of)


def answering(of: Work, started: Started, prompts: list[list[int] | None]) -> Answering:
    return Answering(parcel(prompts), of, started, itertools.count(), priority=0)


async def test_generations_are_one_row_per_sample_in_the_prompts_order(tmp_path: Path) -> None:
    job = work(tmp_path)
    engine, started = await started_for(job)
    prompts: list[list[int] | None] = [[5, 6], None, [7] * 5_000, [8] * 300, [9]]
    asked = answering(job, started, prompts)
    assert asked.answerable == [0, 2, 3, 4]
    await asked.run(asked.answerable)
    table = asked.parcel(attempt=1, engine_deaths=0).generations
    assert table is not None
    assert table.schema == GENERATION_SCHEMA
    table.validate(full=True)
    assert table["row"].to_pylist() == [0, 0, 1, 2, 3, 3, 4, 4]
    assert table["sample_index"].to_pylist() == [0, 1, 0, 0, 0, 1, 0, 1]
    assert table["error_code"].to_pylist()[2:4] == ["prompt_error", "prompt_too_long"]
    for place, ids in ((0, [5, 6]), (4, [8] * 300), (6, [9])):
        samples = (await engine.generate("again", ids, None)).samples
        assert table["token_ids"].to_pylist()[place : place + 2] == [list(s.token_ids) for s in samples]
        assert all(isinstance(s.token_ids, array) for s in samples)
    assert table["token_ids"].to_pylist()[2:4] == [None, None]
    assert started.gate.load == Load()


async def test_a_turn_ends_with_the_last_answer(tmp_path: Path) -> None:
    """Not with what was waited for afterwards."""
    job = work(tmp_path)
    _, started = await started_for(job)
    asked = answering(job, started, [[5, 6], [7]])
    await asked.run([0])
    answered_at = time.time()
    await asyncio.sleep(0.3)
    asked.take(1, cast("Answer", asked._results[0]))
    notes = asked.parcel(attempt=1, engine_deaths=0).notes
    [turn] = notes["turns"]
    assert turn["began_at"] <= turn["ended_at"] <= answered_at + 0.1
    assert notes["generate_s"] == pytest.approx(turn["ended_at"] - turn["began_at"], abs=1e-4)
    assert notes["rows_reused"] == 1


def test_without_an_engine_the_notes_are_those_of_the_generation_before(tmp_path: Path) -> None:
    """Where there was none either, whatever `Provenance` has by default, but for who answered."""
    before = {
        "turns": [{"replica": "a:1"}],
        "device": "H200",
        "engine": "vllm 0.32.0",
        "engine_compile_s": 7.0,
    }
    for given in ({}, before):
        asked = Answering(parcel([None]).noting(**given), work(tmp_path), None, itertools.count(), 0)
        notes = asked.parcel(attempt=1, engine_deaths=0).notes
        own = {"replica": replica_name(), "engine": "simulated", **given, "turns": ()}
        said = Provenance(run_id="r", job="j", **own)  # type: ignore[arg-type]
        names = ("replica", "engine", "device", "engine_start_s", "engine_ready_at", *START_PARTS)
        assert [notes[name] for name in names] == [getattr(said, name) for name in names]
        assert notes["turns"] == given.get("turns", [])


@pytest.mark.parametrize("prompts", [[], [None, None]])
async def test_a_shard_without_prompts_asks_nothing(tmp_path: Path, prompts: list[list[int] | None]) -> None:
    job = work(tmp_path)
    _, started = await started_for(job)
    asked = answering(job, started, prompts)
    await asked.run(asked.answerable)
    table = asked.parcel(attempt=1, engine_deaths=0).generations
    assert table is not None
    assert table["error_code"].to_pylist() == ["prompt_error"] * len(prompts)


@pytest.mark.parametrize("rows", [2, 40])
async def test_a_cancelled_shard_gives_its_places_back(tmp_path: Path, rows: int) -> None:
    """While all are in the engine, and while some wait."""
    job = work(tmp_path, tokens_per_s=1)
    engine, started = await started_for(job)
    call = asyncio.ensure_future(answering(job, started, [[5 + i] for i in range(rows)]).run(range(rows)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert started.gate.in_flight == min(rows, 4)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert started.gate.load == Load()
    await engine.stop()


async def test_an_engine_that_dies_fails_every_shard_and_leaves_nothing_behind(tmp_path: Path) -> None:
    job = work(tmp_path, tokens_per_s=50)
    _, started = await started_for(job)
    innocent = answering(job, started, [[5 + i] for i in range(30)])
    poisoned = answering(job, started, [[5], [POISON], *([[6]] * 30)])
    calls = [asyncio.ensure_future(a.run(a.answerable)) for a in (poisoned, innocent)]
    async with asyncio.timeout(20):
        ends = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(end) for end in ends] == [EngineDied, EngineDied]
    assert started.gate.load == Load()


@pytest.mark.parametrize("when", ["a request ends", "a shard is cancelled"])
async def test_a_mistake_before_the_gate_fails_those_who_wait_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Whether or not anybody waits for the call in which it comes up."""
    job = work(tmp_path, tokens_per_s=1000 if when == "a request ends" else 1)
    _, started = await started_for(job)
    waiting = [answering(job, started, [[5 + i] for i in range(30)]) for _ in range(2)]
    calls = [asyncio.ensure_future(a.run(a.answerable)) for a in waiting]
    await asyncio.sleep(0)

    def wrong(*_: Any) -> float:
        raise KeyError("a class that nobody knows")

    with monkeypatch.context() as broken:
        broken.setattr(Lengths, "predict", wrong)
        if when == "a shard is cancelled":
            calls[0].cancel()
        async with asyncio.timeout(20):
            ends = await asyncio.gather(*calls, return_exceptions=True)
    first = KeyError if when == "a request ends" else asyncio.CancelledError
    assert [type(end) for end in ends] == [first, KeyError]
    assert started.gate.load == Load()
