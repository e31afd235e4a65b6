"""What decoding by a JSON schema costs: the same prompts with `sampling.output_schema` and without, in turns, on a CPU.

    python benchmarks/constrained.py --rows 1000 --repetitions 3 --out results

The repository's tiny model, whose steps cost next to nothing, so that what the grammar adds to each step shows as much as it
ever will. Free answers get as many tokens as the schema's have on average (`ignore_eos`). Tokens/s are from the first request to the
last answer, by the footers. Every `parsed` is checked against the schema with jsonschema.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import child
from benchmarks.machine import ROOT, machine
from benchmarks.measuring import markdown

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["question", "writing", "calculation", "conversion"]},
        "task": {"type": "string", "minLength": 1, "maxLength": 40},
        "level": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["kind", "task", "level"],
    "additionalProperties": False,
}


def main() -> int:
    """A table, and JSON in `--out`; exit code 1 when an answer breaks the schema."""
    args = _arguments()
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    questions = [f"What is {n} plus {n % 7}?" for n in range(args.rows)]
    pq.write_table(pa.table({"question": questions}), args.out / "rows.parquet")
    rates: dict[str, list[float]] = {"free": [], "by schema": []}
    valid, length = 0, None
    for number in range(args.repetitions):
        by_schema = _run(args.out, f"schema-{number}", {"max_tokens": 160, "output_schema": SCHEMA})
        parsed = by_schema["parsed"].to_pylist()
        valid += sum(_fits(one) for one in parsed)
        length = length or round(pc.mean(by_schema["completion_tokens"]).as_py())
        free = _run(args.out, f"free-{number}", {"max_tokens": length, "ignore_eos": True})
        for name, rows, run in (("by schema", by_schema, "schema"), ("free", free, "free")):
            rate = pc.sum(rows["completion_tokens"]).as_py() / _seconds(args.out / f"{run}-{number}")
            rates[name].append(rate)
            print(f"{name} {number + 1}: {rate:,.0f} output tokens/s", file=sys.stderr, flush=True)
    asked = args.rows * args.repetitions
    result = {
        "machine": machine(),
        "tokens_per_s": rates,
        "valid": valid,
        "asked": asked,
        "tokens_each": length,
    }
    (args.out / "constrained.json").write_text(json.dumps(result, indent=1) + "\n")
    base = statistics.median(rates["free"])
    lines: list[tuple[str, ...]] = [("answers", "runs", "output tokens/s", "ratio")]
    for name, values in rates.items():
        middle = statistics.median(values)
        spread = f"{middle:,.0f} ({min(values):,.0f} – {max(values):,.0f})"
        lines.append((name, str(len(values)), spread, f"{middle / base:.2f}"))
    print(markdown([*lines, (f"{valid:,} of {asked:,} answers are valid; {length} tokens each on average",)]))
    return int(valid < asked)


def _fits(parsed: Any) -> bool:
    try:
        jsonschema.validate(parsed, SCHEMA)
    except jsonschema.ValidationError:
        return False
    return True


def _run(folder: Path, name: str, sampling: dict[str, Any]) -> pa.Table:
    """The rows of one job."""
    job = {
        "name": "constrained",
        "extends": [str(ROOT / "conf/base.yaml"), str(ROOT / "conf/models/tiny.yaml")],
        "input": {"path": str(folder / "rows.parquet")},
        "prompt": {"template": "{{ question }}"},
        "model": {"source": str(ROOT / "examples/tiny-model")},
        "sampling": {"temperature": 1.0, "seed": 0, **sampling},
        "output": {"path": str(folder / name)},
        "shards": {"rows": 250},
    }
    (folder / f"{name}.yaml").write_text(json.dumps(job))
    child.run(
        child.dray("run", str(folder / f"{name}.yaml"), "--quiet"),
        log=folder / f"{name}.txt",
        env=child.environment({"DRAY_LOGS": str(folder / "logs"), "VLLM_CPU_KVCACHE_SPACE": "1"}),
        cwd=ROOT,
    )
    return pq.read_table(folder / name / "data")


def _seconds(output: Path) -> float:
    """From the first request to the last answer."""
    footers = [
        json.loads(pq.read_metadata(part).metadata[b"dray"]) for part in (output / "data").glob("*.parquet")
    ]
    turns = [turn for footer in footers for turn in footer["provenance"]["turns"]]
    return max(turn["ended_at"] for turn in turns) - min(turn["began_at"] for turn in turns)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("bench-constrained"))
    args = parser.parse_args()
    args.out = args.out.resolve()
    return args


if __name__ == "__main__":
    sys.exit(main())
