"""Which engines a job gets on the hardware at hand: how many, how many on one GPU, and with which numbers.

Hardware (Ray's counts, NVML's memory) + ModelShape ─► pool without `auto` + Sizing of one engine
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jobs.doctor_gpu import Gpu, read_gpus
from jobs.spec import JobSpec
from pipelines.model_shape import ModelShape, read_shape
from pipelines.settings import PoolSettings, Replicas
from pipelines.sizing import GIB, LARGE_GPU, Sizing, engines_that_fit, size_for_cpu, size_for_gpu
from pipelines.vllm_defaults import cpu_kv_bytes


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What a job's engines run on. None where it cannot be told from this machine."""

    gpus: int | None
    """GPUs that the job may use; 0: engines run on CPUs."""
    gpu_name: str = ""
    gpu_bytes: int | None = None
    """Memory of the smallest."""
    cores: float | None = None
    """CPU cores of all nodes."""


@dataclass(frozen=True, kw_only=True)
class Engines:
    """The engines of a job."""

    hardware: Hardware
    shape: ModelShape | None
    """None for the simulated engine, and for a model that is not on this machine."""
    pool: PoolSettings
    """`spec.pool` with numbers for `replicas` and `engines_per_gpu`."""
    sizing: Sizing | None
    """One engine's; None where the hardware is not known, and for the simulated engine."""
    most: int
    """Engines that one GPU could hold."""
    pays: int
    """Engines that one GPU is given with `engines_per_gpu: auto`: `most` where packing is known to pay, else 1."""
    model: str

    def to_dict(self) -> dict[str, Any]:
        """JSON values; null for what is not known."""
        shape, hardware = self.shape, self.hardware
        return {
            "device": "unknown" if hardware.gpus is None else "gpu" if hardware.gpus else "cpu",
            "gpu": hardware.gpu_name or None,
            "gpu_bytes": hardware.gpu_bytes,
            "gpus": hardware.gpus,
            "engines": self.pool.model_dump(mode="json")["replicas"],
            "engines_per_gpu": self.pool.engines_per_gpu,
            "parameters": shape and shape.parameters,
            "dtype": shape and shape.dtype,
            "model_weight_bytes": shape and shape.weight_bytes,
            "model_kv_bytes_per_token": shape and shape.kv_bytes_per_token(),
            **{
                f"engine_{name}": value
                for name, value in (self.sizing.to_dict() if self.sizing else {}).items()
            },
        }

    def lines(self) -> list[str]:
        """For `dray plan`: the model, who gets what, and vLLM's arguments."""
        if self.model == "simulated":
            return [f"SIMULATED, {_count(self.pool)}"]
        lines = [_described(self.shape)]
        hardware, sizing, packed = self.hardware, self.sizing, self.pool.engines_per_gpu
        if hardware.gpus is None or sizing is None:
            lines.append(
                f"{_count(self.pool)}; their GPUs are not visible from here: they are sized as they start"
            )
            return lines
        if hardware.gpus:
            on = f"{_count(self.pool)} on {hardware.gpus} × {hardware.gpu_name} of {_gib(hardware.gpu_bytes)}"
            lines.append(f"{on}, {packed} on each" if packed != 1 else on)
        else:
            lines.append(f"{_count(self.pool)} on the CPU")
        if sizing.kv_tokens is not None:
            lines.append(f"one engine's KV cache: {_gib(sizing.kv_bytes)}, about {sizing.kv_tokens:,} tokens")
        lines.append(
            ", ".join(f"{name} {_shown(name, value, sizing.given)}" for name, value in sizing.args.items())
        )
        lines += [f"note: {note}" for note in sizing.notes]
        if packed == 1 and self.pays > 1:
            lines.append(
                f"note: one GPU holds {self.pays} engines of this model: pool.replicas: {self.pays} (or auto) is faster"
            )
        return lines


