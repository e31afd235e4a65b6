"""Read a shard's rows and turn them into prompts: everything before the engine that needs only a CPU."""

from __future__ import annotations

import contextlib
import time
from functools import cached_property

import pyarrow as pa

from pipelines.code import check_code
from pipelines.contracts import Work
from pipelines.prompt import PromptBuilder
from pipelines.read import read_shard
from pipelines.stage import Failure, Parcel
from pipelines.tokenizer import do_without_torch, load_tokenizer


class Prepare:
    """The first stage of the Ray graph: a bare shard in, its rows and prompts out."""

    def __init__(self, work: Work, *, own_process: bool = False) -> None:
        """`own_process`: nothing else runs in this process, least of all an engine."""
        if own_process:
            do_without_torch(work.model)
        self.work = work
        with contextlib.suppress(Exception):
            _ = self.builder

    @cached_property
    def builder(self) -> PromptBuilder:
        """Made with the actor; what is wrong with it meets the first shard again and is that shard's failure."""
        check_code(self.work.code_digest, self.work.code_path)
        return PromptBuilder(self.work.prompt, load_tokenizer(self.work.model), self.work.user_modules)

    def __call__(self, batch: pa.Table) -> pa.Table:
        parcel = Parcel.from_batch(batch)
        try:
            return self.shard(parcel).to_batch()
        except Exception as error:  # noqa: BLE001 - classified by Failure.of
            return parcel.failed(Failure.of("prepare", error)).to_batch()

    def shard(self, parcel: Parcel) -> Parcel:
        """Read, filter, render and tokenise one shard."""
        builder = self.builder
        started_at, began = time.time(), time.monotonic()
        rows = read_shard(parcel.shard, self.work.input, self.work.input_schema)
        prompts = builder.build(rows.table)
        return Parcel(
            shard=parcel.shard,
            # The last two are reading's error columns; by place, since the input may have columns of these names.
            rows=rows.table.select(range(rows.table.num_columns - 2)),
            prompts=prompts,
            notes=parcel.notes,
        ).noting(
            rows_read=rows.rows_read,
            rows_filtered=rows.rows_filtered,
            started_at=started_at,
            prepare_s=time.monotonic() - began,
        )
