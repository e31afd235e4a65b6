"""The intervals hold: over many samples of a known population, the truth lies within as often as they say."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.intervals import Interval, mean_of_windows, share_of, total_of

pytestmark = pytest.mark.slow


RANDOM = np.random.default_rng(5)
SKEWED = {
    "lognormal": np.ceil(RANDOM.lognormal(5.0, 1.0, 20_000)),
    "half filtered": np.ceil(RANDOM.lognormal(5.0, 1.0, 20_000)) * (RANDOM.random(20_000) < 0.5),
    "exponential": np.ceil(RANDOM.exponential(100.0, 20_000)),
    "cut at max_tokens": np.minimum(np.ceil(RANDOM.lognormal(5.0, 1.2, 20_000)), 512.0),
}


def covered(population: npt.NDArray[np.float64], n: int, seeds: int = 200) -> float:
    truth, hits = population.sum(), 0
    for seed in range(seeds):
        random = np.random.default_rng(seed)
        found = total_of(random.choice(population, n, replace=False), len(population), seed)
        hits += found.low <= truth <= found.high
    return hits / seeds


@pytest.mark.parametrize("kind", SKEWED)
def test_the_total_lies_within_in_nine_of_ten_samples_at_least(kind: str) -> None:
    share = covered(SKEWED[kind], 200)
    assert share >= 0.90
    assert share < 1.0  # as wide as needed, not wider


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_the_total_lies_within_where_the_sample_is_small(n: int) -> None:
    assert covered(SKEWED["exponential"], n) >= 0.85
    two = total_of(np.array([1.0, 3.0]), 1000)
    assert two.low == 4.0  # what was seen
    assert two.high == pytest.approx(2000 + 12.71 * 1000, rel=0.01)


def test_a_sample_of_a_third_is_not_given_the_width_of_an_endless_population() -> None:
    population = SKEWED["lognormal"][:600]
    assert covered(population, 200) >= 0.90
    sample = population[:200]
    narrow, wide = total_of(sample, 600), total_of(sample, 600_000)
    ratio = (narrow.high / narrow.value - 1) / (wide.high / wide.value - 1)
    assert ratio == pytest.approx(np.sqrt(2 / 3), rel=0.01)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.97])
def test_a_share_lies_within_in_nine_of_ten_samples_at_least(share: float) -> None:
    population, hits = np.arange(5000) < share * 5000, 0
    for seed in range(200):
        drawn = np.random.default_rng(seed).choice(population, 200, replace=False)
        found = share_of(int(drawn.sum()), 200, 5000)
        hits += found.low <= share <= found.high
    assert hits >= 180


@given(values=st.lists(st.floats(0, 1e6), min_size=2, max_size=40), more=st.integers(0, 1000))
def test_an_interval_holds_its_estimate_and_all_that_was_seen(values: list[float], more: int) -> None:
    sample = np.array(values)
    found = total_of(sample, len(sample) + more)
    assert found.low <= found.value * (1 + 1e-9)
    assert found.value <= found.high * (1 + 1e-9)
    assert found.low >= sample.sum() * (1 - 1e-9)
    if not more:
        assert found == Interval(sample.sum(), sample.sum(), sample.sum())


def test_one_of_many_is_no_sample() -> None:
    with pytest.raises(ValueError, match="two"):
        total_of(np.array([3.0]), 10)
    assert total_of(np.array([3.0]), 1).high == 3.0


def test_a_speed_stays_positive() -> None:
    found = mean_of_windows(np.array([1.0, 100.0]))
    assert 0 < found.low < found.value < found.high
