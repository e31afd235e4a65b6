"""What a job did, as figures: folded from the footers, the same for a run that just ended and one of last year."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from jobs.books import Books
from jobs.engine_use import EngineUse, engine_use
from jobs.ledger import Run
from pipelines.shard_stats import START_PARTS, Provenance, ShardStats


@dataclass(frozen=True, kw_only=True)
class Report:
    """A job's totals, rates and state."""

    job: str
    output: str
    fingerprint: str
    state: str
    """`complete`: `_SUCCESS` stands. Otherwise `incomplete`, or `over budget` when only the error budget is in the way."""
    shards_planned: int
    shards_committed: int
    rows_planned: int | None
    """None where the input's row count is known only once it is read."""
    stats: ShardStats
    output_bytes: int
    generating_s: float
    """Wall seconds from an engine being ready to the last commit, summed over runs: start-up is not in it."""
    engine_start_s: float
    """The longest start of an engine."""
    engine_start_parts: dict[str, float | None]
    """What that start went to: `import_s`, `weights_s`, `compile_s`, `graphs_s`; None where the engine did not tell."""
    engines: tuple[str, ...]
    engine_use: tuple[EngineUse, ...]
    """One for each pool."""
    simulated: bool
    problems: tuple[str, ...]
    runs: tuple[Run, ...]

    @property
    def output_tokens_per_s(self) -> float | None:
        """Completion tokens over `generating_s`."""
        return self.stats.completion_tokens / self.generating_s if self.generating_s else None

    def to_dict(self) -> dict[str, Any]:
        """JSON values; the histograms appear as p50, p95 and p99 in seconds."""
        data = asdict(self)
        stats = self.stats.to_dict()
        for name in ("latency_s", "ttft_s"):
            stats[name] = percentiles(self.stats, name)
        return {**data, "stats": stats, "output_tokens_per_s": self.output_tokens_per_s}


def percentiles(stats: ShardStats, name: str) -> dict[str, float | None]:
    """p50, p95 and p99 of `latency_s` or `ttft_s`."""
    histogram = getattr(stats, name)
    return {f"p{round(q * 100)}": histogram.quantile(q) for q in (0.5, 0.95, 0.99)}


def make_report(
    *,
    job: str,
    output: str,
    fingerprint: str,
    books: Books,
    runs: list[Run],
    succeeded: bool,
    max_error_rate: float,
    steps: Iterable[str],
) -> Report:
    """Fold the books into a report. `steps`: the names of the job's, in its order, which footers do not keep."""
    totals = books.totals
    ordered = {name: totals.steps[name] for name in steps if name in totals.steps}
    stats = replace(totals, steps=ordered | totals.steps)
    over = books.complete and stats.error_rate > max_error_rate
    rows = [shard.rows for shard in books.shards]
    origins = books.origins
    by_run: dict[str, list[Any]] = {}
    for origin in origins:
        by_run.setdefault(origin.run_id, []).append(origin)
    slowest = max(origins, key=lambda origin: origin.engine_start_s, default=None)
    return Report(
        job=job,
        output=output,
        fingerprint=fingerprint,
        state="complete" if succeeded else "over budget" if over else "incomplete",
        shards_planned=len(books.shards),
        shards_committed=len(books.parts),
        rows_planned=None if None in rows else sum(n for n in rows if n is not None),
        stats=stats,
        output_bytes=books.bytes,
        generating_s=sum(
            max(o.committed_at for o in group)
            - min([o.engine_ready_at for o in group if o.engine_ready_at] or [o.started_at for o in group])
            for group in by_run.values()
        ),
        engine_start_s=slowest.engine_start_s if slowest else 0.0,
        engine_start_parts={
            name.removeprefix("engine_"): getattr(slowest, name) if slowest else None for name in START_PARTS
        },
        engines=_engines(origins),
        engine_use=engine_use(origins),
        simulated=any(o.engine == "simulated" for o in origins),
        problems=books.problems,
        runs=tuple(runs),
    )


def _engines(origins: Iterable[Provenance]) -> tuple[str, ...]:
    """`vllm 0.32.0 on cpu`. Parts whose answers were all kept had none; of those of a simulated one the name is told all the same."""
    told = {(origin.engine, origin.device) for origin in origins if origin.engine}
    somewhere = {engine for engine, device in told if device}
    return tuple(
        sorted(
            f"{engine} on {device}" if device else engine
            for engine, device in told
            if device or engine not in somewhere
        )
    )


