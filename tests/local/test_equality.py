"""The part files hold what bare vLLM answers: the same text and the same token counts, row by row."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import load, run
from pipelines.seeds import row_seed
from tests.local.bare_vllm import bare_vllm
from tests.local.runs import REAL, TINY, held_out, job, rows_of
from tests.tiny_models import sentencepiece_style, with_weights

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(400)]

ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 512,
    "max_num_seqs": 64,
    "max_num_batched_tokens": 2048,
    "enforce_eager": True,
}


def questions_of_mixed_length(rows: int) -> list[str]:
    """From one question to a dozen in one prompt, some with text in other scripts in front."""
    dice = random.Random(5)
    pool = [question.question for question in held_out(2_000)]
    intros = ["", "", "Grüße! ", "请回答。", "🙂🙃 ", "Please think about this. " * 5]
    return [
        dice.choice(intros) + " ".join(dice.choice(pool) for _ in range(dice.choice([1, 1, 1, 2, 4, 12])))
        for _ in range(rows)
    ]


def compare(
    folder: Path,
    prompts: list[str],
    sampling: dict[str, Any],
    engine: dict[str, Any],
    *,
    model: Path = TINY,
    chat: bool = True,
) -> list[dict[str, Any]]:
    """Run the prompts through a job and through bare vLLM; every row must be equal. The job's rows, for more checks."""
    (folder / "in").mkdir()
    pq.write_table(pa.table({"question": prompts}), folder / "in" / "q.parquet")
    settings = job(
        folder / "in",
        folder / "out",
        model={"source": str(model), **REAL, "engine": engine},
        sampling=sampling,
        shards={"rows": 128},
    )
    report = run(load(settings))
    assert not report.simulated
    rows = rows_of(folder / "out").to_pylist()
    bare_sampling = {key: value for key, value in sampling.items() if key != "seed"}
    seeds, bare_engine = None, {"model": str(model), **engine}
    if "seed" in sampling:
        # vLLM 0.32 on a CPU dies of a seed and a chunked prefill; Dray switches chunking off there by itself.
        bare_engine["enable_chunked_prefill"] = False
        seeds = [row_seed(sampling["seed"], f"{folder}/in/q.parquet#{i}") for i in range(len(prompts))]
    asked = [[{"role": "user", "content": text}] for text in prompts] if chat else prompts
    bare = bare_vllm(bare_engine, bare_sampling, asked, seeds)
    expected = {
        (row, index): (answer["prompt_tokens"], sample["text"], sample["tokens"], sample["finish_reason"])
        for row, answer in enumerate(bare)
        for index, sample in enumerate(answer["samples"])
    }
    found = {
        (int(row["row_id"].rpartition("#")[2]), row["sample_index"]): (
            row["prompt_tokens"],
            row["generated_text"],
            row["completion_tokens"],
            row["finish_reason"],
        )
        for row in rows
    }
    assert found.keys() == expected.keys()
    differing = {key: (found[key], expected[key]) for key in found if found[key] != expected[key]}
    assert not differing, f"{len(differing)} of {len(found)} differ: {list(differing.items())[:3]}"
    return rows


def test_greedy_answers_to_500_prompts_of_mixed_length(tmp_path: Path) -> None:
    compare(tmp_path, questions_of_mixed_length(500), {"temperature": 0, "max_tokens": 48}, ENGINE)


def test_stop_strings(tmp_path: Path) -> None:
    sampling = {"temperature": 0, "max_tokens": 48, "stop": ["thousand", "day"]}
    rows = compare(tmp_path, questions_of_mixed_length(100), sampling, ENGINE)
    assert not any("thousand" in row["generated_text"] for row in rows)


def test_three_samples_cut_inside_characters_of_a_sentencepiece_model(tmp_path: Path) -> None:
    """Random weights and a temperature give bytes of characters that the short answers cut in two."""
    model = with_weights(sentencepiece_style(tmp_path / "model"))
    sampling = {"temperature": 1.0, "max_tokens": 6, "n": 3, "seed": 42}
    prompts = questions_of_mixed_length(150)
    engine = {**ENGINE, "max_model_len": 1024}
    rows = compare(tmp_path, prompts, sampling, engine, model=model, chat=False)
    assert len(rows) == 450
    assert len({row["generated_text"] for row in rows}) > 400
    assert not any("\ufffd" in row["generated_text"][-1:] for row in rows)  # vLLM holds a cut character back


def test_tensor_parallel_engine(tmp_path: Path) -> None:
    engine = {**ENGINE, "tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    compare(tmp_path, questions_of_mixed_length(60), {"temperature": 0, "max_tokens": 32}, engine)
