"""VLLMEngine and Detokenizer against bare vLLM: the same text, tokens and errors, row by row."""

from __future__ import annotations

import asyncio
import copy
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pyarrow as pa
import pytest
import pytest_asyncio

from pipelines.answering import Answering, Started
from pipelines.contracts import PROMPT_SCHEMA, Shard, Work
from pipelines.detokenize import Detokenizer
from pipelines.engine import Answer, EngineInfo
from pipelines.errors import EngineDied, EngineStartError, ModelError, RowError
from pipelines.row_params import Own, RowParams
from pipelines.row_settings import MOST_SETTINGS
from pipelines.settings import ErrorSettings, ModelSettings, PoolSettings, SamplingSettings
from pipelines.stage import Parcel
from pipelines.task import GENERATE
from pipelines.tokenizer import load_tokenizer
from pipelines.vllm_engine import VLLMEngine
from pipelines.vllm_requests import sampling_params
from tests.tiny_models import byte_level, sentencepiece_style, with_weights

pytestmark = pytest.mark.timeout(300)
in_module_loop = pytest.mark.asyncio(loop_scope="module")

FAMILIES = {"byte_level": byte_level, "sentencepiece": sentencepiece_style}
ARGS: dict[str, Any] = {"max_model_len": 256, "dtype": "float32", "enforce_eager": True, "max_num_seqs": 64}
TP2 = {**ARGS, "tensor_parallel_size": 2}
CPU = PoolSettings(device="cpu")

#: Sampling settings of the comparisons. Random weights emit any bytes, so answers are cut inside characters all over.
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0, "max_tokens": 24},
    "short": {"temperature": 0.0, "max_tokens": 3},
    "special_tokens_shown": {"temperature": 0.0, "max_tokens": 24, "skip_special_tokens": False, "ignore_eos": True},
    "stop_strings": {"temperature": 0.0, "max_tokens": 24, "stop": ["e", " t", "你"]},
    "stop_strings_shown": {
        "temperature": 0.0, "max_tokens": 24, "stop": ["e", " t"], "include_stop_str_in_output": True,
    },
    "stop_token_ids": {"temperature": 0.0, "max_tokens": 40, "stop_token_ids": list(range(0, 560, 11))},
    "stop_token_shown": {
        "temperature": 0.0, "max_tokens": 40, "stop_token_ids": list(range(0, 560, 11)),
        "include_stop_str_in_output": True,
    },
    "bad_words": {"temperature": 0.0, "max_tokens": 8, "bad_words": ["the", "e"], "min_tokens": 4},
    "seeded": {"temperature": 0.9, "top_p": 0.9, "repetition_penalty": 1.2, "max_tokens": 12},
    "seeded_n3": {"temperature": 0.9, "top_p": 0.9, "top_k": 50, "n": 3, "max_tokens": 12},
}  # fmt: skip
SEEDED = {"seeded", "seeded_n3"}
#: Those that rows may have of their own.
OF_ROWS = [name for name, sampling in SAMPLING.items() if not {"n", "skip_special_tokens"} & sampling.keys()]

#: Settings that change the text of the same ids.
VARIANTS: list[dict[str, Any]] = [
    {},
    {"skip_special_tokens": False},
    {"include_stop_str_in_output": True},
]


@dataclass
class Task:
    """The models of both families, and the prompts put to them."""

    models: dict[str, Path]
    prompts: dict[str, list[list[int]]]
    seeds: list[int]


Answers = dict[str, dict[str, list[list[dict[str, Any]]]]]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    folder = tmp_path_factory.mktemp("models")
    models = {name: with_weights(make(folder / name)) for name, make in FAMILIES.items()}
    prompts = {name: _prompts(models[name]) for name in models}
    return Task(models, prompts, [1000 + i for i in range(len(prompts["byte_level"]))])


@pytest.fixture(scope="module")
def bare(task: Task) -> Answers:
    """Bare vLLM's answers by family and sampling."""
    return yardstick(task, {family: (family, ARGS, list(SAMPLING)) for family in FAMILIES})


@pytest.fixture
def bare_tp2(task: Task) -> Answers:
    """Of two ranks: two more processes, each of which imports vLLM for 7 s."""
    return yardstick(task, {"tp2": ("byte_level", {**TP2, "distributed_executor_backend": "mp"}, ["greedy"])})


