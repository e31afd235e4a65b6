"""Ray's exceptions from real processes that die, wait, are cancelled or out of memory: all of them are the shard's."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import ray
import ray.exceptions

from pipelines.scopes import is_passing, scope_of

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(240)]


@ray.remote(num_cpus=0, max_restarts=0)
class Worker:
    def leave(self) -> None:
        os._exit(1)

    def wait(self) -> None:
        time.sleep(60)

    def fail(self, error: Exception) -> None:
        raise error

    def large(self) -> Any:
        return [ray.put(bytearray(10**6))]


@ray.remote(num_cpus=0, max_retries=0)
def leave() -> None:
    os._exit(1)


@ray.remote(num_cpus=0, max_retries=0)
def wait() -> None:
    time.sleep(60)


def error_of(ref: Any, timeout: float = 60) -> BaseException:
    with pytest.raises(Exception) as caught:  # noqa: PT011 -- whichever it is
        ray.get(ref, timeout=timeout)
    return caught.value


def check(error: BaseException, kind: type[BaseException]) -> None:
    assert isinstance(error, kind), repr(error)
    assert scope_of(error) == "shard"
    assert not is_passing(error)  # nothing is gained by asking the same process again at once


def test_an_actor_that_died() -> None:
    worker = Worker.remote()
    check(error_of(worker.leave.remote()), ray.exceptions.ActorDiedError)
    check(error_of(worker.large.remote()), ray.exceptions.ActorDiedError)


def test_a_worker_that_crashed() -> None:
    check(error_of(leave.remote()), ray.exceptions.WorkerCrashedError)


def test_a_task_that_was_cancelled() -> None:
    ref = wait.remote()
    time.sleep(1)
    ray.cancel(ref, force=True)
    error = error_of(ref)
    assert isinstance(error, (ray.exceptions.TaskCancelledError, ray.exceptions.WorkerCrashedError))
    check(error, ray.exceptions.RayError)


def test_a_result_that_does_not_come() -> None:
    worker = Worker.remote()
    check(error_of(worker.wait.remote(), timeout=0.5), ray.exceptions.GetTimeoutError)
    ray.kill(worker)


@pytest.mark.parametrize(
    ("error", "scope"),
    [
        (MemoryError("no memory"), "shard"),
        (ValueError("x"), "shard"),
        (OSError(28, "No space left"), "shard"),
    ],
)
def test_a_task_that_raised_is_what_it_raised(error: Exception, scope: str) -> None:
    caught = error_of(Worker.remote().fail.remote(error))
    assert isinstance(caught, ray.exceptions.RayTaskError)
    assert isinstance(caught, type(error))
    assert scope_of(caught) == scope


def test_a_dray_error_that_crossed_processes_keeps_its_scope() -> None:
    from pipelines.errors import StorageError

    assert scope_of(error_of(Worker.remote().fail.remote(StorageError("access denied")))) == "job"
