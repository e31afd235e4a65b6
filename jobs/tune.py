"""`dray tune`: which engine numbers and watermarks are fastest for this job's prompts on this machine, in bounded time.

    the job's numbers ─► start engines ─► admissions, one after the other ─► one number changed, engines anew ─► … ─► Tuned

A start costs 15 to 75 s on a GPU and an admission only its window, so admissions are tried on the engines that run already,
and everything else one coordinate at a time, the one that promises most first. What is found better by less than
`MARGIN` is noise and does not replace what is simpler.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from jobs.tune_bench import Rate
from pipelines.engine import EngineInfo
from pipelines.errors import EngineStartError, JobError
from pipelines.settings import AdmissionSettings

#: Gain below which two measurements count as equal: runs of one setting differed by 3 % on an H200 (design §5).
MARGIN = 0.03
#: vLLM's n-gram speculation, where asked for: drafts of four tokens that the prompt or the answer held before.
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
#: Share of the time that admissions on the first engines may take.
ADMISSION_SHARE = 0.35
#: Of the longest start, what the next one takes at least: it finds the model compiled (28 s after 39, a 7B on an H200,
#: docs/performance.md).
NEXT_START = 0.6


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What engines are started with."""

    engines_per_gpu: int
    max_num_seqs: int
    max_num_batched_tokens: int
    tensor_parallel_size: int = 1
    ngram: bool = False

    @property
    def engine(self) -> dict[str, Any]:
        """As vLLM's arguments."""
        args: dict[str, Any] = {
            "max_num_seqs": self.max_num_seqs,
            "max_num_batched_tokens": self.max_num_batched_tokens,
        }
        if self.tensor_parallel_size > 1:
            args["tensor_parallel_size"] = self.tensor_parallel_size
        return {**args, "speculative_config": NGRAM} if self.ngram else args


@dataclass(frozen=True)
class Watermarks:
    """An admission policy relative to the engine's requests at once."""

    policy: str = "wave"
    high: float = 1.0
    low: float = 0.75

    def of(self, max_num_seqs: int) -> AdmissionSettings:
        high = max(1, round(self.high * max_num_seqs))
        if self.policy != "wave":
            return AdmissionSettings.model_validate({"policy": self.policy, "high": high})
        return AdmissionSettings(
            policy="wave", high=high, low=max(1, min(high, round(self.low * max_num_seqs)))
        )


