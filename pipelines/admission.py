"""When requests enter the engine: the feeder decides, not the engine's own queue.

A steady trickle of new prompts halves a small model's speed on an H200 (design §5: 25.2 k output tokens/s against 51.2 k in
waves), because each step that mixes a prefill into a full batch of decodes misses the captured CUDA graph.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from dataclasses import dataclass, field
from typing import Protocol

from pipelines.settings import AdmissionSettings


class AdmissionPolicy(Protocol):
    """Decides from the number of requests in flight how many more may enter now."""

    def room(self, in_flight: int) -> int:
        """Requests that may enter now; 0 or less for none. Called after every change of `in_flight`."""


@dataclass
class Continuous:
    """A request enters as soon as one of `high` slots is free."""

    high: int

    def room(self, in_flight: int) -> int:
        return self.high - in_flight


@dataclass
class Wave:
    """Fills up to `high`, then admits none until only `low` are left."""

    high: int
    low: int
    _filling: bool = True

    def room(self, in_flight: int) -> int:
        if in_flight >= self.high:
            self._filling = False
        elif in_flight <= self.low:
            self._filling = True
        return self.high - in_flight if self._filling else 0


def admission_policy(settings: AdmissionSettings, max_num_seqs: int) -> AdmissionPolicy:
    """The policy of a job for an engine that runs `max_num_seqs` requests at once."""
    high = settings.high or max_num_seqs
    if settings.policy == "continuous":
        return Continuous(high)
    # Low at three quarters: 49.7–51.2 k tokens/s at 384–448 of 512, 46.5 k at 256 of 512 (0.5B, one H200).
    return Wave(high, settings.low if settings.low is not None else high * 3 // 4)


@dataclass
class Gate:
    """Lets requests into one engine in the order of their shard, as the policy allows.

    Each shard has one request waiting here at most, so that the cost does not depend on the shards' sizes.
    """

    policy: AdmissionPolicy
    in_flight: int = 0
    busy_since: float = 0.0
    """`time.monotonic()` at which the first of the requests now in flight entered an idle engine."""
    _room: int = 0
    _waiting: list[tuple[int, int, asyncio.Future[None]]] = field(default_factory=list)
    _arrivals: int = 0

    async def enter(self, priority: int) -> None:
        """Wait for a place; the lowest `priority` goes first. Every `enter` needs one `leave`."""
        self._admit()
        if self._room > 0 and not self._waiting:
            self._take()
            return
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._arrivals += 1
        heapq.heappush(self._waiting, (priority, self._arrivals, place))
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self.leave()
            raise

    def leave(self) -> None:
        """A request has been answered, has failed or was cancelled."""
        self.in_flight -= 1
        self._admit()

    def _take(self) -> None:
        if not self.in_flight:
            self.busy_since = time.monotonic()
        self.in_flight += 1
        self._room -= 1

    def _admit(self) -> None:
        self._room = self.policy.room(self.in_flight)
        while self._room > 0 and self._waiting:
            _, _, place = heapq.heappop(self._waiting)
            if not place.cancelled():
                self._take()
                place.set_result(None)
