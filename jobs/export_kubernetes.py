"""The Kubernetes CronJob of `dray export kubernetes`: its pod is the driver, and with `cluster.address: local` all of the job."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import yaml

from jobs.loading import LoadedJob
from jobs.schedule import ScheduleSettings

_HEADER = """\
# {name}: made by `dray export kubernetes`; make it anew when the job file changes.
# ${{env:NAME}} in the job file comes from the Secret {secret}. Paths on a disk need a volume.
# The date of a run is that of the pod's start, in the schedule's zone.
"""

#: Past starts that Kubernetes still makes up for, by `schedule.missed`; it makes up for the latest one only.
_MAKE_UP_S = {"skip": 60, "run_once": 86_400, "run_all": 86_400}

_WEEKDAYS = ("SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT")


def cron_job(
    job: LoadedJob, schedule: ScheduleSettings, image: str, command: Sequence[str], *, submits: bool
) -> str:
    """Two YAML documents. `command`: the program with its options, to which the job file is added; `submits`: it hands
    the run to a cluster elsewhere, and needs no GPU itself."""
    name = f"dray-{re.sub('[^a-z0-9]+', '-', job.spec.name.lower())}"[:52].strip("-")
    labels = {"app.kubernetes.io/name": "dray", "app.kubernetes.io/instance": name}
    security = {
        "runAsNonRoot": True,
        "runAsUser": 10001,
        "runAsGroup": 10001,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    container: dict[str, Any] = {
        "name": "dray",
        "image": image,
        "command": [*command, "/etc/dray/job.yaml"],
        "envFrom": [{"secretRef": {"name": name, "optional": True}}],
        "volumeMounts": [{"name": "job", "mountPath": "/etc/dray", "readOnly": True}],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    if not submits and (gpus := _gpus(job)):
        container["resources"] = {"limits": {"nvidia.com/gpu": gpus}}
    pod = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        # Shards in flight have `errors.shutdown_grace_s`, and the last commits a little more.
        "terminationGracePeriodSeconds": math.ceil(job.spec.errors.shutdown_grace_s) + 30,
        "securityContext": security,
        "containers": [container],
        "volumes": [{"name": "job", "configMap": {"name": name}}],
    }
    config = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "labels": labels},
        "data": {"job.yaml": yaml.dump(_without_extends(job.raw), Dumper=_Plain, **_STYLE)},
    }
    cron = {
        "apiVersion": "batch/v1",
        "kind": "CronJob",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "schedule": _cron_of(schedule.cron),
            "timeZone": schedule.timezone,
            "concurrencyPolicy": "Forbid",
            "startingDeadlineSeconds": _MAKE_UP_S[schedule.missed],
            "jobTemplate": {
                "spec": {
                    "backoffLimit": 2,  # a retry takes up what the first try left
                    "template": {"metadata": {"labels": labels}, "spec": pod},
                }
            },
        },
    }
    header = _HEADER.format(name=job.spec.name, secret=name)
    documents: str = yaml.dump_all([config, cron], Dumper=_Plain, explicit_start=True, **_STYLE)
    return header + documents


class _Plain(yaml.SafeDumper):
    """Without anchors, and texts of several lines as blocks."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style="|" if "\n" in data else None)


_Plain.add_representer(str, _Plain.represent_str)
_STYLE: dict[str, Any] = {"sort_keys": False, "allow_unicode": True, "width": 110}


def _without_extends(raw: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in raw.items() if key != "extends"}


def _cron_of(cron: str) -> str:
    """Kubernetes' weekdays end with 6, its Sunday is 0 only: those that reach to 7 are listed one by one."""
    *fields, weekdays = cron.split()
    if not re.search(r"7|\w/", weekdays):
        return cron
    days: dict[str, None] = {}  # a set that keeps its order
    for part in weekdays.upper().split(","):
        if part.startswith("*"):
            days[part] = None
            continue
        span, _, step = part.partition("/")
        first, _, last = span.partition("-")
        end = _weekday(last) if last else 7 if step else _weekday(first)
        days |= {str(day % 7): None for day in range(_weekday(first), end + 1, int(step or 1))}
    return " ".join([*fields, ",".join(days)])


def _weekday(name: str) -> int:
    return int(name) if name.isdigit() else _WEEKDAYS.index(name)


def _gpus(job: LoadedJob) -> int | None:
    """GPUs that the pod needs, where that is known: engines that it starts itself, as many as the job says."""
    spec = job.spec
    if spec.cluster.address != "local" or spec.pool.device == "cpu" or spec.model.backend != "vllm":
        return None
    if not isinstance(spec.pool.replicas, int):
        return None
    packed = spec.pool.engines_per_gpu if isinstance(spec.pool.engines_per_gpu, int) else 1
    return math.ceil(spec.pool.replicas * spec.model.gpus_per_engine / packed)
