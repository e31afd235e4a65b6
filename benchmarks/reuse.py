"""What an edit costs with `reuse`: the tokens of a job whose judge has another rubric, and of one whose input has grown by 1 %.

    python benchmarks/reuse.py --rows 2000 --out results

The repository's tiny model on a CPU answers each row (temperature 1, seeded), and judges each answer. Three jobs: as it is, keeping its
answers; with another rubric; with one row more for each hundred at the end of the input's file. Tokens are counted in the rows
that were written, of both generations; what the footers call reused was not generated.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.machine import machine
from benchmarks.measuring import markdown
from benchmarks.tiny_job import TinyJob, run, write_questions

RUBRICS = "Is the answer right?", "Is the answer polite?"


def main() -> int:
    """A table, and JSON in `--out`; exit code 1 when a reused answer differs from the one that was kept."""
    args = _arguments()
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    write_questions(args.out, _questions(args.rows))
    first = _run(args.out, "first", RUBRICS[0])
    rubric = _run(args.out, "rubric", RUBRICS[1], reuse=first)
    more = args.rows // 100
    write_questions(args.out, _questions(args.rows + more))
    grown = _run(args.out, "grown", RUBRICS[0], reuse=first)
    jobs = {"first": first, "another rubric": rubric, f"{more:,} rows more": grown}
    runs = {name: _told(job) for name, job in jobs.items()}
    lines: list[tuple[str, ...]] = [
        ("job", "rows", "output tokens in the rows", "generated", "share of the first", "whole, s")
    ]
    whole = runs["first"]["generated"]
    for name, told in runs.items():
        numbers = (f"{told[one]:,}" for one in ("rows", "tokens", "generated"))
        lines.append((name, *numbers, f"{told['generated'] / whole:.1%}", f"{told['wall_s']:.0f}"))
    (args.out / "reuse.json").write_text(json.dumps({"machine": machine(), "runs": runs}, indent=1) + "\n")
    kept = first.texts
    same = kept == rubric.texts == {row: text for row, text in grown.texts.items() if row in kept}
    print(markdown([*lines, (f"answers of the first job's rows are {'the same' if same else 'DIFFERENT'}",)]))
    return int(not same)


def _questions(rows: int) -> list[str]:
    """The input; of more rows the first are the same."""
    return [f"What is {n} plus {n % 7}?" for n in range(rows)]


def _run(folder: Path, name: str, rubric: str, reuse: TinyJob | None = None) -> TinyJob:
    columns = ["question", "generated_text"]
    return run(
        folder,
        name,
        sampling={"temperature": 1.0, "seed": 0, "max_tokens": 48},
        steps=[{"judge": {"column": "score", "rubric": rubric, "columns": columns}}],
        reuse={"outputs": [str(reuse.output)]} if reuse else {"keep": True},
    )


def _told(job: TinyJob) -> dict[str, Any]:
    """Its rows, the tokens in them, and those that were generated."""
    rows = job.rows("completion_tokens", "score_completion_tokens")
    tokens = sum(pc.sum(column).as_py() or 0 for column in rows.columns)
    reused = sum(one["tokens_reused"] for one in job.stats)
    return {"rows": len(rows), "tokens": tokens, "generated": tokens - reused, "wall_s": job.wall_s}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=Path("bench-reuse"))
    args = parser.parse_args()
    args.out = args.out.resolve()
    return args


if __name__ == "__main__":
    sys.exit(main())
