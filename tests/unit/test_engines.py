"""How many engines a job gets, how many share a GPU, and what `dray plan` says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.cluster import engine_resources
from jobs.engines import Engines, Hardware, engines_of, hardware_here, hardware_of
from jobs.loading import load
from jobs.proposal import propose
from jobs.spec import JobSpec
from pipelines.errors import JobError
from pipelines.settings import Replicas
from tests.unit.test_sizing import H200, QWEN_05B, QWEN_7B


def spec(folder: Path, config: dict[str, Any], **overrides: Any) -> JobSpec:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "in.jsonl").write_text('{"q": "a"}\n')
    tree = {
        "name": "engines",
        "input": {"path": str(folder / "in.jsonl")},
        "prompt": {"template": "{{ q }}"},
        "model": {"source": str(folder), "engine": {"load_format": "dummy"}},
        "output": {"path": str(folder / "out")},
    }
    return load(tree, overrides).spec


def gpus(count: int, cores: float = 64) -> Hardware:
    return Hardware(gpus=count, gpu_name="NVIDIA H200", gpu_bytes=H200, cores=cores)


L4 = Hardware(gpus=1, gpu_name="NVIDIA L4", gpu_bytes=23_034 * 2**20, cores=16)


def settled(engines: Engines) -> tuple[int | Replicas | str, int | str]:
    return engines.pool.replicas, engines.pool.engines_per_gpu


@pytest.mark.parametrize(
    ("config", "hardware", "pool", "expected"),
    [
        # `auto` replicas: every GPU full
        (QWEN_05B, gpus(1), {"replicas": "auto"}, (3, 3)),
        (QWEN_05B, gpus(4), {"replicas": "auto"}, (12, 3)),
        (QWEN_05B, gpus(1, cores=4), {"replicas": "auto"}, (2, 2)),
        (QWEN_7B, gpus(4), {"replicas": "auto"}, (4, 1)),
        (QWEN_05B, Hardware(gpus=0, cores=8), {"replicas": "auto"}, (1, 1)),
        # a number of engines: packed as densely as it needs
        (QWEN_05B, gpus(1), {}, (1, 1)),
        (QWEN_05B, gpus(1), {"replicas": 2}, (2, 2)),
        (QWEN_05B, gpus(4), {"replicas": 6}, (6, 2)),
        (QWEN_05B, gpus(1), {"replicas": 5}, (5, 3)),
        (QWEN_7B, gpus(1), {"replicas": 2}, (2, 1)),
        # the user's own number
        (QWEN_7B, gpus(2), {"replicas": "auto", "engines_per_gpu": 2}, (4, 2)),
        (QWEN_05B, gpus(1), {"engines_per_gpu": 2}, (1, 2)),
        # a small GPU holds several, but is not known to gain by it
        (QWEN_05B, L4, {"replicas": "auto"}, (1, 1)),
        # nothing is known of the GPUs' memory
        (QWEN_05B, Hardware(gpus=2), {"replicas": "auto"}, (2, 1)),
        (QWEN_05B, Hardware(gpus=None), {"replicas": 3}, (3, 1)),
    ],
)
def test_replicas_are_engines(
    tmp_path: Path, config: dict[str, Any], hardware: Hardware, pool: dict[str, Any], expected: Any
) -> None:
    job = spec(tmp_path, config, **{f"pool.{key}": value for key, value in pool.items()})
    assert settled(engines_of(job, hardware)) == expected


def test_auto_replicas_of_a_tensor_parallel_model_share_out_the_gpus(tmp_path: Path) -> None:
    job = spec(tmp_path, QWEN_7B, **{"pool.replicas": "auto", "model.engine.tensor_parallel_size": 2})
    assert settled(engines_of(job, gpus(4))) == (2, 1)


def test_an_elastic_pool_is_packed_for_its_most(tmp_path: Path) -> None:
    job = spec(tmp_path, QWEN_05B, **{"pool.replicas": {"min": 1, "max": 3}})
    assert settled(engines_of(job, gpus(1))) == (Replicas(min=1, max=3), 3)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_as_many_engines_as_share_a_gpu_find_room_on_it(tmp_path: Path, count: int) -> None:
    job = spec(tmp_path, QWEN_05B, **{"pool.replicas": count, "pool.engines_per_gpu": count})
    resources = engine_resources(job, engines_of(job, gpus(1)), {"GPU": 1.0, "CPU": 64.0})
    assert resources.num_cpus == 0
    assert resources.num_gpus * count <= 1.0 < resources.num_gpus * (count + 1)


@pytest.mark.parametrize(
    ("nodes", "count", "cpus"),
    [
        ([4], 1, 3),
        ([2], 1, 1),
        ([2], 2, 0.5),
        ([1], 1, 0.2),
        ([1, 3], 1, 2),
        ([1, 3, 3], 1, 2),  # all of the cluster's CPUs but one would be on no node
        ([1, 3, 3], 2, 2),
        ([1, 3, 3], 3, 1),
        ([8, 8], 3, 3),
        ([0, 16], 2, 7),
    ],
)
def test_an_engine_gets_what_one_node_has(
    tmp_path: Path, nodes: list[float], count: int, cpus: float
) -> None:
    job = spec(
        tmp_path, QWEN_05B, **{"pool.replicas": count, "pool.device": "cpu", "cluster.address": "auto"}
    )
    engines = engines_of(job, hardware_of(job, {"CPU": sum(nodes)}))
    assert engine_resources(job, engines, {"CPU": sum(nodes)}, nodes).num_cpus == cpus


def test_more_engines_than_fit_are_refused_with_the_way_out(tmp_path: Path) -> None:
    job = spec(tmp_path, QWEN_7B, **{"pool.replicas": 2})
    with pytest.raises(JobError, match=r"2 × 1 GPU; this machine has 1: .*engines_per_gpu"):
        engine_resources(job, engines_of(job, gpus(1)), {"GPU": 1.0, "CPU": 64.0})


def test_the_plan_says_what_each_engine_gets(tmp_path: Path) -> None:
    engines = engines_of(spec(tmp_path, QWEN_05B, **{"pool.replicas": "auto"}), gpus(1))
    text = "\n".join(engines.lines())
    for part in (
        "0.49 B parameters",
        "12.0 KiB of KV cache a token",
        "3 engines on 1 × NVIDIA H200",
        "3 on each",
    ):
        assert part in text
    found = json.loads(json.dumps(engines.to_dict()))
    assert found["engines"] == 3
    assert found["engine_args"]["max_num_seqs"] == 512
    assert 3 * found["engine_args"]["gpu_memory_utilization"] < 1


def test_the_plan_says_where_more_engines_would_fit(tmp_path: Path) -> None:
    assert "pool.replicas: 3" in engines_of(spec(tmp_path, QWEN_05B), gpus(1)).lines()[-1]
    assert "note" not in engines_of(spec(tmp_path, QWEN_7B), gpus(1)).lines()[-1]


def test_the_plan_says_what_it_cannot_know(tmp_path: Path) -> None:
    job = spec(tmp_path, QWEN_05B, **{"cluster.address": "auto"})
    engines = engines_of(job, hardware_here(job))
    assert "not visible from here" in engines.lines()[1]
    assert engines.to_dict()["gpu_bytes"] is None
    elsewhere = job.model_copy(update={"model": job.model.model_copy(update={"source": "nobody/has-it"})})
    assert "not on this machine" in engines_of(elsewhere, gpus(1)).lines()[0]


def test_a_gpu_pool_is_no_cpu_pool_while_the_autoscaler_has_made_no_gpu_node(tmp_path: Path) -> None:
    pool = {"pool.device": "gpu", "pool.replicas": {"min": 1, "max": 8}}
    job = spec(tmp_path, QWEN_05B, **{"cluster.address": "auto"}, **pool)
    have = {"CPU": 4.0}
    engines = engines_of(job, hardware_of(job, have))
    assert engines.sizing is None  # not a CPU's; the engine is sized where it starts
    assert settled(engines) == (Replicas(min=1, max=8), 1)
    assert engine_resources(job, engines, have).num_gpus == 1


def test_a_plan_holds_the_block(tmp_path: Path) -> None:
    tree = {
        "name": "planned",
        "input": {"path": str(tmp_path / "in.jsonl")},
        "prompt": {"template": "{{ q }}"},
        "model": {"source": str(tmp_path), "engine": {"load_format": "dummy"}},
        "output": {"path": str(tmp_path / "out")},
        "pool": {"device": "cpu"},
    }
    spec(tmp_path, QWEN_05B)
    proposal = propose(load(tree))
    assert proposal.summary["engine"]["device"] == "cpu"
    assert proposal.summary["engine"]["engine_args"]["max_num_batched_tokens"] == 4096
    assert not (tmp_path / "out").exists()
