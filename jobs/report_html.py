"""The report as one HTML page: nothing to fetch, no script, and as many SVG elements for a million shards as for ten."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from jobs.report import Report, percentiles, seconds
from pipelines.errors import OutputError
from pipelines.histogram import GROWTH, Histogram
from pipelines.part import Part

#: Bins of the time axis, and lanes of the Gantt chart: together they bound the page.
BINS = 100
LANES = 24
_REST = "other replicas"


@dataclass(frozen=True)
class Bar:
    """A rectangle in shares of its chart, 0 to 1, and what its tooltip says."""

    x: float
    width: float
    height: float
    title: str


@dataclass(frozen=True)
class Lane:
    """What one replica had in work; a bar's `height` is its shards in flight over the most in any bin."""

    replica: str
    bars: tuple[Bar, ...]


def spread(items: Iterable[tuple[float, float, float]], begin: float, width_s: float) -> list[float]:
    """Put each (start, end, amount), Unix seconds, into `BINS` bins of `width_s`, evenly over its time."""
    bins = [0.0] * BINS
    for start, end, amount in items:
        first = min(BINS - 1, max(0, int((start - begin) / width_s)))
        last = min(BINS - 1, max(first, int((end - begin) / width_s)))
        if first == last:
            bins[first] += amount
            continue
        for k in range(first, last + 1):
            left, right = begin + k * width_s, begin + (k + 1) * width_s
            bins[k] += amount * max(0.0, min(end, right) - max(start, left)) / (end - start)
    return bins


def bars(values: list[float], unit: str, width_s: float, top: float | None = None) -> tuple[Bar, ...]:
    """One bar for each bin that is not empty."""
    top = top or max(values, default=0.0) or 1.0
    return tuple(
        Bar(k / BINS, 1 / BINS, value / top, f"{k * width_s:,.1f} s: {value:,.1f} {unit}")
        for k, value in enumerate(values)
        if value > 0
    )


def distribution(histogram: Histogram) -> tuple[Bar, ...]:
    """A bar for each bucket, on a logarithmic axis of seconds."""
    if not histogram.counts:
        return ()
    low, high = min(histogram.counts), max(histogram.counts)
    span, top = high - low + 1, max(histogram.counts.values())
    return tuple(
        Bar((k - low) / span, 1 / span, n / top, f"up to {seconds(GROWTH**k)}: {n:,}")
        for k, n in sorted(histogram.counts.items())
    )


def timeline(parts: Iterable[Part]) -> dict[str, Any]:
    """Throughput and the Gantt chart, by each part's first commit."""
    shards = [(part.footer.provenance, part.footer.stats) for part in parts]
    if not shards:
        return {"span_s": 0.0, "peak": 0.0, "throughput": (), "lanes": ()}
    begin = min(origin.started_at for origin, _ in shards)
    span_s = max(max(origin.committed_at for origin, _ in shards) - begin, 1e-3)
    width_s = span_s / BINS
    tokens = spread(((o.started_at, o.committed_at, s.completion_tokens) for o, s in shards), begin, width_s)
    rates = [n / width_s for n in tokens]
    busiest = Counter(origin.replica for origin, _ in shards)
    named = {replica for replica, _ in busiest.most_common(LANES if len(busiest) <= LANES else LANES - 1)}
    work: dict[str, list[tuple[float, float, float]]] = {}
    for origin, _ in shards:
        lane = origin.replica if origin.replica in named else _REST
        took = max(origin.committed_at - origin.started_at, 0.0)
        work.setdefault(lane, []).append((origin.started_at, origin.committed_at, took / width_s))
    flying = {lane: spread(items, begin, width_s) for lane, items in sorted(work.items())}
    most = max(max(values) for values in flying.values())
    return {
        "span_s": span_s,
        "peak": max(rates),
        "throughput": bars(rates, "output tokens/s", width_s),
        "lanes": tuple(
            Lane(lane or "unnamed", bars(values, "shards in flight", width_s, most))
            for lane, values in flying.items()
        ),
    }


def render_html(report: Report, parts: tuple[Part, ...]) -> str:
    """The page. Everything that comes from the output is escaped."""
    environment = Environment(
        loader=PackageLoader("jobs"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["seconds"] = seconds
    environment.filters["utc"] = lambda at: f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S} UTC"
    examples: dict[str, dict[str, str]] = {}
    for part in parts:
        for code, example in part.footer.error_examples.items():
            examples.setdefault(code, example)
    origins = [part.footer.provenance for part in parts]
    return environment.get_template("report.html").render(
        report=report,
        stats=report.stats,
        time=timeline(parts),
        distributions=[
            (title, distribution(getattr(report.stats, name)), percentiles(report.stats, name))
            for title, name in (("Latency", "latency_s"), ("Time to first token", "ttft_s"))
        ],
        examples=examples,
        nodes=sorted({origin.node for origin in origins if origin.node}),
        versions=sorted({origin.dray_version for origin in origins if origin.dray_version}),
    )


def write_html(path: str, report: Report, parts: tuple[Part, ...]) -> None:
    """Write the page to a local file. Raises OutputError when that cannot be written."""
    try:
        Path(path).write_text(render_html(report, parts), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"--html {path}: cannot be written: {error.strerror}; name another file") from error
