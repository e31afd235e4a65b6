"""A report's figures one by one, next to those of another run, and the settings in which the two differ."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jobs.books import Books
from jobs.fingerprint import explain_difference
from jobs.ledger import Run
from jobs.metering import gpu_seconds_of_runs, on_gpu, tells_gpus
from jobs.report import Report, percentiles
from jobs.report_charts import duration
from jobs.spec import CostSettings
from pipelines.settings import ModelSettings

#: Settings whose difference says nothing: where a job writes, and what reports show.
_OWN = ("output.path", "report.", "cost.", "name")
#: Characters of a setting's value.
_SHOWN = 160


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure of a report."""

    name: str
    value: float | None
    shown: str
    better: str = ""
    """`more` or `less`, where one of them is."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A figure of two runs."""

    name: str
    ours: str
    theirs: str
    ratio: str
    """Ours over theirs: `1.25×`; `–` where there is none."""
    verdict: str
    """`better`, `worse`, or empty where they are within 2 % of each other or neither is better."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What the GPUs took; see `cost_of`."""

    gpu_hours: float
    usd: float | None
    """None where the job has no `cost.gpu_hour_usd`."""
    assumed: bool
    """Whether engines were taken to have had a GPU each: `engines_per_gpu: auto` settled how many share one, and older parts do not
    tell it."""


def cost_of(
    books: Books, runs: Iterable[Run], model: ModelSettings, engines_per_gpu: int | None, cost: CostSettings
) -> Cost:
    """GPU hours of an output's runs, of all their pools; `jobs.metering` says how they are counted.

    `engines_per_gpu`: None where the job leaves it to Dray; it and `model` are for parts that do not tell their engines' GPUs, of runs without totals.
    """
    totals = {run.run_id: run.usage.gpu_s for run in runs if run.usage is not None}
    share = model.gpus_per_engine / (engines_per_gpu or 1)
    hours = gpu_seconds_of_runs(totals, books.origins, share) / 3600
    silent = [one for one in books.origins if one.run_id not in totals and not tells_gpus(one)]
    usd = None if cost.gpu_hour_usd is None else hours * cost.gpu_hour_usd
    return Cost(gpu_hours=hours, usd=usd, assumed=engines_per_gpu is None and any(map(on_gpu, silent)))


def figures(report: Report, cost: Cost) -> list[Figure]:
    """What a report says in numbers, in the page's order."""
    stats = report.stats
    speed, rows_s = report.output_tokens_per_s, None
    if report.generating_s:
        rows_s = stats.rows_in / report.generating_s
    found = [
        _count("Rows ok", stats.rows_ok, "more"),
        _count("Rows failed", stats.rows_failed, "less"),
        Figure(name="Error rate", value=stats.error_rate, shown=f"{stats.error_rate:.2%}", better="less"),
        _count("Shards", report.shards_committed),
        _count("Prompt tokens", stats.prompt_tokens),
        _count("Output tokens", stats.completion_tokens),
        *([_count("Reasoning tokens", stats.reasoning_tokens)] if stats.reasoning_tokens else []),
        _count("Output tokens/s", speed, "more"),
        Figure(name="Rows/s", value=rows_s, shown="–" if rows_s is None else f"{rows_s:,.1f}", better="more"),
        _time("Generating", report.generating_s),
        _time("Longest engine start", report.engine_start_s),
        _count("Preemptions", stats.preemptions, "less"),
        _count("Engine deaths", stats.engine_deaths, "less"),
    ]
    cached = stats.cached_tokens / stats.prompt_tokens if stats.prompt_tokens else 0.0
    found.append(Figure(name="Prefix-cache hits", value=cached, shown=f"{cached:.1%}", better="more"))
    for title, name in (("Latency", "latency_s"), ("Time to first token", "ttft_s")):
        found += [_time(f"{title} {key}", value) for key, value in percentiles(stats, name).items()]
    found += [
        Figure(name="Output size", value=report.output_bytes, shown=f"{report.output_bytes / 1e6:,.1f} MB"),
    ]
    if cost.gpu_hours:
        hours = f"{cost.gpu_hours:,.2f}" if cost.gpu_hours >= 1 else f"{cost.gpu_hours:.3g}"
        found.append(Figure(name="GPU hours", value=cost.gpu_hours, shown=hours, better="less"))
    if cost.gpu_hours and cost.usd is not None:
        found.append(Figure(name="Cost", value=cost.usd, shown=f"${cost.usd:,.2f}", better="less"))
    return found


def _count(name: str, value: float | None, better: str = "") -> Figure:
    return Figure(name=name, value=value, shown="–" if value is None else f"{value:,.0f}", better=better)


def _time(name: str, value: float | None) -> Figure:
    return Figure(name=name, value=value, shown=duration(value), better="less")


def compared(ours: list[Figure], theirs: list[Figure]) -> list[Compared]:
    """Each figure of ours with the other's of the same name."""
    others = {figure.name: figure for figure in theirs}
    return [_compared(figure, others.get(figure.name)) for figure in ours]


def _compared(ours: Figure, theirs: Figure | None) -> Compared:
    if theirs is None:
        return Compared(name=ours.name, ours=ours.shown, theirs="–", ratio="–", verdict="")
    ratio, verdict = "–", ""
    if ours.value is not None and theirs.value:
        quotient = ours.value / theirs.value
        ratio = f"{quotient:,.2f}×"
        if ours.better and abs(quotient - 1) > 0.02:
            verdict = "better" if (quotient > 1) == (ours.better == "more") else "worse"
    return Compared(name=ours.name, ours=ours.shown, theirs=theirs.shown, ratio=ratio, verdict=verdict)


def differing_settings(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(key, ours, theirs) by two stored spec records: settings as written, then contents behind equal settings.

    Storage options are left out: secrets are not shown, not even where they are.
    """
    a, b = dict(_leaves(ours["spec"])), dict(_leaves(theirs["spec"]))
    found = [
        (key, _text(a, key), _text(b, key))
        for key in sorted({*a, *b})
        if a.get(key) != b.get(key) and not key.startswith(_OWN) and ".storage_options" not in key
    ]
    named = [key for key, _, _ in found]
    for line in explain_difference(ours["identity"], theirs["identity"]):
        key, _, change = line.partition(": ")
        if not any(f"{key}.".startswith(f"{name}.") or name.startswith(f"{key}.") for name in named):
            mine, _, other = change.rpartition(" → ")
            found.append((key, mine, other))
    return found


def _leaves(values: Any, key: str = "") -> list[tuple[str, Any]]:
    if isinstance(values, dict):
        return [leaf for name in values for leaf in _leaves(values[name], f"{key}.{name}" if key else name)]
    return [(key, values)]


def _text(values: Mapping[str, Any], key: str) -> str:
    if key not in values:
        return "not set"
    text = values[key] if isinstance(values[key], str) else json.dumps(values[key], ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
