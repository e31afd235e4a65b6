"""Sides in turns (A B C A B C …), because the speed of a machine drifts; medians, spread, and what went wrong."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.child import ChildFailed, OutOfTime
from benchmarks.sides import Run, Side, Task

Tell = Callable[[str], None]


@dataclass
class Measured:
    """Runs so far."""

    runs: list[Run] = field(default_factory=list)
    cannot: dict[str, str] = field(default_factory=dict)
    """Sides that cannot run here: why. They are not tried again."""
    not_reached: list[str] = field(default_factory=list)
    """Repetitions that the time was not enough for."""

    def by_name(self) -> dict[str, list[Run]]:
        """Runs of each side and variant, in the order in which they first ran."""
        found: dict[str, list[Run]] = {}
        for run in self.runs:
            found.setdefault(run.name, []).append(run)
        return found

    def problems(self, rows: int, output_tokens: int) -> list[str]:
        """Runs that did not write what they had to."""
        found = [
            f"{run.name}: {run.rows:,} rows with {run.output_tokens:,} tokens were written, not {rows:,} with {output_tokens:,}"
            for run in self.runs
            if (run.rows, run.output_tokens) != (rows, output_tokens)
        ]
        found += [
            f"{run.name}: {run.rows_reused:,} rows were not asked, as their prompts are those of others"
            for run in self.runs
            if run.rows_reused
        ]
        if len({run.prompt_tokens for run in self.runs}) > 1:
            found.append("the sides made prompts of different lengths")
        return found

    def json(self) -> dict[str, Any]:
        """All runs and their summaries as JSON values."""
        return {
            "runs": [
                {**asdict(run), "rows_per_s": run.rows_per_s, "output_tokens_per_s": run.tokens_per_s}
                for run in self.runs
            ],
            "sides": {name: summary(runs) for name, runs in self.by_name().items()},
            "cannot_run": self.cannot,
            "not_reached": self.not_reached,
        }


def measure(
    sides: Mapping[str, Side],
    task: Task,
    folder: Path,
    repetitions: int,
    tell: Tell,
    save: Callable[[Measured], object] = lambda measured: None,
) -> Measured:
    """Every side `repetitions` times, in turns; `save` is called after each. A side is not begun when `task.deadline` is
    nearer than its last repetition was long."""
    measured, took = Measured(), dict.fromkeys(sides, 0.0)
    for repetition in range(1, repetitions + 1):
        for name, side in sides.items():
            if name in measured.cannot:
                continue
            began = time.monotonic()
            if task.deadline is not None and began + took[name] > task.deadline:
                measured.not_reached.append(f"{name} {repetition}")
                tell(f"  {name} {repetition}: not begun, it would take {took[name]:.0f} s")
                continue
            try:
                runs = side(task, folder / f"{name}-{repetition}")
            except OutOfTime as error:
                measured.not_reached.append(f"{name} {repetition}")
                tell(f"  {name} {repetition}: {error}")
                continue
            except ChildFailed as error:
                measured.cannot[name] = reason(error)
                tell(f"  {name}: FAILED: {error}")
                save(measured)
                continue
            took[name] = time.monotonic() - began
            measured.runs += runs
            for run in runs:
                finish = "" if run.finish_s is None else f", finish {run.finish_s:.1f} s"
                tell(
                    f"  {run.name} {repetition}: {run.tokens_per_s:,.0f} output tokens/s over {run.steady_s:.1f} s, "
                    f"start-up {run.startup_s:.1f} s{finish}"
                )
            save(measured)
    return measured


def variants(side: Side, settings: Sequence[Mapping[str, Any]]) -> Side:
    """`side` once for each of these values of `task.ray_data`."""

    def each(task: Task, folder: Path) -> list[Run]:
        runs = []
        for number, values in enumerate(settings):
            name = ", ".join(f"{key} {value}" for key, value in values.items())
            done = side(replace(task, ray_data=values), folder / str(number))
            runs += [replace(run, variant=name) for run in done]
        return runs

    return each


FIGURES: dict[str, Callable[[Run], float | None]] = {
    "output_tokens_per_s": lambda run: run.tokens_per_s,
    "total_tokens_per_s": lambda run: run.total_tokens_per_s,
    "rows_per_s": lambda run: run.rows_per_s,
    "startup_s": lambda run: run.startup_s or None,
    "steady_s": lambda run: run.steady_s,
    "finish_s": lambda run: run.finish_s,
    "wall_s": lambda run: run.wall_s,
    "cpu_s": lambda run: run.cpu_s,
    "cpu_s_per_1000_output_tokens": lambda run: (
        None if run.cpu_s is None or not run.output_tokens else 1000 * run.cpu_s / run.output_tokens
    ),
}


def summary(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """Median, lowest and highest of each figure that any of the runs has."""
    found = {}
    for name, figure in FIGURES.items():
        values = [value for run in runs if (value := figure(run)) is not None]
        if values:
            found[name] = {
                "median": statistics.median(values),
                "min": min(values),
                "max": max(values),
                "n": len(values),
            }
    return found


def reason(error: Exception) -> str:
    """The last line of a log that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line or "Exception" in line]
    return (errors or lines or ["no word"])[-1][:300]


def figure(found: Mapping[str, Mapping[str, float]], name: str, form: str) -> str:
    """`8,608 (8,197 – 9,019)`; nothing where no run has it."""
    if name not in found:
        return ""
    one = found[name]
    spread = f" ({one['min']:{form}} – {one['max']:{form}})" if one["n"] > 1 else ""
    return f"{one['median']:{form}}{spread}"


def table(
    measured: Measured, to: str | None = None, more: Mapping[str, Sequence[str]] | None = None
) -> list[tuple[str, ...]]:
    """One line a side; ratios to the side `to` (default: the first that ran). `more`: further columns, by name of a run."""
    sides = {name: summary(runs) for name, runs in measured.by_name().items()}
    base = sides.get(to or "") or (next(iter(sides.values())) if sides else {})
    more = more or {}
    lines: list[tuple[str, ...]] = [
        (
            "side",
            "runs",
            "output tokens/s, steady",
            "ratio",
            *more.get("", ()),
            "start-up, s",
            "steady, s",
            "finish, s",
            "whole, s",
            "CPU s per 1,000 output tokens",
        )
    ]
    for name, found in sides.items():
        rate = found["output_tokens_per_s"]
        lines.append(
            (
                name,
                str(rate["n"]),
                figure(found, "output_tokens_per_s", ",.0f"),
                f"{rate['median'] / base['output_tokens_per_s']['median']:.2f}",
                *more.get(name, ()),
                figure(found, "startup_s", ",.1f"),
                figure(found, "steady_s", ",.1f"),
                figure(found, "finish_s", ",.1f"),
                figure(found, "wall_s", ",.1f"),
                figure(found, "cpu_s_per_1000_output_tokens", ".2f"),
            )
        )
    lines += [(f"{name}: cannot run: {why}",) for name, why in measured.cannot.items()]
    if measured.not_reached:
        lines.append((f"no time left for: {', '.join(measured.not_reached)}",))
    return lines


def markdown(lines: Sequence[tuple[str, ...]]) -> str:
    """A table; lines of one cell become text below it."""
    cells = [line for line in lines if len(line) > 1]
    rows = ["| " + " | ".join(line) + " |" for line in cells]
    rows.insert(1, "|" + "---|" * len(cells[0]))
    return "\n".join([*rows, "", *(line[0] for line in lines if len(line) == 1)])
