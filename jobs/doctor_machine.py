"""The machine beside its GPUs: Python, Dray, Ray, compiler, limits, memory and disks."""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
import socket
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path

from packaging.version import Version

import pipelines
from jobs.doctor_finding import GIB, Finding, gib

#: Ray's minor release that Dray is tested with (pyproject.toml).
RAY_RELEASE = (2, 60)
#: Ray refuses to spill, and so to run on, when its disk is fuller than this:
#: https://docs.ray.io/en/latest/ray-core/objects/object-spilling.html
_RAY_DISK_FULL = 0.95
#: Ray asks for this many descriptors itself and warns below 4096 (ray/_private/worker.py).
_FEW_DESCRIPTORS = 4096
#: Ray's object store: this share of memory, in /dev/shm unless that is too small (ray/_private/ray_constants.py).
_STORE_SHARE, _STORE_FLOOR = 0.3, 10 * 10**9


def python_version(version: tuple[int, ...]) -> Finding:
    """At least 3.11; vLLM's wheels end at 3.13."""
    text = ".".join(map(str, version[:3]))
    if version[:2] < (3, 11):
        return Finding(
            "python", "problem", f"{text}: Dray needs 3.11 or newer", "make setup PYTHON=python3.11"
        )
    if version[:2] > (3, 13):
        return Finding(
            "python", "note", f"{text}: tested up to 3.13", "make setup PYTHON=python3.13 VENV=.venv-313"
        )
    return Finding("python", "ok", f"{text} at {sys.executable}")


def system(name: str, machine: str) -> Finding:
    """Linux runs engines; elsewhere Dray can plan and submit."""
    detail = f"{name} {machine}, {os.cpu_count()} CPUs"
    if name != "Linux":
        return Finding(
            "platform", "note", detail, "engines run on Linux: submit to a Linux cluster (cluster.address)"
        )
    return Finding("platform", "ok", f"{detail}, {platform.platform()}")


def dray() -> Finding:
    """Which Dray this is."""
    folder = Path(pipelines.__file__).resolve().parent.parent
    return Finding("dray", "ok", f"{pipelines.__version__} from {folder}")


def ray_version(version: str) -> Finding:
    """Ray's internals move with its minor releases."""
    release, tested = Version(version).release[:2], ".".join(map(str, RAY_RELEASE))
    remedy = f"pip install 'ray[data,default]~={tested}.0'"
    if release < RAY_RELEASE:
        return Finding(
            "ray", "problem", f"{version} is older than {tested}, which Dray is tested with", remedy
        )
    if release > RAY_RELEASE:
        return Finding("ray", "note", f"{version} is newer than {tested}, which Dray is tested with", remedy)
    return Finding("ray", "ok", f"{version} (tested with {tested})")


def cluster(address: str, environ: Mapping[str, str] = os.environ) -> Finding:
    """Whether anything listens at `cluster.address`, other than `local`. 3 s at most."""
    place = address
    if address == "auto":
        # as ray.init(address="auto") looks for it
        file = ray_folder(environ) / "ray_current_cluster"
        place = environ.get("RAY_ADDRESS") or (file.read_text().strip() if file.exists() else "")
        if not place:
            detail = f"cluster.address is auto, but neither RAY_ADDRESS nor {file} names a running cluster"
            return Finding("cluster", "problem", detail, "ray start --head, or set cluster.address: local")
    match = re.fullmatch(r"(?:ray://)?\[?(.+?)\]?:(\d+)", place)
    if match is None:
        return Finding(
            "cluster", "note", f"cannot tell host and port of {place!r}", "set cluster.address: host:port"
        )
    try:
        with socket.create_connection((match[1], int(match[2])), timeout=3):
            return Finding("cluster", "ok", f"{place} accepts connections")
    except OSError as error:
        return Finding(
            "cluster",
            "problem",
            f"{place} does not answer: {error}",
            "start Ray there (`ray start --head --port=6379`), open the port, or correct cluster.address "
            "(6379: GCS, ray://…:10001: client)",
        )


def conda_mixture(conda_prefix: str, prefix: str, installers: Mapping[str, str]) -> Finding | None:
    """pip-installed torch and friends inside a conda environment; None outside of one."""
    if not conda_prefix or Path(prefix).resolve() != Path(conda_prefix).resolve():
        return None
    mixed = sorted(name for name, installer in installers.items() if installer.strip() not in ("", "conda"))
    if not mixed:
        return Finding("conda", "ok", f"{conda_prefix}, nothing of the engine from pip")
    return Finding(
        "conda",
        "note",
        f"{', '.join(mixed)} from pip inside the conda environment {conda_prefix}: conda's libstdc++ and CUDA "
        "libraries may be loaded instead of the wheels' own",
        "prefer a plain virtual environment (make setup); in this one never `conda install` pytorch, cuda or mkl",
    )