def render(report: Report) -> RenderableType:
    """The summary table of the terminal."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim")
    table.add_column()
    table.add_row(
        "job", f"{report.job} · {report.state}" + (" · SIMULATED ENGINE" if report.simulated else "")
    )
    table.add_row("output", report.output)
    for name, value in figures(report).items():
        table.add_row(name, value)
    problems = [f"problem: {problem}" for problem in report.problems]
    return Group(table, *problems)


def figures(report: Report) -> dict[str, str]:
    """What a report says in words, by name: of the terminal's summary, and of the dataset card."""
    stats = report.stats
    latency = percentiles(stats, "latency_s")
    filtered = f" ({stats.rows_filtered:,} filtered)" if stats.rows_filtered else ""
    dropped = f", {stats.rows_dropped:,} dropped" if stats.rows_dropped else ""
    added = f" ({stats.rows_in:,} of the input)" if stats.rows_added else ""
    found = {
        "shards": f"{report.shards_committed:,} of {report.shards_planned:,}",
        "rows": f"{stats.rows_ok:,} ok, {stats.rows_failed:,} failed{dropped} of {stats.rows:,}{added}{filtered}",
    }
    if stats.samples != stats.rows_ok:
        found["samples"] = f"{stats.samples:,}"
    found |= {f"step {name}": step_counts(counts) for name, counts in stats.steps.items()}
    reasoning = f" ({stats.reasoning_tokens:,} reasoning)" if stats.reasoning_tokens else ""
    found["tokens in / out"] = f"{stats.prompt_tokens:,} / {stats.completion_tokens:,}{reasoning}"
    if stats.rows_reused:
        found["reused"] = (
            f"{stats.rows_reused:,} answers, {stats.tokens_reused:,} output tokens not generated again"
        )
    if report.output_tokens_per_s is not None:
        rows_per_s = stats.rows_in / report.generating_s
        tokens_per_s = f"{report.output_tokens_per_s:,.0f} output tokens/s"
        if not stats.completion_tokens:  # nothing was generated, only read
            tokens_per_s = f"{stats.prompt_tokens / report.generating_s:,.0f} prompt tokens/s"
        found["speed"] = f"{tokens_per_s}, {rows_per_s:,.1f} rows/s"
    found["time"] = f"{report.generating_s:,.1f} s generating, engine start {start_seconds(report)}"
    if report.engine_use:
        found["engines busy"] = "; ".join(uses_in_words(report.engine_use))
    found["latency p50 / p95"] = f"{seconds(latency['p50'])} / {seconds(latency['p95'])}"
    if stats.cached_tokens:
        found["prefix cache"] = f"{stats.cached_tokens / stats.prompt_tokens:.1%} of prompt tokens"
    found["finish"] = ", ".join(f"{k} {v:,}" for k, v in stats.finish_reasons.items()) or "–"
    found["errors"] = ", ".join(f"{k} {v:,}" for k, v in stats.error_codes.items()) or "none"
    found["engine"] = ", ".join(report.engines) or "–"
    found["size"] = f"{report.output_bytes / 1e6:,.1f} MB"
    return found


def step_counts(counts: dict[str, int]) -> str:
    """`1,200 records: 1,150 out, 48 dropped, 2 failed`; without what is 0. An explode's with the records that it has added,
    a gather's with those that are in others' lists now, a generation's with its tokens."""
    every = ("out", "dropped", "failed", "gathered")
    ends = [f"{counts[end]:,} {end}" for end in every if counts.get(end) or end == "out"]
    words = {"completion_tokens": "output tokens", "prompt_tokens": "prompt tokens"}
    tokens = next((f"; {counts[name]:,} {what}" for name, what in words.items() if counts.get(name)), "")
    if counts.get("reasoning_tokens"):
        tokens += f" ({counts['reasoning_tokens']:,} reasoning)"
    added = f" + {counts['added']:,} added" if counts.get("added") else ""
    return f"{counts['in']:,} records{added}: {', '.join(ends)}{tokens}"


def uses_in_words(pools: Sequence[EngineUse]) -> list[str]:
    """`2 engines 93%` for each; of several each with the generations that it answered: `judge: 1 engine 61%`."""
    engines = [f"{use.engines:,} engine{'s' if use.engines > 1 else ''} {use.busy:.0%}" for use in pools]
    if len(pools) == 1:
        return engines
    names = [" and ".join(name or "prompt" for name in use.generations) for use in pools]
    return [f"{name}: {words}" for name, words in zip(names, engines, strict=True)]


def start_seconds(report: Report) -> str:
    """`31.2 s (import 14.1, weights 2.0, compile 8.3, graphs 4)`; without the parts that the engine did not tell."""
    parts = [
        f"{name.removesuffix('_s')} {value:.1f}"
        for name, value in report.engine_start_parts.items()
        if value is not None
    ]
    return f"{report.engine_start_s:,.1f} s" + (f" ({', '.join(parts)})" if parts else "")


def seconds(value: float | None) -> str:
    """A duration for people: `18 ms`, `2.4 s`."""
    if value is None:
        return "–"
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"
