"""The benchmarks' own arithmetic: lengths that are drawn, counts, medians, shares of a GPU's peak."""

from __future__ import annotations

import gzip
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import measuring
from benchmarks.child import ChildFailed
from benchmarks.gpu_trace import kernels
from benchmarks.roofline import Cost, Peak, peak_of
from benchmarks.shapes import SHAPES, model_folder
from benchmarks.sides import Run, Task, answers
from benchmarks.workloads import WORKLOADS

pytestmark = pytest.mark.slow


def a_task(**values: object) -> Task:
    given: dict[str, object] = {
        "input": Path("rows.parquet"),
        "rows": 4,
        "template": "{{ prompt }}",
        "chat": False,
        "model": Path("model"),
        "engine": {},
        "sampling": {},
        "in_flight": [1],
        "ray_data": {},
        "device": "cpu",
    }
    return Task(**{**given, **values})  # type: ignore[arg-type]


def a_run(side: str = "a", steady_s: float = 2.0, tokens: int = 100, variant: str = "") -> Run:
    return Run(
        side=side,
        variant=variant,
        rows=4,
        output_tokens=tokens,
        prompt_tokens=40,
        startup_s=1.0,
        steady_s=steady_s,
        finish_s=None,
        wall_s=None,
        cpu_s=None,
        phases_s={},
        cpu_by_process_s={},
        processes={},
        output=[],
    )


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_workload_is_the_same_each_time_and_fits_the_model(name: str, tmp_path: Path) -> None:
    workload = WORKLOADS[name]
    rows = workload.table(300)
    assert rows == workload.table(300)
    assert rows != workload.table(300, seed=1)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder("nano", tmp_path / "model"))
    prompts, limits = rows["prompt"].to_pylist(), rows["max_tokens"].to_pylist()
    lengths = [len(ids) for ids in tokenizer(prompts).input_ids]
    assert lengths == [len(prompt) for prompt in prompts]  # one token a character
    assert min(limits) >= 1
    assert all(p + n <= workload.max_model_len for p, n in zip(lengths, limits, strict=True))
    assert len(set(limits)) > 50


def test_the_lengths_of_the_workloads() -> None:
    first = WORKLOADS["W1"].table(2000)
    assert {len(prompt) for prompt in first["prompt"].to_pylist()} == {256}
    limits = first["max_tokens"].to_pylist()
    assert (min(limits), max(limits)) == (64, 256)
    assert statistics.mean(limits) == pytest.approx(160, rel=0.03)
    prefixes = {prompt[:2048] for prompt in WORKLOADS["W3"].table(200)["prompt"].to_pylist()}
    assert len(prefixes) == 8
    tail = WORKLOADS["W5"].table(5000)["max_tokens"].to_pylist()
    assert sum(n >= 1024 for n in tail) / 5000 == pytest.approx(0.02, abs=0.006)


def test_any_token_of_the_vocabulary_has_a_text(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder("nano", tmp_path))
    assert len(tokenizer) == SHAPES["nano"]["vocab_size"]
    assert all(tokenizer.decode([place]) for place in range(300, len(tokenizer) - 1))


def test_the_cost_of_a_model_and_the_share_of_a_peak() -> None:
    cost = Cost.of(SHAPES["7b"])
    # Qwen2.5-7B: 7.61 B parameters, 6.53 B without embeddings; of the two embeddings only the head is multiplied.
    assert cost.matrix_parameters == pytest.approx(6.53e9 + 152064 * 3584, rel=0.01)
    assert cost.kv_bytes == 2 * 28 * 4 * 128 * 2
    one = pa.table({"prompt_tokens": [1000], "completion_tokens": [10]})
    twice = pa.concat_tables([one, one])
    peak = Peak(1e15, 1e12)
    share = cost.shares(one, 1.0, peak, 1, 1)
    assert share["mfu"] == pytest.approx(
        (2 * cost.matrix_parameters * 1010 + cost.attention_flops * 1010 * 1011 / 2) / 1e15
    )
    assert cost.shares(twice, 2.0, peak, 1, 1)["mfu"] == pytest.approx(share["mfu"])
    assert cost.shares(one, 1.0, peak, 2, 1)["mbu"] == pytest.approx(share["mbu"] / 2)
    assert cost.shares(one, 1.0, peak, 1, 8)["mbu"] < share["mbu"] / 4
    failed = pa.table({"prompt_tokens": [1000, None], "completion_tokens": [10, None]})
    assert cost.shares(failed, 1.0, peak, 1, 1) == share


