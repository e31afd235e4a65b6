"""The simulated engine: deterministic answers, shared time, the real engine's errors."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.engine import Answer, Engine, open_engine
from pipelines.errors import EngineDied, EngineStartError, RowError
from pipelines.settings import ModelSettings, PoolSettings, SamplingSettings
from pipelines.tokenizer import load_tokenizer
from tests.tiny_models import byte_level

FAST = {"tokens_per_s": 1e9}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(byte_level(tmp_path_factory.mktemp("model")))


def engine_for(
    source: str, engine: dict[str, Any] | None = None, simulated: Any = FAST, **sampling: Any
) -> Engine:
    model = ModelSettings(source=source, backend="simulated", engine=engine or {}, simulated=simulated)
    return open_engine(model, SamplingSettings(**sampling), PoolSettings())


@pytest.fixture
async def engine(source: str) -> AsyncIterator[Engine]:
    engine = engine_for(source)
    await engine.start()
    yield engine
    await engine.stop()


def ids(answer: Answer) -> list[list[int]]:
    return [list(sample.token_ids) for sample in answer.samples]


async def test_answers_depend_on_prompt_seed_and_sample_only(source: str, engine: Engine) -> None:
    again = engine_for(source)
    await again.start()

    first = await engine.generate("a", [5, 6, 7], None)

    assert ids(first) == ids(await again.generate("b", (5, 6, 7), None))
    assert ids(first) != ids(await engine.generate("c", [5, 6, 8], None))
    assert ids(first) != ids(await engine.generate("d", [5, 6, 7], 1))
    assert ids(await engine.generate("e", [5, 6, 7], 0)) != ids(first)
    await again.stop()


async def test_n_samples_differ_and_keep_their_order(source: str) -> None:
    engine = engine_for(source, n=3)
    await engine.start()

    answer = ids(await engine.generate("a", [5], 3))

    assert len(answer) == 3
    assert len({tuple(sample) for sample in answer}) == 3
    assert answer == ids(await engine.generate("b", [5], 3))
    await engine.stop()


async def test_answers_are_printable_and_end_in_the_stop_token(source: str, engine: Engine) -> None:
    tokenizer = load_tokenizer(ModelSettings(source=source))
    lengths = set()
    for row in range(200):
        sample = (await engine.generate(str(row), [row + 5], None)).samples[0]
        lengths.add(len(sample.token_ids))
        assert sample.finish_reason == "stop"
        assert sample.token_ids[-1] == tokenizer.eos_token_id
        text = tokenizer.decode(sample.token_ids[:-1])
        assert text.isprintable()
        assert text.isascii()
        assert text.strip()
    assert lengths == set(range(4, 33))


async def test_max_tokens_and_max_model_len_cut_answers(source: str) -> None:
    short = engine_for(source, max_tokens=3)
    await short.start()
    sample = (await short.generate("a", [5], None)).samples[0]
    assert (len(sample.token_ids), sample.finish_reason) == (3, "length")
    sample = (await short.generate("b", [5], None, max_tokens=2)).samples[0]
    assert (len(sample.token_ids), sample.finish_reason) == (2, "length")
    await short.stop()

    narrow = engine_for(source, engine={"max_model_len": 10}, simulated={"min_tokens": 8, **FAST})
    assert (await narrow.start()).max_model_len == 10
    sample = (await narrow.generate("a", [5] * 7, None)).samples[0]
    assert (len(sample.token_ids), sample.finish_reason) == (3, "length")
    await narrow.stop()


async def test_logprobs_are_one_struct_per_token(source: str) -> None:
    engine = engine_for(source, logprobs=2)
    await engine.start()
    sample = (await engine.generate("a", [5], None)).samples[0]

    assert sample.logprobs is not None
    assert [entry["token_id"] for entry in sample.logprobs] == list(sample.token_ids)
    assert all(len(entry["top"]) == 2 and entry["logprob"] <= 0 for entry in sample.logprobs)
    await engine.stop()


@pytest.mark.parametrize(
    ("prompt", "code"),
    [
        ([], "empty_prompt"),
        ([5] * 4096, "prompt_too_long"),
        ([-1], "invalid_request"),
        ([1_000_000], "invalid_request"),
        ([1.5], "invalid_request"),
        ([None], "invalid_request"),
    ],
)
async def test_bad_prompts_are_row_errors(engine: Engine, prompt: Any, code: str) -> None:
    with pytest.raises(RowError) as caught:
        await engine.generate("a", prompt, None)

    assert caught.value.code == code
    assert (await engine.generate("b", [5], None)).samples


async def test_requests_in_flight_share_the_rate(source: str) -> None:
    engine = engine_for(source, simulated={"tokens_per_s": 2000, "min_tokens": 10, "max_tokens": 10})
    await engine.start()
    loop = asyncio.get_running_loop()

    began = loop.time()
    answers = await asyncio.gather(*(engine.generate(str(i), [5 + i], None) for i in range(40)))
    together = loop.time() - began
    began = loop.time()
    await engine.generate("alone", [5], None)
    alone = loop.time() - began

    assert together == pytest.approx(0.2, rel=0.5)  # 400 tokens at 2,000 a second
    assert alone == pytest.approx(0.005, abs=0.05)
    assert all(answer.ttft_s is not None and 0 < answer.ttft_s <= together for answer in answers)
    await engine.stop()


async def test_a_cancelled_request_leaves_its_share_to_the_others(source: str) -> None:
    engine = engine_for(source, simulated={"tokens_per_s": 100, "min_tokens": 10, "max_tokens": 10})
    await engine.start()
    loop = asyncio.get_running_loop()
    began = loop.time()
    kept = asyncio.ensure_future(engine.generate("kept", [5], None))
    dropped = [asyncio.ensure_future(engine.generate(str(i), [6 + i], None)) for i in range(50)]

    await asyncio.sleep(0.15)  # the next end is far off by now, with the rate shared by 51
    for task in dropped:
        task.cancel()
    await kept

    assert loop.time() - began < 2  # 0.1 s alone; 5 s had the others stayed
    await engine.stop()


async def test_thousands_of_requests_at_once_are_cheap(engine: Engine) -> None:
    async with asyncio.timeout(10):
        answers = await asyncio.gather(
            *(engine.generate(str(i), [5 + i % 500, i % 97], None) for i in range(3_000))
        )

    assert len(answers) == 3_000


async def test_stopping_fails_what_is_in_flight(source: str) -> None:
    engine = engine_for(source, simulated={"tokens_per_s": 1})
    await engine.stop()  # before the start
    await engine.start()
    request = asyncio.ensure_future(engine.generate("a", [5], None))
    await asyncio.sleep(0)

    await engine.stop()
    await engine.stop()

    with pytest.raises(EngineDied):
        await request
    with pytest.raises(EngineDied):
        await engine.generate("b", [5], None)


async def test_a_missing_model_is_a_start_error(tmp_path: Path) -> None:
    with pytest.raises(EngineStartError, match="no such folder"):
        await engine_for(str(tmp_path / "nowhere")).start()


async def test_the_latest_token_is_that_of_a_request_in_flight(source: str) -> None:
    """An idle engine gives none, and neither does one that hangs: what the watchdog tells apart by its requests."""
    engine = engine_for(source, simulated={"tokens_per_s": 50, "stalls_of": 7, "min_tokens": 8})
    await engine.start()
    started = engine.last_token_at
    await asyncio.sleep(0.05)
    assert engine.last_token_at == started
    answer = asyncio.create_task(engine.generate("a", [5], None))
    await asyncio.sleep(0.05)
    assert started < engine.last_token_at <= time.monotonic()
    await answer
    ended = engine.last_token_at
    await asyncio.sleep(0.05)
    assert engine.last_token_at == ended
    hanging = asyncio.create_task(engine.generate("b", [7], None))
    await asyncio.sleep(0.05)
    assert engine.last_token_at == ended
    hanging.cancel()
    await asyncio.gather(hanging, return_exceptions=True)
    assert engine.last_token_at == ended
    await engine.stop()
