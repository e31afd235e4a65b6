"""The sweep of `dray tune`: what it tries, in which order, and that its time is a hard limit."""

from __future__ import annotations

import asyncio
import itertools
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, cast

import pytest
import yaml

from jobs.loading import load
from jobs.tune import MARGIN, Setup, Sweep, Trial
from jobs.tune_bench import Asked, Feed, Rate, fresh_prompts
from jobs.tuned import Tuned
from pipelines.admission import Gate, admission_policy
from pipelines.engine import Answer, Engine, EngineInfo, Sample
from pipelines.errors import EngineStartError, Interrupted, JobError
from pipelines.lengths import Lengths
from pipelines.settings import AdmissionSettings, SamplingSettings

Speed = Callable[[Setup, AdmissionSettings], float]


@dataclass
class Machine:
    """Engines whose speed is a formula and whose clock only moves when they start or are measured."""

    speed: Speed
    start_s: float = 10.0
    refuses: Callable[[Setup], bool] = lambda setup: False
    now: float = 0.0
    started: list[Setup] = field(default_factory=list)
    open: int = 0

    def bench(self, setup: Setup) -> ModelBench:
        self.started.append(setup)
        return ModelBench(self, setup)

    def sweep(self, seconds: float, **settings: Any) -> Sweep:
        first = Setup(engines_per_gpu=1, max_num_seqs=256, max_num_batched_tokens=8192)
        return Sweep(
            open_bench=self.bench,
            first=settings.pop("first", first),
            own=settings.pop("own", AdmissionSettings()),
            seconds=seconds,
            clock=lambda: self.now,
            **settings,
        )


@dataclass
class ModelBench:
    machine: Machine
    setup: Setup
    start_s: float = 0.0

    def __enter__(self) -> ModelBench:
        self.machine.open += 1
        return self

    def __exit__(self, *_: object) -> None:
        self.machine.open -= 1

    def wait_ready(self, deadline: float) -> EngineInfo | None:
        self.start_s = self.machine.start_s
        if self.machine.refuses(self.setup):
            raise EngineStartError("out of memory")
        if not self._pass(self.machine.start_s, deadline):
            return None
        seqs = self.setup.max_num_seqs
        return EngineInfo(
            name="formula", device="formula", max_model_len=4096, max_num_seqs=seqs, start_s=0, ready_at=0
        )

    def measure(self, admission: AdmissionSettings, window_s: float, deadline: float) -> Rate | None:
        if not self._pass(1.5 * window_s, deadline):
            return None
        speed = self.machine.speed(self.setup, admission)
        return Rate(speed, speed, speed, window_s, 100, 0)

    def _pass(self, seconds: float, deadline: float) -> bool:
        self.machine.now = min(self.machine.now + seconds, deadline)
        return self.machine.now < deadline


def by_seqs(setup: Setup, admission: AdmissionSettings) -> float:
    """Best at 512 requests and 16,384 tokens; waves are worth a tenth."""
    far = abs(setup.max_num_seqs.bit_length() - 10) + abs(setup.max_num_batched_tokens.bit_length() - 15)
    return 1000.0 * 0.8**far * (1.1 if admission.policy == "wave" else 1.0)


def test_the_best_of_a_known_machine_is_found() -> None:
    machine = Machine(by_seqs)
    best = machine.sweep(1000).run()
    assert (best.setup.max_num_seqs, best.setup.max_num_batched_tokens) == (512, 16_384)
    assert best.admission is not None
    assert (best.admission.policy, best.admission.high, best.admission.low) == ("wave", 512, 384)
    assert machine.open == 0


def test_admissions_share_one_start_and_later_setups_take_the_best_of_them() -> None:
    def speed(setup: Setup, admission: AdmissionSettings) -> float:
        return 200.0 if admission.policy == "continuous" else 100.0

    sweep = Machine(speed).sweep(1000)
    sweep.run()
    first = [trial for trial in sweep.trials if trial.setup == sweep.first]
    assert len(first) == 5
    assert [trial.start_s is not None for trial in first] == [True, False, False, False, False]
    later = [trial for trial in sweep.trials if trial.setup != sweep.first]
    assert later
    assert all(trial.admission and trial.admission.policy == "continuous" for trial in later)


def test_the_jobs_own_admission_comes_first() -> None:
    sweep = Machine(by_seqs).sweep(1000, own=AdmissionSettings(policy="wave", high=100, low=10))
    sweep.run()
    assert sweep.trials[0].admission == AdmissionSettings(policy="wave", high=100, low=10)


