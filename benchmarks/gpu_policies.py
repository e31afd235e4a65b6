"""Admission policies beside each other behind one vLLM engine: continuous, waves of several widths, adaptive.

    python benchmarks/gpu_policies.py [--seconds 15] [--adaptive-seconds 60] [--max-num-seqs 512] [--config tiny]

Workload W1: prompts of 256 tokens, 64–256 new tokens uniform, greedy, on random weights in the shape of Qwen2.5-0.5B. The
engine starts once; each policy gets an endless supply for `--seconds` after 3 s that do not count. Output tokens are counted
as the engine makes them. One JSON line per policy. On a GPU about 150 s after the engine's start; `--config tiny` runs
the tiny model, on a CPU too.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyarrow as pa

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.shapes import model_folder  # noqa: E402
from pipelines.adaptive import Adaptive  # noqa: E402
from pipelines.answering import Answering, Started  # noqa: E402
from pipelines.contracts import PROMPT_SCHEMA, Shard, Work  # noqa: E402
from pipelines.engine import EngineInfo  # noqa: E402
from pipelines.settings import (  # noqa: E402
    ErrorSettings,
    ModelSettings,
    PoolSettings,
    SamplingSettings,
)
from pipelines.stage import Parcel  # noqa: E402
from pipelines.vllm_engine import VLLMEngine  # noqa: E402

WARM_S, ROWS, SHARDS_IN_FLIGHT = 3.0, 2_000, 3


def work_with(model: ModelSettings, admission: dict[str, Any], longest: int) -> Work:
    pool = PoolSettings.model_validate({"admission": admission})
    sampling = SamplingSettings(temperature=0, max_tokens=longest, ignore_eos=True)
    return cast(
        "Work",
        SimpleNamespace(run_id="w1", model=model, sampling=sampling, pool=pool, errors=ErrorSettings()),
    )


def shard(vocabulary: int, prompt_tokens: int, answers: tuple[int, int], dice: random.Random) -> Parcel:
    ids = [[dice.randrange(10, vocabulary) for _ in range(prompt_tokens)] for _ in range(ROWS)]
    limits = [dice.randint(*answers) for _ in range(ROWS)]
    prompts = [{"row_id": str(i), "token_ids": ids[i], "max_tokens": limits[i]} for i in range(ROWS)]
    return Parcel(
        shard=Shard(ordinal=0, id="0" * 16, spans=(), rows=ROWS, bytes=0),
        prompts=pa.Table.from_pylist(prompts, PROMPT_SCHEMA),
    )


async def measure(
    engine: VLLMEngine, info: EngineInfo, work: Work, parcels: list[Parcel], seconds: float
) -> dict[str, Any]:
    started, numbers, arrivals = Started.of(engine, info, work), itertools.count(), itertools.count()

    async def supply() -> None:
        for parcel in itertools.cycle(parcels):
            asked = Answering(parcel, work, started, numbers, next(arrivals))
            await asked.run(asked.answerable)

    suppliers = [asyncio.create_task(supply()) for _ in range(SHARDS_IN_FLIGHT)]
    loop, marks = asyncio.get_running_loop(), []
    await asyncio.sleep(WARM_S)
    for _ in range(4):  # quarters: the adaptive policy's last one is after its search
        marks.append((loop.time(), engine.output_tokens))
        await asyncio.sleep(seconds / 4)
    marks.append((loop.time(), engine.output_tokens))
    policy = started.gate.policy
    for task in suppliers:
        task.cancel()
    ends = await asyncio.gather(*suppliers, return_exceptions=True)
    broken = [repr(end) for end in ends if not isinstance(end, asyncio.CancelledError)]
    rates = [round((b[1] - a[1]) / (b[0] - a[0])) for a, b in itertools.pairwise(marks)]
    found = {}
    if isinstance(policy, Adaptive):
        found = {"high": policy.watermarks.high, "low": policy.watermarks.low, "searching": policy.searching}
    (t0, n0), (t1, n1) = marks[0], marks[-1]
    return {"output_tokens_per_s": round((n1 - n0) / (t1 - t0)), "quarters": rates, **found, "broken": broken}


async def main_(options: argparse.Namespace, folder: Path) -> None:
    engine_args: dict[str, Any] = {"max_model_len": 512, "max_num_seqs": options.max_num_seqs, "seed": 0}
    if options.config == "tiny":
        answers, source, prompt_tokens, vocabulary = (8, 32), ROOT / "examples" / "tiny-model", 32, 200
        engine_args |= {"dtype": "float32", "enforce_eager": True}
    else:
        answers, source, prompt_tokens, vocabulary = (
            (64, 256),
            model_folder("0.5b", folder / "model"),
            256,
            150_000,
        )
        engine_args |= {"load_format": "dummy", "enable_prefix_caching": False}
    model = ModelSettings(source=str(source), engine=engine_args)
    policies: dict[str, dict[str, Any]] = {"continuous": {"policy": "continuous"}}
    high = options.max_num_seqs
    for share in (16, 8, 4, 2):
        low = max(1, high - high // share)
        policies[f"wave {high} → {low}"] = {"policy": "wave", "low": low}
    policies["adaptive"] = {"policy": "adaptive"}
    work = work_with(model, {}, answers[1])
    engine = VLLMEngine(model, work.sampling, work.pool)
    try:
        info = await engine.start()
        about = {
            "engine": info.name,
            "device": info.device,
            "kv_tokens": info.kv_tokens,
            "start_s": info.start_s,
        }
        print(json.dumps(about), flush=True)
        dice = random.Random(0)
        parcels = [shard(vocabulary, prompt_tokens, answers, dice) for _ in range(4)]
        for name, admission in policies.items():
            seconds = options.adaptive_seconds if name == "adaptive" else options.seconds
            result = await measure(engine, info, work_with(model, admission, answers[1]), parcels, seconds)
            print(json.dumps({"policy": name, "in_flight": high, **result}), flush=True)
    finally:
        await engine.stop()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=13)
    parser.add_argument("--adaptive-seconds", type=float, default=60)
    parser.add_argument("--max-num-seqs", type=int, default=512)
    parser.add_argument("--config", choices=["qwen2.5-0.5b", "tiny"], default="qwen2.5-0.5b")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dray-gpu-") as folder:
        asyncio.run(main_(options, Path(folder)))


if __name__ == "__main__":
    main()
