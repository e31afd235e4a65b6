"""Dray's benchmarks: one command, a table on stdout, JSON in out/bench/.

    make bench                                  # all of it, some 40 minutes on two cores
    make bench ARGS=--quick                     # does everything work: a few minutes, no figures to quote
    python benchmarks/run.py --only throughput --repetitions 3

docs/performance.md says what is measured and has the figures.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import driver_memory, shard_overhead, throughput
from benchmarks.child import ChildFailed
from benchmarks.machine import ROOT, is_busy, machine

NAMES = ("throughput", "driver-memory", "shard-overhead")
OUT = ROOT / "out" / "bench"


def main() -> int:
    """Run what the command line asks for. Exit code 1 when a benchmark failed or its outputs are not right."""
    args = _arguments()
    result: dict[str, Any] = {"machine": machine(), "quick": args.quick}
    if args.quick:
        _say("--quick: too short for figures that mean anything\n")
    elif is_busy():
        _say("the machine is busy with other work (see `uptime`): the figures will be too low\n")
    measures: dict[
        str, tuple[Callable[[], dict[str, Any]], Callable[[dict[str, Any]], list[tuple[str, ...]]]]
    ] = {
        "throughput": (lambda: _throughput(args), throughput.table),
        "driver-memory": (lambda: _driver_memory(args), driver_memory.table),
        "shard-overhead": (lambda: _shard_overhead(args), shard_overhead.table),
    }
    failed = False
    for name in args.only or NAMES:
        measure, table = measures[name]
        _say(f"{name} …")
        try:
            result[name] = measure()
        except ChildFailed as error:
            result[name] = {"problems": [str(error)]}
            failed = True
            _say(f"  FAILED: {error}\n")
            continue
        _show(table(result[name]))
        for problem in result[name]["problems"]:
            failed = True
            _say(f"  WRONG: {problem}")
        _save(result)
    _say(f"figures: {_save(result)}")
    return int(failed)


def _throughput(args: argparse.Namespace) -> dict[str, Any]:
    folder = OUT / "work" / "throughput"
    work = throughput.task(
        model=args.model,
        rows=args.rows or (600 if args.quick else 7_500),
        max_tokens=args.max_tokens or (32 if args.quick else 160),
        threads=args.threads,
        in_flight=args.in_flight,
        folder=folder,
    )
    repetitions = args.repetitions or (1 if args.quick else 3)
    return throughput.measure(work, folder, repetitions, _say, args.side or throughput.NAMES)


def _driver_memory(args: argparse.Namespace) -> dict[str, Any]:
    rows = [2_000, 20_000] if args.quick else [10_000, 200_000]
    return driver_memory.measure(args.model, rows, OUT / "work" / "driver-memory", _say)


def _shard_overhead(args: argparse.Namespace) -> dict[str, Any]:
    return shard_overhead.measure(
        args.model, 50 if args.quick else 500, OUT / "work" / "shard-overhead", _say
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="see that everything works; no figures to quote")
    parser.add_argument("--only", action="append", choices=NAMES, help="run this one only (may be repeated)")
    parser.add_argument(
        "--repetitions", type=int, help="of each side of the throughput benchmark (default: 3)"
    )
    parser.add_argument(
        "--side",
        action="append",
        choices=throughput.NAMES,
        help="of the throughput benchmark (default: all; may be repeated)",
    )
    parser.add_argument(
        "--model",
        type=Path,
        default=ROOT / "examples" / "tiny-model",
        help="a local folder (default: the tiny model)",
    )
    parser.add_argument("--rows", type=int, help="of the throughput benchmark (default: 7,500)")
    parser.add_argument(
        "--max-tokens", type=int, help="of each answer in the throughput benchmark (default: 160)"
    )
    parser.add_argument("--threads", type=int, default=1, help="of the engine's computation (default: 1)")
    parser.add_argument(
        "--in-flight", type=int, help="requests in the engine at once (default: the model file's)"
    )
    args = parser.parse_args()
    args.model = args.model.resolve()
    if not (args.model / "config.json").is_file():
        parser.error(f"there is no model in {args.model}: train it, or give another with --model")
    if args.repetitions is not None and args.repetitions < 1:
        parser.error("--repetitions must be at least 1")
    return args


def _save(result: dict[str, Any]) -> Path:
    """Write what there is so far: an interrupted run keeps its figures."""
    OUT.mkdir(parents=True, exist_ok=True)
    stamp = result["machine"]["date"].replace(":", "").replace("+0000", "Z")
    path = OUT / f"bench-{stamp}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    shutil.copyfile(path, OUT / "latest.json")
    return path


def _show(lines: Sequence[tuple[str, ...]]) -> None:
    columns = max(map(len, lines))
    cells = [(*line, *[""] * (columns - len(line))) for line in lines]
    widths = [max(len(line[n]) for line in cells if any(line[1:])) for n in range(columns)]
    for line in cells:
        if not any(line[1:]):
            _say(f"  {line[0]}")
            continue
        first, *others = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        _say("  ".join([f"  {first}", *others]).rstrip())
    _say("")


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