def test_the_peak_is_that_of_the_named_device() -> None:
    h200, pcie, sxm = (peak_of(f"NVIDIA {name}") for name in ("H200", "H100 PCIe", "H100 80GB HBM3"))
    assert h200 is not None
    assert pcie is not None
    assert sxm is not None
    assert h200.bytes_per_s > sxm.bytes_per_s > pcie.bytes_per_s
    assert peak_of("TPU v9") is None


def test_a_summary_has_median_and_spread_of_what_was_measured() -> None:
    found = measuring.summary([a_run(steady_s=s) for s in (1.0, 2.0, 4.0)])
    assert found["output_tokens_per_s"] == {"median": 50, "min": 25, "max": 100, "n": 3}
    assert found["total_tokens_per_s"]["median"] == 70
    assert "wall_s" not in found  # no run made one pass only


def test_sides_take_turns_and_a_broken_one_is_named_and_left_out() -> None:
    order: list[str] = []

    def good(task: Task, folder: Path) -> list[Run]:
        order.append(folder.name)
        return [a_run("good", variant="8"), a_run("good", steady_s=1.0, variant="16")]

    def broken(task: Task, folder: Path) -> list[Run]:
        order.append(folder.name)
        raise ChildFailed("exit code 1\nTraceback\nImportError: no such thing\nbye")

    told: list[str] = []
    done = measuring.measure({"good": good, "broken": broken}, a_task(), Path("."), 2, told.append)
    assert order == ["good-1", "broken-1", "good-2"]
    assert done.cannot == {"broken": "ImportError: no such thing"}
    lines = measuring.table(done)
    assert [line[0] for line in lines] == [
        "side",
        "good (8)",
        "good (16)",
        "broken: cannot run: ImportError: no such thing",
    ]
    assert [line[3] for line in lines[1:3]] == ["1.00", "2.00"]
    assert measuring.markdown(lines).splitlines()[1].startswith("|---|")


def test_a_side_is_not_begun_when_the_time_is_too_short_for_it() -> None:
    def slow(task: Task, folder: Path) -> list[Run]:
        time.sleep(0.2)
        return [a_run()]

    task = a_task(deadline=time.monotonic() + 0.3)
    done = measuring.measure({"slow": slow}, task, Path("."), 3, lambda text: None)
    assert len(done.runs) == 1
    assert done.not_reached == ["slow 2", "slow 3"]


def test_runs_that_wrote_something_else_are_problems() -> None:
    done = measuring.Measured([a_run("a"), a_run("b", tokens=99), replace(a_run("c"), prompt_tokens=41)])
    assert done.problems(4, 100) == [
        "b: 4 rows with 99 tokens were written, not 4 with 100",
        "the sides made prompts of different lengths",
    ]
    assert measuring.Measured([a_run("a"), replace(a_run("b"), rows_reused=2)]).problems(4, 100) == [
        "b: 2 rows were not asked, as their prompts are those of others"
    ]


def test_answers_of_several_files_are_in_the_order_of_their_ids(tmp_path: Path) -> None:
    for name, ids in (("x", [3, 1]), ("y", [2, 0])):
        pq.write_table(pa.table({"id": ids, "text": [str(i) for i in ids]}), tmp_path / name)
    run = replace(a_run(), output=[str(tmp_path / "x"), str(tmp_path / "y")])
    assert answers(run, ["id", "text"])["text"].to_pylist() == ["0", "1", "2", "3"]


def test_a_traces_busy_share_counts_kernels_that_overlap_once(tmp_path: Path) -> None:
    def event(name: str, at: float, us: float, cat: str = "kernel") -> dict[str, Any]:
        return {"ph": "X", "cat": cat, "name": name, "ts": at, "dur": us}

    events = [
        event("nvjet_sm90_tst_192x208", 0, 40),
        event("flash::FlashAttnFwdSm90 cutlass", 30, 20),
        event("Memcpy HtoD", 90, 10, "gpu_memcpy"),
        event("aten::mm", 50, 40, "cpu_op"),
    ]
    with gzip.open(tmp_path / "t.json.gz", "wt") as file:
        json.dump({"traceEvents": events}, file)
    found = kernels(tmp_path / "t.json.gz")
    assert found["busy"] == pytest.approx(0.6)
    assert found["seconds"] == pytest.approx(100e-6)
    assert found["kinds"] == pytest.approx({"matrix products": 4 / 7, "attention": 2 / 7, "copies": 1 / 7})
