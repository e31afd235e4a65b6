"""How busy a job's engines were, from the turns that the footers tell: which pool of a job the others wait for.

A pool's busy share in one run is

    Σ over engines (time with at least one request of a shard) / (engines × time of the run)

where the time of the run is from the first request of any engine to the last answer of any: start-up is not in it, waiting
for another pool is. An engine that replaced a dead one counts as one more. Several runs are added up before the division.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pipelines.shard_stats import Provenance, Turn


@dataclass(frozen=True, kw_only=True)
class EngineUse:
    """What one pool of engines did."""

    generations: tuple[str, ...]
    """Which generations they answered, in the job's order; `""` is its own prompt."""
    engines: int
    """The most that one run had."""
    busy: float
    """Share of the time, 0 to 1."""


def engine_use(origins: Iterable[Provenance]) -> tuple[EngineUse, ...]:
    """Each pool's, in the order in which a shard passes through them; none where the parts tell of no turns."""
    order: dict[str, None] = {}
    runs: dict[str, dict[str, list[Turn]]] = {}
    for origin in origins:
        for turn in origin.turns:
            order.setdefault(turn.generation)
            runs.setdefault(origin.run_id, {}).setdefault(turn.replica, []).append(turn)
    busy_s: dict[frozenset[str], float] = {}
    there_s: dict[frozenset[str], float] = {}
    engines: dict[frozenset[str], int] = {}
    for of_engines in runs.values():
        every = [turn for turns in of_engines.values() for turn in turns]
        lasted = max(turn.ended_at for turn in every) - min(turn.began_at for turn in every)
        count: dict[frozenset[str], int] = {}
        for turns in of_engines.values():
            pool = frozenset(turn.generation for turn in turns)
            busy_s[pool] = busy_s.get(pool, 0.0) + _covered(turns)
            there_s[pool] = there_s.get(pool, 0.0) + lasted
            count[pool] = count.get(pool, 0) + 1
        engines |= {pool: max(engines.get(pool, 0), n) for pool, n in count.items()}
    names = list(order)
    return tuple(
        EngineUse(
            generations=tuple(sorted(pool, key=names.index)),
            engines=engines[pool],
            busy=busy_s[pool] / there_s[pool] if there_s[pool] else 0.0,
        )
        for pool in sorted(engines, key=lambda pool: min(map(names.index, pool)))
    )


def _covered(turns: Iterable[Turn]) -> float:
    """Seconds in which at least one of the turns lasted."""
    covered, end = 0.0, float("-inf")
    for turn in sorted(turns, key=lambda turn: turn.began_at):
        covered += max(0.0, turn.ended_at - max(end, turn.began_at))
        end = max(end, turn.ended_at)
    return covered
