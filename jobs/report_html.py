"""The report as one HTML page: nothing to fetch, no script, and bounded however many shards there are."""

from __future__ import annotations

import os
import sys
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from jobs.books import Books, fold
from jobs.fingerprint import steps_of
from jobs.inspect import opened, stored_report
from jobs.ledger import read_runs
from jobs.references import References
from jobs.report import Report, step_counts
from jobs.report_charts import Distribution, duration, of_histogram, of_lengths, timeline
from jobs.report_compare import Cost, Figure, compared, cost_of, differing_settings, figures
from jobs.report_rows import Example, Lengths, examples, hidden_columns, lengths
from jobs.spec import CostSettings, JobSpec, ReportSettings
from pipelines.errors import OutputError, SpecError
from pipelines.settings import ModelSettings
from pipelines.storage import Storage

#: Figures that stand on top as tiles.
_TILES = (
    "Rows ok",
    "Rows failed",
    "Output tokens/s",
    "Prompt tokens",
    "Output tokens",
    "Reasoning tokens",
    "Generating",
    "GPU hours",
    "Cost",
)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """All that a page says of one output."""

    record: dict[str, Any]
    """What `jobs.output.claim` stored."""
    books: Books
    report: Report
    cost: Cost
    figures: list[Figure]
    lengths: Lengths
    examples: dict[str, list[Example]]
    hidden: list[str]


@dataclass(frozen=True, kw_only=True)
class _Sections:
    """The sections that a page depends on."""

    cost: CostSettings
    report: ReportSettings
    model: ModelSettings
    engines_per_gpu: int | None


def facts_of(storage: Storage, spec: JobSpec | None = None) -> Facts:
    """Read an output: footers, and a few parts' rows. `spec`: of the job file, where the stored one does not count.

    Columns are hidden that either of the two hides. Raises OutputError, SpecError.
    """
    record, plan = opened(storage)
    books = fold(storage, plan)
    report = stored_report(storage, record, books)
    sections = _stored_sections(record["spec"])
    hide = sections.report.redact
    prices = sections.cost
    if spec is not None:
        hide = list(dict.fromkeys([*hide, *spec.report.redact]))
        prices = spec.cost
    rename = record["spec"].get("output", {}).get("rename") or {}
    cost = cost_of(books, read_runs(storage), sections.model, sections.engines_per_gpu, prices)
    codes = sorted(report.stats.error_codes, key=lambda code: -report.stats.error_codes[code])
    return Facts(
        record=record,
        books=books,
        report=report,
        cost=cost,
        figures=figures(report, cost),
        lengths=lengths(storage, books.parts),
        examples=examples(
            storage,
            books.parts,
            hidden_columns(
                hide, rename, steps_of(record["identity"]), record["identity"].get("output.conversation")
            ),
            codes,
        ),
        hidden=hide,
    )


def _stored_sections(raw: dict[str, Any]) -> _Sections:
    """From the stored tree, whose references are filled in again: only where a page needs them."""
    references = References(os.environ, {})

    def filled(value: Any, key: str) -> Any:
        if isinstance(value, dict):
            return {name: filled(item, f"{key}.{name}") for name, item in value.items()}
        if isinstance(value, list):
            return [filled(item, key) for item in value]
        try:
            return references.fill(value) if isinstance(value, str) else value
        except SpecError as error:
            raise SpecError(f"the job's {key}: {error}") from None

    def section(name: str, *keys: str) -> dict[str, Any]:
        values = {key: value for key, value in (raw.get(name) or {}).items() if not keys or key in keys}
        return {key: filled(value, f"{name}.{key}") for key, value in values.items() if value is not None}

    engine = (raw.get("model") or {}).get("engine") or {}
    sizes = {
        key: filled(engine[key], f"model.engine.{key}")
        for key in ("tensor_parallel_size", "pipeline_parallel_size")
        if engine.get(key) is not None
    }
    packed = section("pool", "engines_per_gpu").get("engines_per_gpu", "auto")
    return _Sections(
        cost=CostSettings.model_validate(section("cost")),
        report=ReportSettings.model_validate(section("report")),
        model=ModelSettings(source="-", engine={key: int(value) for key, value in sizes.items()}),
        engines_per_gpu=None if packed == "auto" else int(packed),
    )


def render_html(facts: Facts, against: Facts | None = None) -> str:
    """The page. Everything that comes from the output is escaped."""
    environment = Environment(
        loader=PackageLoader("jobs"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["duration"] = duration
    environment.filters["utc"] = lambda at: f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S} UTC"
    environment.filters["count"] = lambda n: f"{n:,}"
    report = facts.report
    return environment.get_template("report.html").render(
        report=report,
        stats=report.stats,
        tiles=[figure for figure in facts.figures if figure.name in _TILES],
        figures=facts.figures,
        time=timeline(facts.books.parts),
        distributions=_distributions(facts),
        codes=sorted(report.stats.error_codes.items(), key=lambda item: (-item[1], item[0])),
        examples=facts.examples,
        hidden=facts.hidden,
        cost=facts.cost,
        price=facts.cost.usd is not None,
        origin=_origin(facts),
        other=against.report if against else None,
        compared=compared(facts.figures, against.figures) if against else [],
        settings=differing_settings(facts.record, against.record) if against else [],
        origins=_origins(facts, against) if against else [],
    )


def _distributions(facts: Facts) -> list[Distribution]:
    stats, counted = facts.report.stats, facts.lengths
    whole = counted.parts == len(facts.books.parts)
    note = "" if whole else f"of {counted.parts:,} of {len(facts.books.parts):,} shards"
    found = [
        of_histogram("Latency", stats.latency_s),
        of_histogram("Time to first token", stats.ttft_s),
        of_lengths("Prompt length", counted.prompts, note),
        of_lengths("Output length", counted.answers, note),
    ]
    return [one for one in found if one.bars]


def _origin(facts: Facts) -> dict[str, str]:
    """What made the output, by name."""
    origins = facts.books.origins
    model = facts.record["spec"].get("model") or {}

    def named(values: list[str], most: int = 12) -> str:
        ranked = [f"{value} ({n:,})" for value, n in sorted(Counter(filter(None, values)).items())]
        if len(ranked) == 1:
            return values[0]
        rest = len(ranked) - most
        return ", ".join(ranked[:most]) + (f" and {rest:,} more" if rest > 0 else "") or "–"

    return {
        "Model": str(model.get("source", "–")),
        "Revision": str(model.get("revision") or "not pinned"),
        "Engine": named([origin.engine for origin in origins]),
        "GPU": named([origin.device for origin in origins]),
        "Nodes": named([origin.node for origin in origins]),
        "Dray": named([origin.dray_version for origin in origins]),
        **{f"Step {name}": step_counts(counts) for name, counts in facts.report.stats.steps.items()},
        "Fingerprint": facts.report.fingerprint,
        "Output": facts.report.output,
    }


def _origins(ours: Facts, theirs: Facts) -> list[tuple[str, str, str]]:
    a, b = _origin(ours), _origin(theirs)
    return [(name, a[name], b[name]) for name in a if a[name] != b[name]]


def write_html(path: str, page: str) -> None:
    """Write the page to a local file, `-`: to stdout. Raises OutputError when that cannot be done."""
    if path == "-":
        sys.stdout.write(page)
        return
    try:
        Path(path).write_text(page, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"--html {path}: cannot be written: {error.strerror}; name another file") from error
