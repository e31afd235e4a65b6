"""The main job on NVIDIA GPUs: one engine per GPU, tensor parallelism in one actor, and nothing left behind."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.local.runs import REAL, TINY, dray, job, rows_of, write_questions

pytestmark = pytest.mark.timeout(400)


def nvidia_smi(query: str) -> list[str]:
    """One line per GPU (or process)."""
    done = subprocess.run(
        ["nvidia-smi", f"--query-{query}", "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
        check=True,
    )
    return [line for line in done.stdout.splitlines() if line.strip()]


def need_gpus(count: int) -> None:
    have = len(nvidia_smi("gpu=name"))
    if have < count:
        pytest.skip(f"needs {count} GPUs, this machine has {have}")


def run_on_gpus(folder: Path, **sections: Any) -> dict[str, Any]:
    """Answer 600 questions by the command line; the report, after checking the answers and what is left."""
    asked = write_questions(folder / "in", rows=600, files=6)
    model = {**REAL, **sections.pop("model", {})}
    model["engine"] = {
        "dtype": "float32",
        "max_model_len": 512,
        "enforce_eager": True,
        "gpu_memory_utilization": 0.3,
        **model.get("engine", {}),
    }
    pool = {"device": "gpu", **sections.pop("pool", {})}
    settings = job(folder / "in", folder / "out", model=model, pool=pool, **sections)
    (folder / "job.yaml").write_text(json.dumps(settings))
    done = dray("run", str(folder / "job.yaml"), "--json", timeout=360)
    assert done.returncode == 0, done.stderr + done.stdout
    found = {row["question"]: row["generated_text"] for row in rows_of(folder / "out").to_pylist()}
    right = sum(found[row["question"]] == row["answer"] for row in asked.to_pylist())
    assert right >= 0.99 * len(asked)
    # Ray and vLLM need a moment to go; then no process may hold the GPU's memory.
    until = time.monotonic() + 20
    while max(int(used) for used in nvidia_smi("gpu=memory.used")) > 1000 and time.monotonic() < until:
        time.sleep(0.5)
    assert max(int(used) for used in nvidia_smi("gpu=memory.used")) < 1000, nvidia_smi(
        "compute-apps=pid,name"
    )
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def test_one_engine_on_one_gpu(tmp_path: Path) -> None:
    report = run_on_gpus(tmp_path)
    assert report["engines"][0].endswith(nvidia_smi("gpu=name")[0])


def test_tensor_parallelism_in_one_actor(tmp_path: Path) -> None:
    need_gpus(2)
    run_on_gpus(tmp_path, model={"engine": {"tensor_parallel_size": 2}})
    replicas = set(pq.read_table(tmp_path / "out" / "stats" / "shards.parquet")["replica"].to_pylist())
    assert len(replicas) == 1


def test_two_replicas_on_two_gpus(tmp_path: Path) -> None:
    need_gpus(2)
    run_on_gpus(tmp_path, pool={"replicas": 2, "shards_in_flight": 1}, shards={"rows": 20})
    replicas = set(pq.read_table(tmp_path / "out" / "stats" / "shards.parquet")["replica"].to_pylist())
    assert len(replicas) == 2


def shape_of_half_a_billion(folder: Path) -> str:
    """The tiny model's vocabulary, and random weights in the shape of Qwen2.5-0.5B: its answers mean nothing."""
    folder.mkdir()
    for file in TINY.iterdir():
        if file.is_file() and file.suffix in (".json", ".jinja"):
            (folder / file.name).write_bytes(file.read_bytes())
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": 1536,
        "eos_token_id": json.loads((TINY / "config.json").read_text())["eos_token_id"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_small_models_share_a_gpu_as_the_plan_says(tmp_path: Path) -> None:
    """`replicas: auto` on one GPU: as many engines as the plan announces, each with its share, all of them at work."""
    write_questions(tmp_path / "in", rows=600, files=6)
    settings = job(
        tmp_path / "in",
        tmp_path / "out",
        model={
            **REAL,
            "source": shape_of_half_a_billion(tmp_path / "model"),
            "engine": {
                "load_format": "dummy",
                "dtype": "bfloat16",
                "enforce_eager": True,
                "max_num_seqs": 256,
            },
        },
        pool={"device": "gpu", "replicas": "auto", "shards_in_flight": 1},
        cluster={"num_gpus": 1},
        shards={"rows": 20},
        errors={"max_error_rate": 1.0},
    )
    (tmp_path / "job.yaml").write_text(json.dumps(settings))
    planned = json.loads(dray("plan", str(tmp_path / "job.yaml"), "--json").stdout)["engine"]
    if planned["engines_per_gpu"] < 2:
        pytest.skip(f"{planned['gpu']} of {planned['gpu_bytes']} bytes on this host holds one engine only")
    assert planned["engines"] == planned["engines_per_gpu"]
    assert planned["engines"] * planned["engine_args"]["gpu_memory_utilization"] < 1
    done = dray("run", str(tmp_path / "job.yaml"), "--json", timeout=390)
    assert done.returncode == 0, done.stderr + done.stdout
    stats = pq.read_table(tmp_path / "out" / "stats" / "shards.parquet")
    assert len(set(stats["replica"].to_pylist())) == planned["engines"]
    assert sum(stats["rows_ok"].to_pylist()) == 600