def yardstick(task: Task, engines: dict[str, tuple[str, dict[str, Any], list[str]]]) -> Answers:
    """What bare vLLM answers, by the name of the engine: of a family, with these arguments, to each of these samplings."""
    requests = [
        {
            "args": {"model": str(task.models[family]), **args},
            "calls": [
                {
                    "sampling": SAMPLING[name],
                    "prompts": task.prompts[family],
                    "seeds": task.seeds if name in SEEDED else None,
                }
                for name in names
            ],
        }
        for family, args, names in engines.values()
    ]
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with tempfile.TemporaryDirectory() as folder:
        asked, answers = Path(folder) / "requests.json", Path(folder) / "answers.json"
        asked.write_text(json.dumps(requests))
        done = subprocess.run(
            [sys.executable, "-m", "tests.local.vllm_token_yardstick", str(asked), str(answers)],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        by_engine = json.loads(answers.read_text())
    return {
        key: dict(zip(names, answered, strict=True))
        for (key, (_, _, names)), answered in zip(engines.items(), by_engine, strict=True)
    }


def _prompts(model: Path) -> list[list[int]]:
    tokenizer = load_tokenizer(ModelSettings(source=str(model)))
    texts = ["The quick brown", "def main(", "你好世界 ", "naïve café\n", "1, 22, 333", "a " * 50, "🎉", "x"]
    encoded = [tokenizer.encode(text) for text in texts]
    chooser = random.Random(0)
    some = [[chooser.randrange(3, 560) for _ in range(chooser.randrange(1, 30))] for _ in range(24)]
    return [*encoded, *some, [tokenizer.bos_token_id]]


def _settings(task: Task, family: str, args: dict[str, Any]) -> ModelSettings:
    return ModelSettings(source=str(task.models[family]), engine=args)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engines(task: Task) -> AsyncIterator[dict[str, VLLMEngine]]:
    """A started engine for each family; `ask` gives it other sampling settings."""
    started = {}
    for family in FAMILIES:
        started[family] = VLLMEngine(_settings(task, family, ARGS), SamplingSettings(temperature=0.0), CPU)
        info = await started[family].start()
        assert info.name.startswith("vllm 0.")
        assert (info.device, info.max_model_len, info.max_num_seqs) == ("cpu", 256, 64)
    yield started
    for engine in started.values():
        await engine.stop()
        await engine.stop()


async def ask(
    engine: VLLMEngine, sampling: SamplingSettings, task: Task, family: str, seeded: bool
) -> list[Answer]:
    """All prompts at once through the engine, as if it had been started with this sampling."""
    other = copy.copy(engine)
    other._sampling = sampling
    other._params = sampling_params(sampling)
    seeds = task.seeds if seeded else [None] * len(task.seeds)
    rows = zip(task.prompts[family], seeds, strict=True)
    return await asyncio.gather(*(other.generate(f"r{i}", ids, seed) for i, (ids, seed) in enumerate(rows)))


def compare(
    answers: list[Answer], expected: list[list[dict[str, Any]]], task: Task, family: str, name: str
) -> None:
    sampling = SamplingSettings(**SAMPLING[name])
    detokenizer = Detokenizer(load_tokenizer(_settings(task, family, {})), sampling)
    for prompt, answer, wanted in zip(task.prompts[family], answers, expected, strict=True):
        samples = answer.samples
        assert [list(sample.token_ids) for sample in samples] == [each["token_ids"] for each in wanted]
        assert [sample.finish_reason for sample in samples] == [each["finish_reason"] for each in wanted]
        ids = [sample.token_ids for sample in samples]
        made = detokenizer.texts([prompt] * len(ids), ids, [sample.finish_reason for sample in samples])
        texts = [made[i] if sample.text is None else sample.text for i, sample in enumerate(samples)]
        assert texts == [each["text"] for each in wanted]
        assert all((sample.text is not None) == bool(sampling.stop) for sample in samples)


@in_module_loop
@pytest.mark.parametrize("name", SAMPLING)
@pytest.mark.parametrize("family", FAMILIES)
async def test_text_and_tokens_equal_bare_vllm(
    engines: dict[str, VLLMEngine], task: Task, bare: Answers, family: str, name: str
) -> None:
    answers = await ask(engines[family], SamplingSettings(**SAMPLING[name]), task, family, name in SEEDED)

    compare(answers, bare[family][name], task, family, name)


@in_module_loop
@pytest.mark.parametrize("family", FAMILIES)
async def test_rows_of_one_job_with_parameters_of_their_own_equal_bare_vllm(
    engines: dict[str, VLLMEngine], task: Task, bare: Answers, family: str
) -> None:
    job = SamplingSettings(params_column="p", temperature=0.7, max_tokens=100, seed=5)
    refused: dict[str, dict[str, Any]] = {
        "out-of-vocab": {"stop_token_ids": [640]},
        "Too many bad words": {"bad_words": [f"x{i}" for i in range(2000)]},
        "they may have 1024": {"bad_words": ["zq#" * 2000]},
        "there may be 100": {"stop_token_ids": list(range(101)), "min_tokens": 1},
    }
    rows = [
        (ids, {**SAMPLING[name], **({"seed": task.seeds[place]} if name in SEEDED else {})})
        for name in OF_ROWS
        for place, ids in enumerate(task.prompts[family])
    ]
    asked = [*rows, *((task.prompts[family][0], own) for own in refused.values())]
    table = pa.table({"p": [json.dumps(own) for _, own in asked]})
    prompts = [
        {"row_id": f"f#{place}", "token_ids": ids, **cast("Own", own)._asdict()}
        for place, ((ids, _), own) in enumerate(zip(asked, RowParams(job)(table), strict=True))
    ]
    engine = copy.copy(engines[family])  # as if it had been started for the job
    engine._sampling, engine._params, engine._other_params = job, sampling_params(job), OrderedDict()
    work = cast(
        "Work",
        SimpleNamespace(
            task=GENERATE, prompt=None, run_id="r", sampling=job, errors=ErrorSettings(), pool=CPU,
            model=_settings(task, family, {}),
        ),
    )  # fmt: skip
    info = EngineInfo(name="vllm", device="cpu", max_model_len=256, max_num_seqs=64, start_s=0, ready_at=0)
    parcel = Parcel(
        shard=Shard(ordinal=0, id="0" * 16, spans=(), rows=len(asked), bytes=0),
        prompts=pa.Table.from_pylist(prompts, PROMPT_SCHEMA),
    )
    answering = Answering(parcel, work, Started.of(engine, info, work), itertools.count(), priority=0)
    await answering.run(answering.answerable)
    generations = answering.parcel(attempt=1, engine_deaths=0).generations
    assert generations is not None
    answers = generations.to_pylist()

    assert [row["error_code"] for row in answers] == [None] * len(rows) + ["invalid_request"] * len(refused)
    for row, words in zip(answers[len(rows) :], refused, strict=True):
        assert words in row["error_message"]
    answers = answers[: len(rows)]
    expected = [samples[0] for name in OF_ROWS for samples in bare[family][name]]
    ids = [row["token_ids"] for row in answers]
    assert ids == [wanted["token_ids"] for wanted in expected]
    finish = [row["finish_reason"] for row in answers]
    assert finish == [wanted["finish_reason"] for wanted in expected]
    detokenizer = Detokenizer(load_tokenizer(_settings(task, family, {})), job)
    made = detokenizer.texts([prompt for prompt, _ in rows], ids, finish)
    texts = [text if row["text"] is None else row["text"] for row, text in zip(answers, made, strict=True)]
    assert texts == [wanted["text"] for wanted in expected]
    # The engine makes a text only where the job's way of making it would not do.
    by_engine = {
        json.dumps(own) for row, (_, own) in zip(answers, rows, strict=True) if row["text"] is not None
    }
    wanted = ("stop_strings", "stop_strings_shown", "stop_token_shown")
    assert by_engine == {json.dumps(SAMPLING[name]) for name in wanted}
    # Made once for each set; "short" is the greedy one with another limit, and three came to nothing.
    assert len(engine._other_params) == len(OF_ROWS) - 1 + len(refused) - 3
    for _ in range(MOST_SETTINGS):
        engine._params_of(job.model_copy())
    assert len(engine._other_params) == MOST_SETTINGS


def test_the_comparisons_meet_what_they_are_for(task: Task, bare: Answers) -> None:
    """Cut characters, stops by token and by string, and different samples do occur in the yardstick."""
    byte_level = bare["byte_level"]
    reasons = {name: [s["finish_reason"] for row in rows for s in row] for name, rows in byte_level.items()}
    assert "stop" in reasons["stop_strings"]
    assert "stop" in reasons["stop_token_ids"]
    assert any(len({s["text"] for s in row}) == 3 for row in byte_level["seeded_n3"])
    tokenizer = load_tokenizer(_settings(task, "byte_level", {}))
    cut = [
        s for row in byte_level["short"] for s in row if tokenizer.decode(s["token_ids"]).endswith("\ufffd")
    ]
    assert cut
    assert all(not s["text"].endswith("\ufffd") for s in cut)


@in_module_loop
async def test_logprobs_timing_and_prefix_cache(engines: dict[str, VLLMEngine], task: Task) -> None:
    sampling = SamplingSettings(temperature=0.0, max_tokens=5, logprobs=2)
    await ask(
        engines["byte_level"], sampling, task, "byte_level", seeded=False
    )  # compiles, and fills the cache
    began = time.monotonic()
    answers = await ask(engines["byte_level"], sampling, task, "byte_level", seeded=False)
    elapsed_s = time.monotonic() - began

    for answer in answers:
        sample = answer.samples[0]
        assert sample.logprobs is not None
        assert [entry["token_id"] for entry in sample.logprobs] == list(sample.token_ids)
        for entry in sample.logprobs:
            assert entry["top"][0]["token_id"] == entry["token_id"]  # greedy: the likeliest
            assert entry["logprob"] == entry["top"][0]["logprob"] >= entry["top"][1]["logprob"]
        assert answer.ttft_s is not None
        assert 0 < answer.ttft_s <= elapsed_s
        assert answer.preemptions == 0

    long_prompt = [5 + i % 500 for i in range(200)]
    engine = engines["byte_level"]
    first = await engine.generate("long", long_prompt, None)
    second = await engine.generate("long again", long_prompt, None)
    assert (first.cached_tokens, second.cached_tokens) == (0, 128)  # blocks of 128 tokens on a CPU
    assert first.samples[0].token_ids == second.samples[0].token_ids


@in_module_loop
@pytest.mark.parametrize(
    ("prompt", "code"),
    [
        ([5] * 256, "prompt_too_long"),
        ([5] * 5000, "prompt_too_long"),
        ([], "empty_prompt"),
        ([5, -1], "invalid_request"),
        ([5, 640], "invalid_request"),
        ([5, 10**12], "invalid_request"),
        ([5, 10**30], "invalid_request"),
        ([5, 1.5], "invalid_request"),
        ([5, None], "invalid_request"),
        (["5"], "invalid_request"),
    ],
)
async def test_a_refused_prompt_is_a_row_error_and_harms_no_neighbour(
    engines: dict[str, VLLMEngine], prompt: Any, code: str
) -> None:
    engine = engines["byte_level"]
    neighbour = asyncio.ensure_future(engine.generate("neighbour", [5, 6, 7], None))

    with pytest.raises(RowError) as caught:
        await engine.generate("bad", prompt, None)

    assert caught.value.code == code
    assert "\n" not in str(caught.value)
    async with asyncio.timeout(60):
        assert (await neighbour).samples[0].token_ids
        assert (await engine.generate("after", [5, 6, 7], None)).samples[0].token_ids


@in_module_loop
async def test_the_longest_prompt_that_fits_has_room_for_one_token(engines: dict[str, VLLMEngine]) -> None:
    sample = (await engines["byte_level"].generate("long", [5] * 255, None)).samples[0]

    assert (len(sample.token_ids), sample.finish_reason) == (1, "length")


@in_module_loop
async def test_cancelling_aborts_the_request_in_the_engine(engines: dict[str, VLLMEngine]) -> None:
    engine = copy.copy(engines["byte_level"])
    engine._params = sampling_params(SamplingSettings(temperature=0.0, max_tokens=250, ignore_eos=True))
    requests = [asyncio.ensure_future(engine.generate(f"c{i}", [5 + i], None)) for i in range(10)]
    await asyncio.sleep(0.2)

    for request in requests:
        request.cancel()
    results = await asyncio.gather(*requests, return_exceptions=True)

    assert all(isinstance(result, asyncio.CancelledError) for result in results)
    assert engine._llm.get_num_unfinished_requests() == 0
    assert (await engines["byte_level"].generate("after", [5], None)).samples


def test_texts_equal_vllms_incremental_detokenizer(task: Task) -> None:
    """The real class of vLLM, one token at a time, over ids that no model would choose."""
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.detokenizer import IncrementalDetokenizer

    chooser = random.Random(7)
    for family in FAMILIES:
        tokenizer = load_tokenizer(_settings(task, family, {}))
        for options in VARIANTS:
            rows = []
            for _ in range(400):
                low, high = chooser.choice([(0, 640), (3, 259)])
                prompt, ids = (
                    [chooser.randrange(low, high) for _ in range(chooser.randrange(1, 14))] for _ in range(2)
                )
                rows.append((prompt, ids, chooser.choice(["stop", "length"])))
            wanted = []
            for prompt, ids, finish in rows:
                request = SimpleNamespace(
                    request_id="r",
                    prompt_token_ids=prompt,
                    prompt_embeds=None,
                    sampling_params=SamplingParams(**options),
                )
                reference = IncrementalDetokenizer.from_new_request(tokenizer, request)
                for position, token_id in enumerate(ids):
                    reference.update([token_id], finish == "stop" and position == len(ids) - 1)
                wanted.append(reference.get_next_output_text(True, False))

            made = Detokenizer(tokenizer, SamplingSettings(**options)).texts(
                *map(list, zip(*rows, strict=True))
            )

            assert made == wanted


@in_module_loop
@pytest.mark.parametrize(
    ("engine", "sampling", "reason"),
    [
        ({"max_model_len": 1_000_000}, {}, "max_model_len"),
        ({"dtype": "float99"}, {}, "dtype"),
        ({"max_modl_len": 1}, {}, "did you mean max_model_len"),
        ({}, {"temperature": 9.0}, "temperature must be in"),
        ({}, {"bad_words": ["zq#" * 2000]}, "they may have 1024"),
        (
            {"kv_cache_memory_bytes": 100_000},
            {},
            "No available memory",
        ),  # found out by the engine's own process
    ],
)
async def test_why_an_engine_does_not_start_is_one_line(
    task: Task, monkeypatch: pytest.MonkeyPatch, engine: Any, sampling: Any, reason: str
) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    broken = VLLMEngine(_settings(task, "byte_level", {**ARGS, **engine}), SamplingSettings(**sampling), CPU)

    with pytest.raises((EngineStartError, ModelError)) as caught:
        await broken.start()
    await broken.stop()

    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@in_module_loop
async def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineStartError, match="nowhere"):
        await VLLMEngine(ModelSettings(source=str(tmp_path / "nowhere")), SamplingSettings(), CPU).start()


