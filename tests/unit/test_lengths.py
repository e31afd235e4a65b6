"""Answers are predicted from those of prompts alike, and the longest go first when little is left."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.step_model import LARGE, Request, StepEngine, run_shards
from benchmarks.workloads import WORKLOADS
from pipelines.lengths import HELD, Lengths, Rows
from pipelines.settings import SamplingSettings
from pipelines.waves import Wave


def lengths(max_model_len: int = 4096, **sampling: object) -> Lengths:
    return Lengths(SamplingSettings.model_validate(sampling), max_model_len)


def test_half_of_the_allowed_length_is_the_first_guess() -> None:
    assert lengths(max_tokens=512).predict(100) == 256
    assert lengths(max_tokens=None, max_model_len=1000).predict(100) == 500
    assert lengths(max_tokens=None, max_model_len=1000).predict(900) == 100
    assert lengths(max_tokens=100, n=3, temperature=1).predict(10) == 150


def test_a_class_of_prompts_is_learned_and_relearned() -> None:
    known = lengths(max_tokens=4000)
    dice = random.Random(0)
    for _ in range(2_000):
        known.learn(100, dice.randint(40, 60))
        known.learn(1000, dice.randint(900, 1100))
    assert 45 < known.predict(70) < 70
    assert 900 < known.predict(1000) < 1100
    assert 400 < known.predict(5) < 800  # a class of its own that has none: like all
    for _ in range(10_000):
        known.learn(100, 500)
    assert 450 < known.predict(100) <= 550


@settings(deadline=None)
@given(
    prompts=st.lists(st.integers(1, 5000), min_size=1, max_size=60),
    learned=st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 2000)), max_size=200),
)
def test_every_row_goes_once_and_predictions_keep_their_bounds(
    prompts: list[int], learned: list[tuple[int, int]]
) -> None:
    known = lengths(max_tokens=1000, max_model_len=4096)
    line = Rows(range(len(prompts)), prompts.__getitem__, known)
    dice, order = random.Random(len(prompts)), []
    while len(line):
        row = line.first(longest=dice.random() < 0.5)
        line.take(row)
        order.append(row)
        if learned:
            known.learn(*learned.pop())
        assert 1 <= known.predict(prompts[row]) <= 1000
    assert sorted(order) == list(range(len(prompts)))
    for kind in {prompt.bit_length() for prompt in prompts}:  # within a class the input's order
        of_kind = [row for row in order if prompts[row].bit_length() == kind]
        assert of_kind == sorted(of_kind)


def test_the_longest_go_first_once_they_are_known() -> None:
    prompts = [10, 1000, 10, 1000, 10, 1000]
    known = lengths(max_tokens=1000)
    assert order(prompts, known) == [0, 1, 2, 3, 4, 5]
    for _ in range(200):
        known.learn(10, 300)
        known.learn(1000, 20)
    assert order(prompts, known) == [0, 2, 4, 1, 3, 5]
    assert order(prompts, known, longest=False) == [0, 1, 2, 3, 4, 5]


def order(prompts: list[int], known: Lengths, *, longest: bool = True) -> list[int]:
    line = Rows(range(len(prompts)), prompts.__getitem__, known)
    rows = []
    while len(line):
        rows.append(line.first(longest))
        line.take(rows[-1])
    return rows


def test_a_rows_own_limit_makes_its_class() -> None:
    known = lengths(max_tokens=1000)
    for _ in range(500):
        known.learn(100, 10, 16)
        known.learn(100, 250, 256)
    assert known.predict(100, 16) <= 16
    assert 200 < known.predict(100, 256) <= 256
    limits = [16, 256, 16, 256]
    line = Rows(range(4), lambda row: 100, known, limits.__getitem__)
    order = []
    while len(line):
        order.append(line.first(longest=True))
        line.take(order[-1])
    assert order == [1, 3, 0, 2]


def test_a_limit_that_no_answer_has_shown_yet_is_taken_for_a_longer_answer() -> None:
    known = lengths(max_tokens=1000)
    for _ in range(300):
        known.learn(100, 20, 40)
    assert 300 < known.predict(100, 800) < 500
    assert 15 < known.predict(100, 40) < 25


@pytest.mark.slow
def test_known_limits_shorten_the_end_of_a_run() -> None:
    """SIMULATED: one 7B engine, long-tailed answers as long as their rows allow, in shards that alone do not fill it."""
    table = WORKLOADS["W2"].table(1_500)
    rows = [
        Request(len(prompt), most, len(prompt) + round(HELD * most), most)
        for prompt, most in zip(table["prompt"].to_pylist(), table["max_tokens"].to_pylist(), strict=True)
    ]
    blind = [replace(row, max_tokens=None) for row in rows]

    def seconds(rows: list[Request]) -> float:
        engine = StepEngine(replace(LARGE, kv_tokens=1_700_000), lambda _: Wave(512, 384))
        shards = [rows[at : at + 256] for at in range(0, len(rows), 256)]
        return run_shards([engine], shards, shards_in_flight=6, learn=True)

    assert seconds(rows) < 0.95 * seconds(blind)


def test_rows_leave_the_line_whatever_their_prompts_are_taken_for_by_then() -> None:
    known = lengths(max_tokens=100)
    images = [1, 0, 2, 1, 0]
    line = Rows(range(5), lambda row: 10 + images[row] * known.image_tokens, known)
    left = []
    while line:
        left.append(line.first(longest=False))
        line.take(left[-1])
        known.learn_images(1, 20)
    assert left == [0, 1, 2, 3, 4]
