"""When requests enter the engine: the feeder decides, not the engine's own queue.

A steady trickle of new prompts halves a small model's speed on an H200 (design §5: 25.2 k output tokens/s against 51.2 k in
waves), because each step that mixes a prefill into a full batch of decodes misses the captured CUDA graph.

    shards' lines ──► Gate: whose turn, as much as the KV cache holds ──► policy: now or later ──► engine

It is the oldest shard's turn, so that shards end one after the other. When little is left it is the longest answer's of all
shards: one that is begun last keeps the engine busy alone.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from pipelines.adaptive import Adaptive
from pipelines.engine import Engine, EngineInfo
from pipelines.lengths import ALIKE, LITTLE
from pipelines.settings import AdmissionSettings
from pipelines.waves import AdmissionPolicy, Continuous, Load, Wave


@dataclass(frozen=True, slots=True)
class Candidate:
    """A request that waits."""

    answer_tokens: float
    """That it is expected to get, all samples together."""
    kv_tokens: int
    """Tokens of KV cache to keep for it."""


class Line(Protocol):
    """The requests of one shard that wait before the gate."""

    def __len__(self) -> int:
        """Requests that wait."""

    def peek(self, longest: bool) -> Candidate:
        """The first in line, by the line's own order or by the longest expected answer; the line has one."""

    def start(self, kv_tokens: int) -> None:
        """Begin the one that `peek` gave last, with `kv_tokens`. When it ends, `Gate.leave(kv_tokens)` is due."""

    def fail(self, error: Exception) -> None:
        """Nothing enters any more; `withdraw` is due."""


@dataclass
class Gate:
    """Lets requests into one engine: the oldest shard's first, while the KV cache has room and the policy allows.

    Nobody overtakes the one whose turn it is for want of KV cache, and it may enter an empty engine whatever its size, so none
    waits for ever. Everything happens inside `enter` and `leave`, in O(log lines) per request, in O(lines) when little is
    left; there is a line for each shard in flight. For one event loop, or one thread.
    """

    policy: AdmissionPolicy
    kv_tokens: int | None = None
    """Tokens that the engine's KV cache holds; None: no bound."""
    clock: Callable[[], float] = time.monotonic
    load: Load = field(default_factory=Load)
    busy_since: float = 0.0
    """`clock()` at which the first of the requests now in flight entered an idle engine."""
    _lines: list[tuple[int, int, Line]] = field(default_factory=list)
    _arrivals: int = 0

    @property
    def in_flight(self) -> int:
        return self.load.in_flight

    def enter(self, priority: int, line: Line) -> None:
        """Queue a shard's requests; the lowest `priority` goes first. `line` does not grow afterwards. Where this raises,
        `withdraw` is due."""
        self._arrivals += 1
        heapq.heappush(self._lines, (priority, self._arrivals, line))
        self.load.waiting += len(line)
        self._admit()

    def withdraw(self, line: Line) -> None:
        """Give up what waits in `line`; what was started leaves when it ends. Safe for a line that is not here."""
        kept = [entry for entry in self._lines if entry[2] is not line]
        if len(kept) < len(self._lines):
            heapq.heapify(kept)
            self._lines = kept
            self.load.waiting -= len(line)
            self._admit_or_fail()

    def leave(self, kv_tokens: int) -> None:
        """A request has been answered, has failed or was cancelled; `kv_tokens` as it was started with."""
        self.load.in_flight -= 1
        self.load.kv_tokens -= kv_tokens
        self._admit_or_fail()

    def _admit_or_fail(self) -> None:
        """For callbacks, whose errors an event loop would only log: the lines that wait are told."""
        try:
            self._admit()
        except Exception as error:  # noqa: BLE001 - a mistake of ours
            for _, _, line in [*self._lines]:
                line.fail(error)

    def _admit(self) -> None:
        load = self.load
        while (turn := self._turn()) is not None:
            line, kv_tokens = turn
            fits = self.kv_tokens is None or load.kv_tokens + kv_tokens <= self.kv_tokens
            if not self.policy.admits(load, fits or not load.in_flight):
                return
            if not load.in_flight:
                self.busy_since = self.clock()
            line.start(kv_tokens)
            load.in_flight += 1
            load.kv_tokens += kv_tokens
            load.waiting -= 1

    def _turn(self) -> tuple[Line, int] | None:
        """The line whose request is to enter next, and the KV-cache tokens that it needs; None where nobody waits."""
        while self._lines and not len(self._lines[0][2]):
            heapq.heappop(self._lines)
        if not self._lines:
            return None
        if self.load.waiting > LITTLE * self.load.in_flight:
            oldest = self._lines[0][2]
            return oldest, oldest.peek(longest=False).kv_tokens
        found = [(line, line.peek(longest=True)) for _, _, line in sorted(self._lines) if len(line)]
        enough = (1 - ALIKE) * max(one.answer_tokens for _, one in found)
        return next((line, one.kv_tokens) for line, one in found if one.answer_tokens >= enough)


def gate_of(settings: AdmissionSettings, engine: Engine, info: EngineInfo) -> Gate:
    """The gate before an engine that has started."""
    return Gate(admission_policy(settings, info.max_num_seqs, lambda: engine.output_tokens), info.kv_tokens)


def admission_policy(
    settings: AdmissionSettings, max_num_seqs: int, output_tokens: Callable[[], int]
) -> AdmissionPolicy:
    """The policy of a job for an engine that runs `max_num_seqs` requests at once and has made `output_tokens`."""
    high = settings.high or max_num_seqs
    if settings.policy == "continuous":
        return Continuous(high)
    if settings.policy == "adaptive":
        return Adaptive(high, output_tokens)
    # Low at three quarters: 49.7–51.2 k tokens/s at 384–448 of 512, 46.5 k at 256 of 512 (0.5B, one H200).
    return Wave(high, settings.low if settings.low is not None else high * 3 // 4)
