"""What the engines of a run reserve on its Ray cluster."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jobs.engines import Engines, engines_of, hardware_of
from jobs.policy import check_pool
from jobs.spec import JobSpec
from pipelines.errors import JobError
from pipelines.run import COMMIT_CPUS, PREPARE_CPUS, EngineResources
from pipelines.settings import PoolSettings

log = logging.getLogger("dray")


@dataclass(frozen=True, kw_only=True)
class Reserved:
    """A pool of engines on a cluster."""

    pool: PoolSettings
    """With numbers for `auto`."""
    each: EngineResources
    """What Ray reserves for one engine."""

    @property
    def gpus(self) -> float:
        """Of all engines that are always there."""
        return self.each.num_gpus * self.pool.least_engines

    @property
    def cpus(self) -> float:
        """As `gpus`."""
        return self.each.num_cpus * self.pool.least_engines


def settle(spec: JobSpec) -> list[Reserved]:
    """The pools of a job, one for each of `spec.pools`, on the connected cluster."""
    import ray

    have: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    cpus = [float(node.get("CPU", 0)) for node in nodes]
    each = [engines_of(one, hardware_of(one, have)) for one in spec.pools]
    most = sum(engines.pool.least_engines for engines in each)
    found = []
    for one, engines in zip(spec.pools, each, strict=True):
        check_pool(one, engines.pool)
        needed = engine_resources(one, engines, have, cpus, beside=most - engines.pool.least_engines)
        if not any(needed.fit(node) for node in nodes):
            log.warning(
                "no node of this cluster has %g CPUs and %g GPUs for an engine: the run waits until one joins",
                needed.num_cpus,
                needed.num_gpus,
            )
        found.append(Reserved(pool=engines.pool, each=needed))
    if spec.cluster.address == "local":
        for kind, need in (("GPU", sum(one.gpus for one in found)), ("CPU", sum(one.cpus for one in found))):
            if need > have.get(kind, 0):
                raise JobError(
                    f"the {len(found)} pools of this job need {need:g} {kind}s together; this machine has "
                    f"{have.get(kind, 0):g}: lower their pool.replicas or pool.cpus_per_engine, raise "
                    "pool.engines_per_gpu, or name a larger cluster.address"
                )
    return found


def engine_resources(
    spec: JobSpec,
    engines: Engines,
    have: Mapping[str, float],
    node_cpus: Sequence[float] = (),
    beside: int = 0,
) -> EngineResources:
    """What Ray reserves for one engine of a settled pool, on a cluster that has `have`, by default in one node.

    `beside`: engines of the job's other pools. Raises JobError when a cluster of our own can never hold the pool: Ray
    would wait for ever.
    """
    pool = engines.pool
    wanted = pool.least_engines
    if pool.device == "gpu" or engines.hardware.gpus:
        assert pool.engines_per_gpu != "auto"
        # Rounded down to Ray's own steps, or the last of three engines finds no third of a GPU left. No CPU for a GPU
        # engine: two such actors on two cores would block every CPU stage for ever.
        share = math.floor(1e4 * spec.model.gpus_per_engine / pool.engines_per_gpu) / 1e4
        resources = EngineResources(num_gpus=share, num_cpus=0)
    else:
        fair = _fair_cpus(node_cpus or [have.get("CPU", 1)], wanted + beside)
        cpus = fair if pool.cpus_per_engine == "auto" else pool.cpus_per_engine
        resources = EngineResources(num_gpus=0, num_cpus=cpus)
    if spec.cluster.address == "local":
        stages = PREPARE_CPUS + COMMIT_CPUS
        for kind, need, rest in (("GPU", resources.num_gpus, 0), ("CPU", resources.num_cpus, stages)):
            if need * wanted + rest > have.get(kind, 0):
                packing = ", raise pool.engines_per_gpu" if kind == "GPU" and need <= 1 else ""
                raise JobError(
                    f"the pool needs {wanted} × {need:g} {kind}{' and some for the stages beside it' if rest else ''}; "
                    f"this machine has {have.get(kind, 0):g}: lower pool.replicas, pool.cpus_per_engine or "
                    f"tensor_parallel_size{packing}, or name a larger cluster.address"
                )
    return resources


def _fair_cpus(nodes: Sequence[float], engines: int) -> float:
    """The most CPUs that each engine can have: an engine is on one node, where the stages beside it may be as well."""
    room = [max(0.0, node - PREPARE_CPUS - COMMIT_CPUS) for node in nodes]
    for cpus in range(math.floor(max(nodes)), 0, -1):
        if sum(free // cpus for free in room) >= engines and sum(nodes) - engines * cpus >= 1:
            return cpus
    return max((sum(nodes) - 1) / engines, 0.2)
