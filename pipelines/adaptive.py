"""Watermarks found by trying: the adaptive admission policy.

Output tokens/s of several pairs of watermarks are measured in turn on the job's own requests, and whatever is clearly worse
is dropped after each round, until one is left or the rest cannot be told apart. First how many in flight, continuously and
in waves, then how much of that leaves between two waves. Not by steps to the better neighbour: with 1,024 in flight and
CUDA graphs up to 512 (28.1 k tokens/s continuously and 23.9 k in waves, against 51.2 k in waves of 512; design §5) no step
but that to waves of half the size is better than none.

Afterwards it keeps measuring, and searches again when the speed or the size of requests has changed.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import sqrt
from statistics import fmean

from pipelines.waves import Load, Wave

#: Spread of one measurement: equal runs gave 21.8–25.2 k tokens/s continuously and 49.7–51.2 k in waves (one H200).
NOISE = 0.05
#: Measurements of each pair of watermarks that is not clearly worse.
ROUNDS = 3
#: Lead that another pair needs over the present one to take its place: what so many measurements can tell.
LEAD = NOISE / sqrt(ROUNDS)
#: First stage: shares of the most requests in flight, each continuously and with a small gap.
HIGHS, SMALL_GAP = (1.0, 3 / 4, 1 / 2), 1 / 8
#: Second stage: shares of `high` that leave before the next wave.
GAPS = (0.0, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
#: A measurement is whole waves over at least so many seconds, and over one turnover of `high` requests where that takes
#: no more than so many; before it the new watermarks get a turnover, or so many seconds, to take effect.
MEASURE_S, TURNOVER_S, SETTLE_S = 2.0, 15.0, 5.0
#: Once found, the mean of so many measurements may differ by so much in speed, and requests by so much in size.
WATCHED, SPEED_DRIFT, SIZE_DRIFT = 6, 0.15, 0.3


@dataclass(frozen=True)
class Watermarks:
    """Requests in flight at which a wave ends and at which the next begins; `low` = `high`: continuous."""

    high: int
    low: int

    @property
    def gap(self) -> float:
        return 1 - self.low / self.high


class Search:
    """Which of `arms` gives the most: measured in turns, up and down so that a trend of the job's favours none."""

    def __init__(self, arms: Sequence[Watermarks], present: Watermarks) -> None:
        """`present`: one of the arms; it is kept unless another is better by `LEAD`."""
        self._present = present
        self._rates: dict[Watermarks, list[float]] = {arm: [] for arm in arms}
        self._turns = deque(arms)
        self._rounds = 0

    @property
    def arm(self) -> Watermarks | None:
        """What to measure next; None at the end."""
        return self._turns[0] if self._turns else None

    def record(self, rate: float) -> None:
        """The tokens/s of `arm`."""
        self._rates[self._turns.popleft()].append(rate)
        if self._turns:
            return
        self._rounds += 1
        best = max(fmean(rates) for rates in self._rates.values())
        clearly = 1 - 2 * NOISE * sqrt(2 / self._rounds)  # two standard errors of a difference
        self._rates = {arm: rates for arm, rates in self._rates.items() if fmean(rates) >= best * clearly}
        if self._rounds < ROUNDS and len(self._rates) > 1:
            self._turns.extend(self._rates if self._rounds % 2 == 0 else reversed(self._rates))

    @property
    def best(self) -> tuple[Watermarks, float]:
        """The choice and its tokens/s."""
        means = {arm: fmean(rates) for arm, rates in self._rates.items()}
        first = max(means, key=means.__getitem__)
        if means.get(self._present, 0.0) * (1 + LEAD) >= means[first]:
            first = self._present
        return first, means[first]


