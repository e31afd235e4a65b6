"""The plan: which shards make up the job. Append-only, in numbered segments below `.dray/plan/`.

    files ──cut──► shards ──► new_plan / extend (pure: can be printed and compared) ──save_plan──► .dray/plan/000000.arrow

A later listing adds a segment for what it found new and never touches the earlier ones, so a run that started on them
keeps reading what it planned. A plan is the fold of its segments.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import pyarrow as pa

from jobs.cutting import cut
from jobs.segment import Segment, decode, encode
from pipelines.contracts import FORMAT_VERSION, InputFile, Shard
from pipelines.errors import InputError, OutputError, OutputLocked
from pipelines.storage import Storage

__all__ = [
    "Plan",
    "Segment",
    "Superseded",
    "cut",
    "extend",
    "load_plan",
    "new_plan",
    "save_plan",
    "summary",
]

_SEGMENT = re.compile(r"\.dray/plan/(\d{6})\.arrow")


@dataclass(frozen=True, kw_only=True)
class Superseded:
    """A shard whose rows were planned anew because a file of it changed (`input.on_changed: replace`)."""

    shard: Shard
    by: tuple[Shard, ...]
    """Shards of the plan that hold its rows now; when all are committed, its part may go."""


@dataclass(frozen=True)
class Plan:
    """All segments of a job, in order. Compare plans by `==`."""

    segments: tuple[Segment, ...]
    saved: int = 0
    """How many of the segments are on storage; `save_plan` writes the others."""

    @property
    def fingerprint(self) -> str:
        return self.segments[0].fingerprint

    @property
    def input_schema(self) -> pa.Schema:
        """The input columns that are read, pinned by the first segment."""
        return self.segments[0].schema

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        """The shards to do, by ordinal; superseded ones are not among them."""
        return tuple(self._folded[0].values())

    @property
    def new_segments(self) -> tuple[Segment, ...]:
        """Segments that are not saved yet."""
        return self.segments[self.saved :]

    @property
    def new_shards(self) -> tuple[Shard, ...]:
        """Shards of the segments that are not saved yet."""
        return tuple(shard for segment in self.segments[self.saved :] for shard in segment.shards)

    @cached_property
    def files(self) -> tuple[InputFile, ...]:
        """Every planned file as it was last planned, in the order of first planning."""
        return tuple(self.by_path.values())

    @cached_property
    def by_path(self) -> dict[str, InputFile]:
        """`files` by path; what `listing.list_files` takes as `known`."""
        return {file.path: file for segment in self.segments for file in segment.files}

    @cached_property
    def superseded(self) -> tuple[Superseded, ...]:
        """Shards that are no longer to be done, the oldest first."""
        holders: dict[str, list[Shard]] = {}
        for shard in self.shards if self._folded[1] else ():
            for span in shard.spans:
                holders.setdefault(span.path, []).append(shard)
        found = []
        for gone in self._folded[1]:
            by = {new.ordinal: new for span in gone.spans for new in holders.get(span.path, ())}
            found.append(Superseded(shard=gone, by=tuple(by.values())))
        return tuple(found)

    @cached_property
    def _folded(self) -> tuple[dict[str, Shard], list[Shard]]:
        """(shards to do by id, superseded ones).

        Segment by segment: content that comes back after a change has the id of the shard that was superseded, but
        another ordinal, and is to be done again.
        """
        current: dict[str, Shard] = {}
        gone: list[Shard] = []
        for segment in self.segments:
            gone += [current.pop(id_) for id_ in segment.supersedes]
            current |= {shard.id: shard for shard in segment.shards}
        return current, gone


def new_plan(files: Sequence[InputFile], schema: pa.Schema, fingerprint: str, **cutting: Any) -> Plan:
    """The first plan of an output, not saved. `cutting`: the keyword arguments of `cut`, without first_ordinal."""
    segment = Segment(
        number=0,
        fingerprint=fingerprint,
        schema=schema,
        files=tuple(files),
        shards=tuple(cut(files, fingerprint, **cutting)),
    )
    return Plan((segment,))


def extend(
    plan: Plan,
    files: Sequence[InputFile],
    *,
    on_changed: Literal["refuse", "replace"] = "refuse",
    **cutting: Any,
) -> Plan:
    """The plan with what `files` (a fresh listing) has beyond it; `plan` itself when that is nothing. Not saved.

    New files get shards with the next ordinals. A planned file with another version or size is refused, or with
    `replace` planned anew: its shards are superseded, and files packed with it are planned again too. Planned files
    that are not listed any more stay planned. Raises InputError.
    """
    known = plan.by_path
    listed = {file.path: file for file in files}
    changed = [
        file
        for file in files
        if file.path in known
        and (file.version, file.size) != (known[file.path].version, known[file.path].size)
    ]
    if changed and on_changed == "refuse":
        raise InputError(_refusal(changed, known))
    gone, again = _superseded_by(plan, {file.path for file in changed}, listed)
    taken = [file for file in files if file.path not in known or file.path in again]
    if not taken:
        return plan
    first = sum(len(segment.shards) for segment in plan.segments)
    segment = Segment(
        number=len(plan.segments),
        fingerprint=plan.fingerprint,
        schema=plan.input_schema,
        files=tuple(taken),
        shards=tuple(cut(taken, plan.fingerprint, first_ordinal=first, **cutting)),
        supersedes=tuple(gone),
    )
    return Plan((*plan.segments, segment), plan.saved)


def _refusal(changed: Sequence[InputFile], known: dict[str, InputFile]) -> str:
    new = changed[0]
    old = known[new.path]
    others = f" (and {len(changed) - 1:,} more files)" if len(changed) > 1 else ""
    return (
        f"{new.path}{others}: changed since it was planned: version {old.version}, {old.size:,} bytes, now "
        f"{new.version}, {new.size:,} bytes; put the planned content back, or set input.on_changed: replace"
    )


def _superseded_by(plan: Plan, changed: set[str], listed: dict[str, InputFile]) -> tuple[list[str], set[str]]:
    """(ids of shards that hold a changed file, paths of all files in them)."""
    if not changed:
        return [], set()
    gone, again = [], set(changed)
    for shard in plan.shards:
        paths = {span.path for span in shard.spans}
        if paths & changed:
            gone.append(shard.id)
            again |= paths
    missing = sorted(again - listed.keys())
    if missing:
        raise InputError(
            f"{missing[0]}: shares a shard with a changed file and must be read again, but is not listed any more; "
            "put it back, or use a new output.path"
        )
    return gone, again


# ── On storage ──────────────────────────────────────────────────────────────────────────────────────────────────


def load_plan(storage: Storage) -> Plan | None:
    """The plan of an output; None when it has none. Raises OutputError for a damaged one, or a newer Dray's."""
    numbers = sorted(
        int(match[1]) for item in storage.list(".dray/plan") if (match := _SEGMENT.fullmatch(item.name))
    )
    if not numbers:
        return None
    if numbers != list(range(len(numbers))):
        missing = next(i for i, number in enumerate(numbers) if i != number)
        raise OutputError(
            f"{storage.url('.dray/plan')}: segment {missing:06d}.arrow is missing; restore it, or use a new output.path"
        )
    segments = []
    for number in numbers:
        name = f".dray/plan/{number:06d}.arrow"
        segments.append(decode(number, storage.read(name), storage.url(name)))
    return Plan(tuple(segments), len(segments))