@pytest.mark.long
@in_module_loop
async def test_two_ranks_equal_bare_vllm_with_two_ranks_and_die_together(
    task: Task, bare_tp2: Answers
) -> None:
    engine = VLLMEngine(_settings(task, "byte_level", TP2), SamplingSettings(**SAMPLING["greedy"]), CPU)
    before = _children()
    await engine.start()
    try:
        answers = await ask(engine, SamplingSettings(**SAMPLING["greedy"]), task, "byte_level", seeded=False)
        compare(answers, bare_tp2["tp2"]["greedy"], task, "byte_level", "greedy")

        worker = next(p for p in _children() - before if "Worker" in " ".join(p.cmdline()))
        pending = asyncio.ensure_future(engine.generate("pending", [5], None))
        worker.send_signal(signal.SIGKILL)
        with suppress(EngineDied):  # it may have been answered just before
            await pending
        await asyncio.sleep(3)
        with pytest.raises(EngineDied):
            await engine.generate("after", [5], None)
    finally:
        await engine.stop()
    assert _alive(_children() - before) == []


@in_module_loop
async def test_a_killed_engine_process_fails_its_requests_at_once(engines: dict[str, VLLMEngine]) -> None:
    """Last: it costs this module's engine."""
    engine = engines["sentencepiece"]
    longest = engine._max_model_len - 2
    engine._params = sampling_params(SamplingSettings(temperature=0.0, max_tokens=longest, ignore_eos=True))
    # More than the engine runs at once, so that some are waiting however fast it is.
    requests = [asyncio.ensure_future(engine.generate(f"k{i}", [5 + i % 50], None)) for i in range(200)]
    await asyncio.sleep(0.05)
    core = engine._llm.engine_core.resources.engine_manager.processes[0]

    os.kill(core.pid, signal.SIGKILL)
    async with asyncio.timeout(30):
        results = await asyncio.gather(*requests, return_exceptions=True)

    died = [result for result in results if isinstance(result, EngineDied)]
    assert died
    assert all(isinstance(result, (EngineDied, Answer)) for result in results), results
    with pytest.raises(EngineDied):
        await engine.generate("after", [5], None)
    await engine.stop()
    assert not core.is_alive()


def _children() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def _alive(processes: set[psutil.Process]) -> list[psutil.Process]:
    _, alive = psutil.wait_procs(processes, timeout=5)
    return [
        p
        for p in alive
        if p.status() != psutil.STATUS_ZOMBIE and "resource_tracker" not in " ".join(p.cmdline())
    ]
