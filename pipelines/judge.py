"""What a judge's votes come to, and in which order it sees what it compares.

    record ─► one request, of `compare` one for each order ─► `votes` samples each ─► the verdict, a column

All else is the generations' (`pipelines.generations`): engines, prompts, suspects, attempts, retries.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pyarrow as pa

from pipelines.ask_settings import FIRST, SECOND, AskStep, JudgeStep

Vote = int | str
TIE = "tie"


def views(step: AskStep, records: pa.Table) -> list[pa.Table]:
    """The records as the step's requests see them: once, or of a comparison with the two answers in each order."""
    if not isinstance(step, JudgeStep) or step.compare is None:
        return [records]
    orders = [step.compare, step.compare[::-1]] if step.swap else [step.compare]
    return [
        records.append_column(FIRST, records[first]).append_column(SECOND, records[second])
        for first, second in orders
    ]


def ruling(judge: JudgeStep, texts: Sequence[Sequence[str]]) -> tuple[Vote | float, list[Vote]]:
    """(the verdict on a record, all votes). `texts`: the answers to each of its requests; at least one of each is a vote.

    Other texts, which decoding had no tokens left for, are no votes.
    """
    votes = [
        [_vote(judge, text, swapped) for text in answers if text in judge.labels]
        for swapped, answers in enumerate(texts)
    ]
    every = [vote for of_order in votes for vote in of_order]
    if judge.compare is not None:
        leading = {vote for of_order in votes for vote in _commonest(of_order)}
        return (leading.pop() if len(leading) == 1 else TIE), every
    if judge.verdict == "mean":
        return sum(map(int, every)) / len(every), every
    return min(_commonest(every), key=lambda vote: judge.labels.index(str(vote))), every


def _vote(judge: JudgeStep, text: str, swapped: int) -> Vote:
    if judge.compare is not None:
        return "ab"[(text == judge.labels[1]) != bool(swapped)]
    return int(text) if judge.is_score else text


def _commonest(votes: Sequence[Vote]) -> list[Vote]:
    """The votes that no other is commoner than."""
    counts = Counter(votes)
    return [vote for vote, count in counts.items() if count == max(counts.values())]
