"""The results of many trials, as the Markdown table that `docs/failure-modes.md` shows."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from tests.chaos.faults import FAULTS
from tests.chaos.result import Result

_HEAD = (
    "fault",
    "engine",
    "trials",
    "rows",
    "lost",
    "doubled",
    "wrong",
    "failed trials",
    "rows run again: mean, most (may)",
    "seconds to recover: median, most",
)


def render(results: Sequence[Result]) -> str:
    """One line per fault and engine, in the order of `FAULTS`."""
    lines = [_HEAD, tuple("---" if i < 2 else "---:" for i in range(len(_HEAD)))]
    for name, fault in FAULTS.items():
        for engine in fault.engines:
            group = [r for r in results if (r.fault, r.engine) == (name, engine)]
            if group:
                lines.append(_line(fault.title, engine, group))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _line(title: str, engine: str, group: list[Result]) -> tuple[str, ...]:
    ran = [result for result in group if result.outcome != "skipped"]
    if not ran:
        return (title, engine, "0", *["–"] * 6, f"skipped: {group[0].note}")
    struck = sum(result.struck for result in ran)
    trials = str(len(ran)) if struck == len(ran) else f"{len(ran)} ({struck} struck)"
    return (
        title,
        engine,
        trials,
        f"{sum(result.rows for result in ran):,}",
        str(sum(result.lost for result in ran)),
        str(sum(result.doubled for result in ran)),
        str(sum(result.wrong + result.misjudged for result in ran)),
        str(sum(result.outcome == "failed" for result in ran)),
        _repeated(ran),
        _spread(result.recover_s for result in ran if result.struck),
    )


def _repeated(ran: list[Result]) -> str:
    rows = [result.repeated_rows for result in ran if result.repeated_rows is not None]
    if not rows:
        return "–"
    allowed = [result.allowed_rows for result in ran if result.allowed_rows]
    return f"{statistics.mean(rows):.1f}, {max(rows)}" + (f" ({max(allowed)})" if allowed else "")


def _spread(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):.1f}, {max(known):.1f}" if known else "–"
