"""The yardstick: one dataset through vLLM, as a reader would write it himself. Nothing of Dray is in it.

    python benchmarks/bare_vllm.py TASK.json RESULT.json

reads Parquet, renders a Jinja template and the model's chat template, tokenises, answers, and writes one Parquet file.
TASK.json has `input`, `output`, `rows` ([start, stop] of the input), `template`, `chat`, `model`, `engine` (EngineArgs),
`sampling` (SamplingParams), `max_tokens_column` (a row's own), `warmup_rows`, and `in_flight`: for each number one pass with
AsyncLLM and as many requests in the engine, for 0 one call of `LLM.generate`. Passes share one engine; RESULT.json has
their Unix times (engine ready, or the pass before done; file written) and the seconds of the phases before.

Tuned as far as it can be without becoming a framework: every prompt is ready before the engine is made, so that the
engine never waits for one; requests are token ids; each answer comes once (`FINAL_ONLY`) and is detokenised by vLLM. What
it has not: commits, resuming, errors by row, statistics, inputs larger than memory.
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


def main(task: dict[str, Any]) -> dict[str, Any]:
    """Do the whole task; phases and passes."""
    laps = Laps()

    import jinja2
    import pyarrow.parquet as pq
    from transformers import AutoTokenizer
    from vllm import SamplingParams

    laps.end("import_s")

    start, stop = task["rows"]
    table = pq.read_table(task["input"]).slice(start, stop - start)
    template = jinja2.Template(task["template"])
    tokenizer = AutoTokenizer.from_pretrained(task["model"])
    prompts = [template.render(row) for row in table.to_pylist()]
    if task["chat"]:
        turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
        prompts = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    token_ids = tokenizer(prompts, add_special_tokens=not task["chat"]).input_ids
    name = task["max_tokens_column"]
    own = [{"max_tokens": n} for n in table[name].to_pylist()] if name else [{}] * len(token_ids)
    params = [SamplingParams(**{**task["sampling"], **given}) for given in own]
    laps.end("prepare_s")

    engine_args = {
        "model": task["model"],
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        **task["engine"],
    }
    passes: list[dict[str, Any]] = []

    def written(answers: list[Any], variant: str, ready_at: float) -> None:
        answered = table.append_column("generated_text", [[answer.text for answer in answers]])
        answered = answered.append_column("finish_reason", [[answer.finish_reason for answer in answers]])
        answered = answered.append_column("prompt_tokens", [[len(ids) for ids in token_ids]])
        answered = answered.append_column(
            "completion_tokens", [[len(answer.token_ids) for answer in answers]]
        )
        path = f"{task['output']}-{len(passes)}.parquet"
        pq.write_table(answered, path, compression="zstd")
        passes.append({"variant": variant, "ready_at": ready_at, "written_at": time.time(), "output": [path]})

    if task["in_flight"] == [0]:
        _llm(engine_args, token_ids, params, task["warmup_rows"], laps, written)
    else:
        asyncio.run(
            _async_llm(engine_args, token_ids, params, task["warmup_rows"], task["in_flight"], laps, written)
        )
    return {"phases": dict(laps), "passes": passes}


def _llm(
    engine_args: dict[str, Any],
    token_ids: list[Any],
    params: list[Any],
    warmup: int,
    laps: Laps,
    written: Any,
) -> None:
    from vllm import LLM, TokensPrompt

    llm = LLM(**engine_args)
    laps.end("engine_start_s")
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in token_ids]
    if warmup:
        llm.generate(prompts[:warmup], params[:warmup], use_tqdm=False)
        llm.reset_prefix_cache()
        laps.end("warmup_s")
    ready_at = time.time()
    answers = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
    written(answers, "", ready_at)


async def _async_llm(
    engine_args: dict[str, Any],
    token_ids: list[Any],
    params: list[Any],
    warmup: int,
    in_flight: list[int],
    laps: Laps,
    written: Any,
) -> None:
    from vllm import AsyncEngineArgs, TokensPrompt
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**engine_args))
    laps.end("engine_start_s")
    for each in params:
        each.output_kind = RequestOutputKind.FINAL_ONLY

    async def answered(rows: int, most: int, name: str) -> list[Any]:
        slots = asyncio.Semaphore(most)
        answers: list[Any] = [None] * rows

        async def answer(row: int) -> None:
            async with slots:
                prompt = TokensPrompt(prompt_token_ids=token_ids[row])
                async for output in engine.generate(prompt, params[row], request_id=f"{name}-{row}"):
                    answers[row] = output.outputs[0]

        async with asyncio.TaskGroup() as group:
            for row in range(rows):
                group.create_task(answer(row))
        return answers

    if warmup:
        await answered(min(warmup, len(token_ids)), warmup, "warmup")
        laps.end("warmup_s")
    for number, most in enumerate(in_flight):
        if warmup or number:
            await engine.reset_prefix_cache()
        ready_at = time.time()
        written(await answered(len(token_ids), most, str(number)), f"{most} in flight", ready_at)
    engine.shutdown()


if __name__ == "__main__":
    found = main(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(found))
