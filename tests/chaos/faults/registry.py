"""What a fault is, and the list of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from tests.chaos.trial import Trial

Engine = Literal["simulated", "vllm"]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault with its name in reports."""

    name: str
    title: str
    play: Callable[[Trial], None]
    engines: tuple[Engine, ...]
    bounded: bool
    """Whether the work repeated may not exceed the shards in flight. Not where an engine dies again and again."""
    s3: bool


FAULTS: dict[str, Fault] = {}


def fault(
    title: str,
    *,
    engines: tuple[Engine, ...] = ("simulated", "vllm"),
    bounded: bool = False,
    s3: bool = False,
) -> Callable[[Callable[[Trial], None]], Callable[[Trial], None]]:
    """Put a function among the `FAULTS`, by its name."""

    def wrap(play: Callable[[Trial], None]) -> Callable[[Trial], None]:
        name = play.__name__
        FAULTS[name] = Fault(name=name, title=title, play=play, engines=engines, bounded=bounded, s3=s3)
        return play

    return wrap
