"""One output and everybody who may write to it at once: drivers, their workers, merges, a `cancel`, and accidents.

Drivers run the product's own `jobs.runner.run` (lock, plan, passes, books, `_SUCCESS`), workers its commit stage. Only
what stands around them is simulated: threads and time (`schedule`), the store (`store`), the listing of the input, and
the Ray graph, whose workers take a while and then commit rows that name their attempt. `Judge` holds every effect
on the store against the promises, while it happens.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq

import jobs.books
import jobs.lock
import jobs.runner
import pipelines.advance
import pipelines.attempts
import pipelines.commit
import pipelines.storage
from jobs import load
from jobs.loading import LoadedJob
from jobs.lock import LOCK_NAME, OutputLock, cancel
from jobs.planning import extend, load_plan, new_plan
from jobs.proposal import Proposal
from pipelines.commit import Commit
from pipelines.contracts import GENERATION_SCHEMA, PROMPT_SCHEMA, InputFile, Shard, Work
from pipelines.errors import (
    DrayError,
    Interrupted,
    JobIncomplete,
    OutputLocked,
    TransientStorageError,
)
from pipelines.kept import KeptIn
from pipelines.part import FOOTER_KEY, Footer, part_of
from pipelines.run import EngineResources, Outcome
from pipelines.shard_stats import START_PARTS
from pipelines.stage import Failure, Parcel
from pipelines.storage import Storage
from tests.local.runs import job
from tests.proof.in_process import Flag, reserved
from tests.proof.judge import Judge
from tests.proof.schedule import Process, Schedule
from tests.proof.store import Kind, Server, Stored

ROOT = "sim://bucket/out"
ROWS = 3
SCHEMA = pa.schema([pa.field("question", pa.string())])
#: What a seed raises that finds a broken promise, or an end that no run should have.
BROKEN = (AssertionError, DrayError)
#: How a run may end besides well, whatever happens around it.
ENDS = (OutputLocked, Interrupted, JobIncomplete, TransientStorageError)


@cache
def loaded(failed_rows: str) -> LoadedJob:
    budget = {"max_error_rate": 1.0, "shutdown_grace_s": 5}
    return load(job("sim://bucket/in/", ROOT, errors=budget, output={"failed_rows": failed_rows}))


class World:
    """Everything that a seed decides. `run` ends with one undisturbed driver that finishes the job."""

    def __init__(self, seed: int, kind: Kind) -> None:
        self.schedule = Schedule(seed)
        self.random = self.schedule.random
        self.server = Server(self.schedule, kind)
        self.judge = Judge(self.schedule, self.server)
        self.failed_rows = self.random.choice(("inline", "separate"))
        self.files = {f"f{i}": 0 for i in range(self.random.randint(1, 3))}
        """The input: names and versions."""
        self.processes: dict[int, Process] = {}
        self.workers: dict[Process, list[Process]] = {}
        self.ended: dict[str, str] = {}
        """How each driver ended."""
        self._attempts = 0

    # ── the story ───────────────────────────────────────────────────────────────────────────────────────────────

    def run(self) -> None:
        """Raises AssertionError with the seed's trace when a promise was broken."""
        with self.simulated():
            self.leave_a_lock()
            drivers = [
                self.driver(name, self.random.choice((0.02, 1, 20, 60)) * self.random.random())
                for name in "abc"[: self.random.choice((2, 2, 3))]
            ]
            merges = self.random.uniform(0, 120)
            for name in "mn"[: self.random.choice((0, 1, 2, 2))]:
                self.actor(f"merge {name}", merges + self.random.uniform(0, 10), self.merge)
            if self.random.random() < 0.5:
                self.actor("cancel", self.random.uniform(0, 80), self.cancel)
            accidents = self.process("accidents")
            for process in drivers:
                accident = self.random.choice(
                    (None, self.kill_driver, self.freeze_driver, self.freeze_driver)
                )
                if accident is not None:
                    # At any of its requests: a plan, three shards, the books and the end are some eighty.
                    at = self.random.randrange(1, 100)
                    self.server.at_request[process, at] = lambda process=process, accident=accident: accident(
                        process
                    )
            if self.random.random() < 0.4:
                self.later(accidents, 100, lambda: self.files.__setitem__("g", 0))
            if self.random.random() < 0.4:
                self.later(accidents, 100, lambda: self.files.__setitem__("f0", 1))
            self.schedule.run()
            self.finish()
        self.judge.verdict(self.ended)

    def finish(self) -> None:
        """Calm weather, and a last driver: the job ends well, and all rows are there once."""
        if "bucket/out/data/_SUCCESS" in self.server.objects and not self.judge.contested:
            self.judge.finished("_SUCCESS stands")
        self.server.loss = 0.0
        began = self.schedule.now
        self.driver("last", 0.0)
        self.schedule.run()
        self.judge.check(self.ended["last"] == "succeeded", f"the last driver {self.ended['last']}")
        took = self.schedule.now - began
        self.judge.check(took < 300, f"the last driver took {took:.0f} s: it waited for somebody")
        plan = load_plan(Storage(ROOT))
        assert plan is not None
        parts = {f"bucket/out/data/{shard.part_name}": shard for shard in plan.shards}
        data = {key for key in self.server.objects if key.startswith("bucket/out/data/")}
        self.judge.check(
            data == parts.keys() | {"bucket/out/data/_SUCCESS"}, f"in the end there are {sorted(data)}"
        )
        for key in data & parts.keys():
            shard, rows = parts[key], self.judge.rows(self.server.objects[key].data)
            planned = sorted((row_id, 0) for row_id in row_ids(shard))
            self.judge.check(sorted(rows.keys) == planned, f"in the end {key} holds {rows.keys}")
            self.judge.check(
                all(attempt.endswith(shard.id) for attempt in rows.attempts), f"{key} is of other content"
            )

    # ── actors ──────────────────────────────────────────────────────────────────────────────────────────────────

    def leave_a_lock(self) -> None:
        """Some begin on an output whose last driver died, on a machine that nobody can ask."""
        if self.random.random() < 0.3:
            gone = Process("gone", machine="elsewhere", alive=False)
            holder = OutputLock(Storage(ROOT), "run-gone")._mine
            self.judge.locks[holder.token] = (gone, None)
            self.server.objects[f"bucket/out/{LOCK_NAME}"] = Stored(
                data=replace(holder, host="elsewhere", machine="elsewhere").to_json(),
                version="0",
                metadata={},
            )

    def process(self, name: str) -> Process:
        process = Process(name, machine=self.random.choice("ab"), pid=len(self.processes) + 1)
        self.processes[process.pid] = process
        return process

    def actor(self, name: str, after: float, target: Callable[[], object]) -> Process:
        process = self.process(name)
        self.schedule.spawn(process, "main", target, after)
        return process

    def later(self, process: Process, within: float, target: Callable[[], object]) -> None:
        self.schedule.spawn(process, "later", target, self.random.uniform(0, within))

    def driver(self, name: str, after: float) -> Process:
        self.ended[name] = "was killed"

        def drive() -> None:
            try:
                jobs.runner.run(loaded(self.failed_rows), run_id=f"run-{name}")
                self.ended[name] = "succeeded"
            except ENDS as error:
                self.ended[name] = f"{type(error).__name__}: {error}"
            self.schedule.note(self.ended[name])

        return self.actor(name, after, drive)

    def merge(self) -> None:
        """Answer failed rows of committed parts by compare-and-swap, part by part, as `dray retry-failed` does."""
        process = self.schedule.process
        assert process is not None
        storage = Storage(ROOT)
        with contextlib.suppress(TransientStorageError):
            for info in storage.list("data"):
                found = storage.read_versioned(info.name) if info.name.endswith(".parquet") else None
                while found is not None:
                    merged = answered(found[0], process.name)
                    if merged is None:
                        break
                    self.schedule.sleep(self.random.uniform(0.1, 20.0))
                    if storage.replace(info.name, merged, found[1]):
                        break
                    found = storage.read_versioned(info.name)

    def cancel(self) -> None:
        with contextlib.suppress(TransientStorageError):
            holder = cancel(Storage(ROOT))
            if holder is not None:
                self.schedule.note(f"cancelled {holder.run_id}")
                self.judge.cancelled(holder)

    # ── accidents ───────────────────────────────────────────────────────────────────────────────────────────────

    def kill_driver(self, process: Process) -> None:
        self.schedule.kill(process)
        for workers in self.workers.get(process, ()):
            if self.random.random() < 0.5:  # the others are zombies, and go on
                self.schedule.kill(workers)

    def freeze_driver(self, process: Process) -> None:
        self.schedule.freeze(process, self.random.uniform(5, 90))
        for workers in self.workers.get(process, ()):
            if self.random.random() < 0.5:
                self.schedule.freeze(workers, self.random.uniform(5, 90))

    # ── what stands around the product ──────────────────────────────────────────────────────────────────────────

    @contextlib.contextmanager
    def simulated(self) -> Iterator[None]:
        """The product on this schedule and this store."""
        schedule, random = self.schedule, self.random
        replaced: dict[Any, dict[str, Any]] = {
            pipelines.storage: {"open_backend": lambda *given: self.server.backend()},
            jobs.lock: {
                "time": schedule.time,
                "threading": schedule.threading,
                "os": mock.Mock(wraps=os, getpid=lambda: schedule.process.pid if schedule.process else 0),
                "_machine": lambda: schedule.process.machine if schedule.process else "",
                "_process_started": self._process_started,
            },
            jobs.runner: {
                "time": schedule.time,
                "threading": schedule.threading,
                "queue": schedule.queue,
                "propose": self._propose,
                "stream": self._stream,
                "connected": lambda cluster: contextlib.nullcontext(),
                "settle": reserved,
                "StopFlag": Flag,
                "OutputLock": self.judge.watched(OutputLock),
            },
            jobs.books: {"ThreadPoolExecutor": OneByOne},
            pipelines.attempts: {"ThreadPoolExecutor": OneByOne},
            pipelines.advance: {"load_tokenizer": lambda model: object()},
            pipelines.commit: {"check_code": lambda *given: None},
            uuid: {"uuid4": lambda: uuid.UUID(int=random.getrandbits(128), version=4)},
        }
        with contextlib.ExitStack() as patches:
            for module, names in replaced.items():
                patches.enter_context(mock.patch.multiple(module, **names))
            yield

    def _process_started(self, pid: int) -> str:
        process, here = self.processes.get(pid), self.schedule.process
        return "once" if process and here and process.alive and process.machine == here.machine else ""

    def _propose(self, job: LoadedJob, *, relist: bool = True) -> Proposal:
        storage = Storage(ROOT)
        files = [input_file(name, version) for name, version in self.files.items()]
        plan = load_plan(storage)
        plan = (
            new_plan(files, SCHEMA, "spec", rows=ROWS)
            if plan is None
            else extend(plan, files, on_changed="replace", rows=ROWS)
        )
        return Proposal(job=job, storage=storage, plan=plan, identity={})

    def _stream(
        self,
        shards: Sequence[Shard],
        work: Work,
        resources: Sequence[EngineResources],
        flag: Flag,
        pass_: int,
        kept_in: KeptIn,
    ) -> Iterator[Outcome]:
        """Two workers; some shards are run twice, some outcomes never arrive."""
        driver = self.schedule.process
        assert driver is not None
        process = self.process(f"workers of {driver.name}")
        process.machine = driver.machine
        self.workers.setdefault(driver, []).append(process)
        todo = deque(shard for shard in shards for _ in range(self.random.choice((1, 1, 1, 2))))
        outcomes = self.schedule.queue.SimpleQueue()

        def worker() -> None:
            commit = Commit(work)
            while todo:
                shard = todo.popleft()
                if flag.is_set():
                    stopped = Failure(stage="generate", scope="shard", kind="Stopped", message="stopped")
                    outcomes.put(Outcome(shard_id=shard.id, footer=None, failure=stopped))
                    continue
                self.schedule.sleep(self.random.choice((1.0, 1.0, 4.0, 12.0)))
                row = commit(self._generated(shard, work, pass_).to_batch()).to_pylist()[0]
                outcomes.put(
                    Outcome(
                        shard_id=row["shard"],
                        footer=Footer.from_json(row["footer"], "") if row["footer"] else None,
                        failure=Failure(stage="commit", scope="shard", kind="some", message=row["failure"])
                        if row["failure"]
                        else None,
                    )
                )

        expected = len(todo)
        for number in range(2):
            self.schedule.spawn(process, f"worker {number}", worker)
        for _ in range(expected):
            outcome = outcomes.get()
            if self.random.random() > 0.03:
                yield outcome

    def _generated(self, shard: Shard, work: Work, pass_: int) -> Parcel:
        """The shard as one attempt answered it: each text names the attempt, and rows may fail."""
        self._attempts += 1
        ids = row_ids(shard)
        failed = [self.random.random() < 0.35 for _ in ids]
        attempt = f"{work.run_id}/{self._attempts} {shard.id}"
        prompts = pa.Table.from_pylist([{"row_id": row, "token_ids": [1]} for row in ids], PROMPT_SCHEMA)
        generations = pa.Table.from_pylist(
            [
                {"row": i, "sample_index": 0, "error_code": "request_timeout", "error_message": attempt}
                if failed[i]
                else {
                    "row": i,
                    "sample_index": 0,
                    "token_ids": [2],
                    "text": f"attempt {attempt}",
                    "finish_reason": "stop",
                    "cached_tokens": 0,
                }
                for i in range(len(ids))
            ],
            GENERATION_SCHEMA,
        )
        return Parcel(
            shard=shard,
            rows=pa.table({"question": ["?"] * len(ids), "row_id": ids}),
            prompts=prompts,
            generations=generations,
            notes=NOTES
            | {"pass": pass_, "rows_read": len(ids), "rows_in": len(ids), "attempt": self._attempts},
        )


