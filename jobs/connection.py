"""A Ray cluster for a run: one of our own on this machine, or the one that `cluster.address` names."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pipelines
from jobs.spec import ClusterSettings
from pipelines.errors import JobError
from pipelines.orphans import outlived


@contextlib.contextmanager
def connected(cluster: ClusterSettings) -> Iterator[None]:
    """Connect to a cluster, and leave it afterwards, or end our own with its workers and engines.

    Raises JobError when it does not answer.

    A process that is connected already (a notebook) stays so, whatever `cluster` says.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    on_sigterm = signal.getsignal(signal.SIGTERM)
    with outlived():
        try:
            _connect(cluster)
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, on_sigterm)  # ray.init puts its own there, which exits with 15
            yield
        finally:
            ray.shutdown()


def _connect(cluster: ClusterSettings) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

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
                    _metrics_export_port=cluster.metrics_port,
                    log_to_driver=False,
                    logging_level=logging.WARNING,
                )
            else:
                ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.WARNING)
        except (ConnectionError, OSError, ValueError, RuntimeError) as error:
            raise JobError(
                f"no Ray cluster at cluster.address {cluster.address!r}: {str(error).splitlines()[0]}"
            ) from error
        except Exception as error:
            if type(error) is not Exception:
                raise
            # Ray's own words when its processes take longer than its fixed 30 s, as on an overloaded machine.
            raise JobError(
                f"Ray does not start: {str(error).split('. ')[0]}; run again when the machine has time"
            ) from error
