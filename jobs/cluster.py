"""A Ray cluster for a run: one of our own on this machine, or the one that `cluster.address` names."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pipelines
from jobs.spec import ClusterSettings, JobSpec
from pipelines.errors import JobError
from pipelines.run import COMMIT_CPUS, PREPARE_CPUS, EngineResources
from pipelines.settings import Replicas


@contextlib.contextmanager
def connected(cluster: ClusterSettings) -> Iterator[None]:
    """Connect to a cluster, and leave it (or end our own) afterwards. Raises JobError when it does not answer.

    A process that is connected already (a notebook) stays so, whatever `cluster` says.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    on_sigterm = signal.getsignal(signal.SIGTERM)
    # Ray puts the driver's working directory first on the workers' import path. From our own root that folder is ours,
    # so that a `jobs/` or `pipelines/` of the user's cannot shadow Dray's (docs/decisions/0001).
    with contextlib.chdir(Path(pipelines.__file__).parent.parent):
        try:
            if cluster.address == "local":
                os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
                ray.init(
                    address="local",
                    _node_ip_address="127.0.0.1",
                    include_dashboard=False,
                    num_cpus=cluster.num_cpus,
                    num_gpus=cluster.num_gpus,
                    log_to_driver=False,
                    logging_level=logging.WARNING,
                )
            else:
                ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.WARNING)
        except (ConnectionError, OSError, ValueError, RuntimeError) as error:
            raise JobError(
                f"no Ray cluster at cluster.address {cluster.address!r}: {str(error).splitlines()[0]}"
            ) from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # ray.init puts its own there, which exits with 15
    try:
        yield
    finally:
        ray.shutdown()


def engine_resources(spec: JobSpec) -> EngineResources:
    """What Ray reserves for one engine on the connected cluster.

    Raises JobError when a cluster of our own can never hold the pool: Ray would wait for ever.
    """
    import ray

    have: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    pool, replicas = spec.pool, spec.pool.replicas
    wanted = replicas.min if isinstance(replicas, Replicas) else replicas
    device = pool.device
    if device == "auto":
        device = "gpu" if have.get("GPU", 0) else "cpu"
    if device == "gpu":
        packed = 1 if pool.engines_per_gpu == "auto" else pool.engines_per_gpu
        gpus = spec.model.gpus_per_engine / packed
        # No CPU for a GPU engine: two such actors on two cores would block every CPU stage for ever.
        resources = EngineResources(num_gpus=gpus, num_cpus=0)
    else:
        share = (have.get("CPU", 1) - 1) / wanted
        fair = math.floor(share) if share >= 1 else max(share, 0.2)
        cpus = fair if pool.cpus_per_engine == "auto" else pool.cpus_per_engine
        resources = EngineResources(num_gpus=0, num_cpus=cpus)
    if spec.cluster.address == "local":
        beside = PREPARE_CPUS + COMMIT_CPUS
        for kind, need, rest in (("GPU", resources.num_gpus, 0), ("CPU", resources.num_cpus, beside)):
            if need * wanted + rest > have.get(kind, 0):
                raise JobError(
                    f"the pool needs {wanted} × {need:g} {kind}{' and some for the stages beside it' if rest else ''}; "
                    f"this machine has {have.get(kind, 0):g}: lower pool.replicas, pool.cpus_per_engine or "
                    "tensor_parallel_size, or name a larger cluster.address"
                )
    return resources
