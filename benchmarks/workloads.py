"""Rows to answer: how long prompts and answers are, the same for every side. One seed, one table.

Random weights never stop by themselves, so each row says how many tokens it gets (`max_tokens`, with `ignore_eos`): a
column that Dray reads as `sampling.max_tokens_column` and the baselines put into each request's SamplingParams.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa

Draw = Callable[[random.Random], int]


def fixed(length: int) -> Draw:
    return lambda dice: length


def uniform(low: int, high: int) -> Draw:
    """Both ends included."""
    return lambda dice: dice.randint(low, high)


def log_normal(low: int, high: int) -> Draw:
    """Clipped to both ends; the median is their geometric mean, and they lie two standard deviations away."""
    middle, width = math.log(low * high) / 2, math.log(high / low) / 4
    return lambda dice: min(high, max(low, round(dice.lognormvariate(middle, width))))


def mostly(usual: Draw, rare: Draw, share: float) -> Draw:
    """`rare` for this share of the rows."""
    return lambda dice: (rare if dice.random() < share else usual)(dice)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Lengths in tokens, with the tokenizer of `shapes`: one token a character."""

    what: str
    prompt: Draw
    """The row's own part of the prompt."""
    answer: Draw
    max_model_len: int
    prefix: int = 0
    """Tokens of a prefix that several rows share."""
    prefixes: int = 0
    """How many of these there are."""
    rows: dict[str, int]
    """By shape: for 10 to 20 s on one H200."""

    def table(self, rows: int, seed: int = 0) -> pa.Table:
        """`id`, `prompt`, `max_tokens`."""
        dice = random.Random(seed)
        shared = [self._text(dice, self.prefix) for _ in range(self.prefixes)]
        prompts, limits = [], []
        for _ in range(rows):
            prefix = dice.choice(shared) if shared else ""
            prompts.append(prefix + self._text(dice, self.prompt(dice)))
            limits.append(self.answer(dice))
        columns = {"id": list(range(rows)), "prompt": prompts, "max_tokens": pa.array(limits, pa.int32())}
        return pa.table(columns)

    @staticmethod
    def _text(dice: random.Random, length: int) -> str:
        return "".join(dice.choices("0123456789", k=length))


WORKLOADS: dict[str, Workload] = {
    "W1": Workload(
        what="256 prompt tokens, 64 to 256 new ones, uniform",
        prompt=fixed(256),
        answer=uniform(64, 256),
        max_model_len=1024,
        rows={"nano": 200, "0.5b": 4000, "7b": 1500},
    ),
    "W2": Workload(
        what="64 to 4,096 prompt tokens, 16 to 1,024 new ones, log-normal",
        prompt=log_normal(64, 4096),
        answer=log_normal(16, 1024),
        max_model_len=6144,
        rows={"nano": 60, "0.5b": 3000, "7b": 1200},
    ),
    "W3": Workload(
        what="8 prefixes of 2,048 tokens, 128 of the row's own, 64 to 256 new ones",
        prompt=fixed(128),
        answer=uniform(64, 256),
        prefix=2048,
        prefixes=8,
        max_model_len=3072,
        rows={"nano": 60, "0.5b": 3000, "7b": 1200},
    ),
    "W5": Workload(
        what="256 prompt tokens, 32 to 256 new ones, and 1,024 to 2,048 for one row in fifty",
        prompt=fixed(256),
        answer=mostly(uniform(32, 256), uniform(1024, 2048), 0.02),
        max_model_len=4096,
        rows={"nano": 120, "0.5b": 3000, "7b": 1500},
    ),
}
