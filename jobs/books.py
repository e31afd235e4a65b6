"""The books of an output: what the plan promised against what stands in `data/`, read from footers and listings only.

Nothing here trusts what a Ray job or a worker claimed (design §4.10).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from jobs.planning import Plan
from pipelines.contracts import Shard
from pipelines.errors import OutputError, PartDamaged
from pipelines.part import Part, read_part
from pipelines.shard_stats import Provenance, ShardStats
from pipelines.storage import Storage

T = TypeVar("T")

SUCCESS = "data/_SUCCESS"
#: What a commit or a merge names an object of failed rows; `part`: of which part.
ERRORS_OBJECT = re.compile(r"errors/(?P<part>part-\d{6,}-[0-9a-f]{16})-[0-9a-f]{8}\.parquet")
#: Footers are small reads of one round trip each; 32 at once keeps a listing of 100,000 parts to minutes on S3.
_READERS = 32


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that does not add up."""

    name: str
    """The object that it is about, relative to the output."""
    text: str
    movable: bool
    """Whether it helps to move the object away: a part whose shard `dray resume` then makes anew, or a stranger."""


@dataclass(frozen=True, kw_only=True)
class Books:
    """Planned shards, the parts that stand for them, and everything that does not add up."""

    shards: tuple[Shard, ...]
    parts: tuple[Part, ...]
    """In plan order."""
    sizes: dict[str, int]
    """Bytes of each part object, by name."""
    faults: tuple[Fault, ...]

    @property
    def problems(self) -> tuple[str, ...]:
        """The faults in words."""
        return tuple(fault.text for fault in self.faults)

    @cached_property
    def missing(self) -> tuple[Shard, ...]:
        """Planned shards without a part, in plan order."""
        standing = {part.name for part in self.parts}
        return tuple(shard for shard in self.shards if shard.part_name not in standing)

    @cached_property
    def totals(self) -> ShardStats:
        """Sum of all footers."""
        return sum((part.footer.stats for part in self.parts), ShardStats(shards=0))

    @property
    def origins(self) -> list[Provenance]:
        """Of all parts, then of what was merged into them."""
        retries = (one for part in self.parts for one in part.footer.retries)
        return [*(part.footer.provenance for part in self.parts), *(one.provenance for one in retries)]

    @property
    def bytes(self) -> int:
        """Bytes of all parts as stored."""
        return sum(self.sizes[part.name] for part in self.parts)

    @property
    def complete(self) -> bool:
        return not self.missing and not self.faults


def committed_shards(storage: Storage, plan: Plan) -> set[str]:
    """Ids of the planned shards whose part exists, from one listing."""
    names = {info.name for info in storage.list("data")}
    return {shard.id for shard in plan.shards if f"data/{shard.part_name}" in names}


def clear_superseded(storage: Storage, plan: Plan) -> None:
    """Remove the parts of shards whose files changed, once all that replaces them is committed."""
    if not plan.superseded:
        return
    committed = committed_shards(storage, plan)
    for old in plan.superseded:
        if all(shard.id in committed for shard in old.by):
            storage.delete(f"data/{old.shard.part_name}")


def clear_unreferenced_errors(storage: Storage, plan: Plan, books: Books) -> None:
    """Remove what attempts that came second wrote to `errors/`: no part refers to it.

    Only of parts that stand or are superseded: another driver may have extended the plan since `books` were made, and
    what its attempts write is not referred to before they commit.
    """
    referenced = {part.name: part.footer.errors_object for part in books.parts}
    referenced |= {old.shard.part_name: None for old in plan.superseded}
    for info in storage.list("errors"):
        match = ERRORS_OBJECT.fullmatch(info.name)
        name = f"{match['part']}.parquet" if match else ""
        if name in referenced and referenced[name] != info.name:
            storage.delete(info.name)


def fold(storage: Storage, plan: Plan) -> Books:
    """Read every footer below `data/` and compare it with the plan."""
    found = {info.name.removeprefix("data/"): info for info in storage.list("data") if info.name != SUCCESS}
    planned = {shard.part_name: shard for shard in plan.shards}
    superseded = {old.shard.part_name for old in plan.superseded}
    faults = [
        Fault(name=f"data/{name}", text=f"data/{name} is not in the plan", movable=True)
        for name in sorted(found.keys() - planned.keys() - superseded)
    ]
    faults += [
        Fault(name=f"data/{name}", text=f"data/{name} is superseded and still there", movable=False)
        for old in plan.superseded
        if (name := old.shard.part_name) in found and all(shard.part_name in found for shard in old.by)
    ]
    error_objects = {info.name for info in storage.list("errors")}
    parts: list[Part] = []
    for name, result in each(found.keys() & planned.keys(), lambda name: _read(storage, name)):
        if isinstance(result, OutputError):
            faults.append(
                Fault(name=f"data/{name}", text=str(result), movable=isinstance(result, PartDamaged))
            )
        elif result is not None:
            parts.append(result)
            faults += (
                Fault(name=f"data/{name}", text=f"data/{name}: {why}", movable=True)
                for why in _disagreements(result, planned[name], plan, error_objects)
            )
    parts.sort(key=lambda part: part.footer.shard.ordinal)
    return Books(
        shards=plan.shards,
        parts=tuple(parts),
        sizes={name: info.size for name, info in found.items()},
        faults=tuple(faults),
    )


def _read(storage: Storage, name: str) -> Part | OutputError | None:
    try:
        return read_part(storage, name)
    except OutputError as error:
        return error
    except FileNotFoundError:
        return None  # moved away since it was listed


def each(names: Iterable[str], read: Callable[[str], T], readers: int = _READERS) -> Iterable[tuple[str, T]]:
    """(name, what `read` makes of it), in order of the names, several at a time."""
    names = sorted(names)
    with ThreadPoolExecutor(readers) as pool:
        yield from zip(names, pool.map(read, names), strict=True)


def _disagreements(part: Part, shard: Shard, plan: Plan, error_objects: set[str]) -> Iterable[str]:
    """What a part says of itself against the plan, its own rows, and what there is below `errors/`."""
    footer, stats = part.footer, part.footer.stats
    if footer.shard != shard:
        yield f"holds shard {footer.shard.id}, planned is {shard.id}"
    if footer.fingerprint != plan.fingerprint:
        yield f"was made from spec {footer.fingerprint}, planned is {plan.fingerprint}"
    if not stats.balanced:
        yield f"its books do not balance: {stats.rows} rows, {stats.rows_ok} ok, {stats.rows_failed} failed"
    inline = 0 if footer.errors_object else stats.rows_failed
    if part.rows != stats.samples + inline:
        yield f"has {part.rows} rows, its footer counts {stats.samples} samples and {inline} failed rows"
    if shard.rows is not None and stats.rows_read != shard.rows:
        yield f"was made from {stats.rows_read} rows, planned are {shard.rows}"
    if footer.errors_object and footer.errors_object not in error_objects:
        yield f"its failed rows, {footer.errors_object}, are gone"
