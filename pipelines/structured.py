"""Answers that must be what the sampling asks of them: checked as they come, and tried again where they are not."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from pipelines.answer_parsers import AnswerParser, open_parser
from pipelines.contracts import Work
from pipelines.engine import Answer, Sample
from pipelines.errors import RowError
from pipelines.output_schema import Checker
from pipelines.settings import SamplingSettings

#: Tries after the first, where `sampling.repairs` says nothing.
REPAIRS = 1

#: Asks the engine: (number of the try, from 0; whether the try before was cut off at `max_tokens`).
Ask = Callable[[int, bool], Awaitable[Answer]]


@dataclass
class Spent:
    """What tries after the first have cost."""

    repairs: int = 0
    tokens: int = 0
    """Output tokens of answers that gave way to others, or came to nothing."""


class Structured:
    """The check of one generation's answers, of what follows their reasoning. Without constraints every answer passes."""

    def __init__(self, sampling: SamplingSettings, parser: AnswerParser | None = None) -> None:
        """`parser`: `checking_parser` of the generation."""
        self._checker = Checker(sampling)
        self._parser = parser
        self._most = REPAIRS if sampling.repairs is None else sampling.repairs
        self.spent = Spent()

    async def answer(self, ask: Ask) -> Answer:
        """The answer with as many good samples as the tries give. Raises RowError where there is none.

        Of several samples a bad one stays, for want of a better one; its `parsed` is null.
        """
        answer = await ask(0, False)
        if not self._checker.asks:
            return answer
        samples = list(answer.samples)
        problems = [self._problem(sample) for sample in samples]
        for number in range(1, self._most + 1):
            bad = [place for place, problem in enumerate(problems) if problem is not None]
            if not bad:
                break
            self.spent.repairs += 1
            again = await ask(number, any(samples[place].finish_reason == "length" for place in bad))
            for sample in again.samples:
                given_up = sample
                if bad and self._problem(sample) is None:
                    place = bad.pop(0)
                    given_up, samples[place], problems[place] = samples[place], sample, None
                self.spent.tokens += len(given_up.token_ids)
        reasons = [problem for problem in problems if problem is not None]
        if len(reasons) == len(samples):
            self.spent.tokens += sum(len(sample.token_ids) for sample in samples)
            raise RowError("invalid_output", reasons[0])
        return replace(answer, samples=samples)

    def _problem(self, sample: Sample) -> str | None:
        text = sample.text or ""
        if self._parser is not None:
            text = self._parser.answer(text, sample.token_ids.tolist())
            if not text and sample.finish_reason == "length":
                return "the answer was cut off at max_tokens within its reasoning"
        return self._checker.problem(text, sample.finish_reason)


def checking_parser(work: Work) -> AnswerParser | None:
    """What tells the part of an answer that a generation's constraints hold for; None where they hold for all of it.

    Raises ModelError, as `open_parser`; blocks.
    """
    sampling = work.sampling
    if not sampling.is_structured or sampling.reasoning_parser is None:
        return None
    return open_parser(work.model, sampling, work.prompt)
