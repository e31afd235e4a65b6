"""What the report's charts show, in shares of each chart: as many SVG elements for a million shards as for a few hundred."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from jobs.report import seconds
from pipelines.histogram import GROWTH, Histogram
from pipelines.part import Part
from pipelines.shard_stats import Provenance, ShardStats, Turn

#: Bins of the time axis, and lanes of the Gantt chart: together they bound the page.
BINS = 100
LANES = 24
#: Up to so many shards are drawn one by one, more as shards in flight by bin.
DRAWN = 400
LENGTH_BINS = 40
_REST = "other replicas"
#: Least width of a shard's bar, in shares of the axis, and least height of its failed rows, in shares of the bar.
_THIN, _SEEN = 0.002, 0.2
#: A time in which nothing ran is cut out of the axis when it is longer than this share of the time in which something did.
_IDLE = 0.1


@dataclass(frozen=True)
class Bar:
    """A rectangle in shares of its chart, 0 to 1 from the top left, and what its tooltip says."""

    x: float
    width: float
    height: float
    title: str
    y: float = 0.0
    kind: str = ""
    """`wait`: a shard in work, but not in its engine; `failed`: its failed rows."""


@dataclass(frozen=True)
class Lane:
    """What one replica had in work."""

    replica: str
    bars: tuple[Bar, ...]
    rows: int
    """Shards above each other."""


@dataclass(frozen=True)
class Work:
    """What one replica did to one shard, in Unix seconds: `start` to `end`, of which `left` to `right` in the engine."""

    replica: str
    name: str
    start: float
    left: float
    right: float
    end: float
    tokens: int
    rows: int
    failed: int


@dataclass(frozen=True)
class Axis:
    """Busy time: Unix seconds onto 0 to 1, without the times between two runs in which nothing was done."""

    spans: tuple[tuple[float, float], ...]
    """Apart and in order."""

    @classmethod
    def of(cls, spans: Iterable[tuple[float, float]]) -> Axis:
        """Spans that overlap or nearly meet become one."""
        merged: list[list[float]] = []
        for start, end in sorted(spans):
            if merged and start <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], end)
            else:
                merged.append([start, end])
        idle = _IDLE * sum(end - start for start, end in merged)
        joined: list[list[float]] = []
        for start, end in merged:
            if joined and start - joined[-1][1] <= idle:
                joined[-1][1] = end
            else:
                joined.append([start, end])
        return cls(tuple((start, end) for start, end in joined))

    @property
    def busy_s(self) -> float:
        return max(sum(end - start for start, end in self.spans), 1e-3)

    @property
    def cuts(self) -> tuple[float, ...]:
        """Where time was cut out."""
        return tuple(self.at(start) for start, _ in self.spans[1:])

    def at(self, when: float) -> float:
        """The place of a time; one within a cut stands at the cut."""
        k = max(bisect.bisect_right(self.spans, (when, float("inf"))) - 1, 0)
        before = sum(end - start for start, end in self.spans[:k])
        start, end = self.spans[k]
        return (before + min(max(when - start, 0.0), end - start)) / self.busy_s


@dataclass(frozen=True)
class Timeline:
    """Throughput and the Gantt chart over one axis."""

    busy_s: float = 0.0
    peak: float = 0.0
    """Output tokens/s of the highest bar."""
    cuts: tuple[float, ...] = ()
    throughput: tuple[Bar, ...] = ()
    lanes: tuple[Lane, ...] = ()
    each_shard: bool = True
    """Whether a bar of the Gantt chart is a shard; otherwise its height is the shards in flight."""


def timeline(parts: Iterable[Part]) -> Timeline:
    """What the footers tell of when which replica did what; retries count at their own time."""
    works = [work for part in parts for work in _works(part)]
    if not works:
        return Timeline()
    axis = Axis.of((work.start, work.end) for work in works)
    width_s = axis.busy_s / BINS
    tokens = spread((axis.at(work.left), axis.at(work.right), work.tokens) for work in works)
    rates = [amount / width_s for amount in tokens]
    busiest = Counter(work.replica for work in works)
    named = {replica for replica, _ in busiest.most_common(LANES if len(busiest) <= LANES else LANES - 1)}
    by_lane: dict[str, list[Work]] = {}
    for work in works:
        by_lane.setdefault(work.replica if work.replica in named else _REST, []).append(work)
    each_shard = len(works) <= DRAWN
    if each_shard:
        lanes = [_gantt(name, items, axis) for name, items in sorted(by_lane.items())]
    else:
        lanes = _densities(sorted(by_lane.items()), axis)
    return Timeline(
        busy_s=axis.busy_s,
        peak=max(rates),
        cuts=axis.cuts,
        throughput=columns(rates, lambda k, rate: f"{duration(k * width_s)}: {rate:,.0f} output tokens/s"),
        lanes=tuple(lanes),
        each_shard=each_shard,
    )


def _works(part: Part) -> Iterator[Work]:
    footer = part.footer
    name = f"shard {footer.shard.ordinal}"
    # A footer's seconds and tokens are sums with those of its retries, so the first run's are what is left.
    retried = sum((one.stats for one in footer.retries), ShardStats(shards=0))
    yield from _works_of_run(name, footer.provenance, footer.stats, retried)
    for one in footer.retries:
        yield from _works_of_run(f"{name}, retried", one.provenance, one.stats, ShardStats(shards=0))


def _works_of_run(name: str, origin: Provenance, stats: ShardStats, less: ShardStats) -> Iterator[Work]:
    """One for each generation; what is not `less` of `stats` is this run's."""
    tokens = {step: counts.get("completion_tokens", 0) for step, counts in stats.steps.items()}
    for step, counts in less.steps.items():
        tokens[step] -= counts.get("completion_tokens", 0)
    tokens[""] = stats.completion_tokens - less.completion_tokens - sum(tokens.values())
    turns = origin.turns or (_turn_before_commit(origin, stats, less),)
    start, committed = origin.started_at, max(origin.committed_at, origin.started_at)
    for turn in turns:
        last = turn is turns[-1]
        end = committed if last else max(turn.ended_at, start)
        yield Work(
            replica=turn.replica,
            name=f"{name}, {turn.generation}" if turn.generation else name,
            start=start,
            left=min(max(turn.began_at, start), end),
            right=min(max(turn.ended_at, start), end),
            end=end,
            tokens=max(tokens.get(turn.generation, 0), 0),
            rows=stats.rows_in,
            failed=stats.rows_failed if last else 0,
        )
        start = end