def save_plan(storage: Storage, plan: Plan) -> Plan:
    """Write the segments that are not on storage yet. Raises OutputLocked when another driver wrote one meanwhile."""
    for segment in plan.segments[plan.saved :]:
        if not storage.create(segment.name, encode(segment)):
            raise OutputLocked(
                f"{storage.url(segment.name)}: another run has extended this plan meanwhile; run again to build on it"
            )
    return Plan(plan.segments, len(plan.segments))


def summary(plan: Plan) -> dict[str, Any]:
    """The plan in numbers, for `dray plan`: JSON values only."""
    shards, files = plan.shards, plan.files
    rows = [shard.rows for shard in shards]

    def shown(shard: Shard) -> dict[str, Any]:
        return {"part": shard.part_name, "rows": shard.rows, "bytes": shard.bytes}

    by_size = sorted(shards, key=lambda shard: (shard.bytes, shard.rows or 0, -shard.ordinal))
    return {
        "fingerprint": plan.fingerprint,
        "format_version": FORMAT_VERSION,
        "files": len(files),
        "files_by_format": {
            name: n
            for name in ("parquet", "jsonl", "csv")
            if (n := sum(file.format == name for file in files))
        },
        "shards": len(shards),
        "new_shards": len(plan.new_shards),
        "superseded_shards": len(plan.superseded),
        "rows": None if None in rows else sum(n for n in rows if n is not None),
        "rows_estimated": sum(file.rows if file.rows is not None else file.estimated_rows for file in files),
        "bytes": sum(shard.bytes for shard in shards),
        "smallest_shard": shown(by_size[0]) if shards else None,
        "largest_shard": shown(by_size[-1]) if shards else None,
    }
