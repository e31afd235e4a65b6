"""deploy/kubernetes against the schemas of Kubernetes, KubeRay and the Prometheus operator, and against the rest of Dray.

The schemas are trimmed copies (tests/data/kubernetes/README.md) that forbid unknown fields.
"""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import load
from jobs.cli import main
from tests.unit.manifests import (
    FILES,
    FOLDER,
    ROOT,
    clusters,
    complaints,
    manifests,
    mounted_at,
    pod_specs,
    pod_templates,
    ports_of,
    server,
    validator,
)


@pytest.mark.parametrize("name", FILES)
def test_the_schemas_accept(name: str) -> None:
    for manifest in manifests(name):
        assert complaints(manifest) == []


def test_a_wrong_name_or_type_is_refused_anywhere() -> None:
    """Otherwise the test above proves nothing."""

    def every(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            if isinstance(value, dict | list):
                yield (*path, key)
                yield from every(value, (*path, key))

    def at(node: Any, path: tuple[Any, ...]) -> Any:
        for key in path:
            node = node[key]
        return node

    # What the API server takes any key in.
    free = re.compile(r"labels|matchLabels|nodeSelector|rayStartParams|requests|limits")
    for name, manifest in [(file, one) for file in FILES for one in manifests(file)]:
        for path in every(manifest):
            labels = free.fullmatch(str(path[-1])) or (manifest["kind"], path[-1]) == ("Service", "selector")
            if isinstance(at(manifest, path), dict) and not labels:
                wrong = copy.deepcopy(manifest)
                at(wrong, path)["replcias"] = 1
                assert not validator(wrong["kind"]).is_valid(wrong), f"{name}: {path} takes any key"
    [cluster] = manifests("raycluster.yaml")
    for path, value in [
        (("spec", "workerGroupSpecs", 0, "maxReplicas"), "8"),
        (("spec", "enableInTreeAutoscaling"), "yes"),
        (("spec", "authOptions", "mode"), "tokens"),
    ]:
        wrong = copy.deepcopy(cluster)
        at(wrong, path[:-1])[path[-1]] = value
        assert complaints(wrong), f"{path}: {value!r} passed"
    deployment, service = manifests("serve.yaml")
    for manifest, path, other in [
        (deployment, ("spec", "replicas"), "1"),
        (deployment, ("spec", "strategy", "type"), True),
        (deployment, ("apiVersion",), "v1"),
        (service, ("spec", "ports", 0, "port"), "8000"),
    ]:
        wrong = copy.deepcopy(manifest)
        at(wrong, path[:-1])[path[-1]] = other
        assert complaints(wrong), f"{path}: {other!r} passed"


def test_the_image_is_this_version_of_dray_on_the_locks_ray() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    images = {image for name in FILES for image in re.findall(r"image: (\S+)", (FOLDER / name).read_text())}
    assert images == {f"dray:{version}"}
    kustomization = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
    assert kustomization["images"] == [{"name": "dray", "newName": "dray", "newTag": version}]
    lock = dict(
        line.split("==") for line in (ROOT / "requirements/gpu.txt").read_text().split() if "==" in line
    )
    assert {spec["rayVersion"] for _, spec in clusters()} == {lock["ray"]}


def test_every_container_is_bounded_and_unprivileged() -> None:
    user = re.search(r"^USER (\d+):", (ROOT / "deploy/Dockerfile").read_text(), re.MULTILINE)
    assert user
    found = [pod for name in FILES for manifest in manifests(name) for pod in pod_specs(manifest)]
    assert len(found) == 7  # two heads, two worker groups, two submitters, one server
    for pod in found:
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["runAsUser"] == int(user[1])
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            resources = container["resources"]
            assert set(resources["requests"]) == set(resources["limits"]) >= {"cpu", "memory"}
            # Every name that is mounted is a volume, and the other way round.
            mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
            assert mounted == {volume["name"] for volume in pod.get("volumes", [])}


def test_ray_nodes_have_probes_and_workers_a_gpu() -> None:
    for name, spec in clusters():
        groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
        for group in groups:
            [container] = group["template"]["spec"]["containers"]
            for probe in ("readinessProbe", "livenessProbe"):
                assert container[probe]["httpGet"]["port"] == 52365, name
        for group in spec["workerGroupSpecs"]:
            pod = group["template"]["spec"]
            assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
            resources = pod["containers"][0]["resources"]
            assert resources["requests"]["nvidia.com/gpu"] == resources["limits"]["nvidia.com/gpu"] == "1"
            assert pod["nodeSelector"]
            assert pod["tolerations"]


def test_models_and_kernels_go_to_volumes_of_their_own() -> None:
    text = (ROOT / "deploy/Dockerfile").read_text()
    folders = dict(re.findall(r"(\w+)=(/(?:models|cache)\S*)", text))
    assert {"HF_HOME", "DRAY_MODELS", "VLLM_CACHE_ROOT", "TRITON_CACHE_DIR"} <= set(folders)
    groups = [group for _, spec in clusters() for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]]
    deployment, _, _ = server()
    for pod in (owner["template"]["spec"] for owner in [*groups, deployment["spec"]]):
        at = mounted_at(pod)
        assert "persistentVolumeClaim" in at["/models"]
        assert "emptyDir" in at["/cache"]