def _turn_before_commit(origin: Provenance, stats: ShardStats, less: ShardStats) -> Turn:
    """For parts without turns: counted back from the commit."""
    ended = origin.committed_at - (stats.commit_s - less.commit_s)
    began = ended - (stats.generate_s - less.generate_s)
    return Turn(generation="", replica=origin.replica, began_at=began, ended_at=ended)


def spread(items: Iterable[tuple[float, float, float]]) -> list[float]:
    """Put each (start, end, amount), in shares of the axis, into `BINS` bins, evenly over its time."""
    bins = [0.0] * BINS
    for start, end, amount in items:
        first = min(BINS - 1, max(0, int(start * BINS)))
        last = min(BINS - 1, max(first, int(end * BINS)))
        if first == last:
            bins[first] += amount
            continue
        for k in range(first, last + 1):
            bins[k] += (
                amount * max(0.0, min(end, (k + 1) / BINS) - max(start, k / BINS)) / (min(end, 1.0) - start)
            )
    return bins


def columns(
    values: Sequence[float], title: Callable[[int, float], str], top: float | None = None
) -> tuple[Bar, ...]:
    """One bar for each value above 0, standing on the ground; the highest, or `top`, fills the chart."""
    top = top or max(values, default=0.0) or 1.0
    n = len(values)
    return tuple(
        Bar(k / n, 1 / n, value / top, title(k, value), 1 - value / top)
        for k, value in enumerate(values)
        if value > 0
    )


