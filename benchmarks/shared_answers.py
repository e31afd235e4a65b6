"""What it costs to share answers between shards, and what it saves.

    python benchmarks/shared_answers.py --rows 2000 --engines 1 --out results

First each row's cost where no two prompts are equal, so that nothing is gained: shards of 1,000 rows claim and tell through a shelf
in the process, and through Ray's actor. Then one job twice, with `reuse.equal_prompts` `greedy` and `none`: the repository's
tiny model on a CPU, a fifth as many questions as rows, in shards of 250 rows.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import pickle
import shutil
import sys
import time
from array import array
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import ray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.machine import machine
from benchmarks.measuring import markdown
from benchmarks.tiny_job import TinyJob, run, write_questions
from pipelines.engine import Answer, Sample
from pipelines.shared_answers import ShelfActor, ShelfHere, ShelfThere, Shelves

SHARD_ROWS = 1000
ANSWER_TOKENS = 200


def main() -> int:
    """Two tables, and JSON in `--out`; exit code 1 when a shared answer differs from one that was asked for."""
    args = _arguments()
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    costs = asyncio.run(_costs(args.shards))
    lines: list[tuple[str, ...]] = [("shelf", "claim, µs a row", "tell, µs a row")]
    lines += [(where, f"{claim:.1f}", f"{tell:.1f}") for where, (claim, tell) in costs.items()]
    print(markdown(lines))
    write_questions(args.out, _questions(args.rows))
    jobs = {
        how: run(
            args.out,
            how,
            sampling={"temperature": 0, "max_tokens": 48, "ignore_eos": True},
            reuse={"equal_prompts": how},
            pool={"replicas": args.engines},
        )
        for how in ("greedy", "none")
    }
    runs = {how: _told(job) for how, job in jobs.items()}
    lines = [
        (
            "equal_prompts",
            "rows",
            "requests",
            "output tokens in the rows",
            "generated",
            "asking, s",
            "whole, s",
        )
    ]
    for how, told in runs.items():
        numbers = (told[name] for name in ("rows", "requests", "tokens", "generated"))
        seconds = (told[name] for name in ("asking_s", "wall_s"))
        lines.append((how, *(f"{n:,}" for n in numbers), *(f"{s:.1f}" for s in seconds)))
    same = jobs["greedy"].texts == jobs["none"].texts
    print(markdown([*lines, (f"the answers are {'the same' if same else 'DIFFERENT'}",)]))
    found = {"machine": machine(), "us_a_row": costs, "engines": args.engines, "runs": runs, "same": same}
    (args.out / "shared_answers.json").write_text(json.dumps(found, indent=1) + "\n")
    return int(not same)


async def _costs(shards: int) -> dict[str, tuple[float, float]]:
    """Microseconds of this process for each row, by where the shelf is: to claim, with the wait; to tell, pickled."""
    found = {"in the process": await _cost(ShelfHere(), shards)}
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        there = ShelfThere(ray.remote(ShelfActor).options(num_cpus=0).remote())
        await there.claim("first", [os.urandom(18)])  # the actor starts
        there.release("first")
        found["over Ray"] = await _cost(there, shards)
    finally:
        ray.shutdown()
    return found


async def _cost(shelf: Shelves, shards: int) -> tuple[float, float]:
    claim_s = tell_s = 0.0
    ids = array("i", range(ANSWER_TOKENS))
    answer = Answer(
        samples=[Sample(token_ids=ids, text=None, finish_reason="stop")], cached_tokens=0, ttft_s=0.1
    )
    for number in range(shards):
        owner = f"shard {number}"
        keys = [os.urandom(18) for _ in range(SHARD_ROWS)]
        began = time.perf_counter()
        assert await shelf.claim(owner, keys) == ({}, [])
        claim_s += time.perf_counter() - began
        for key in keys:
            began = time.perf_counter()
            shelf.tell(owner, key, pickle.dumps(answer, pickle.HIGHEST_PROTOCOL))
            tell_s += time.perf_counter() - began
        shelf.release(owner)
        if isinstance(shelf, ShelfThere):
            # The message that goes once a second, now; with its way there and back.
            began = time.perf_counter()
            told, shelf._told = shelf._told, {}
            await shelf._word(shelf._actor.hear.remote([], told, [owner]))
            tell_s += time.perf_counter() - began
    rows = shards * SHARD_ROWS
    return 1e6 * claim_s / rows, 1e6 * tell_s / rows


def _questions(rows: int) -> list[str]:
    """Each of them five times, far apart."""
    different = rows // 5
    return [f"What is {n * 7919 % different} plus {n * 7919 % different % 7}?" for n in range(rows)]


def _told(job: TinyJob) -> dict[str, Any]:
    """Its rows, requests and tokens, and those that were generated."""
    stats = job.stats
    tokens = pc.sum(job.rows("completion_tokens")["completion_tokens"]).as_py()
    return {
        "rows": sum(one["rows_in"] for one in stats),
        "requests": sum(sum(one["latency_s"]["counts"].values()) for one in stats),
        "tokens": tokens,
        "generated": tokens - sum(one["tokens_reused"] for one in stats),
        "asking_s": job.asking_s,
        "wall_s": job.wall_s,
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--engines", type=int, default=1)
    parser.add_argument("--shards", type=int, default=50, help="of 1,000 rows, for what a row costs")
    parser.add_argument("--out", type=Path, default=Path("bench-shared-answers"))
    args = parser.parse_args()
    args.out = args.out.resolve()
    return args


if __name__ == "__main__":
    sys.exit(main())