def engines_of(spec: JobSpec, hardware: Hardware) -> Engines:
    """Settle `pool.replicas` and `pool.engines_per_gpu`, and size one engine.

    `replicas` counts engines, wherever they are. `replicas: auto` is every GPU full, one engine on a CPU.
    `engines_per_gpu: auto` packs engines only where there are more of them than GPUs, as densely as that needs and at
    most as `sizing.engines_that_fit` allows, on GPUs of 70 GiB or more: on smaller, slower ones it is not known to pay.
    """
    pool, simulated = spec.pool, spec.model.backend == "simulated"
    shape = None if simulated else read_shape(spec.model)
    gpus, gpu_bytes = hardware.gpus, hardware.gpu_bytes
    most = 1
    if gpus and gpu_bytes and not simulated:
        cores = math.inf if hardware.cores is None else hardware.cores / gpus
        most = engines_that_fit(shape, spec.model, spec.sampling, gpu_bytes, cores)
    pays = most if (gpu_bytes or 0) >= LARGE_GPU else 1
    if pool.engines_per_gpu != "auto":
        packed = pool.engines_per_gpu
    elif pool.replicas == "auto":
        packed = pays
    else:
        packed = min(pays, math.ceil(pool.most_engines / gpus)) if gpus else 1
    replicas: int | Replicas = 1
    if pool.replicas != "auto":
        replicas = pool.replicas
    elif gpus:
        replicas = max(1, gpus // spec.model.gpus_per_engine * packed)
    pool = pool.model_copy(update={"replicas": replicas, "engines_per_gpu": packed})
    sizing = None
    if not simulated and gpus == 0:
        sizing = size_for_cpu(shape, spec.model, spec.sampling, cpu_kv_bytes(spec.model))
    elif not simulated and gpu_bytes:
        sizing = size_for_gpu(shape, spec.model, spec.sampling, gpu_bytes, packed)
    return Engines(
        hardware=hardware,
        shape=shape,
        pool=pool,
        sizing=sizing,
        most=most,
        pays=pays,
        model="simulated" if simulated else spec.model.source,
    )


def hardware_here(spec: JobSpec) -> Hardware:
    """This machine's, for a cluster of our own; of a running cluster nothing is known before a run joins it."""
    if spec.pool.device == "cpu":
        return Hardware(gpus=0, cores=os.cpu_count())
    if spec.cluster.address != "local":
        return Hardware(gpus=None)
    found = read_gpus().gpus
    allowed = spec.cluster.num_gpus if spec.cluster.num_gpus is not None else _visible(len(found))
    count = min(len(found), allowed)
    if not count and spec.pool.device == "gpu":
        return Hardware(gpus=None)
    return _with_memory(count, found, spec.cluster.num_cpus or os.cpu_count())


def hardware_of(spec: JobSpec, have: Mapping[str, float]) -> Hardware:
    """A connected cluster's, by Ray's counts. Memory is known for GPUs of this machine only."""
    gpus = 0 if spec.pool.device == "cpu" else int(have.get("GPU", 0))
    if not gpus and spec.pool.device == "gpu" and spec.cluster.address != "local":
        return Hardware(gpus=None)  # an autoscaling cluster makes its first GPU node for the first engine
    here = read_gpus().gpus if gpus and spec.cluster.address == "local" else ()
    return _with_memory(gpus, here, have.get("CPU"))


def _with_memory(count: int, found: tuple[Gpu, ...], cores: float | None) -> Hardware:
    known = [gpu for gpu in found if gpu.total]
    smallest = min(known, key=lambda gpu: gpu.total, default=None) if count else None
    return Hardware(
        gpus=count,
        gpu_name=smallest.name if smallest else "",
        gpu_bytes=smallest.total if smallest else None,
        cores=cores,
    )


def _visible(found: int) -> int:
    """GPUs that CUDA_VISIBLE_DEVICES leaves, as Ray counts them."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return found
    return len([one for one in chosen.split(",") if one.strip() and one.strip() != "-1"])


def _described(shape: ModelShape | None) -> str:
    if shape is None:
        return "the model is not on this machine: its size is not known before engines start"
    count, kv = shape.parameters, _gib(shape.kv_bytes_per_token())
    parameters = (
        "unknown" if count is None else f"{count / 1e9:.2f} B" if count >= 1e8 else f"{count / 1e6:.2f} M"
    )
    return f"{parameters} parameters, {_gib(shape.weight_bytes)} of weights ({shape.dtype}), {kv} of KV cache a token"


def _count(pool: PoolSettings) -> str:
    if isinstance(pool.replicas, Replicas):
        return f"{pool.replicas.min} to {pool.replicas.max} engines"
    return "1 engine" if pool.replicas == 1 else f"{pool.replicas} engines"


def _shown(name: str, value: Any, given: tuple[str, ...]) -> str:
    if isinstance(value, list):
        text = f"{len(value)} up to {max(value):,}"
    else:
        text = (
            _gib(value)
            if name.endswith("_bytes")
            else f"{value:,}"
            if isinstance(value, int)
            else f"{value:g}"
        )
    return f"{text} (yours)" if name in given else text


def _gib(count: int | None) -> str:
    if count is None:
        return "unknown"
    for unit, size in (("GiB", GIB), ("MiB", 1024**2)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count / 1024:,.1f} KiB"
