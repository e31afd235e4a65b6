"""Dray against the ways to run a dataset through vLLM without it, on one host's GPUs; random weights, nothing downloaded.

    python benchmarks/gpu.py --workload W1 --model 0.5b --sides llm_generate,async_llm,ray_data,ray_data_tuned,dray --budget-s 500
    python benchmarks/gpu.py --workload W1 --model 7b --tp 2 --in-flight 256,512 --repetitions 3
    python benchmarks/gpu.py --workload W5 --model 7b --replicas 4 --sides async_llm,dray

docs/performance.md says what is measured. A Markdown table comes to stdout; JSON with every repetition goes to `--out`, written anew
after each one. After `--budget-s` seconds what runs is stopped and the table is made of what there is.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.machine import ROOT, gpus, machine
from benchmarks.measuring import Measured, Tell, markdown, measure, table, variants
from benchmarks.roofline import Cost, peak_of
from benchmarks.shapes import SHAPES, model_folder
from benchmarks.sides import SIDES, Task, answers, ray_data_tuned
from benchmarks.workloads import WORKLOADS

DEFAULT_SIDES = "llm_generate,async_llm,ray_data,ray_data_tuned,dray"


def main() -> int:
    """Run what the command line asks for. Exit code 1 when a side failed or wrote other rows than it had to."""
    began = time.monotonic()
    args = _arguments()
    work: Path = args.out / f"{args.workload}-{args.model}-tp{args.tp}x{args.replicas}"
    shutil.rmtree(work, ignore_errors=True)
    task, result = _task(args, work, began + args.budget_s)
    sides = {name: SIDES[name] for name in args.sides}
    if "ray_data_tuned" in sides:
        sides["ray_data_tuned"] = variants(ray_data_tuned, args.ray_data)
    rows = pq.read_table(task.input, columns=["max_tokens"])
    wanted = task.rows, pc.sum(rows["max_tokens"]).as_py()

    def save(measured: Measured) -> None:
        found = result | measured.json() | {"roofline": _roofline(measured, args, task)}
        found["problems"] = measured.problems(*wanted)
        (args.out / f"{work.name}.json").write_text(json.dumps(found, indent=1) + "\n")

    tell: Tell = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
    measured = measure(sides, task, work, args.repetitions, tell, save)
    save(measured)
    print(
        f"\n{args.workload} ({WORKLOADS[args.workload].what}), shape {args.model}, TP {args.tp}, {args.replicas} replicas,"
    )
    print(
        f"{task.rows:,} rows, {wanted[1]:,} output tokens; {', '.join(result['gpus']) or 'no GPU'}; {_versions(result)}\n"
    )
    shares = _roofline(measured, args, task)
    more = {"": ("MFU", "MBU")} if shares else {}
    more |= {name: (f"{share['mfu']:.1%}", f"{share['mbu']:.1%}") for name, share in shares.items()}
    if measured.runs:
        print(markdown(table(measured, more=more)))
    problems = measured.problems(*wanted)
    for problem in problems:
        print(f"WRONG: {problem}")
    return int(bool(problems or measured.cannot))


def _task(args: argparse.Namespace, work: Path, deadline: float) -> tuple[Task, dict[str, Any]]:
    workload = WORKLOADS[args.workload]
    count = args.rows or workload.rows[args.model] * args.replicas
    work.mkdir(parents=True)
    pq.write_table(workload.table(count), work / "rows.parquet")
    model = model_folder(args.model, work / "model")
    engine: dict[str, Any] = {
        "load_format": "dummy",
        "max_model_len": workload.max_model_len,
        # Every row is answered several times by one engine; only shared prefixes may be found in the cache.
        "enable_prefix_caching": workload.prefixes > 0,
        "max_num_seqs": args.max_num_seqs,
        "max_num_batched_tokens": args.max_num_batched_tokens,
    }
    if args.tp > 1:
        engine |= {"tensor_parallel_size": args.tp, "distributed_executor_backend": "mp"}
    environment = {}
    if args.device == "cpu":
        engine |= {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 2**29}
        environment = {
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }
    task = Task(
        input=work / "rows.parquet",
        rows=count,
        template="{{ prompt }}",
        chat=False,
        model=model,
        engine=engine | args.engine,
        sampling={"temperature": 0, "ignore_eos": True, "max_tokens": workload.max_model_len},
        max_tokens_column="max_tokens",
        in_flight=args.in_flight,
        ray_data=args.ray_data[0],
        limits=("max_num_seqs", "max_num_batched_tokens", "distributed_executor_backend"),
        device=args.device,
        replicas=args.replicas,
        packed=args.packed,
        warmup_rows=args.warmup_rows,
        pool=args.pool,
        shard_rows=args.shard_rows or max(256, count // (8 * args.replicas * args.packed)),
        environment=environment,
        deadline=deadline,
    )
    result = {
        "machine": machine(),
        "gpus": gpus(),
        "arguments": {key: str(value) for key, value in vars(args).items()},
        "workload": workload.what,
        "rows": count,
        "engine": task.engine,
        "sampling": task.sampling,
        "environment": environment,
    }
    return task, result


def _roofline(measured: Measured, args: argparse.Namespace, task: Task) -> dict[str, dict[str, float]]:
    """`mfu` and `mbu` of each side's median, where the GPU's peak is known."""
    found = gpus()
    peak = peak_of(found[0]) if found else None
    if peak is None:
        return {}
    cost = Cost.of(SHAPES[args.model])
    shares = {}
    for name, runs in measured.by_name().items():
        lengths = answers(runs[0], ["id", "prompt_tokens", "completion_tokens"])
        seconds = statistics.median(run.steady_s for run in runs)
        engines = args.replicas * (args.packed if runs[0].side == "dray_packed" else 1)
        most = int(task.engine["max_num_seqs"]) * engines
        shares[name] = cost.shares(lengths, seconds, peak, args.tp * args.replicas, most)
    return shares


def _versions(result: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in result["machine"]["versions"].items())


def _arguments() -> argparse.Namespace:
    def names(text: str) -> list[str]:
        unknown = [name for name in text.split(",") if name not in SIDES]
        if unknown:
            raise argparse.ArgumentTypeError(f"no side {unknown[0]!r}; there are {', '.join(SIDES)}")
        return text.split(",")

    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--workload", choices=WORKLOADS, required=True)
    add("--model", choices=SHAPES, required=True, help="the shape of Qwen2.5 of this size")
    add("--sides", type=names, default=names(DEFAULT_SIDES), help=f"of {', '.join(SIDES)}")
    add("--repetitions", type=int, default=3)
    add("--budget-s", type=float, default=500, help="stop after so many seconds (default: 500)")
    add("--rows", type=int, help="default: for 10 to 20 s on one H200")
    add("--tp", type=int, default=1)
    add("--replicas", type=int, default=1)
    add("--packed", type=int, default=2, help="engines per GPU of dray_packed (default: 2)")
    add("--max-num-seqs", type=int, default=512, help="of all sides but ray_data (default: 512)")
    add("--max-num-batched-tokens", type=int, default=16384, help="likewise (default: 16,384)")
    add(
        "--in-flight",
        type=numbers,
        default=[256, 512],
        help="of async_llm, a pass for each (default: 256,512)",
    )
    add(
        "--ray-data",
        type=json.loads,
        default=[{"batch_size": 256, "max_concurrent_batches": 8}],
        help="JSON list of settings for ray_data_tuned, a process for each",
    )
    add("--engine", type=json.loads, default={}, help="JSON of further EngineArgs for all sides")
    add("--pool", type=json.loads, default={}, help="JSON of further settings of Dray's pool")
    add("--warmup-rows", type=int, default=64, help="of llm_generate and async_llm (default: 64)")
    add("--shard-rows", type=int, help="of Dray (default: eight shards an engine, at least 256)")
    add(
        "--device", choices=("gpu", "cpu"), default="gpu", help="cpu: only to see that it runs (--model nano)"
    )
    add("--out", type=Path, default=ROOT / "out" / "bench" / "gpu")
    args = parser.parse_args()
    args.out = args.out.resolve()
    return args


if __name__ == "__main__":
    sys.exit(main())