def _gantt(replica: str, works: list[Work], axis: Axis) -> Lane:
    """Shards that were in work at the same time lie above each other."""
    free: list[float] = []
    placed: list[tuple[int, Work]] = []
    for work in sorted(works, key=lambda work: work.start):
        row = next((k for k, end in enumerate(free) if end <= work.start), len(free))
        free[row : row + 1] = [work.end]
        placed.append((row, work))
    height, bars = 1 / len(free), []
    for row, work in placed:
        title = (
            f"{work.name}: {duration(work.end - work.start)}, of which {duration(work.right - work.left)} "
            f"in the engine; {work.tokens:,} output tokens, {work.failed:,} of {work.rows:,} rows failed"
        )
        place, top = 0.84 * height, (row + 0.08) * height
        left = axis.at(work.left)
        width = max(axis.at(work.right) - left, _THIN)
        x = axis.at(work.start)
        bars.append(Bar(x, max(axis.at(work.end) - x, _THIN), place, title, top, "wait"))
        bars.append(Bar(left, width, place, title, top))
        if work.failed:
            share = place * max(work.failed / max(work.rows, 1), _SEEN)
            bars.append(Bar(left, width, share, title, top + place - share, "failed"))
    return Lane(replica or "unnamed", tuple(bars), len(free))


def _densities(lanes: list[tuple[str, list[Work]]], axis: Axis) -> list[Lane]:
    flying = {
        name: spread((a := axis.at(work.start), b := axis.at(work.end), (b - a) * BINS) for work in works)
        for name, works in lanes
    }
    most = max(max(values) for values in flying.values())
    return [
        Lane(name or "unnamed", columns(values, lambda k, value: f"{value:,.1f} shards in flight", most), 2)
        for name, values in flying.items()
    ]


@dataclass(frozen=True)
class Distribution:
    """A chart of how many values lie where, with its quantiles and the ends of its axis in words."""

    title: str
    bars: tuple[Bar, ...]
    low: str
    high: str
    quantiles: dict[str, str]
    note: str


def of_histogram(title: str, histogram: Histogram) -> Distribution:
    """Seconds, on a logarithmic axis: a bar for each bucket."""
    keys = range(min(histogram.counts, default=0), max(histogram.counts, default=0) + 1)
    counts = [histogram.counts.get(key, 0) for key in keys]
    return Distribution(
        title=title,
        bars=columns(counts, lambda k, n: f"up to {seconds(GROWTH ** keys[k])}: {n:,.0f} requests"),
        low=seconds(GROWTH ** (keys[0] - 1)),
        high=seconds(GROWTH ** keys[-1]),
        quantiles={f"p{round(q * 100)}": seconds(histogram.quantile(q)) for q in (0.5, 0.95, 0.99)},
        note="logarithmic axis",
    )


def of_lengths(title: str, counted: Counter[int], note: str) -> Distribution:
    """Tokens, on a linear axis of `LENGTH_BINS` bins at most; `counted`: how many have each length."""
    low, high = min(counted, default=0), max(counted, default=0)
    step = max(1, -(-(high - low + 1) // LENGTH_BINS))
    bins = [0] * -(-(high - low + 1) // step)
    for length, n in counted.items():
        bins[(length - low) // step] += n
    return Distribution(
        title=title,
        bars=columns(
            bins, lambda k, n: f"{low + k * step:,} to {low + (k + 1) * step - 1:,} tokens: {n:,.0f}"
        ),
        low=f"{low:,}",
        high=f"{high:,} tokens",
        quantiles={f"p{round(q * 100)}": f"{quantile(counted, q):,}" for q in (0.5, 0.95, 0.99)},
        note=note,
    )


def duration(value: float | None) -> str:
    """Seconds for people, also where there are many: `18 ms`, `47.2 s`, `3 min 20 s`, `2 h 05 min`."""
    if value is None or value < 120:
        return seconds(value)
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


def quantile(counted: Counter[int], q: float) -> int:
    """The least length that a share `q` does not exceed; 0 when there is none."""
    rank, seen = q * counted.total(), 0
    for length in sorted(counted):
        seen += counted[length]
        if seen >= rank:
            return length
    return 0