def compiler(found: str | None, has_headers: bool, *, gpu: bool) -> Finding:
    """Triton compiles its launchers with the C compiler and Python's headers at the first start of an engine."""
    package = f"python{sys.version_info[0]}.{sys.version_info[1]}-dev"
    if found is None:
        detail = "no C compiler: torch.compile and Triton need one when an engine starts"
        remedy = "apt-get install -y gcc g++ (or name one in CC), or model.engine.enforce_eager: true"
        return Finding("compiler", "problem" if gpu else "note", detail, remedy)
    if gpu and not has_headers:
        detail = f"{found}, but Python.h is missing: Triton cannot compile its launchers"
        return Finding("compiler", "problem", detail, f"apt-get install -y {package}")
    return Finding("compiler", "ok", found)


def find_compiler(*, gpu: bool) -> tuple[str | None, bool]:
    """The compiler that Triton (GPU) or torch's inductor (CPU, C++) would take, and whether Python's headers are there."""
    names = ("gcc", "clang", "cc") if gpu else ("g++", "clang++", "c++")
    chosen = os.environ.get("CC" if gpu else "CXX")
    found = next((path for name in ((chosen,) if chosen else names) if (path := shutil.which(name))), None)
    return found, (Path(sysconfig.get_path("include")) / "Python.h").exists()


def descriptors(soft: int, hard: int) -> Finding:
    """Ray raises the soft limit to the hard one, up to 65,536, so the hard one counts."""
    least = hard if hard != resource.RLIM_INFINITY else 65536
    detail = f"ulimit -n {soft} (hard limit {'none' if hard == resource.RLIM_INFINITY else hard})"
    if least < _FEW_DESCRIPTORS:
        return Finding(
            "open files", "note", f"{detail}: few for Ray's connections", "ulimit -Hn 65536, as root"
        )
    return Finding("open files", "ok", detail)


def shared_memory(total: int, free: int, memory: int) -> Finding:
    """`/dev/shm` against Ray's object store and what vLLM's and NCCL's processes exchange; all in bytes."""
    store = min(int(memory * _STORE_SHARE), max(_STORE_FLOOR, int(free * 0.95)))
    detail = f"/dev/shm has {gib(free)} of {gib(total)} free; Ray's object store takes {gib(store)}"
    if free < store:
        remedy = f"docker run --shm-size={store // 10**9 + 2}g (Kubernetes: an emptyDir with medium: Memory)"
        return Finding("shared memory", "note", f"{detail} and goes to the disk instead", remedy)
    return Finding("shared memory", "ok", detail)


def disk(name: str, folder: Path, total: int, free: int, *, least: int, key: str, for_ray: bool) -> Finding:
    """Room on one disk; `key` is what moves the folder elsewhere."""
    detail = f"{folder}: {gib(free)} of {gib(total)} free"
    if for_ray and free < (1 - _RAY_DISK_FULL) * total:
        remedy = f"free some space, or set {key} to a folder on another disk"
        return Finding(name, "problem", f"{detail}: above 95 % full Ray refuses to write objects", remedy)
    if free < least:
        return Finding(name, "note", detail, f"free some space, or set {key} to a folder on another disk")
    return Finding(name, "ok", detail)


def disks(environ: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """The hub cache and Ray's session folder."""
    hub = hub_cache(environ)
    usage = shutil.disk_usage(existing(hub))
    yield disk("model cache", hub, usage.total, usage.free, least=20 * GIB, key="HF_HOME", for_ray=False)
    ray = ray_folder(environ)
    usage = shutil.disk_usage(existing(ray))
    yield disk("ray's disk", ray, usage.total, usage.free, least=10 * GIB, key="RAY_TMPDIR", for_ray=True)


def hub_cache(environ: Mapping[str, str] = os.environ) -> Path:
    """Where huggingface_hub keeps models."""
    cache = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    home = Path(environ.get("HF_HOME") or cache / "huggingface")
    return Path(environ.get("HF_HUB_CACHE") or home / "hub").expanduser()


def ray_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Where Ray keeps sessions and spilled objects (ray/_common/utils.py)."""
    return Path(environ.get("RAY_TMPDIR") or environ.get("TMPDIR") or "/tmp") / "ray"


def existing(path: Path) -> Path:
    """The path itself or its nearest parent that exists."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
