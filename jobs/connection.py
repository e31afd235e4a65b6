"""A Ray cluster for a run: one of our own on this machine, or the one that `cluster.address` names.

Kept apart from what needs Ray Data, so that Ray's processes can start while that is being imported.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pipelines
from jobs.spec import ClusterSettings, JobSpec
from pipelines.errors import JobError

_early: Future[None] | None = None
"""The start that `connecting` began in this process."""


@contextlib.contextmanager
def connecting(spec: JobSpec) -> Iterator[None]:
    """Begin to connect, beside what the block does first (imports, listing, planning); `connected` inside waits for it.

    Most of that time is waiting for Ray's own processes. Left out where the working directory matters meanwhile, which is
    another one while Ray starts, and where the output is finished already.
    """
    global _early
    if _early is not None or _directory_matters(spec) or _finished(spec):
        yield
        return
    starter = ThreadPoolExecutor(1, "dray-ray-start")
    _early = starter.submit(_connect, spec.cluster)
    try:
        yield
    finally:
        starter.shutdown()
        _early = None
        _leave()


@contextlib.contextmanager
def connected(cluster: ClusterSettings) -> Iterator[None]:
    """Connect to a cluster, and leave it (or end our own) afterwards. Raises JobError when it does not answer.

    A process that is connected already (a notebook) stays so, whatever `cluster` says.
    """
    import ray

    if _early is not None:
        _early.result()
    if ray.is_initialized():
        yield
        return
    on_sigterm = signal.getsignal(signal.SIGTERM)
    _connect(cluster)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # ray.init puts its own there, which exits with 15
    try:
        yield
    finally:
        _leave()


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


def _leave() -> None:
    import ray

    ray.shutdown()


def _directory_matters(spec: JobSpec) -> bool:
    """Whether something that planning reads may be named relative to the working directory: the user's own module, or
    a file in an environment variable (`AWS_CA_BUNDLE=certs/ca.pem`) or a storage option.
    """
    named = [*os.environ.values(), *_texts([spec.input.storage_options, spec.output.storage_options])]
    return spec.prompt.function is not None or any(map(_is_relative, named))


def _texts(value: Any) -> Iterator[str]:
    """All strings of nested lists and mappings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _is_relative(text: str) -> bool:
    places = text.split(os.pathsep) if len(text) < 4096 else []
    return any(place and not os.path.isabs(place) and os.path.exists(place) for place in places)


def _finished(spec: JobSpec) -> bool:
    """Whether there is probably nothing to run; of an object store that would take a request."""
    return os.path.exists(os.path.join(spec.output.path, "data", "_SUCCESS"))
