"""How a running pass is asked to stop: one small actor beside the driver, which every stage looks at.

Ray Data cannot take back what it was given. So the stages decline the shards that come to them after the request, and
shards in flight get `grace_s` seconds to finish.
"""

from __future__ import annotations

import asyncio
import contextlib

import ray
import ray.exceptions

from pipelines.driver_actor import beside_driver
from pipelines.orphans import end_with_parent

#: Seconds to wait for the actor's word. It is gone only with the driver's own node.
_ANSWER_S = 10.0


class _Flag:
    """The actor. Calls of `wait` never end by themselves, and Ray ends no actor that has calls: so not with its last
    handle, nor with its raylet."""

    def __init__(self) -> None:
        end_with_parent()
        self._raised = asyncio.Event()
        self._grace_s: float | None = None

    async def set(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._raised.set()

    async def grace_s(self) -> float | None:
        return self._grace_s

    async def wait(self) -> float | None:
        await self._raised.wait()
        return self._grace_s


class StopFlag:
    """Made by the driver, passed to the stages' actors."""

    def __init__(self) -> None:
        # An actor's calls queue behind its pool's threads; `wait` holds one place for each engine.
        self._flag = beside_driver(_Flag, max_concurrency=10_000)

    def set(self, grace_s: float) -> None:
        """Ask all stages to stop. Does not wait for them."""
        self._flag.set.remote(grace_s)

    def close(self) -> None:
        """End the actor; for the driver, once no stage looks any more."""
        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(self._flag)

    def is_set(self) -> bool:
        """From a worker's thread: one request to the actor, about a millisecond."""
        with contextlib.suppress(ray.exceptions.RayError):
            return ray.get(self._flag.grace_s.remote(), timeout=_ANSWER_S) is not None
        return False

    async def wait(self) -> float:
        """Seconds of grace, once the flag is set."""
        grace_s: float = await self._flag.wait.remote()
        return grace_s
