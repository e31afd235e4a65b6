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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.machine import machine
from benchmarks.measuring import markdown
from benchmarks.tiny_job import TinyJob, run, write_questions

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
SAMPLED = {"temperature": 1.0, "seed": 0}


def main() -> int:
    """A table, and JSON in `--out`; exit code 1 when an answer breaks the schema."""
    args = _arguments()
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    questions = [f"What is {n} plus {n % 7}?" for n in range(args.rows)]
    write_questions(args.out, questions)
    rates: dict[str, list[float]] = {"free": [], "by schema": []}
    valid, length = 0, None
    for number in range(args.repetitions):
        sampling = {**SAMPLED, "max_tokens": 160, "output_schema": SCHEMA}
        by_schema = run(args.out, f"schema-{number}", sampling=sampling)
        valid += sum(_fits(one) for one in by_schema.rows("parsed")["parsed"].to_pylist())
        length = length or round(pc.mean(_lengths(by_schema)).as_py())
        sampling = {**SAMPLED, "max_tokens": length, "ignore_eos": True}
        free = run(args.out, f"free-{number}", sampling=sampling)
        for name, job in (("by schema", by_schema), ("free", free)):
            rate = pc.sum(_lengths(job)).as_py() / job.asking_s
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


def _lengths(job: TinyJob) -> pa.ChunkedArray:
    """Output tokens of each row."""
    return job.rows("completion_tokens")["completion_tokens"]


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
