"""The adaptive policy on SIMULATED engines in virtual time: it finds what is best there, whatever the shape of the speed."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.step_model import CURVES, SMALL, Curve, Request, StepEngine, run_shards, uniform
from pipelines.adaptive import GAPS, Adaptive, Search, Watermarks
from pipelines.waves import Load, Wave

pytestmark = pytest.mark.slow


def adaptive(engine: StepEngine) -> Adaptive:
    return Adaptive(engine.curve.max_num_seqs, lambda: engine.output_tokens, lambda: engine.now)


def endless(seed: int, rows: int = 2_000) -> Iterator[list[Request]]:
    dice = random.Random(seed)
    while True:
        yield uniform(dice, rows)


def rate_of(curve: Curve, high: int, low: int) -> float:
    engine = StepEngine(curve, lambda _: Wave(high, low))
    seconds = run_shards([engine], endless(0, rows=500), until=lambda now: now > 30)
    return engine.output_tokens / seconds


@pytest.mark.parametrize("name", CURVES)
def test_it_comes_within_five_percent_of_the_best_watermarks(name: str) -> None:
    """With the spread of equal runs on a GPU (4.5 %)."""
    curve = CURVES[name].shrunk(8)
    highs = (curve.max_num_seqs, curve.max_num_seqs // 2)
    best = max(rate_of(curve, high, round(high * (1 - gap))) for high in highs for gap in GAPS)
    for seed in range(3):
        engine = StepEngine(curve, adaptive, noise=0.045, seed=seed)
        policy = engine.gate.policy
        assert isinstance(policy, Adaptive)
        seconds = run_shards([engine], endless(seed), until=lambda _, policy=policy: not policy.searching)
        assert rate_of(curve, policy.watermarks.high, policy.watermarks.low) >= 0.95 * best, policy.watermarks
        assert seconds < 600


def test_it_stays_with_what_it_has_found_while_nothing_changes() -> None:
    engine = StepEngine(SMALL.shrunk(8), adaptive, noise=0.045, seed=5)
    policy = engine.gate.policy
    assert isinstance(policy, Adaptive)
    run_shards([engine], endless(5), until=lambda now: now > 1_000)
    assert policy.searches == 1
    assert not policy.searching


def test_it_searches_again_when_requests_change() -> None:
    def changing() -> Iterator[list[Request]]:
        dice = random.Random(1)
        for _ in range(8):
            yield uniform(dice, 2_000)
        while True:
            yield uniform(dice, 2_000, prompt=64, shortest=300, longest=1000)

    engine = StepEngine(SMALL.shrunk(8), adaptive, noise=0.045, seed=1)
    policy = engine.gate.policy
    assert isinstance(policy, Adaptive)
    run_shards([engine], changing(), until=lambda now: now > 3_000 or policy.searches > 1)
    assert policy.searches == 2


def test_a_kv_cache_that_holds_few_bounds_what_is_in_flight() -> None:
    """Where the gate does not look at the KV cache, the engine preempts and computes again; otherwise it need not."""
    curve = Curve(graph_s=0.009, launch_s=2e-6, request_s=1e-5, prefill_s=2e-5, kv_tokens=30_000)

    def run(kv_bound: bool) -> StepEngine:
        engine = StepEngine(curve, lambda _: Wave(512, 448), kv_bound=kv_bound)
        dice = random.Random(2)
        rows = [uniform(dice, 200, prompt=100, shortest=200, longest=1000) for _ in range(4)]
        run_shards([engine], rows)
        return engine

    bound, free = run(True), run(False)
    assert bound.most_kv_tokens <= curve.kv_tokens
    assert bound.output_tokens >= free.output_tokens
    assert bound.preemptions == 0
    assert free.preemptions > 500


@settings(deadline=None)
@given(
    arms=st.lists(st.integers(1, 100), min_size=1, max_size=8, unique=True),
    noise=st.floats(0, 0.02),
    seed=st.integers(0, 2**16),
)
def test_a_search_ends_with_the_best_or_one_that_is_as_good(arms: list[int], noise: float, seed: int) -> None:
    dice = random.Random(seed)
    marks = [Watermarks(high, high) for high in arms]
    search, measured = Search(marks, marks[0]), 0
    while search.arm is not None:
        search.record(search.arm.high * dice.uniform(1 - noise, 1 + noise))
        measured += 1
    assert search.best[0] in marks
    assert search.best[0].high >= 0.9 * max(arms)
    assert measured <= 3 * len(arms)


@settings(deadline=None)
@given(
    high=st.integers(1, 40),
    steps=st.lists(st.floats(0.01, 3), min_size=50, max_size=300),
    rate=st.floats(0, 1e6),
)
def test_it_stays_within_its_bounds(high: int, steps: list[float], rate: float) -> None:
    """However time passes and whatever the engine gives."""
    now, in_flight = 0.0, 0
    policy = Adaptive(high, lambda: int(rate * now), lambda: now)
    for step in steps:
        now += step
        while policy.admits(Load(in_flight=in_flight, waiting=10_000, kv_tokens=in_flight * 10), fits=True):
            in_flight += 1
        marks = policy.watermarks
        assert 1 <= marks.high <= high
        assert 0 <= marks.low <= marks.high
        assert in_flight <= high
        in_flight = max(0, in_flight - 1 - in_flight // 3)
