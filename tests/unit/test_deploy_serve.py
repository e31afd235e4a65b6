"""deploy/kubernetes/serve.yaml against the command line that it starts, and against the job file that this serves."""

from __future__ import annotations

from pathlib import Path

import yaml

from jobs.batch_server import GRACE_S
from jobs.runner import COMMIT_S
from jobs.served_models import served_models
from tests.unit.manifests import (
    FILES,
    FOLDER,
    ROOT,
    manifests,
    mounted_at,
    pod_templates,
    ports_of,
    served_job,
    server,
)


def gib(quantity: str) -> int:
    assert quantity.endswith("Gi")
    return int(quantity.removesuffix("Gi"))


def test_one_server_writes_a_store() -> None:
    deployment, _, arguments = server()
    assert deployment["spec"]["replicas"] == 1
    assert deployment["spec"]["strategy"] == {
        "type": "Recreate"
    }  # two at once: the new one would never be ready
    assert arguments["store"].startswith("s3://")
    assert arguments["access_log"] is None  # stdout


def test_the_service_and_the_probes_come_to_where_the_server_listens() -> None:
    deployment, service, arguments = server()
    pod = deployment["spec"]["template"]
    [container] = pod["spec"]["containers"]
    ports = ports_of(container)
    assert arguments["host"] == "0.0.0.0"  # probes and the Service come to the pod's address
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = container[probe]["httpGet"]
        assert asked["path"] == "/health"
        assert ports[asked["port"]] == arguments["port"], probe
    [port] = service["spec"]["ports"]
    assert ports[port["targetPort"]] == arguments["port"]
    assert service["spec"]["type"] == "ClusterIP"
    templates = [one for name in FILES for one in pod_templates(manifests(name))]
    all_labels = [one.get("metadata", {}).get("labels", {}) for one in templates]
    for selector in (deployment["spec"]["selector"]["matchLabels"], service["spec"]["selector"]):
        chosen = [labels for labels in all_labels if selector.items() <= labels.items()]
        assert chosen == [pod["metadata"]["labels"]]


def test_the_server_has_the_time_to_start_and_to_end() -> None:
    deployment, _, arguments = server()
    pod = deployment["spec"]["template"]["spec"]
    [container] = pod["containers"]
    probe = container["startupProbe"]
    assert (
        probe["periodSeconds"] * probe["failureThreshold"] >= 4 * 30
    )  # the lock of a killed one, and as much again
    grace_s = served_job(arguments).errors.shutdown_grace_s
    assert pod["terminationGracePeriodSeconds"] >= grace_s + COMMIT_S + GRACE_S + 20


def test_the_server_finds_its_keys_and_hears_of_their_changes() -> None:
    deployment, _, arguments = server()
    pod = deployment["spec"]["template"]["spec"]
    keys = Path(arguments["key_file"])
    [secret] = [volume["secret"] for volume in pod["volumes"] if "secret" in volume]
    assert mounted_at(pod)[str(keys.parent)]["secret"] == secret
    assert "items" not in secret
    # A file that is mounted by subPath stays what it was when the pod began.
    assert not any("subPath" in mount for mount in pod["containers"][0]["volumeMounts"])
    guide = (ROOT / "docs/deployment.md").read_text()
    assert f"create secret generic {secret['secretName']} -n dray --from-file={keys.name}" in guide


def test_the_servers_pod_is_the_cluster_of_its_runs() -> None:
    deployment, _, arguments = server()
    pod = deployment["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert "command" not in container  # would replace tini, the image's ENTRYPOINT
    [model] = arguments["models"]
    here = str(FOLDER / "jobs" / Path(model).name)
    spec = served_job(arguments)
    assert list(served_models([here], arguments["overrides"])) == [spec.model.source]
    assert spec.cluster.address == "local"
    assert spec.pool.device == "gpu"
    resources = container["resources"]
    gpus = resources["limits"]["nvidia.com/gpu"]
    assert resources["requests"]["nvidia.com/gpu"] == gpus
    assert spec.pool.most_engines * spec.model.gpus_per_engine == int(gpus)
    assert resources["requests"]["memory"] == resources["limits"]["memory"]
    assert resources["requests"]["cpu"] == resources["limits"]["cpu"]
    assert pod["nodeSelector"]
    assert pod["tolerations"]
    at = mounted_at(pod)
    [generator] = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())["configMapGenerator"]
    assert at[str(Path(model).parent)]["configMap"]["name"] == generator["name"]
    shared = at["/dev/shm"]["emptyDir"]
    assert shared["medium"] == "Memory"
    # Ray takes 30 % of the memory for objects, of /dev/shm at most 95 %.
    memory = gib(resources["limits"]["memory"])
    assert 0.3 * memory <= 0.95 * gib(shared["sizeLimit"]) < 0.5 * memory
