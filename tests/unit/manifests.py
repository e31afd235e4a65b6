"""The manifests of deploy/kubernetes, and the schemas that they are held against."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from jobs import load
from jobs.cli import main
from jobs.spec import JobSpec

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
SCHEMAS = json.loads((ROOT / "tests/data/kubernetes/schemas.json").read_text())
FILES = sorted(path.name for path in FOLDER.glob("*.yaml") if path.name != "kustomization.yaml")


@cache
def manifests(name: str) -> list[Any]:
    # Through JSON, since anchors make two places of a manifest one object.
    found: list[Any] = json.loads(json.dumps(list(yaml.safe_load_all((FOLDER / name).read_text()))))
    return found


@cache
def validator(kind: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator({"$defs": SCHEMAS["$defs"], **SCHEMAS["kinds"][kind]})


def complaints(manifest: Any) -> list[str]:
    """What the API server would refuse."""
    errors = validator(manifest["kind"]).iter_errors(manifest)
    return [f"{error.json_path}: {error.message}" for error in errors]


def clusters() -> Iterator[tuple[str, Any]]:
    [cluster] = manifests("raycluster.yaml")
    [job] = manifests("rayjob.yaml")
    yield "raycluster.yaml", cluster["spec"]
    yield "rayjob.yaml", job["spec"]["rayClusterSpec"]


def pod_templates(node: Any) -> Iterator[Any]:
    if isinstance(node, list):
        for one in node:
            yield from pod_templates(one)
    elif isinstance(node, dict):
        if "containers" in node.get("spec", {}):
            yield node
        for one in node.values():
            yield from pod_templates(one)


def pod_specs(node: Any) -> Iterator[Any]:
    return (template["spec"] for template in pod_templates(node))


def server() -> tuple[Any, Any, dict[str, Any]]:
    """Deployment and Service of serve.yaml, and its command line, by the command line itself."""
    deployment, service = manifests("serve.yaml")
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    program, command, *arguments = container["args"]
    assert program == "dray"
    return deployment, service, main.commands[command].make_context(command, list(arguments)).params


def served_job(arguments: dict[str, Any]) -> JobSpec:
    """What a batch's run is started with."""
    [model] = arguments["models"]
    batch = {
        "name": "batch",
        "extends": [str(FOLDER / "jobs" / Path(model).name)],
        "input": {"path": "requests.parquet"},
        "prompt": {"messages_column": "messages"},
        "output": {"path": "out"},
    }
    return load(batch, arguments["overrides"]).spec


def mounted_at(pod: Any) -> dict[str, Any]:
    """Folder → volume, of a pod's one container."""
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    [container] = pod["containers"]
    return {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}


def ports_of(container: Any) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in container.get("ports", [])}
