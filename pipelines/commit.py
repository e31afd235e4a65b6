"""Put a shard's part file: the one moment at which a shard counts as done.

The part is built whole in memory, with its statistics in the footer, and put with one create-only request; its existence
is the commit (design §4.4). Whoever comes second throws its rows away and reports the statistics of the part that stands.
A retry's rows are merged into that part instead (`pipelines.merge`).
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from dataclasses import asdict, replace
from functools import cached_property

import pyarrow as pa

from pipelines import __version__
from pipelines.advance import Reading
from pipelines.attempts import Attempts
from pipelines.code import check_code
from pipelines.contracts import FORMAT_VERSION, Work
from pipelines.counting import count
from pipelines.dedup_keys import keep_keys
from pipelines.errors import ShardError
from pipelines.generations import generations_of
from pipelines.merge import merge
from pipelines.metrics import tell_committed
from pipelines.orphans import end_with_parent
from pipelines.part import Footer, build_part, read_part
from pipelines.policy import check_model_allowed
from pipelines.shard_stats import START_PARTS, Provenance, Turn
from pipelines.stage import Failure, Parcel
from pipelines.steps import settled
from pipelines.storage import Storage
from pipelines.tokenizer import do_without_torch


class Commit:
    """The last stage of the Ray graph: the last generation in, its steps over it, a part file and its footer out."""

    def __init__(self, work: Work, *, own_process: bool = False) -> None:
        """`own_process`: nothing else runs in this process, least of all an engine."""
        if own_process:
            end_with_parent()
            if not generations_of(work)[-1].parses:
                do_without_torch(work.model)
        self.work = work
        self.storage = Storage(work.output.path, work.output.storage_options)
        self.attempts = Attempts(self.storage, "commit", work.run_id)
        # 3.5 s of CPU, with vLLM's parsers more: now, while the engine starts, and not when the first shard comes.
        with contextlib.suppress(Exception):
            if self.reading.generation.writes:
                _ = self.reading.detokenizer

    @cached_property
    def reading(self) -> Reading:
        """Made with the actor; what is wrong with it meets the first shard again and is that shard's failure."""
        check_code(self.work.code_digest, self.work.code_path)
        last = generations_of(self.work)[-1]
        check_model_allowed(last.work.model)  # by this machine's own policy
        return Reading(last)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """One row: the shard's id, and its footer or its failure, as JSON."""
        parcel = Parcel.from_batch(batch)
        footer, failure = None, parcel.failure
        if failure is None:
            try:
                self._begin(parcel)
                footer = self.shard(parcel)
            except Exception as error:  # noqa: BLE001 - classified by Failure.of
                failure = Failure.of("commit", error)
        return pa.table(
            {
                "shard": [parcel.shard.id],
                "footer": pa.array([footer and footer.to_json()], pa.large_string()),
                "failure": pa.array([failure and json.dumps(asdict(failure))], pa.large_string()),
            }
        )

    def shard(self, parcel: Parcel) -> Footer:
        """Build and put the part of one shard; the footer that stands afterwards, ours or an earlier one."""
        began = time.monotonic()
        if parcel.notes.get("committed"):
            return read_part(self.storage, parcel.shard.part_name).footer
        answers, parcel = self.reading.records(parcel)
        if self.work.retry is not None:
            return merge(
                self.storage, parcel, answers, self.reading.steps, self.work, self._provenance(parcel)
            )
        records, counts = self.reading.steps.run(answers)
        rows = settled(records)
        stats = count(parcel, records, rows, counts, self.work.sampling)
        if not stats.balanced:
            raise ShardError(f"the books of shard {parcel.shard.id} do not balance: {stats}")
        footer = Footer(
            format_version=FORMAT_VERSION,
            shard=parcel.shard,
            fingerprint=self.work.fingerprint,
            stats=replace(stats, commit_s=time.monotonic() - began),
            provenance=self._provenance(parcel),
        )
        data, footer = build_part(self.storage, rows, footer, self.work.output)
        keep_keys(self.storage, rows, footer, self.work.steps)
        if self.storage.create(f"data/{parcel.shard.part_name}", data):
            tell_committed(footer.stats, footer.provenance)
            return footer
        return read_part(self.storage, parcel.shard.part_name).footer

    def _begin(self, parcel: Parcel) -> None:
        """Record the attempt. Raises WorkerDied for a shard that has ended this process too often."""
        self.attempts.begin_whole(
            self.work.attempts_key(parcel.shard),
            parcel.notes["pass"],
            name=parcel.shard.part_name,
            most=self.work.errors.max_attempts,
        )

    def _provenance(self, parcel: Parcel) -> Provenance:
        return Provenance(
            run_id=self.work.run_id,
            job=self.work.job,
            attempt=parcel.notes["attempt"],
            replica=parcel.notes["replica"],
            node=socket.gethostname(),
            device=parcel.notes["device"],
            engine=parcel.notes["engine"],
            dray_version=__version__,
            started_at=parcel.notes["started_at"],
            engine_start_s=parcel.notes["engine_start_s"],
            engine_ready_at=parcel.notes["engine_ready_at"],
            **{name: parcel.notes[name] for name in START_PARTS},
            committed_at=time.time(),
            turns=tuple(Turn(**turn) for turn in parcel.notes["turns"]),
        )
