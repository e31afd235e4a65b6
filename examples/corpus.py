"""Small texts for the recipes in `conf/recipes/`, drawn from lists: documents, personas, and tasks to begin with.

    python examples/corpus.py documents OUT.parquet --rows 200 [--seed 0] [--files 2]

writes Parquet. `documents` have the string columns id, text and topic (one of `TOPICS`, known because the text is made
from it); `personas` have id and persona; `tasks` have id and, in each row, a list of three tasks. With `--files 2` the
rows are spread over `OUT-00000-of-00002.parquet` and its sibling. The output depends on nothing but the arguments.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

# fmt: off
TOPICS = {
    "sport": (
        "{name} won the race through {town} in {small} minutes. {number} people watched, and the prize was a {thing}.",
        "The team of {town} scored {small} goals on {day}. Its captain, {name}, had trained for {number} hours.",
    ),
    "trade": (
        "{name} sold {number} boxes of {goods} in {town} on {day}. A box cost {small} coins.",
        "The market of {town} opens on {day}. {name} brings {number} kilos of {goods} and a {thing}.",
    ),
    "weather": (
        "On {day} it rained for {small} hours in {town}. {name} measured {number} litres in a {thing}.",
        "A storm took {number} trees in {town}. {name} saw it coming {small} hours before, on {day}.",
    ),
}
_WORDS = {
    "name": ("Clara Meyer", "Ivo Lund", "Ada Okafor", "Juan Prieto", "Mei Tanaka", "Rosa Klein"),
    "town": ("Lindau", "Porto", "Bergen", "Nara", "Leeds", "Quito"),
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "goods": ("apples", "rye bread", "nails", "candles", "tea"),
    "thing": ("silver cup", "copper kettle", "wooden cart", "glass bowl"),
    "trade": ("baker", "surveyor", "nurse", "train driver", "beekeeper", "teacher"),
    "interest": ("counts everything", "plans for the week", "writes numbers out in words", "adds up bills"),
}
_TASKS = (
    "Write {number} in words.", "Which day comes {small} days after {day}?", "Add {small} and {number}.",
    "Turn a list of {goods} into a table with prices.", "Write to {name} that the {thing} has arrived.",
    "Give {small} reasons to visit {town}.", "Shorten a text about {goods} to one sentence.",
)
# fmt: on

KINDS = ("documents", "personas", "tasks")
TASKS_PER_ROW = 3


def rows_of(kind: str, rows: int, seed: int = 0) -> list[dict[str, Any]]:
    """`rows` rows of one of `KINDS`; the first ones are the same however many there are."""
    draw = random.Random(f"{kind} {seed}")
    return [{"id": f"{kind[0]}-{row:06d}", **_row(kind, draw)} for row in range(rows)]


def write(kind: str, out: Path, rows: int, seed: int = 0, files: int = 1) -> list[Path]:
    """Write them to `out`, or to `files` numbered siblings of it; returns the paths."""
    table = pa.Table.from_pylist(rows_of(kind, rows, seed))
    out.parent.mkdir(parents=True, exist_ok=True)
    if files == 1:
        paths = [out]
    else:
        paths = [out.with_name(f"{out.stem}-{n:05d}-of-{files:05d}{out.suffix}") for n in range(files)]
    for n, path in enumerate(paths):
        start, end = rows * n // files, rows * (n + 1) // files
        pq.write_table(table.slice(start, end - start), path)
    return paths


def _row(kind: str, draw: random.Random) -> dict[str, Any]:
    if kind == "documents":
        topic = draw.choice(list(TOPICS))
        return {"text": _filled(draw.choice(TOPICS[topic]), draw), "topic": topic}
    if kind == "personas":
        return {"persona": _filled("A {trade} from {town} who {interest}.", draw)}
    return {"tasks": [_filled(task, draw) for task in draw.sample(_TASKS, TASKS_PER_ROW)]}


def _filled(text: str, draw: random.Random) -> str:
    words = {name: draw.choice(choices) for name, choices in _WORDS.items()}
    return text.format(**words, small=draw.randrange(2, 10), number=draw.randrange(110, 10_000))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write small made-up texts as Parquet.")
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("out", type=Path, help="the Parquet file, or the stem of its numbered siblings")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--files", type=int, default=1, help="how many files to spread the rows over")
    args = parser.parse_args()
    if not 1 <= args.files <= args.rows:
        parser.error("--files must be at least 1 and at most --rows")
    for path in write(args.kind, args.out, args.rows, args.seed, args.files):
        print(path)


if __name__ == "__main__":
    main()
