"""Questions with known answers: the one source of what the tiny model is trained and examined on.

    python examples/questions.py OUT.parquet --rows 1000 [--files 4]

writes held-out questions only, as Parquet with the string columns id, question, answer and kind. With
`--files 4` the rows are spread over `OUT-00000-of-00004.parquet` and its siblings. The output depends on
nothing but the arguments: no random numbers are drawn, questions are ordered by their hash.

Four kinds: `words` (4721 -> "four thousand seven hundred twenty-one"), `digits` (the way back), `weekdays` and
`sums`. A *fact* is what a question asks about, without its phrasing. Every tenth fact, by hash, is held out:
training sees it in none of its phrasings. Two exceptions, for want of facts to learn the rule from: each
phrasing of a weekday question counts as its own fact, and numbers below 110 and sums with a one-digit addend are
never held out.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

Split = Literal["train", "held-out"]

KINDS = ("words", "digits", "weekdays", "sums")
HELD_OUT_EVERY = 10
NUMBERS = range(10_000)
ADDENDS = range(100)
DAY_STEPS = range(1, 7)

WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
# fmt: off
_SMALL = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
# fmt: on

_PHRASINGS = {
    "words": (
        "What is {0} in words?",
        "Write {0} in words.",
        "Spell out the number {0}.",
        "How do you say {0}?",
        "Turn {0} into words, please.",
    ),
    "digits": (
        "What is {0} in digits?",
        "Write {0} as a number.",
        'Which number is "{0}"?',
        "How do you write {0} in digits?",
        "Turn {0} into digits, please.",
    ),
    "weekdays": (
        "What day comes {0} {2} {1}?",
        "Which day is {0} {2} {1}?",
        "Name the weekday {0} {2} {1}.",
        "Tell me the day {0} {2} {1}.",
        "It is {0} {2} {1}. Which day is it?",
        "We meet {0} {2} {1}. What day is that?",
    ),
    "sums": (
        "What is {0} + {1}?",
        "Add {0} and {1}.",
        "How much is {0} plus {1}?",
        "Compute {0} + {1}.",
        "What do you get if you add {1} to {0}?",
    ),
}


class Question(NamedTuple):
    """One question, the exact text of its right answer, and which of `KINDS` it is."""

    question: str
    answer: str
    kind: str


def number_in_words(number: int) -> str:
    """`number` (0 to 9,999) in American English: no "and", a hyphen between tens and ones."""
    if number < 20:
        return _SMALL[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return _TENS[tens] + (f"-{_SMALL[ones]}" if ones else "")
    size, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    count, rest = divmod(number, size)
    return f"{number_in_words(count)} {name}" + (f" {number_in_words(rest)}" if rest else "")


@functools.cache
def questions(split: Split) -> tuple[Question, ...]:
    """All questions of a split, ordered by hash: the same list on every machine and Python version."""
    chosen = [question for fact, question in _all() if _is_held_out(fact) == (split == "held-out")]
    return tuple(sorted(chosen, key=lambda question: _digest(question.question)))


def held_out(rows: int) -> list[Question]:
    """`rows` held-out questions, the kinds taking turns; a kind that runs out starts over."""
    pool = questions("held-out")
    turns = [itertools.cycle([q for q in pool if q.kind == kind]) for kind in KINDS]
    return [next(turns[row % len(turns)]) for row in range(rows)]


def write(out: Path, rows: int, files: int = 1) -> list[Path]:
    """Write `rows` held-out questions to `out`, or to `files` numbered siblings of it; returns the paths."""
    table = pa.table(
        {
            "id": [f"q-{row:06d}" for row in range(rows)],
            **dict(zip(Question._fields, zip(*held_out(rows), strict=True), strict=True)),
        }
    ).select(["id", "question", "answer", "kind"])
    out.parent.mkdir(parents=True, exist_ok=True)
    if files == 1:
        paths = [out]
    else:
        paths = [out.with_name(f"{out.stem}-{n:05d}-of-{files:05d}{out.suffix}") for n in range(files)]
    for n, path in enumerate(paths):
        start, end = rows * n // files, rows * (n + 1) // files
        pq.write_table(table.slice(start, end - start), path)
    return paths


def _all() -> Iterator[tuple[str | None, Question]]:
    """Every question, each with the fact that decides its split (None: never held out)."""
    for number in NUMBERS:
        digits, words = str(number), number_in_words(number)
        fact = digits if number >= 110 else None
        for phrasing in _PHRASINGS["words"]:
            yield fact, Question(phrasing.format(digits), words, "words")
        for phrasing in _PHRASINGS["digits"]:
            yield fact, Question(phrasing.format(words), digits, "digits")
    for (place, day), step, sign in itertools.product(enumerate(WEEKDAYS), DAY_STEPS, (1, -1)):
        span = f"{step} day" if step == 1 else f"{step} days"
        answer = WEEKDAYS[(place + sign * step) % 7]
        for phrasing in _PHRASINGS["weekdays"]:
            text = phrasing.format(span, day, "after" if sign > 0 else "before")
            yield text, Question(text, answer, "weekdays")
    for left, right in itertools.product(ADDENDS, ADDENDS):
        fact = f"{left}+{right}" if min(left, right) >= 10 else None
        for phrasing in _PHRASINGS["sums"]:
            yield fact, Question(phrasing.format(left, right), str(left + right), "sums")


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _is_held_out(fact: str | None) -> bool:
    return fact is not None and _digest(fact) % HELD_OUT_EVERY == 0


def main() -> None:
    parser = argparse.ArgumentParser(description="Write held-out questions with known answers as Parquet.")
    parser.add_argument("out", type=Path, help="the Parquet file, or the stem of its numbered siblings")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--files", type=int, default=1, help="how many files to spread the rows over")
    args = parser.parse_args()
    if not 1 <= args.files <= args.rows:
        parser.error("--files must be at least 1 and at most --rows")
    for path in write(args.out, args.rows, args.files):
        print(path)


if __name__ == "__main__":
    main()
