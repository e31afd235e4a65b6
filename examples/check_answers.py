"""Compare a job's generations with the known answers of `examples/questions.py`.

    python examples/check_answers.py OUT_DIR [--min 0.99]

reads `OUT_DIR/data`, a Parquet dataset with the input's `question`, `answer` and `kind` beside
`generated_text` and `error_code`, and prints how many texts equal their answer to the letter. A failed row
counts as wrong. The exit code is 1 when the share of right rows is below `--min`, 2 when there is nothing
to compare.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds

COLUMNS = ["question", "answer", "kind", "generated_text", "error_code"]
WRONG_SHOWN = 5


def report(rows: list[dict[str, Any]]) -> tuple[float, str]:
    """The share of right rows, and the table by kind with the first wrong rows below it."""
    wrong = [row for row in rows if row["error_code"] is not None or row["generated_text"] != row["answer"]]
    total, missed = Counter(row["kind"] for row in rows), Counter(row["kind"] for row in wrong)
    lines = [_line(kind, total[kind] - missed[kind], total[kind]) for kind in sorted(total)]
    right = len(rows) - len(wrong)
    lines.append(f"{right:,} of {len(rows):,} right ({right / len(rows):.1%})".replace("%", " %"))
    for row in wrong[:WRONG_SHOWN]:
        got = row["error_code"] or repr(row["generated_text"])
        lines.append(f"  wrong: {row['question']!r} -> {got}, expected {row['answer']!r}")
    return right / len(rows), "\n".join(lines)


def _line(kind: str, right: int, total: int) -> str:
    return f"{kind:<10}{right:>8,} of {total:>8,} right"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare a job's generations with the known answers.")
    parser.add_argument("out", type=Path, help="the job's output folder")
    parser.add_argument("--min", type=float, default=0.99, help="least share of right rows (0.99)")
    args = parser.parse_args(arguments)
    try:
        rows = ds.dataset(args.out / "data", format="parquet").to_table(columns=COLUMNS).to_pylist()
    except (OSError, pa.ArrowInvalid) as error:
        print(f"cannot read {args.out / 'data'}: {error}", file=sys.stderr)
        return 2
    if not rows:
        print(f"{args.out / 'data'} holds no rows", file=sys.stderr)
        return 2
    share, text = report(rows)
    print(text)
    return 0 if share >= args.min else 1


if __name__ == "__main__":
    sys.exit(main())
