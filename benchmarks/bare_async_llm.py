"""The yardstick: one dataset through vLLM's AsyncLLM, as a reader would write it himself. Nothing of Dray is in it.

    python benchmarks/bare_async_llm.py TASK.json TIMES.json

reads Parquet, renders a Jinja template and the model's chat template, tokenises, keeps `in_flight` requests in the engine,
and writes one Parquet file. TASK.json has input, output, template, model, engine (EngineArgs), sampling (SamplingParams)
and in_flight; TIMES.json gets seconds by phase, and the Unix times at which they ended.

Tuned as far as it can be without becoming a framework: every prompt is ready before the engine is made, so that the
engine never waits for one; requests are token ids; each answer comes once (`FINAL_ONLY`) and is detokenised by vLLM. What
it has not: commits, resuming, errors by row, statistics, more than one engine, inputs larger than memory.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any


class Laps(dict[str, float]):
    """Seconds of each phase, by name."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def end(self, name: str) -> None:
        """The phase `name` ends now, and the next one begins."""
        now = time.monotonic()
        self[name], self._last = now - self._last, now


async def main(task: dict[str, Any]) -> Laps:
    """Do the whole task; the times of its phases."""
    laps = Laps()

    import jinja2
    import pyarrow.parquet as pq
    from transformers import AutoTokenizer
    from vllm import AsyncEngineArgs, SamplingParams, TokensPrompt
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    laps.end("import_s")

    table = pq.read_table(task["input"])
    template = jinja2.Template(task["template"])
    tokenizer = AutoTokenizer.from_pretrained(task["model"])
    prompts = [template.render(row) for row in table.to_pylist()]
    chat = tokenizer.chat_template is not None
    if chat:
        turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
        prompts = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    token_ids = tokenizer(prompts, add_special_tokens=not chat).input_ids
    laps.end("prepare_s")

    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(model=task["model"], disable_log_stats=True, use_tqdm_on_load=False, **task["engine"])
    )
    laps.end("engine_start_s")
    laps["engine_ready_at"] = time.time()

    params = SamplingParams(**task["sampling"], output_kind=RequestOutputKind.FINAL_ONLY)
    slots = asyncio.Semaphore(task["in_flight"])
    answers: list[Any] = [None] * len(token_ids)

    async def answer(row: int) -> None:
        async with slots:
            prompt = TokensPrompt(prompt_token_ids=token_ids[row])
            async for output in engine.generate(prompt, params, request_id=str(row)):
                answers[row] = output.outputs[0]

    async with asyncio.TaskGroup() as group:
        for row in range(len(token_ids)):
            group.create_task(answer(row))
    laps.end("generate_s")

    table = table.append_column("generated_text", [[answer.text for answer in answers]])
    table = table.append_column("finish_reason", [[answer.finish_reason for answer in answers]])
    table = table.append_column("prompt_tokens", [[len(ids) for ids in token_ids]])
    table = table.append_column("completion_tokens", [[len(answer.token_ids) for answer in answers]])
    pq.write_table(table, task["output"], compression="zstd")
    laps.end("write_s")
    laps["written_at"] = time.time()

    engine.shutdown()
    return laps


if __name__ == "__main__":
    found = asyncio.run(main(json.loads(Path(sys.argv[1]).read_text())))
    Path(sys.argv[2]).write_text(json.dumps(found))
