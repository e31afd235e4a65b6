"""Real engines that die under a running job: killed from outside, or by a prompt. Random moments are tests/chaos's."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import load, run
from tests.chaos.processes import matching
from tests.local.bare_vllm import bare_vllm
from tests.local.runs import TINY, job, rows_of, write_questions

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(900)]
#: As vLLM titles its processes.
CORE, RANK = r"^VLLM::EngineCore", r"^VLLM::Worker"


def test_a_job_outlives_a_killed_rank_and_a_killed_engine_core_and_answers_as_bare_vllm(
    tmp_path: Path,
) -> None:
    asked = write_questions(tmp_path / "in", rows=160)
    engine = {
        "tensor_parallel_size": 2,
        "distributed_executor_backend": "mp",
        "dtype": "float32",
        "max_model_len": 512,
        "max_num_seqs": 8,
        "enforce_eager": True,
    }
    sampling = {"temperature": 0, "max_tokens": 32}
    settings = job(
        tmp_path / "in",
        tmp_path / "out",
        model={"backend": "vllm", "engine": engine},
        sampling=sampling,
        shards={"rows": 20},
        pool={"shards_in_flight": 2, "admission": {"policy": "continuous"}},
    )
    seen: set[int] = set()
    with ThreadPoolExecutor(1) as driver:
        running = driver.submit(run, load(settings))

        def wait_for(ready: Callable[[], bool], what: str) -> None:
            while not ready():
                assert not running.done(), f"ended before {what}: {running.exception()}"
                seen.update(matching("^VLLM::"))
                time.sleep(0.2)

        def parts() -> int:
            return len(list((tmp_path / "out").glob("data/*.parquet")))

        wait_for(lambda: parts() > 0, "a part")
        ranks = matching(RANK)
        assert len(ranks) == 2
        first = {*ranks, *matching(CORE)}
        os.kill(ranks[1], signal.SIGKILL)
        before = parts() + 2  # what was on its way to its commit may still arrive
        wait_for(lambda: parts() > before, "parts by a second engine")
        assert not first & set(matching("^VLLM::"))  # the rank that lived went, too
        os.kill(matching(CORE)[0], signal.SIGKILL)
        report = running.result()
    assert report.stats.engine_deaths > 0
    rows = rows_of(tmp_path / "out").to_pylist()
    assert [int(row["row_id"].rpartition("#")[2]) for row in rows] == sorted(range(160), key=str)
    found = {row["question"]: (row["generated_text"], row["completion_tokens"]) for row in rows}
    chats = [[{"role": "user", "content": text}] for text in asked["question"].to_pylist()]
    bare = bare_vllm({"model": str(TINY), **engine}, sampling, chats)
    samples = [answer["samples"][0] for answer in bare]
    assert found == {
        question: (sample["text"], sample["tokens"])
        for question, sample in zip(asked["question"].to_pylist(), samples, strict=True)
    }
    deadline = time.monotonic() + 30
    while any(map(living, seen)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert [pid for pid in seen if living(pid)] == []


def living(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_prompt_that_kills_vllm_is_one_rows_error(tmp_path: Path) -> None:
    """On a CPU, vLLM 0.32 turns a seeded request's generator back after each chunk of a prefill, and dies of it."""
    asked = write_questions(tmp_path / "in", rows=60)
    texts = asked["question"].to_pylist()
    texts[41] = "Please think about this. " * 60  # 400 tokens: more than one step takes
    poisoned = asked.set_column(asked.schema.get_field_index("question"), "question", pa.array(texts))
    pq.write_table(poisoned, tmp_path / "in" / "q000.parquet")
    settings = job(
        tmp_path / "in",
        tmp_path / "out",
        model={
            "backend": "vllm",
            "engine": {
                "max_num_seqs": 7,
                "max_num_batched_tokens": 300,
                "enable_chunked_prefill": True,
                "enable_prefix_caching": False,
            },
        },
        sampling={"temperature": 0.5, "top_k": 1, "seed": 7, "max_tokens": 16},
        shards={"rows": 30},
        errors={"max_error_rate": 0.1, "max_attempts": 1},
    )
    report = run(load(settings))
    assert report.stats.error_codes == {"engine_crash": 1}
    assert (report.stats.rows_in, report.stats.rows_ok) == (60, 59)
    failed = [row for row in rows_of(tmp_path / "out").to_pylist() if row["error_code"]]
    assert [row["row_id"].rpartition("#")[2] for row in failed] == ["41"]
    assert "vLLM's engine process died" in failed[0]["error_message"]
    assert not list((tmp_path / "out" / ".dray").rglob("generate-*"))  # what was tried is of no use any more