NOTES: dict[str, Any] = {
    "rows_filtered": 0,
    "prepare_s": 0.0,
    "queue_s": 0.0,
    "generate_s": 0.0,
    "preemptions": 0,
    "repairs": 0,
    "repair_tokens": 0,
    "rows_reused": 0,
    "tokens_reused": 0,
    "engine_deaths": 0,
    "latency_s": {},
    "ttft_s": {},
    "replica": "",
    "device": "cpu",
    "engine": "simulated",
    "started_at": 0.0,
    "engine_start_s": 0.0,
    "engine_ready_at": 0.0,
    "turns": [],
    **dict.fromkeys(START_PARTS),
}


def row_ids(shard: Shard) -> list[str]:
    return [f"{span.path}#{row}" for span in shard.spans for row in range(span.start, span.stop)]


def input_file(name: str, version: int) -> InputFile:
    return InputFile(
        path=f"sim://bucket/in/{name}.parquet",
        size=100,
        version=f"v{version}",
        format="parquet",
        rows=ROWS,
        row_groups=(ROWS,),
        data_bytes=100,
        estimated_rows=ROWS,
    )


def answered(part: bytes, name: str) -> bytes | None:
    """The part with its first failed row answered by `name`; None when none has failed."""
    table = pq.read_table(io.BytesIO(part))
    footer = part_of(io.BytesIO(part), "", "a part").footer
    rows = table.to_pylist()
    failed = next((row for row in rows if row["error_code"]), None)
    if failed is None:
        return None
    failed |= {"error_code": None, "error_message": None, "generated_text": name, "finish_reason": "stop"}
    stats = footer.stats
    left = stats.rows_failed - 1
    stats = replace(
        stats,
        rows_ok=stats.rows_ok + 1,
        rows_failed=left,
        samples=stats.samples + 1,
        error_codes={"request_timeout": left} if left else {},
    )
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, table.schema.remove_metadata()) as writer:
        writer.write_table(pa.Table.from_pylist(rows, table.schema.remove_metadata()))
        digest = hashlib.sha256(sink.getbuffer()).hexdigest()
        writer.add_key_value_metadata({FOOTER_KEY: replace(footer, stats=stats, digest=digest).to_json()})
    return sink.getvalue()


class OneByOne:
    """A thread pool that works in the caller's own thread: the schedule knows no others."""

    def __init__(self, threads: int) -> None:
        pass

    def __enter__(self) -> OneByOne:
        return self

    def __exit__(self, *given: object) -> None:
        pass

    def map(self, function: Callable[..., Any], *items: Any) -> Iterator[Any]:
        return map(function, *items)
