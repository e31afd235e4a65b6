"""Admission policies with fixed watermarks: continuous, and in waves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(slots=True)
class Load:
    """What an engine and the gate before it have to do."""

    in_flight: int = 0
    """Requests that the engine has."""
    kv_tokens: int = 0
    """Tokens of KV cache that they hold together, as far as one can tell beforehand."""
    waiting: int = 0
    """Requests of the shards that are here and have not entered yet."""


class AdmissionPolicy(Protocol):
    """Decides for the first in line whether it enters now."""

    def admits(self, load: Load, fits: bool) -> bool:
        """Asked after every change of `load` while anyone waits, and after a yes for the next one.

        `fits`: the KV cache has room for this one too. True for an empty engine: a request too large for any company
        must be let in then.
        """


@dataclass
class Continuous:
    """A request enters as soon as one of `high` slots is free."""

    high: int

    def admits(self, load: Load, fits: bool) -> bool:
        return fits and load.in_flight < self.high


@dataclass
class Wave:
    """Fills until `high` are in flight or the KV cache is full, then admits none until `low`/`high` of them are left.

    The last ones wait for nothing: where all that is in flight and waiting comes to no more than `high`, it is let in.
    """

    high: int
    low: int
    filling: bool = True
    _peak: int = 0
    """In flight when the last wave was full: fewer than `high` where prompts or answers are long."""

    def admits(self, load: Load, fits: bool) -> bool:
        if not load.in_flight:
            self.filling = True
        elif not fits or load.in_flight >= self.high:
            if self.filling:
                self._peak = min(load.in_flight, self.high)
            self.filling = False
        elif load.in_flight * self.high <= self._peak * self.low:
            self.filling = True
        return fits and (self.filling or load.in_flight + load.waiting <= self.high)
