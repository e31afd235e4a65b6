"""A job's stages by hand, without Ray: what a driver would stream, one shard after the other, in this process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow as pa

from jobs import load
from jobs.fingerprint import fingerprint
from jobs.planning import Plan
from jobs.proposal import checked_identity, propose, work_of
from pipelines.advance import Between
from pipelines.commit import Commit
from pipelines.contracts import Retry, Shard, Work
from pipelines.generate import Generate
from pipelines.generations import pools_of
from pipelines.kept import KeptIn
from pipelines.part import Footer
from pipelines.prepare import Prepare
from pipelines.stage import Parcel
from pipelines.storage import Storage


@dataclass(frozen=True)
class Output:
    """An output whose shards `commit` has committed."""

    settings: Mapping[str, Any]
    storage: Storage
    plan: Plan

    @property
    def folder(self) -> Path:
        return Path(self.storage.root)

    def work(self, run_id: str, *overrides: str) -> Work:
        """Of a first run."""
        job = load(self.settings, overrides)
        return work_of(job, self.plan.input_schema, fingerprint=self.plan.fingerprint, run_id=run_id)

    def retry(self, run_id: str, *overrides: str, error_codes: tuple[str, ...] | None = None) -> Work:
        """Of a retry with these overrides."""
        print_ = fingerprint(checked_identity(load(self.settings, overrides)))
        return replace(
            self.work(run_id, *overrides), retry=Retry(error_codes=error_codes, fingerprint=print_)
        )


def planned(settings: Mapping[str, Any]) -> Output:
    """An output with a plan and no parts."""
    proposal = propose(load(settings))
    return Output(settings, proposal.storage, proposal.save())


def committed(settings: Mapping[str, Any], run_id: str = "first") -> Output:
    """An output with all its parts."""
    output = planned(settings)
    run(output.work(run_id), output.plan.shards)
    return output


def generated(
    work: Work, shards: Sequence[Shard], pass_: int = 0, kept_in: KeptIn = MappingProxyType({})
) -> list[pa.Table]:
    """Batches as they come to the commit stage."""
    prepare, generate = Prepare(work), engines(work)
    notes = [{"pass": pass_, "kept_in": kept_in.get(shard.id, ())} for shard in shards]
    rows = [Parcel.row(shard, **noted) for shard, noted in zip(shards, notes, strict=True)]
    prepared = [prepare(pa.Table.from_pylist([row])) for row in rows]

    async def answer() -> list[pa.Table]:
        return [await generate(batch) for batch in prepared]

    return asyncio.run(answer())


def engines(work: Work) -> Callable[[pa.Table], Awaitable[pa.Table]]:
    """All pools of engines of a job, and what stands between them, as one stage."""
    generates = [Generate(work, None, pool) for pool in range(len(pools_of(work)))]
    betweens = [Between(work, pool) for pool in range(1, len(generates))]

    async def through(batch: pa.Table) -> pa.Table:
        batch = await generates[0](batch)
        for between, generate in zip(betweens, generates[1:], strict=True):
            batch = await generate(between(batch))
        return batch

    return through


def merge(work: Work, batch: pa.Table, storage: Storage | None = None) -> Footer:
    """The commit stage on one batch; AssertionError with its words where it fails. `storage`: instead of its own."""
    commit = Commit(work)
    if storage is not None:
        commit.storage = storage
    row = commit(batch).to_pylist()[0]
    assert row["failure"] is None, json.loads(row["failure"])["trace"]
    return Footer.from_json(row["footer"], "")


def run(
    work: Work, shards: Sequence[Shard], pass_: int = 0, kept_in: KeptIn = MappingProxyType({})
) -> list[Footer]:
    """All stages."""
    return [merge(work, batch) for batch in generated(work, shards, pass_, kept_in)]
