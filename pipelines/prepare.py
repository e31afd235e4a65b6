"""Read a shard's rows and turn them into prompts: everything before the engine that needs only a CPU."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from functools import cached_property

import pyarrow as pa

from pipelines.advance import Advance, prompts_of
from pipelines.attempts import Attempts, History
from pipelines.code import check_code
from pipelines.contracts import PROMPT_SCHEMA, Work, carried_columns
from pipelines.errors import Stopped
from pipelines.generation_table import unanswered
from pipelines.generations import generations_of
from pipelines.merge import failed_rows
from pipelines.orphans import end_with_parent
from pipelines.policy import check_model_allowed
from pipelines.prompt import PromptBuilder, no_prompts
from pipelines.read import read_shard
from pipelines.stage import Failure, Parcel
from pipelines.stop import StopFlag
from pipelines.storage import Storage
from pipelines.tokenizer import do_without_torch


class Prepare:
    """The first stage of the Ray graph: a bare shard in, its rows and prompts out."""

    def __init__(self, work: Work, stop: StopFlag | None = None, *, own_process: bool = False) -> None:
        """`own_process`: nothing else runs in this process, least of all an engine."""
        if own_process:
            end_with_parent()
            do_without_torch(work.model)
        self.work = work
        self.storage = Storage(work.output.path, work.output.storage_options)
        self.attempts = Attempts(self.storage, "prepare", work.run_id)
        self._stop = stop
        first, *others = generations_of(work)
        self._asking = first if first.asks else others[0]
        self._first_steps = None if first.asks else Advance(first, self._asking)
        """Of a job without a prompt: from the rows to the prompts of the first model step."""
        with contextlib.suppress(Exception):
            _ = self.builder

    @cached_property
    def builder(self) -> PromptBuilder:
        """Made with the actor; what is wrong with it meets the first shard again and is that shard's failure."""
        check_code(self.work.code_digest, self.work.code_path)
        check_model_allowed(self._asking.work.model)  # by this machine's own policy
        return prompts_of(self._asking) if self._first_steps is None else self._first_steps.builder

    def __call__(self, batch: pa.Table) -> pa.Table:
        parcel = Parcel.from_batch(batch)
        try:
            if self._stop is not None and self._stop.is_set():
                raise Stopped("the run was stopped before this shard was begun")
            return self.shard(parcel, self._begin(parcel)).to_batch()
        except Exception as error:  # noqa: BLE001 - classified by Failure.of
            return parcel.failed(Failure.of("prepare", error)).to_batch()

    def shard(self, parcel: Parcel, history: History | None = None) -> Parcel:
        """Read, filter, render and tokenise one shard; a few rows at a time where its `history` is bad.

        In a retry only the rows that failed; the bare shard, noted as committed, where this run has merged it.
        """
        _ = self.builder  # its checks, and no time of the shard
        started_at, began = time.time(), time.monotonic()
        wanted = None
        if self.work.retry is not None:
            wanted = failed_rows(self.storage, parcel.shard, self.work)
            if wanted is None:
                return Parcel(shard=parcel.shard, notes=parcel.notes).noting(committed=True)
        rows = read_shard(parcel.shard, self.work.input, self.work.input_schema)
        if wanted is not None:
            rows = rows.only(wanted)
        return self.prompted(parcel, rows.table, history).noting(
            rows_read=rows.rows_read,
            rows_filtered=rows.rows_filtered,
            rows_in=len(rows.table),
            started_at=started_at,
            prepare_s=time.monotonic() - began,
        )

    def prompted(self, parcel: Parcel, rows: pa.Table, history: History | None = None) -> Parcel:
        """The parcel with `rows`, as reading gives them, and their prompts."""
        schema = self.work.input_schema
        # By place, since the input may have columns of these names: after its own come row id, error code and message.
        carried = [schema.get_field_index(name) for name in carried_columns(schema, self.work.output)]
        prepared = Parcel(
            shard=parcel.shard, rows=rows.select([*carried, rows.num_columns - 3]), notes=parcel.notes
        )
        if self._first_steps is not None:
            prompts = no_prompts(rows)
            return self._first_steps(replace(prepared, prompts=prompts, generations=unanswered(prompts)))
        if history is None:
            return replace(prepared, prompts=self.builder.build(rows))
        return replace(prepared, prompts=self._in_groups(rows, history, parcel))

    def _begin(self, parcel: Parcel) -> History | None:
        """Record the attempt; the history where this shard has ended the process `errors.max_attempts` times."""
        key, pass_ = self.work.attempts_key(parcel.shard), parcel.notes["pass"]
        most = self.work.errors.max_attempts
        if self._first_steps is not None:  # as between two generations, nobody looks for the row
            self.attempts.begin_whole(key, pass_, name=parcel.shard.part_name, most=most)
            return None
        if self.attempts.begin(key, pass_):
            return None
        history = self.attempts.history(key, pass_)
        history.check("prepare", parcel.shard.part_name, most=2 * most)
        self.attempts.another(key, pass_, history.latest)
        return history if len(history.deaths) >= most else None

    def _in_groups(self, rows: pa.Table, history: History, parcel: Parcel) -> pa.Table:
        """Prompts, a few rows at a time and written down before: user code may end the process (see `attempts`)."""
        ids = rows["row_id"].to_pylist()
        number = history.latest + 1
        built: dict[int, pa.Table] = {}
        for places in history.groups(ids):
            number = self.attempts.another(
                self.work.attempts_key(parcel.shard), history.pass_, number, [ids[place] for place in places]
            ).number
            prompts = self.builder.build(rows.take(places))
            built |= {place: prompts.slice(i, 1) for i, place in enumerate(places)}
        for place, row in enumerate(ids):
            if place not in built:
                error = {"row_id": row, "error_code": "prompt_crash", "error_message": history.reason(row)}
                built[place] = pa.Table.from_pylist([error], PROMPT_SCHEMA)
        return (
            pa.concat_tables([built[place] for place in range(len(ids))]) if ids else self.builder.build(rows)
        )
