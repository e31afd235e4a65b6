"""What `dray submit` ships and refuses, without a cluster."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from jobs import load
from jobs.submission import local_places, pack, submit, unset_variables
from pipelines.errors import SpecError


def job(folder: Path, **changes: object) -> dict[str, object]:
    return {
        "name": "shipped",
        "input": {"path": str(folder / "in.parquet")},
        "prompt": {"template": "{{ q }}"},
        "model": {"source": "nobody/model"},
        "output": {"path": "s3://bucket/out"},
        "cluster": {"address": "local", "num_cpus": 2},
        **changes,
    }


def test_the_shipped_job_runs_there_and_loads_alike(tmp_path: Path) -> None:
    loaded = load(job(tmp_path), ["sampling.temperature=0.5"])
    pack(loaded, tmp_path)
    shipped = yaml.safe_load((tmp_path / "job.yaml").read_text())
    assert shipped["cluster"] == {"address": "auto"}
    again = load(shipped).spec
    assert again.sampling.temperature == 0.5
    assert again.model_copy(update={"cluster": loaded.spec.cluster}) == loaded.spec
    shipped_names = {path.name for path in tmp_path.iterdir()}
    assert shipped_names == {"job.yaml", "jobs", "pipelines", "user"}
    assert (tmp_path / "jobs" / "cli.py").exists()
    assert not list(tmp_path.rglob("__pycache__"))


def test_a_secret_is_shipped_as_its_reference_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("S3_KEY", "hunter2")
    output = {"path": "s3://bucket/out", "storage_options": {"secret": "${env:S3_KEY}"}}
    loaded = load(job(tmp_path, output=output))
    pack(loaded, tmp_path)
    assert "hunter2" not in (tmp_path / "job.yaml").read_text()
    assert unset_variables(loaded, {}) == ["S3_KEY"]
    assert unset_variables(loaded, {"S3_KEY": "hunter2"}) == []
    written_out = load(job(tmp_path, output={**output, "storage_options": {"secret": "hunter2"}}))
    with pytest.raises(
        SpecError, match=r"output.storage_options.secret: a secret written out is not shipped"
    ):
        pack(written_out, tmp_path / "elsewhere")


def test_a_job_brings_no_policy_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="DRAY_POLICY: the cluster's own to set"):
        submit(load(job(tmp_path)), "http://127.0.0.1:9", env={"DRAY_POLICY": "/dev/null"})


def test_a_variable_that_no_time_gives_is_not_lost_on_the_way(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="run variable 'region'"):
        submit(load(job(tmp_path), variables={"region": "eu"}), "http://127.0.0.1:9")


def test_paths_of_this_machine_are_named_where_the_cluster_is_elsewhere(tmp_path: Path) -> None:
    loaded = load(job(tmp_path))
    assert local_places(loaded, "http://10.0.0.7:8265") == [str(tmp_path / "in.parquet")]
    assert local_places(loaded, "http://127.0.0.1:8265") == []