@pytest.mark.parametrize("seconds", [11.0, 20.0, 45.0, 77.0, 180.0, 600.0])
def test_the_time_is_a_hard_limit(seconds: float) -> None:
    machine = Machine(by_seqs)
    sweep = machine.sweep(seconds)
    try:
        sweep.run()
    except JobError:
        assert sweep.best is None
    assert machine.now <= seconds
    assert machine.open == 0


def test_more_time_never_finds_less() -> None:
    speeds = [Machine(by_seqs).sweep(seconds).run().speed for seconds in (20, 60, 120, 300, 600)]
    assert speeds == sorted(speeds)


def test_packings_are_tried_before_anything_else_and_kept_where_they_pay() -> None:
    def speed(setup: Setup, admission: AdmissionSettings) -> float:
        return 100.0 * setup.engines_per_gpu

    machine = Machine(speed)
    best = machine.sweep(1000, engines=(3, 2)).run()
    assert machine.started[1].engines_per_gpu == 3
    assert best.setup.engines_per_gpu == 3


def test_a_gain_within_the_noise_changes_nothing() -> None:
    def speed(setup: Setup, admission: AdmissionSettings) -> float:
        return 100.0 * (1 + 0.9 * MARGIN) if setup.max_num_seqs == 512 else 100.0

    assert Machine(speed).sweep(1000).run().setup.max_num_seqs == 256


def test_tensor_parallel_engines_count_per_gpu_and_only_where_asked() -> None:
    def speed(setup: Setup, admission: AdmissionSettings) -> float:
        return 100.0 * (1.5 if setup.tensor_parallel_size == 2 else 1.0)

    machine = Machine(speed)
    assert machine.sweep(1000, tensor_parallel=(2,)).run().setup.tensor_parallel_size == 1
    assert any(setup.tensor_parallel_size == 2 for setup in machine.started)
    machine = Machine(speed)
    machine.sweep(1000).run()
    assert all(setup.tensor_parallel_size == 1 and not setup.ngram for setup in machine.started)


def test_a_setup_that_does_not_start_is_a_line_of_the_table_and_not_the_end() -> None:
    machine = Machine(by_seqs, refuses=lambda setup: setup.max_num_seqs > 256)
    sweep = machine.sweep(1000)
    assert sweep.run().setup.max_num_seqs == 256
    assert [trial.failure for trial in sweep.trials if trial.setup.max_num_seqs > 256] == ["out of memory"]


def test_the_jobs_own_engines_must_start() -> None:
    with pytest.raises(EngineStartError, match="out of memory"):
        Machine(by_seqs, refuses=lambda setup: True).sweep(1000).run()


def test_no_time_to_measure_anything_says_so() -> None:
    with pytest.raises(JobError, match="raise --seconds"):
        Machine(by_seqs, start_s=100).sweep(50).run()


def test_an_interrupt_leaves_what_was_found() -> None:
    calls = 0

    def speed(setup: Setup, admission: AdmissionSettings) -> float:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Interrupted("stopped by SIGINT")
        return 100.0

    machine = Machine(speed)
    sweep = machine.sweep(1000)
    with pytest.raises(Interrupted):
        sweep.run()
    assert len(sweep.trials) == 2
    assert sweep.best is sweep.trials[0]
    assert machine.open == 0


def test_prompts_never_come_twice_but_keep_what_they_share() -> None:
    prompts = [[1, 2, 3, place, place + 1, 9] for place in range(50)]
    asked = [Asked(ids, place, place, "{}") for place, ids in enumerate(prompts)]
    found = list(islice(fresh_prompts(asked, 0), 500))
    assert found[:50] == asked
    assert [one[1:] for one in found] == [(place, place, "{}") for place in range(50)] * 10
    seen = [tuple(one.token_ids) for one in found]
    assert len(set(seen)) > 0.99 * len(seen)
    assert all(ids[:3] == (1, 2, 3) and len(ids) == 6 for ids in seen)


