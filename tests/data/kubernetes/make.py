"""Make the schemas of this folder anew, trimmed to the kinds that deploy/kubernetes uses.

    python tests/data/kubernetes/make.py DEFINITIONS CRD...

DEFINITIONS is `_definitions.json` of Kubernetes' strict JSON schemas, each CRD a file of KubeRay or the Prometheus operator.
README.md names the versions. Descriptions are dropped; what is not described is forbidden, as `kubectl apply --validate=strict`
does; pod templates, which a CRD repeats in full, become references to Kubernetes' own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
KINDS = {
    "ConfigMap": "io.k8s.api.core.v1.ConfigMap",
    "PersistentVolumeClaim": "io.k8s.api.core.v1.PersistentVolumeClaim",
    "Secret": "io.k8s.api.core.v1.Secret",
    "CronJob": "io.k8s.api.batch.v1.CronJob",
    "Deployment": "io.k8s.api.apps.v1.Deployment",
    "Service": "io.k8s.api.core.v1.Service",
}
POD_TEMPLATE = "io.k8s.api.core.v1.PodTemplateSpec"
METADATA = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"


def reference(name: str) -> dict[str, Any]:
    return {"$ref": f"#/$defs/{name}"}


def without_prose(node: Any, *, names: bool = False) -> Any:
    """`names`: the keys of this mapping are names of fields, one of which may be `description`."""
    if isinstance(node, list):
        return [without_prose(one) for one in node]
    if not isinstance(node, dict):
        return node
    return {
        key: without_prose(value, names=not names and key in ("properties", "$defs"))
        for key, value in node.items()
        if names or not (key in ("description", "format", "default") or key.startswith("x-kubernetes-"))
    }


def strict(node: Any) -> Any:
    """A CRD's structural schema as a JSON schema that forbids unknown fields."""
    if isinstance(node, list):
        return [strict(one) for one in node]
    if not isinstance(node, dict):
        return node
    fields = node.get("properties", {})
    if "containers" in fields.get("spec", {}).get("properties", {}):
        return reference(POD_TEMPLATE)
    if node.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    made = {
        key: {name: strict(one) for name, one in value.items()} if key == "properties" else strict(value)
        for key, value in node.items()
    }
    if fields and not node.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


def crd(path: Path) -> tuple[str, dict[str, Any]]:
    definition = yaml.load(path.read_text(), Loader=yaml.CSafeLoader)
    names = definition["spec"]["names"]
    [version] = [v for v in definition["spec"]["versions"] if v["storage"]]
    schema = version["schema"]["openAPIV3Schema"]
    schema["properties"].pop("status", None)
    made = strict(schema)
    made["properties"]["metadata"] = reference(METADATA)
    made["properties"]["apiVersion"] = {"const": f"{definition['spec']['group']}/{version['name']}"}
    made["properties"]["kind"] = {"const": names["kind"]}
    made["required"] = ["apiVersion", "kind", "metadata", "spec"]
    return names["kind"], made


def needed(names: list[str], definitions: dict[str, Any]) -> dict[str, Any]:
    """The definitions that these ones refer to, themselves included."""
    found: dict[str, Any] = {}
    while names:
        name = names.pop()
        if name not in found:
            found[name] = definitions[name]
            names += [part.split('"')[0] for part in json.dumps(found[name]).split('"#/$defs/')[1:]]
    return dict(sorted(found.items()))


def main() -> None:
    definitions = json.loads(Path(sys.argv[1]).read_text())["$defs"]
    kinds = {kind: reference(name) for kind, name in KINDS.items()}
    kinds |= dict(crd(Path(path)) for path in sys.argv[2:])
    schemas = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "kinds": dict(sorted(kinds.items())),
        "$defs": needed([*KINDS.values(), POD_TEMPLATE, METADATA], definitions),
    }
    text = json.dumps(without_prose(schemas), separators=(",", ":"), sort_keys=True)
    (HERE / "schemas.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