#: What is tried besides the job's own, the most promising first.
WATERMARKS = (
    Watermarks(),
    Watermarks("continuous"),
    Watermarks(low=0.875),
    Watermarks(low=0.5),
    Watermarks(high=0.5, low=0.375),
)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One line of the table."""

    setup: Setup
    admission: AdmissionSettings | None = None
    rate: Rate | None = None
    start_s: float | None = None
    """Of the engines that were started for this line; None for those that ran already."""
    failure: str = ""
    """Why there is no rate."""

    @property
    def speed(self) -> float:
        """Output tokens per second and GPU (and machine, on a CPU); 0 where nothing was measured."""
        return self.rate.tokens_per_s / self.setup.tensor_parallel_size if self.rate else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self.setup),
            "admission": self.admission and self.admission.model_dump(),
            "rate": self.rate and asdict(self.rate),
            "tokens_per_s_per_gpu": self.speed or None,
            "start_s": self.start_s,
            "failure": self.failure or None,
        }


class StartedBench(Protocol):
    """What the sweep needs of `tune_bench.Bench`."""

    start_s: float

    def __enter__(self) -> StartedBench: ...
    def __exit__(self, *_: object) -> None: ...
    def wait_ready(self, deadline: float) -> EngineInfo | None: ...
    def measure(self, admission: AdmissionSettings, window_s: float, deadline: float) -> Rate | None: ...


@dataclass(kw_only=True)
class Sweep:
    """Coordinate descent under a deadline. `run` fills `trials`, so that an interrupted sweep has what it found."""

    open_bench: Callable[[Setup], StartedBench]
    first: Setup
    own: AdmissionSettings
    """The job's admission."""
    seconds: float
    """Hard limit of everything, engine starts included, from `began` on."""
    engines: tuple[int, ...] = ()
    """`engines_per_gpu` to try besides the first; empty on a CPU."""
    tensor_parallel: tuple[int, ...] = ()
    ngram: bool = False
    most_seqs: int = 1024
    observer: Callable[[Trial], None] = lambda trial: None
    clock: Callable[[], float] = time.monotonic
    window_s: float = 0.0
    """Seconds of one measurement; 0: a thirtieth of `seconds`, within 1.5 and 15."""
    began: float | None = None
    """By `clock`; default: when `run` is called."""
    trials: list[Trial] = field(default_factory=list)

    @property
    def best(self) -> Trial | None:
        """The fastest so far, an earlier one where the difference is noise."""
        best: Trial | None = None
        for trial in self.trials:
            if trial.rate and (best is None or trial.speed > (1 + MARGIN) * best.speed):
                best = trial
        return best

    def __post_init__(self) -> None:
        self.window_s = self.window_s or min(15.0, max(1.5, self.seconds / 30))

    def run(self) -> Trial:
        """Sweep until nothing is left to try or no time. Raises EngineStartError when the job's own engines fail to start,
        JobError when there was no time to measure anything.
        """
        self._deadline = (self.clock() if self.began is None else self.began) + self.seconds
        self._longest_start = 0.0
        self._longest_measure = 2 * self.window_s
        self._try(self.first, self._admissions())
        if self.best is not None:
            for neighbours in (self._engines, self._seqs, self._batched, self._parallel, self._speculation):
                for setup in neighbours():
                    if not self._time_for_a_start():
                        return self.best
                    self._try(setup, iter((self._watermarks_of_best(),)))
        if self.best is None:
            raise JobError(
                f"nothing was measured within {self.seconds:g} s, engine starts included: raise --seconds"
            )
        return self.best

    # ── trials ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _try(self, setup: Setup, watermarks: Iterator[Watermarks]) -> None:
        """Start engines and measure them with each of the watermarks, as long as there is time."""
        began, first = self.clock(), not self.trials
        try:
            with self.open_bench(setup) as bench:
                info = bench.wait_ready(self._deadline)
                if info is None:
                    return self._note(Trial(setup=setup, failure="no time left to start"))
                self._longest_start = max(self._longest_start, self.clock() - began)
                start_s: float | None = bench.start_s
                until = self.clock() + ADMISSION_SHARE * (self._deadline - self.clock())
                for count, marks in enumerate(watermarks):
                    if count and self.clock() + self._longest_measure > until:
                        break
                    admission = marks.of(info.max_num_seqs)
                    asked_at = self.clock()
                    rate = bench.measure(admission, self.window_s, self._deadline)
                    self._longest_measure = max(self._longest_measure, self.clock() - asked_at)
                    failure = "" if rate else "no time left to measure"
                    self._note(
                        Trial(setup=setup, admission=admission, rate=rate, start_s=start_s, failure=failure)
                    )
                    start_s = None
                    if rate is None:
                        break
        except (EngineStartError, JobError) as error:
            if first:
                raise
            self._note(Trial(setup=setup, failure=" ".join(str(error).split())[:200]))

    def _note(self, trial: Trial) -> None:
        self.trials.append(trial)
        self.observer(trial)

    def _time_for_a_start(self) -> bool:
        left = self._deadline - self.clock()
        return left > NEXT_START * self._longest_start + self._longest_measure

    # ── what to try ─────────────────────────────────────────────────────────────────────────────────────────────

    def _admissions(self) -> Iterator[Watermarks]:
        seqs = self.first.max_num_seqs
        own = Watermarks(
            self.own.policy,
            (self.own.high or seqs) / seqs,
            (self.own.low or 0.75 * (self.own.high or seqs)) / seqs,
        )
        yield own
        yield from (marks for marks in WATERMARKS if marks.of(seqs) != own.of(seqs))

    def _watermarks_of_best(self) -> Watermarks:
        best = self.best
        assert best is not None
        assert best.admission is not None
        seqs, admission = best.setup.max_num_seqs, best.admission
        high = (admission.high or seqs) / seqs
        return Watermarks(admission.policy, high, (admission.low or 0.75 * high * seqs) / seqs)

    def _engines(self) -> Iterator[Setup]:
        yield from (replace(self.first, engines_per_gpu=count) for count in self.engines)

    def _seqs(self) -> Iterator[Setup]:
        yield from self._both_ways("max_num_seqs", 1, self.most_seqs)

    def _batched(self) -> Iterator[Setup]:
        yield from self._both_ways("max_num_batched_tokens", 1024, 65_536)

    def _both_ways(self, name: str, least: int, most: int) -> Iterator[Setup]:
        """Double as long as that pays; halve as long as that pays, where doubling never did."""
        for factor in (2.0, 0.5):
            gained = False
            while True:
                best = self._best_setup()
                value = math.floor(getattr(best, name) * factor)
                if not least <= value <= most:
                    break
                setup = replace(best, **{name: value})
                if setup.max_num_batched_tokens < setup.max_num_seqs:
                    break
                yield setup
                if self._best_setup() != setup:
                    break
                gained = True
            if gained:
                return

    def _parallel(self) -> Iterator[Setup]:
        for ways in self.tensor_parallel:
            if ways != self._best_setup().tensor_parallel_size:
                yield replace(self._best_setup(), tensor_parallel_size=ways, engines_per_gpu=1)

    def _speculation(self) -> Iterator[Setup]:
        if self.ngram:
            yield replace(self._best_setup(), ngram=True)

    def _best_setup(self) -> Setup:
        best = self.best
        assert best is not None
        return best.setup
