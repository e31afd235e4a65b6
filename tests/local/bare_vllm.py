"""What bare vLLM answers, in a process of its own: the yardstick of the equality tests. Nothing of Dray is in it.

    python -m tests.local.bare_vllm < request.json > answers.json

The request has `engine` (arguments of `vllm.LLM`), `sampling` (of SamplingParams) and `prompts` (texts, lists of
messages, to be rendered by vLLM itself, or `{prompt, images}` of a text and files in base64). The answers: per prompt, per
sample, text, number of tokens, finish reason; with `prompt_logprobs` those of the prompt's tokens behind the first.
With a `task` (`embed` or `classify`) instead of `sampling`: per prompt the vector, or the probabilities.
"""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
from typing import Any


def bare_vllm(
    engine: dict[str, Any], sampling: dict[str, Any], prompts: list[Any], seeds: list[int] | None = None
) -> list[dict[str, Any]]:
    """Run it, and wait for the answers. `seeds`: one per prompt, where sampling is not greedy."""
    answers: list[dict[str, Any]] = _asked(
        {"engine": engine, "sampling": sampling, "prompts": prompts, "seeds": seeds}
    )
    return answers


def bare_pooling(task: str, engine: dict[str, Any], prompts: list[Any]) -> list[list[float]]:
    """What `LLM.embed` or `LLM.classify` says of texts, or of `seen` ones."""
    return _asked({"engine": {**engine, "runner": "pooling"}, "task": task, "prompts": prompts})


def seen(text: str, images: list[bytes]) -> dict[str, Any]:
    """A prompt with images, for which the model's own placeholders stand in the text."""
    return {"prompt": text, "images": [base64.b64encode(data).decode() for data in images]}


def _asked(request: dict[str, Any]) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "tests.local.bare_vllm"],
        input=json.dumps(request),
        env={
            **os.environ,
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            # A second process would import vLLM once more, 7 s; ranks are processes of their own.
            "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(request["engine"].get("tensor_parallel_size", 1) > 1)),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    request = json.load(sys.stdin)
    real = os.dup(1)
    os.dup2(2, 1)  # vLLM prints to standard output

    from vllm import LLM, SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    llm = LLM(**request["engine"])
    prompts = [_decoded(prompt) if isinstance(prompt, dict) else prompt for prompt in request["prompts"]]
    if request.get("task"):
        pooled = {"embed": lambda: [o.outputs.embedding for o in llm.embed(prompts, use_tqdm=False)],
                  "classify": lambda: [o.outputs.probs for o in llm.classify(prompts, use_tqdm=False)]}  # fmt: skip
        os.write(real, json.dumps(pooled[request["task"]]()).encode())
        return
    seeds = request["seeds"] or [None] * len(prompts)
    sampling = request["sampling"]
    if held := sampling.get("structured_outputs"):
        sampling["structured_outputs"] = StructuredOutputsParams(**held)
    params = [SamplingParams(**sampling, seed=seed) for seed in seeds]
    if isinstance(prompts[0], str | dict):
        outputs = llm.generate(prompts, params, use_tqdm=False)
    else:
        outputs = llm.chat(prompts, params, use_tqdm=False)
    answers = [
        {
            "prompt_tokens": len(output.prompt_token_ids),
            "prompt_logprobs": [next(iter(at.values())).logprob for at in (output.prompt_logprobs or ())[1:]],
            "samples": [
                {"text": s.text, "tokens": len(s.token_ids), "finish_reason": s.finish_reason}
                for s in output.outputs
            ],
        }
        for output in outputs
    ]
    os.write(real, json.dumps(answers).encode())


def _decoded(prompt: dict[str, Any]) -> dict[str, Any]:
    from PIL import Image

    images = [Image.open(io.BytesIO(base64.b64decode(data))) for data in prompt["images"]]
    return {"prompt": prompt["prompt"], "multi_modal_data": {"image": images} if images else {}}


if __name__ == "__main__":
    main()
