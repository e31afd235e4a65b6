"""Two models in one job, a pool of engines each, against the same two generations as two jobs one after the other.

    python benchmarks/two_pools.py --model 7b --rows 2000 --out results            # needs two GPUs
    python benchmarks/two_pools.py --model nano --rows 60 --device cpu             # tries it out

One job: writer and reader have one engine each, side by side. Two jobs: each has both GPUs, two engines, and the second
reads what the first wrote. Random weights, nothing downloaded. Whole seconds are from the start of the commands to their
ends; steady ones from the first request to the last part, summed over the two jobs. Rows and tokens are counted
in the part files; how busy the engines of each pool were is the job's own report.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import child
from benchmarks.machine import ROOT, machine
from benchmarks.measuring import markdown
from benchmarks.shapes import model_folder
from benchmarks.workloads import WORKLOADS
from jobs.inspect import report_of
from jobs.report import figures
from pipelines.storage import Storage

#: What the reader sees of an answer, in characters: one token each, with the tokenizer of `shapes`.
SEEN = 600
READER_TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class Found:
    """One way to do it."""

    name: str
    whole_s: float
    steady_s: float
    rows: int
    output_tokens: int
    busy: str
    """`engines busy` of the job's report, or of each job's."""


def main() -> int:
    """Run both ways once; exit code 1 when they wrote other rows than each other."""
    args = _arguments()
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    pq.write_table(WORKLOADS["W1"].table(args.rows), args.out / "rows.parquet")
    models = {name: str(model_folder(args.model, args.out / name)) for name in ("writer", "reader")}
    found = [_one_job(args, models), _two_jobs(args, models)]
    both = {(one.rows, one.output_tokens) for one in found}
    (args.out / "two_pools.json").write_text(
        json.dumps({"machine": machine(), "ways": [asdict(one) for one in found]}, indent=1) + "\n"
    )
    head = (
        "way",
        "whole, s",
        "steady, s",
        "ratio, whole",
        "ratio, steady",
        "rows",
        "output tokens",
        "engines busy",
    )
    print(markdown([head, *(_line(one, found[-1]) for one in found)]))
    return int(len(both) > 1)


def _line(one: Found, base: Found) -> tuple[str, ...]:
    return (
        one.name,
        f"{one.whole_s:.1f}",
        f"{one.steady_s:.1f}",
        f"{base.whole_s / one.whole_s:.2f}",
        f"{base.steady_s / one.steady_s:.2f}",
        f"{one.rows:,}",
        f"{one.output_tokens:,}",
        one.busy,
    )


def _one_job(args: argparse.Namespace, models: dict[str, str]) -> Found:
    out = args.out / "one"
    step = {
        "name": "read",
        "generate": {
            "column": "read",
            "prompt": _prompt(f"{{{{ generated_text[:{SEEN}] }}}}"),
            "sampling": _sampling(READER_TOKENS),
            "model": _model(models["reader"]),
        },
    }
    job = _job("one", args, args.out / "rows.parquet", out, models["writer"], steps=[step])
    whole = _run(args, job)
    busy, steady = _report(out)
    tokens = _total(out, "completion_tokens") + _total(out, "read_completion_tokens")
    return Found(
        name="one job, two pools",
        whole_s=whole,
        steady_s=steady,
        rows=_rows(out),
        output_tokens=tokens,
        busy=busy,
    )


def _two_jobs(args: argparse.Namespace, models: dict[str, str]) -> Found:
    wrote, read = args.out / "wrote", args.out / "read"
    pool = {"replicas": 2}
    first = _job("wrote", args, args.out / "rows.parquet", wrote, models["writer"], pool=pool)
    second = _job(
        "read",
        args,
        wrote / "data",
        read,
        models["reader"],
        pool=pool,
        input={"path": str(wrote / "data"), "columns": ["generated_text"]},
        prompt=_prompt(f"{{{{ generated_text[:{SEEN}] }}}}"),
        sampling=_sampling(READER_TOKENS),
        output={"path": str(read), "rename": {"generated_text": "written"}},
    )
    whole = _run(args, first) + _run(args, second)
    reports = [_report(out) for out in (wrote, read)]
    return Found(
        name="two jobs, one after the other",
        whole_s=whole,
        steady_s=sum(steady for _, steady in reports),
        rows=_rows(read),
        output_tokens=_total(wrote, "completion_tokens") + _total(read, "completion_tokens"),
        busy="; then ".join(busy for busy, _ in reports),
    )


def _job(
    name: str, args: argparse.Namespace, path: Path, out: Path, model: str, **sections: Any
) -> dict[str, Any]:
    return {
        "name": name,
        "input": {"path": str(path)},
        "prompt": _prompt("{{ prompt }}"),
        "model": _model(model),
        "sampling": {**_sampling(None), "max_tokens_column": "max_tokens"},
        "output": {"path": str(out)},
        "pool": {"device": args.device, "replicas": 1, "engines_per_gpu": 1},
        "shards": {"rows": max(20, args.rows // 24)},
    } | {
        key: {"device": args.device, "engines_per_gpu": 1, **value} if key == "pool" else value
        for key, value in sections.items()
    }


def _prompt(template: str) -> dict[str, Any]:
    return {"template": template, "chat": False}


def _model(folder: str) -> dict[str, Any]:
    return {"source": folder, "engine": {"load_format": "dummy", "max_model_len": 1024}}


def _sampling(max_tokens: int | None) -> dict[str, Any]:
    limit = {} if max_tokens is None else {"max_tokens": max_tokens}
    return {"temperature": 1, "seed": 0, "ignore_eos": True, **limit}


def _run(args: argparse.Namespace, job: dict[str, Any]) -> float:
    """Seconds that the command took."""
    path = args.out / f"{job['name']}.yaml"
    path.write_text(yaml.safe_dump(job, sort_keys=False))
    watched = child.run(
        child.dray("run", str(path), "--quiet"),
        log=args.out / f"{job['name']}.txt",
        env=child.environment({"DRAY_LOGS": str(args.out / "logs")}),
        cwd=ROOT,
        deadline=args.deadline,
    )
    print(f"{job['name']}: {watched.wall_s:.1f} s", file=sys.stderr, flush=True)
    return watched.wall_s


def _report(out: Path) -> tuple[str, float]:
    """(how busy the engines were, seconds from the first request to the last part), by the footers."""
    report = report_of(Storage(str(out), {}))
    footers = [
        json.loads(pq.read_metadata(part).metadata[b"dray"]) for part in (out / "data").glob("*.parquet")
    ]
    began = min(turn["began_at"] for footer in footers for turn in footer["provenance"]["turns"])
    ended = max(footer["provenance"]["committed_at"] for footer in footers)
    return figures(report)["engines busy"], ended - began


def _rows(out: Path) -> int:
    return sum(pq.read_metadata(part).num_rows for part in (out / "data").glob("*.parquet"))


def _total(out: Path, column: str) -> int:
    return pc.sum(pq.read_table(out / "data", columns=[column])[column]).as_py() or 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="7b")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--device", choices=["gpu", "cpu"], default="gpu")
    parser.add_argument("--budget-s", type=float, default=500)
    parser.add_argument("--out", type=Path, default=Path("bench-two-pools"))
    args = parser.parse_args()
    args.out = args.out.resolve()
    args.deadline = time.monotonic() + args.budget_s
    return args


if __name__ == "__main__":
    sys.exit(main())
