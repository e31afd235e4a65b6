"""What `vllm.LLM.generate` answers to token ids, from a process of its own: for tests/local/test_vllm_engine.py.

    python -m tests.local.vllm_token_yardstick REQUESTS.json ANSWERS.json

REQUESTS: [{"args": EngineArgs, "calls": [{"sampling": SamplingParams, "prompts": [[id]], "seeds": [int]|null}]}];
ANSWERS: for each engine, each call, each prompt, each sample {"text", "token_ids", "finish_reason"}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(requests: str, answers: str) -> None:
    engines = json.loads(Path(requests).read_text())
    Path(answers).write_text(json.dumps([_answers(engine["args"], engine["calls"]) for engine in engines]))


def _answers(args: dict[str, Any], calls: list[dict[str, Any]]) -> list[list[list[dict[str, Any]]]]:
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    llm = LLM(**args)
    answered = []
    for call in calls:
        seeds = call["seeds"] or [None] * len(call["prompts"])
        params = [SamplingParams(**call["sampling"], seed=seed) for seed in seeds]
        prompts = [TokensPrompt(prompt_token_ids=ids) for ids in call["prompts"]]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        answered.append(
            [
                [
                    {"text": o.text, "token_ids": list(o.token_ids), "finish_reason": o.finish_reason}
                    for o in output.outputs
                ]
                for output in outputs
            ]
        )
    return answered


if __name__ == "__main__":
    main(*sys.argv[1:])
