"""NVIDIA GPUs and their driver, as NVML or nvidia-smi tell them."""

from __future__ import annotations

import contextlib
import csv
import importlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jobs.doctor_finding import Finding, gib

_TABLE = "https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html"
#: CUDA major version of a build → oldest driver that runs it, any minor version of it: table 1 of that page.
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
_GPU_FOLDER = Path("/proc/driver/nvidia/gpus")


@dataclass(frozen=True, slots=True)
class Gpu:
    """One NVIDIA GPU; memory in bytes."""

    name: str
    total: int
    free: int
    capability: str = ""
    """Compute capability, `9.0`."""


@dataclass(frozen=True, slots=True)
class Gpus:
    """What the driver says. `fault`: why it says nothing although there is a GPU."""

    driver: str = ""
    gpus: tuple[Gpu, ...] = ()
    fault: str = ""

    @property
    def present(self) -> bool:
        return bool(self.gpus or self.fault)


# ── Reading ─────────────────────────────────────────────────────────────────────────────────────────────────────


def read_gpus() -> Gpus:
    """Through NVML where its Python binding is installed, else through nvidia-smi."""
    with contextlib.suppress(ImportError):
        nvml = importlib.import_module("pynvml")
        try:
            nvml.nvmlInit()
        except nvml.NVMLError as error:
            return _none(f"NVML: {error}")
        try:
            handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
            found = []
            for handle in handles:
                memory = nvml.nvmlDeviceGetMemoryInfo(handle)
                major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
                name = str(nvml.nvmlDeviceGetName(handle))
                found.append(Gpu(name, int(memory.total), int(memory.free), f"{major}.{minor}"))
            return Gpus(str(nvml.nvmlSystemGetDriverVersion()), tuple(found))
        finally:
            nvml.nvmlShutdown()
    if not shutil.which("nvidia-smi"):
        return _none("no nvidia-smi")
    fields = "driver_version,name,memory.total,memory.free,compute_cap"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=15, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return Gpus(fault="nvidia-smi gives no answer within 15 s")
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines()
        return _none(f"nvidia-smi: {said[0] if said else f'exit status {done.returncode}'}")
    return parse_smi(done.stdout)


def parse_smi(text: str) -> Gpus:
    """Lines of `driver, name, total MiB, free MiB, capability`; memory is `[N/A]` on GPUs that share the host's."""
    rows = [row for row in csv.reader(text.splitlines(), skipinitialspace=True) if len(row) == 5]
    gpus = tuple(Gpu(name, _mib(total), _mib(free), cap) for _, name, total, free, cap in rows)
    return Gpus(rows[0][0] if rows else "", gpus)


def _mib(text: str) -> int:
    return int(text) * 2**20 if text.strip().isdigit() else 0


def _none(reason: str) -> Gpus:
    """No GPU, or one that cannot be asked: its PCI device or the kernel driver's folder is still there."""
    if _GPU_FOLDER.is_dir() and any(_GPU_FOLDER.iterdir()):
        return Gpus(fault=f"{reason}, although the kernel driver is loaded")
    for device in Path("/sys/bus/pci/devices").glob("*"):
        with contextlib.suppress(OSError):
            vendor, kind = (device / "vendor").read_text(), (device / "class").read_text()
            if vendor.strip() == "0x10de" and kind.startswith("0x03"):  # NVIDIA, display or 3D controller
                return Gpus(fault=f"{reason}, although this machine has an NVIDIA device")
    return Gpus()


# ── Judging ─────────────────────────────────────────────────────────────────────────────────────────────────────


def gpu_findings(gpus: Gpus, *, wanted: bool) -> Iterator[Finding]:
    """One line per GPU; `wanted`: the job asks for GPUs on this machine."""
    if gpus.fault:
        yield Finding(
            "gpu",
            "problem",
            gpus.fault,
            "install or reload the NVIDIA driver until `nvidia-smi` lists the GPU; "
            "in a container: NVIDIA Container Toolkit and `docker run --gpus all`",
        )
    elif not gpus.gpus:
        detail = "no NVIDIA GPU on this machine"
        if wanted:
            remedy = "set pool.device: cpu, or name a cluster that has GPUs in cluster.address"
            yield Finding("gpu", "problem", f"{detail}, and pool.device is gpu", remedy)
        else:
            yield Finding("gpu", "ok", f"{detail}: engines run on the CPU")
    for index, gpu in enumerate(gpus.gpus):
        used = gpu.total - gpu.free
        memory = f"{gib(gpu.free)} of {gib(gpu.total)} free" if gpu.total else "memory shared with the host"
        detail = f"{gpu.name}, {memory}, driver {gpus.driver}"
        if used > 0.1 * gpu.total:
            remedy = "end the process that holds it (`nvidia-smi` lists it), or lower model.engine.gpu_memory_utilization"
            yield Finding(f"gpu {index}", "note", f"{detail}: something holds {gib(used)} of it", remedy)
        else:
            yield Finding(f"gpu {index}", "ok", detail)


def driver_fits(driver: str, cuda: str, works: bool = False) -> Finding:
    """Driver version against the CUDA version of the torch build. `works`: torch sees the GPU all the same."""
    major = int(cuda.split(".")[0])
    oldest = OLDEST_DRIVER.get(major)
    number = re.match(r"\d+", driver)
    if oldest is None or number is None:
        detail = f"driver {driver or 'unknown'} and torch's CUDA {cuda}: no rule known"
        return Finding("driver", "note", detail, f"compare them in NVIDIA's table: {_TABLE}")
    if int(number[0]) >= oldest:
        return Finding("driver", "ok", f"driver {driver} runs torch's CUDA {cuda} (needs {oldest} or newer)")
    detail = f"driver {driver} is too old for torch's CUDA {cuda}, which needs {oldest} or newer"
    if works:  # the forward compatibility package (cuda-compat), on data centre GPUs
        return Finding(
            "driver",
            "note",
            f"{detail}; torch works by cuda-compat",
            f"update the driver to {oldest} or newer",
        )
    builds = [f"cu{m}x" for m, least in OLDEST_DRIVER.items() if least <= int(number[0]) and m >= 12]
    other = f", or install torch and vLLM builds for {builds[-1]}" if builds else ""
    return Finding("driver", "problem", detail, f"update the NVIDIA driver to {oldest} or newer{other}")