def test_secrets_are_references() -> None:
    for name in FILES:
        for manifest in manifests(name):
            assert manifest["kind"] != "Secret"
            for pod in pod_specs(manifest):
                for variable in (v for c in pod["containers"] for v in c.get("env", [])):
                    secret = re.search(r"TOKEN|KEY|SECRET|PASSWORD", variable["name"])
                    assert not secret or "secretKeyRef" in variable["valueFrom"], variable["name"]


def test_the_job_files_are_mounted_and_valid() -> None:
    kustomization = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
    [generator] = kustomization["configMapGenerator"]
    for name, spec in clusters():
        for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
            [volume] = [v for v in group["template"]["spec"]["volumes"] if v["name"] == "jobs"]
            assert volume["configMap"]["name"] == generator["name"], name
    [job] = manifests("rayjob.yaml")
    [cron] = manifests("cronjob.yaml")
    [submit] = next(pod_specs(cron))["containers"]
    _, _, served = server()
    started = {job["spec"]["entrypoint"].split()[-1], submit["command"][2], *served["models"]}
    # What the submitter's command line is, by the command line itself.
    command = main.commands[submit["command"][1]]
    parsed = command.make_context("submit", submit["command"][2:]).params
    assert parsed["watch"]
    [cluster] = manifests("raycluster.yaml")
    assert parsed["address"] == f"http://{cluster['metadata']['name']}-head-svc:8265"
    assert started == {f"/etc/dray/{file}" for file in generator["files"]}
    assert {path.name for path in (FOLDER / "jobs").iterdir()} == {Path(f).name for f in generator["files"]}


@pytest.mark.parametrize("name", ["nightly", "summaries"])
def test_the_pool_fits_the_cluster_it_runs_on(name: str) -> None:
    spec = load(str(FOLDER / "jobs" / f"{name}.yaml")).spec
    assert spec.cluster.address == "auto"
    assert spec.pool.device == "gpu"
    cluster = dict(clusters())["rayjob.yaml" if name == "summaries" else "raycluster.yaml"]
    [gpus] = cluster["workerGroupSpecs"]
    assert spec.pool.most_engines * spec.model.gpus_per_engine <= gpus["maxReplicas"]


def test_prometheus_scrapes_all_that_have_metrics() -> None:
    [monitor] = manifests("monitoring.yaml")
    selector = monitor["spec"]["selector"]
    [among] = selector["matchExpressions"]
    assert among["operator"] == "In"
    wanted = {end["port"] for end in monitor["spec"]["podMetricsEndpoints"]}
    scraped = set()
    for name in FILES:
        for template in (t for manifest in manifests(name) for t in pod_templates(manifest)):
            labels = template.get("metadata", {}).get("labels", {})
            ports = ports_of(template["spec"]["containers"][0])
            chosen = (
                selector["matchLabels"].items() <= labels.items() and labels[among["key"]] in among["values"]
            )
            assert chosen == bool(wanted & set(ports)), name
            if chosen:
                scraped |= {(labels[among["key"]], ports[port]) for port in wanted & set(ports)}
    assert scraped == {("head", 8080), ("worker", 8080), ("serve", server()[2]["port"])}


def test_kustomize_builds_it() -> None:
    command = (
        ["kustomize", "build"]
        if shutil.which("kustomize")
        else ["kubectl", "kustomize"]
        if shutil.which("kubectl")
        else None
    )
    if not command:
        pytest.skip("neither kustomize nor kubectl is installed")
    done = subprocess.run([*command, str(FOLDER)], capture_output=True, text=True, check=True)
    built = list(yaml.safe_load_all(done.stdout))
    assert sorted(manifest["kind"] for manifest in built) == [
        "ConfigMap",
        "CronJob",
        "PersistentVolumeClaim",
        "RayCluster",
    ]
    for manifest in built:
        assert complaints(manifest) == []
        assert manifest["metadata"]["namespace"] == "dray"