class Writer:
    """An engine that writes every answer to its limit, a token each two milliseconds; it notes what it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int | None]] = []
        self.sampled: list[tuple[int, int | None, SamplingSettings | None]] = []
        self.output_tokens = 0

    async def generate(
        self,
        request_id: str,
        token_ids: Sequence[int],
        seed: int | None,
        max_tokens: int | None = None,
        sampling: SamplingSettings | None = None,
    ) -> Answer:
        self.asked.append((token_ids[0], max_tokens))
        self.sampled.append((token_ids[0], seed, sampling))
        count = max_tokens or 0
        for _ in range(count):
            await asyncio.sleep(0.002)
            self.output_tokens += 1
        return Answer(
            samples=[Sample(token_ids=array("i", [1] * count), text=None, finish_reason="length")],
            cached_tokens=0,
            ttft_s=None,
        )


async def measured(
    limits: list[int], window_s: float, seed: int | None = None, params: str | None = None
) -> tuple[Writer, Rate]:
    """Eight requests at once, the limit of each told by its first token."""
    engine, sampling = Writer(), SamplingSettings(max_tokens=4096)
    gate = Gate(admission_policy(AdmissionSettings(policy="continuous", high=8), 8, lambda: 0), None)
    prompts = [Asked([place, 7, 7], limit, seed, params) for place, limit in enumerate(limits)]
    feed = Feed(cast(Engine, engine), gate, Lengths(sampling, 8192), itertools.cycle(prompts), sampling)
    rate = await feed.measure(window_s)
    await feed.stop()
    return engine, rate


async def test_a_measurement_has_the_rows_own_limits_and_meets_the_first_on_their_way() -> None:
    limits = [40 + place for place in range(16)]
    engine, _ = await measured(limits, 0.3)
    first, later = engine.asked[:8], engine.asked[8:]
    assert len(later) > 8
    assert all(limit == limits[place] for place, limit in later)
    assert all(0 < limit <= limits[place] for place, limit in first if limit)
    assert len({limit for _, limit in first}) > 4
    assert sum(limit for _, limit in first if limit) < 0.9 * sum(limits[:8])


async def test_a_measurement_has_the_rows_own_parameters() -> None:
    engine, _ = await measured([20] * 16, 0.1, seed=7, params='{"min_tokens": 15, "top_p": 0.5}')
    seeds, samplings = {seed for _, seed, _ in engine.sampled}, {id(own): own for *_, own in engine.sampled}
    [own] = samplings.values()
    assert own is not None
    assert (seeds, own.min_tokens, own.top_p) == ({7}, 15, 0.5)
    assert all(15 <= (limit or 0) <= 20 for _, limit in engine.asked)  # the first are cut, but no shorter
    plain, _ = await measured([5] * 16, 0.1)
    assert {own for *_, own in plain.sampled} == {None}


async def test_a_measurement_goes_on_where_answers_take_longer_than_a_window() -> None:
    _, short = await measured([5] * 16, 0.15)
    _, long = await measured([150] * 16, 0.15)
    assert 0.15 <= short.seconds < 0.3
    assert 0.3 <= long.seconds < 1.0


def test_the_written_file_is_one_to_extend(tmp_path: Path) -> None:
    setup = Setup(engines_per_gpu=2, max_num_seqs=128, max_num_batched_tokens=4096)
    trial = Trial(
        setup=setup,
        admission=AdmissionSettings(policy="wave", high=128, low=64),
        rate=Rate(1234.0, 1200.0, 1250.0, 6.0, 90, 0),
        start_s=31.0,
    )
    tuned = Tuned(
        best=trial,
        trials=(trial, Trial(setup=setup, failure="out of: memory # here")),
        job="j",
        model="acme/m",
        device="NVIDIA H200",
        engine="vllm 0.32.0",
        prompts=512,
        prompt_tokens=200.4,
        command="dray tune job.yaml",
        path=tmp_path / "tuned.yaml",
        left_out=("steps.generate",),
    )
    tuned.path.write_text(tuned.to_yaml())
    assert yaml.safe_load(tuned.path.read_text()) == tuned.settings()
    for fact in (
        "1,234",
        "vllm 0.32.0",
        "NVIDIA H200",
        "512 prompts",
        "without steps.generate",
        "dray tune job.yaml",
        "← best",
        "# here",
    ):
        assert fact in tuned.to_yaml()
    job = load(
        {
            "name": "j",
            "extends": [str(tuned.path)],
            "input": {"path": "in"},
            "prompt": {"template": "{{ q }}"},
            "model": {"source": "acme/m", "engine": {"max_num_seqs": 7}},
            "output": {"path": "out"},
        }
    ).spec
    assert job.model.engine == {"max_num_seqs": 7, "max_num_batched_tokens": 4096}
    assert job.pool.engines_per_gpu == 2
    assert job.pool.admission.low == 64
