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

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import child
from benchmarks.machine import ROOT, machine
from benchmarks.measuring import markdown

RUBRICS = "Is the answer right?", "Is the answer polite?"


def main() -> int:
    """A table, and JSON in `--out`; exit code 1 when a reused answer differs from the one that was kept."""
    args = _arguments()
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    _write(args.out, args.rows)
    runs = {"first": _run(args.out, "first", RUBRICS[0])}
    runs["another rubric"] = _run(args.out, "rubric", RUBRICS[1], reuse=args.out / "first")
    more = args.rows // 100
    _write(args.out, args.rows + more)
    runs[f"{more:,} rows more"] = _run(args.out, "grown", RUBRICS[0], reuse=args.out / "first")
    lines: list[tuple[str, ...]] = [
        ("job", "rows", "output tokens in the rows", "generated", "share of the first", "whole, s")
    ]
    whole = runs["first"]["generated"]
    for name, run in runs.items():
        share = f"{run['generated'] / whole:.1%}"
        lines.append(
            (
                name,
                f"{run['rows']:,}",
                f"{run['tokens']:,}",
                f"{run['generated']:,}",
                share,
                f"{run['wall_s']:.0f}",
            )
        )
    (args.out / "reuse.json").write_text(json.dumps({"machine": machine(), "runs": runs}, indent=1) + "\n")
    first, rubric, grown = (_texts(args.out / name) for name in ("first", "rubric", "grown"))
    same = first == rubric == {row: text for row, text in grown.items() if row in first}
    print(markdown([*lines, (f"answers of the first job's rows are {'the same' if same else 'DIFFERENT'}",)]))
    return int(not same)


def _write(folder: Path, rows: int) -> None:
    """The input; of more rows the first are the same."""
    (folder / "in").mkdir(exist_ok=True)
    questions = [f"What is {n} plus {n % 7}?" for n in range(rows)]
    pq.write_table(pa.table({"question": questions}), folder / "in" / "rows.parquet")


def _run(folder: Path, name: str, rubric: str, reuse: Path | None = None) -> dict[str, Any]:
    """One job; its rows, the tokens in them, and those that were generated."""
    job = {
        "name": "reuse",
        "extends": [str(ROOT / "conf/base.yaml"), str(ROOT / "conf/models/tiny.yaml")],
        "input": {"path": str(folder / "in")},
        "prompt": {"template": "{{ question }}"},
        "model": {"source": str(ROOT / "examples/tiny-model")},
        "sampling": {"temperature": 1.0, "seed": 0, "max_tokens": 48},
        "steps": [
            {"judge": {"column": "score", "rubric": rubric, "columns": ["question", "generated_text"]}}
        ],
        "reuse": {"outputs": [str(reuse)]} if reuse else {"keep": True},
        "output": {"path": str(folder / name)},
        "shards": {"rows": 250},
    }
    (folder / f"{name}.yaml").write_text(json.dumps(job))
    watched = child.run(
        child.dray("run", str(folder / f"{name}.yaml"), "--quiet"),
        log=folder / f"{name}.txt",
        env=child.environment({"DRAY_LOGS": str(folder / "logs"), "VLLM_CPU_KVCACHE_SPACE": "1"}),
        cwd=ROOT,
    )
    parts = list((folder / name / "data").glob("*.parquet"))
    rows = pa.concat_tables(
        [pq.read_table(part, columns=["completion_tokens", "score_completion_tokens"]) for part in parts]
    )
    stats = [json.loads(pq.read_metadata(part).metadata[b"dray"])["stats"] for part in parts]
    tokens = sum(pc.sum(column).as_py() or 0 for column in rows.columns)
    reused = sum(one["tokens_reused"] for one in stats)
    return {"rows": len(rows), "tokens": tokens, "generated": tokens - reused, "wall_s": watched.wall_s}


def _texts(output: Path) -> dict[str, str]:
    rows = pa.concat_tables(
        [
            pq.read_table(part, columns=["row_id", "generated_text"])
            for part in (output / "data").glob("*.parquet")
        ]
    )
    return dict(zip(rows["row_id"].to_pylist(), rows["generated_text"].to_pylist(), strict=True))


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
