"""CPU seconds of our side of the engine's process per 1,000 output tokens: requests in, one table of generations out.

    python benchmarks/host_path.py [--rows 4000] [--prompt-tokens 256] [--answer-tokens 160]

The engine answers at once from a list, so that what is left is the actor's own: admission, tasks, token ids from and to
Arrow. Nothing about a model. Runs three times and prints the least CPU time as one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import sys
import time
from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipelines.answering import Answering, Started
from pipelines.contracts import PROMPT_SCHEMA, Shard, Work
from pipelines.engine import Answer, EngineInfo, Sample, check_prompt
from pipelines.settings import ErrorSettings, PoolSettings, SamplingSettings
from pipelines.stage import Parcel
from pipelines.task import GENERATE

WORK = cast(
    "Work",
    SimpleNamespace(
        run_id="r",
        task=GENERATE,
        prompt=None,
        sampling=SamplingSettings(),
        errors=ErrorSettings(),
        pool=PoolSettings(),
    ),
)
INFO = EngineInfo(
    name="at once", device="cpu", max_model_len=8192, max_num_seqs=512, start_s=0.0, ready_at=0.0
)


class AtOnce:
    """As VLLMEngine does: a list of ids in, a list of ids from vLLM."""

    output_tokens = 0
    last_token_at = 0.0

    def __init__(self, answer: list[int]) -> None:
        self._answer = answer

    async def generate(
        self,
        request_id: str,
        token_ids: Any,
        seed: int | None,
        max_tokens: int | None = None,
        sampling: Any = None,
        variables: Any = None,
    ) -> Answer:
        check_prompt(token_ids, 8192)
        await asyncio.sleep(0)
        ids = array("i", self._answer)
        return Answer(
            samples=[Sample(token_ids=ids, text=None, finish_reason="length")], cached_tokens=0, ttft_s=0.01
        )


async def once(parcel: Parcel, answer: list[int]) -> float:
    began = time.process_time()
    started = Started.of(cast("Any", AtOnce(answer)), INFO, WORK)
    asked = Answering(parcel, WORK, started, itertools.count(), 0)
    await asked.run(asked.answerable)
    asked.parcel(attempt=1, engine_deaths=0)
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=4_000)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--answer-tokens", type=int, default=160)
    options = parser.parse_args()
    rows, dice = options.rows, np.random.default_rng(0)
    ids = dice.integers(1_000, 150_000, (rows, options.prompt_tokens)).tolist()
    prompts = [{"row_id": str(i), "token_ids": ids[i]} for i in range(rows)]
    parcel = Parcel(
        shard=Shard(ordinal=0, id="0" * 16, spans=(), rows=rows, bytes=0),
        prompts=pa.Table.from_pylist(prompts, PROMPT_SCHEMA),
    )
    answer = dice.integers(1_000, 150_000, options.answer_tokens).tolist()
    seconds = min(asyncio.run(once(parcel, answer)) for _ in range(3))
    print(
        json.dumps(
            {
                **vars(options),
                "cpu_s": round(seconds, 3),
                "cpu_us_per_request": round(seconds / rows * 1e6, 1),
                "cpu_s_per_1000_output_tokens": round(seconds / rows / options.answer_tokens * 1e3, 6),
            }
        )
    )


if __name__ == "__main__":
    main()
