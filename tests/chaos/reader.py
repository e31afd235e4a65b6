"""The independent check of an output: pyarrow alone, nothing of `jobs` or `pipelines`.

It reads the input files as they are now and every Parquet file below `data/`, and compares them row by row: each input
row exactly once, each answer as in an undisturbed greedy run, errors where errors are due and nowhere else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pyarrow import fs


@dataclass(frozen=True)
class Place:
    """A folder in a store, and how row ids and people name it."""

    files: fs.FileSystem
    path: str
    url: str

    def names(self) -> list[str]:
        """The files below it, relative to it, in order."""
        selector = fs.FileSelector(self.path, recursive=True, allow_not_found=True)
        found = [info.path for info in self.files.get_file_info(selector) if info.is_file]
        return sorted(path.removeprefix(self.path).lstrip("/") for path in found)


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What the reader saw, in rows."""

    rows: int
    """Rows of the input."""
    lost: int
    """Input rows that the output lacks, copies counted singly."""
    doubled: int
    """Output rows beyond the input's: second copies, and rows that nobody asked for."""
    wrong: int
    """Rows with another question or another answer than they should have."""
    misjudged: int
    """Rows with an error although none was due, or without the error that was due."""
    finished: bool
    """`_SUCCESS` stands."""
    example: str = ""
    """The first thing that is not as it should be."""

    @property
    def sound(self) -> bool:
        return self.finished and not (self.lost or self.doubled or self.wrong or self.misjudged)


def check(
    source: Place, output: Place, answers: Mapping[str, str], errors: Mapping[str, frozenset[str]]
) -> Findings:
    """Compare an output with its input.

    `answers`: question → the answer of an undisturbed run. `errors`: row id below the input folder (`q000.parquet#7`) →
    the error codes it may have; rows that are not in it must be answered.
    """
    asked: dict[str, str | None] = {}
    for name in source.names():
        with source.files.open_input_file(f"{source.path}/{name}") as file:
            questions = pq.read_table(file, columns=["question"])["question"].to_pylist()
        asked.update({f"{name}#{number}": question for number, question in enumerate(questions)})

    prefix = source.url.rstrip("/") + "/"
    parts = [f"{output.path}/{name}" for name in output.names() if _is_part(name)]
    columns = ["row_id", "question", "generated_text", "error_code"]
    found = (
        ds.dataset(parts, filesystem=output.files, format="parquet").to_table(columns=columns).to_pylist()
        if parts
        else []
    )
    examples: list[str] = []
    counted: Counter[str] = Counter()
    wrong = misjudged = 0
    for row in found:
        name = row["row_id"].removeprefix(prefix)
        counted[name] += 1
        if name not in asked or counted[name] > 1:
            examples.append(
                f"{row['row_id']} is there {counted[name]} times, in the input {name in asked:d} times"
            )
            continue
        due = errors.get(name, frozenset())
        if bool(due) != (row["error_code"] is not None) or (due and row["error_code"] not in due):
            misjudged += 1
            examples.append(f"{name}: error {row['error_code']!r}, due was {sorted(due) or None}")
        elif row["question"] != asked[name]:
            wrong += 1
            examples.append(f"{name}: asked {row['question']!r}, the input says {asked[name]!r}")
        elif not due and row["generated_text"] != answers[row["question"]]:
            wrong += 1
            examples.append(
                f"{name}: {row['question']!r} → {row['generated_text']!r}, undisturbed {answers[row['question']]!r}"
            )
    lost = [name for name in asked if not counted[name]]
    examples += [f"{name} is lost" for name in lost]
    return Findings(
        rows=len(asked),
        lost=len(lost),
        doubled=counted.total() - sum(1 for name in counted if name in asked),
        wrong=wrong,
        misjudged=misjudged,
        finished="data/_SUCCESS" in output.names(),
        example=examples[0] if examples else "",
    )


def answers_of(output: Place) -> dict[str, str]:
    """Question → answer of an undisturbed run. Raises ValueError for a row without one."""
    found: dict[str, str] = {}
    for name in filter(_is_part, output.names()):
        with output.files.open_input_file(f"{output.path}/{name}") as file:
            table = pq.read_table(file, columns=["question", "generated_text"])
        for row in table.to_pylist():
            if row["generated_text"] is None:
                raise ValueError(f"the undisturbed run has no answer to {row['question']!r}")
            found[row["question"]] = row["generated_text"]
    return found


def _is_part(name: str) -> bool:
    return name.startswith("data/") and name.endswith(".parquet")