@dataclass
class Adaptive:
    """Waves whose watermarks come from `Search`, within 1 and `high`; starts like the `wave` policy's defaults."""

    high: int
    output_tokens: Callable[[], int]
    """Tokens that the engine has generated so far."""
    clock: Callable[[], float] = time.monotonic
    searches: int = 0
    """Searches that were begun."""
    _wave: Wave = field(init=False)
    _search: Search | None = field(init=False, default=None)
    _gaps_next: bool = field(init=False, default=False)
    """Whether the first stage is under way."""
    _window: _Window | None = field(init=False, default=None)
    _settled: _Settled | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._wave = Wave(self.high, self.high - self.high // 4)
        self._begin()

    @property
    def watermarks(self) -> Watermarks:
        """Those in use."""
        return Watermarks(self._wave.high, self._wave.low)

    @property
    def searching(self) -> bool:
        return self._search is not None

    def admits(self, load: Load, fits: bool) -> bool:
        wave = self._wave
        before = wave.filling
        admitted = wave.admits(load, fits)
        if load.in_flight + load.waiting <= wave.high:
            self._window = None  # too little work to tell anything
        elif wave.filling and not before:
            self._wave_begins(load)
        if admitted and self._window is not None:
            self._window.admitted += 1
        return admitted

    def _wave_begins(self, load: Load) -> None:
        now, tokens = self.clock(), self.output_tokens()
        window = self._window
        if window is None:
            self._window = _Window(now, tokens, settling=True)
            return
        seconds, turned_over = now - window.since, window.admitted >= self._wave.high
        if window.settling:
            if turned_over or seconds >= SETTLE_S:
                self._window = _Window(now, tokens, settling=False)
            return
        if seconds < MEASURE_S or not (turned_over or seconds >= TURNOVER_S):
            return
        self._window = _Window(now, tokens, settling=False)
        self._measured((tokens - window.tokens) / seconds, load.kv_tokens / max(1, load.in_flight))

    def _measured(self, rate: float, size: float) -> None:
        """`rate`: output tokens/s with the present watermarks; `size`: KV-cache tokens of a request in flight."""
        search = self._search
        if search is None:
            assert self._settled is not None
            if self._settled.drifted(rate, size):
                self._begin()
            return
        search.record(rate)
        if search.arm is not None:
            self._use(search.arm)
            return
        best, rate = search.best
        if self._gaps_next:
            self._gaps_next = False
            self._look([best, *(self._at(best.high, gap) for gap in GAPS)], best)
        else:
            self._search, self._settled = None, _Settled(rate, size)
            self._use(best)

    def _begin(self) -> None:
        self.searches += 1
        self._gaps_next, self._settled = True, None
        present = self.watermarks
        arms = [self._at(round(self.high * share), gap) for share in HIGHS for gap in (0.0, SMALL_GAP)]
        self._look([present, *arms], present)

    def _look(self, arms: Sequence[Watermarks], present: Watermarks) -> None:
        # The widest first: a job starts at full speed.
        self._search = search = Search(sorted(set(arms), key=lambda arm: (-arm.high, arm.low)), present)
        assert search.arm is not None
        self._use(search.arm)

    def _use(self, watermarks: Watermarks) -> None:
        if watermarks != self.watermarks:
            self._wave.high, self._wave.low = watermarks.high, watermarks.low
            self._window = None

    def _at(self, high: int, gap: float) -> Watermarks:
        high = max(1, high)
        return Watermarks(high, high - round(high * gap))


@dataclass
class _Window:
    since: float
    tokens: int
    settling: bool
    admitted: int = 0


class _Settled:
    """Speed and size of requests when the watermarks were found, against the latest measurements."""

    def __init__(self, rate: float, size: float) -> None:
        self._rate, self._size = rate, size
        self._latest: deque[tuple[float, float]] = deque(maxlen=WATCHED)

    def drifted(self, rate: float, size: float) -> bool:
        self._latest.append((rate, size))
        if len(self._latest) < WATCHED:
            return False
        rate, size = (fmean(values) for values in zip(*self._latest, strict=True))
        return (
            abs(rate - self._rate) > SPEED_DRIFT * self._rate
            or abs(size - self._size) > SIZE_DRIFT * self._size
        )
