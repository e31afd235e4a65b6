"""Run a job: plan, stream the pending shards through Ray, reconcile, finish. Resuming is running again."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from jobs.books import (
    SUCCESS,
    Books,
    clear_superseded,
    clear_unreferenced_errors,
    committed_shards,
    fold,
)
from jobs.budget import ErrorBudget
from jobs.cluster import settle
from jobs.connection import connected
from jobs.dedup import drop_duplicates, read_rounds, uncompared
from jobs.feeding import fed
from jobs.ledger import Ledger, new_run_id, read_runs
from jobs.limits import Limits
from jobs.loading import LoadedJob
from jobs.lock import OutputLock
from jobs.metering import Meter, Usage
from jobs.output import succeed, write_card, write_stats
from jobs.planning import Plan
from jobs.proposal import propose, work_of
from jobs.report import Report, make_report
from jobs.reuse import KEPT, kept_in
from jobs.shared_ledger import announcer
from jobs.stopping import StopRequest
from pipelines.attempts import clear_attempts
from pipelines.contracts import Shard, Work
from pipelines.errors import (
    DrayError,
    ErrorBudgetSpent,
    Interrupted,
    JobIncomplete,
    LimitReached,
)
from pipelines.generations import pools_of, with_pools
from pipelines.kept import KeptIn
from pipelines.metrics import tell_shards
from pipelines.part import Footer
from pipelines.run import EngineResources, Outcome, stream
from pipelines.shard_stats import Provenance, ShardStats
from pipelines.stage import Failure
from pipelines.step_settings import dedup_step
from pipelines.stop import StopFlag
from pipelines.storage import Storage

log = logging.getLogger("dray")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is; sent to the observer after each change."""

    phase: str
    """`planning`, `waiting` (for the output's lock), `starting`, `running`, `stopping`, `finishing` or `done`."""
    shards_total: int = 0
    """Of the job; in a retry those with rows to retry."""
    shards_done: int = 0
    """Committed shards, those of earlier runs included; in a retry those that it has merged."""
    rows_total: int | None = None
    rows_before: int = 0
    """Rows that earlier runs committed, where the plan knows them."""
    stats: ShardStats = field(default_factory=lambda: ShardStats(shards=0))
    """Sum of what this run committed."""
    retries: int = 0
    """Attempts at shards that failed and were repeated."""
    note: str = ""
    """Something to tell the user once."""


Observer = Callable[[Progress], None]


def run(
    job: LoadedJob,
    *,
    run_id: str | None = None,
    observer: Observer = lambda progress: None,
    relist: bool = True,
    stop: StopRequest | None = None,
) -> Report:
    """Run a job to its end and return its report.

    Args:
        job: what `load` returned.
        run_id: names the run in the ledger and in its rows; a new one by default.
        observer: called with the progress, from this thread.
        relist: list the input again and extend the plan (`dray run`); False takes the plan as it is (`dray resume`).
        stop: asks the run to stop with what it has; by default nothing does but KeyboardInterrupt.

    Raises:
        BadInput: nothing was started.
        ErrorBudgetSpent, LimitReached, JobIncomplete, EngineStartError, OutputLocked, Interrupted: committed shards
            stay; running again takes up the rest.
    """
    run_id = run_id or new_run_id()
    storage = Storage(job.spec.output.path, job.spec.output.storage_options)
    observer(Progress(phase="planning"))
    proposal = propose(job, relist=relist)
    job = proposal.job
    if not storage.check_writable():
        log.warning(
            "%s: this store ignores conditional writes; two drivers started at once may repeat work",
            storage.url(),
        )
    with OutputLock(
        storage, run_id, notify=lambda line: observer(Progress(phase="waiting", note=line))
    ) as lock:
        plan = proposal.save()
        command = "run" if relist else "resume"
        with Ledger(storage, run_id, announcer(job, storage)).recorded(
            command, fingerprint=plan.fingerprint, shards=len(plan.shards), spec=job.raw
        ) as ended:
            work = work_of(job, plan.input_schema, fingerprint=plan.fingerprint, run_id=run_id)
            driver = Driver(job, storage, plan, work, observer, lock, stop or StopRequest())
            ended.usage = driver.usage
            return driver.to_the_end()


#: Seconds beyond `errors.shutdown_grace_s` for the last commits, before the driver stops waiting.
COMMIT_S = 5.0
#: Seconds between two looks at the lock and at requests to stop.
TICK_S = 0.25
#: What an engine's start may meet on one node and not on others: a device, a cache folder, a network.
_OF_ONE_NODE = frozenset({"EngineStartError", "ModelError", "StorageError", "StorageDenied"})


class Driver:
    """One driver's passes over one output, under its lock, until every planned shard has a part.

    `jobs.retry` makes another one of it: what is left to do, what counts, and the end are methods of their own.
    """

    UNDONE = "have no part"

    def __init__(
        self,
        job: LoadedJob,
        storage: Storage,
        plan: Plan,
        work: Work,
        observer: Observer,
        lock: OutputLock,
        stop: StopRequest,
    ) -> None:
        self.job, self.storage, self.plan, self.work = job, storage, plan, work
        self.observer, self.lock, self.stop = observer, lock, stop
        self.attempts: Counter[str] = Counter()
        """Shard id → attempts in this run that failed."""
        self.failures: dict[str, Failure] = {}
        self.stats = ShardStats(shards=0)
        self.retries = 0
        self.ending: DrayError | None = None
        """Why this run ends before its work does, once it is known."""
        self.shards_total = len(plan.shards)
        self.done = committed_shards(storage, plan)
        """Ids of the shards that are known to have their part; in a retry those that it has merged."""
        rows = [shard.rows for shard in plan.shards]
        self.rows_total = None if None in rows else sum(n for n in rows if n is not None)
        self.rows_before = sum(shard.rows or 0 for shard in plan.shards if shard.id in self.done)
        # How many rows the lists of an `explode` become is known in the end.
        rows_due = None if any(step.explode for step in work.steps) else self.rows_total
        self.budget = ErrorBudget(work.errors, rows_due, storage.url())
        self.limits = Limits(job.spec.budget, storage.url())
        self.meter = Meter(work.run_id)
        self.kept_in: KeptIn = {}
        self.turns = sum(map(len, pools_of(work)))
        """Of a shard in engines, where no answer was kept."""
        self.engines_work = False
        """Whether engines of all generations have answered a shard of this run; answers that were kept say nothing of them."""

    def to_the_end(self) -> Report:
        pending = self._pending()
        if not pending and self.storage.exists(SUCCESS):
            # A worker that outlived its driver may have put back a part since.
            clear_superseded(self.storage, self.plan)
            books = fold(self.storage, self.plan)
            if not self._uncompared(books):
                self._tell("done", note=f"nothing to do: all {len(self.plan.shards):,} shards are committed")
                return self._report(books, succeeded=True)
        self.storage.delete(SUCCESS)
        if pending:
            self._passes(pending)
        return self._finish()

    def _passes(self, pending: list[Shard]) -> None:
        """Stream what is pending until nothing is."""
        if self.work.reuse is not None:
            self.kept_in = kept_in(self.work, self.plan, pending)
            if self.work.reuse.keep:
                self.storage.create(KEPT, b"")
        self._tell("starting")
        with connected(self.job.spec.cluster):
            reserved = settle(self.job.spec)
            rows = self._rows_of(pending)
            self.work = with_pools(
                self.work,
                [
                    fed(one.pool, of.model, of.sampling, shards=len(pending), rows=rows)
                    for of, one in zip(self.job.spec.pools, reserved, strict=True)
                ],
            )
            resources = [one.each for one in reserved]
            # As if all pools were one engine: those of several are of a fixed size (`JobSpec`).
            alone = reserved[0] if len(reserved) == 1 else None
            gpus = alone.each.num_gpus if alone else sum(one.gpus for one in reserved)
            self._check_limits(gpus)
            pass_ = 0
            while pending:
                self.meter.begin(
                    gpus_per_engine=gpus,
                    least=alone.pool.least_engines if alone else 1,
                    most=alone.pool.most_engines if alone else 1,
                )
                try:
                    self._pass(pending, resources, pass_)
                finally:
                    self.meter.end()
                pending, pass_ = self._pending(), pass_ + 1

    def _check_limits(self, gpus_per_engine: float) -> None:
        """Raise LimitReached where the output's earlier runs, or the clock, leave this one nothing."""
        if self.limits.count_earlier:
            parts = fold(self.storage, self.plan).parts
            self.limits.add_earlier(
                parts, read_runs(self.storage), self.work.run_id, gpus_per_engine=gpus_per_engine
            )
        reached = self.limits.reached(0, 0.0)
        if reached is not None:
            raise reached

    def usage(self) -> Usage:
        """What this run has done and used so far."""
        return Usage.of(self.stats, self.meter.gpu_s, self.job.spec.cost.gpu_hour_usd)

    def _left(self) -> list[Shard]:
        """Planned shards without a part, by a fresh listing."""
        committed = committed_shards(self.storage, self.plan)
        return [shard for shard in self.plan.shards if shard.id not in committed]

    def _rows_of(self, pending: Sequence[Shard]) -> int | None:
        """Rows of these shards that engines are asked about; None where one does not know its own."""
        rows = [shard.rows for shard in pending]
        return None if None in rows else sum(n for n in rows if n is not None)

    def _pending(self) -> list[Shard]:
        """What is left to do. Raises JobIncomplete when a shard of it is out of attempts."""
        pending = self._left()
        limit = self.work.errors.max_attempts
        spent = [shard for shard in pending if self.attempts[shard.id] >= limit]
        if spent:
            failure = self.failures.get(spent[0].id)
            why = (
                f"{failure.stage}: {failure.kind}: {failure.message}"
                if failure
                else "Ray lost it without a word"
            )
            raise JobIncomplete(
                f"{len(spent)} of {self.shards_total} shards {self.UNDONE} after {limit} attempts; "
                f"the first is {spent[0].part_name} ({why}). Committed shards are kept: run again to try the rest"
            )
        return pending

    # ── one pass ────────────────────────────────────────────────────────────────────────────────────────────────

    def _pass(self, pending: list[Shard], resources: list[EngineResources], pass_: int) -> None:
        """Stream the pending shards once. Raises what ends the run, after the shards in flight had their time."""
        import ray.exceptions

        before = len(self.done)
        heard: set[str] = set()
        flag = StopFlag()
        try:
            with self.stop.graceful():
                outcomes = stream(pending, self.work, resources, flag, pass_, self.kept_in)
                for outcome in self._until_stopped(outcomes, flag):
                    heard.add(outcome.shard_id)
                    self._take(outcome)
        except ray.exceptions.RayError as error:
            # The listing afterwards tells what is missing; Ray's own verdict on a shard is not trusted.
            log.warning("Ray ended the stream: %s", error)
            for shard in pending:
                self.failures.setdefault(shard.id, Failure.of("generate", error))
        if self.ending is None:
            flag.close()  # else stages of a run that is given up may still look
        if isinstance(self.ending, LimitReached) and not self._left():
            self.ending = None  # reached by the last of the work: there is nothing left to stop
        if self.ending is not None:
            raise self.ending
        if len(self.done) == before:
            # Without progress, silence counts as a failed attempt, or a stream that breaks would be tried for ever.
            self.attempts.update(shard.id for shard in pending if shard.id not in heard)

    def _until_stopped(self, outcomes: Iterator[Outcome], flag: StopFlag) -> Iterator[Outcome]:
        """The outcomes, while this thread looks after the lock and heeds requests to stop.

        When the run is to end, `flag` tells the stages, and what still comes within the grace time is taken.
        """
        arrived: queue.SimpleQueue[Outcome | BaseException | None] = queue.SimpleQueue()

        def receive() -> None:
            try:
                for outcome in outcomes:
                    arrived.put(outcome)
                arrived.put(None)
            except BaseException as error:  # noqa: BLE001 - raised again below, in the driver's thread
                arrived.put(error)

        receiver = threading.Thread(target=receive, name="dray-outcomes", daemon=True)
        receiver.start()
        deadline: float | None = None
        try:
            while deadline is None or time.monotonic() < deadline:
                try:
                    outcome = arrived.get(timeout=TICK_S)
                except queue.Empty:
                    outcome = None
                    if not receiver.is_alive() and arrived.empty():
                        return
                else:
                    if outcome is None:
                        return
                    if isinstance(outcome, BaseException):
                        raise outcome
                    yield outcome
                self._look_around()
                if self.ending is not None and deadline is None:
                    grace_s = self.work.errors.shutdown_grace_s
                    flag.set(grace_s)
                    deadline = time.monotonic() + grace_s + COMMIT_S
                    self._tell(
                        "stopping", note=f"{self._why()}: shards in flight have {grace_s:g} s to finish"
                    )
        finally:
            # Whoever leaves early must not leave a pass behind that goes on by itself, in a notebook's Ray.
            flag.set(0.0)
            receiver.join(0.0 if deadline is None else COMMIT_S)

    def _look_around(self) -> None:
        """Whether the run is to end: the lock lost, or somebody wants it to."""
        self.lock.check()
        if self.lock.cancelled_by:
            self.stop.ask(f"cancelled by {self.lock.cancelled_by}")
        if self.stop.reason and self.ending is None:
            self.ending = Interrupted(self.stop.reason)
        if self.ending is None:
            self.ending = self.limits.reached(self.stats.tokens_generated, self.meter.gpu_s)

    def _why(self) -> str:
        return str(self.ending).splitlines()[0]

    def _take(self, outcome: Outcome) -> None:
        if outcome.footer is not None:
            self._take_footer(outcome.footer)
        elif outcome.failure is not None and outcome.failure.kind != "Stopped":
            failure = outcome.failure
            log.warning(
                "shard %s: %s failed: %s\n%s", outcome.shard_id, failure.stage, failure.message, failure.trace
            )
            # One engine of a pool that works already may fail to start: a bad node is not the job's end.
            one_node = failure.stage == "generate" and failure.kind in _OF_ONE_NODE
            if failure.scope == "job" and not (one_node and self.engines_work):
                self.ending = self.ending or failure.to_error()
            self.attempts[outcome.shard_id] += 1
            self.failures[outcome.shard_id] = failure
            self.retries += 1
        self._tell("running" if self.ending is None else "stopping")

    def _count(self, shard: Shard, stats: ShardStats) -> bool:
        """Add up what has become of a shard; False where that was told before: Ray may repeat finished work."""
        if shard.id in self.done:
            return False
        self.done.add(shard.id)
        self.stats += stats
        if stats.engine_deaths:
            log.warning("%s: %d engines died under it", shard.part_name, stats.engine_deaths)
            self.retries += stats.engine_deaths
        return True

    def _take_origin(self, origin: Provenance) -> None:
        self.meter.take(origin)
        self.engines_work |= len(origin.turns) == self.turns

    def _take_footer(self, footer: Footer) -> None:
        self._take_origin(footer.provenance)
        if not self._count(footer.shard, footer.stats):
            return
        try:
            self.budget.take(footer)
        except ErrorBudgetSpent as error:
            self.ending = self.ending or error

    # ── the end ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _finish(self) -> Report:
        self._tell("finishing")
        self.lock.check()
        clear_superseded(self.storage, self.plan)
        books = fold(self.storage, self.plan)
        if books.complete:
            books = self._without_duplicates(books)
        if not books.complete:
            problem = books.problems[0] if books.problems else f"{books.missing[0].part_name} is gone"
            raise JobIncomplete(f"the output's books do not agree: {problem} (`dray verify` lists all)")
        self.lock.check()
        clear_unreferenced_errors(self.storage, self.plan, books)
        clear_attempts(self.storage)
        succeeded = books.totals.error_rate <= self.work.errors.max_error_rate
        write_stats(self.storage, books)
        report = self._report(books, succeeded=succeeded)
        write_card(self.storage, books, report)
        self.budget.check_total(books.totals, (part.footer for part in books.parts))
        self.lock.confirm()  # the plan may have been extended while this process slept
        succeed(self.storage, report)
        self._tell("done")
        return report

    def _uncompared(self, books: Books) -> bool:
        """Whether there are answers that the job's `dedup` has not seen: a retry's worker outlived its driver."""
        return dedup_step(self.work.steps) is not None and bool(uncompared(books, read_rounds(self.storage)))

    def _without_duplicates(self, books: Books) -> Books:
        """The books after the job's `dedup`, if it has one with anything to compare. Raises as `drop_duplicates`."""
        if dedup_step(self.work.steps) is None:
            return books
        if self.storage.exists(SUCCESS) and not self._uncompared(books):
            return books  # a retry that had nothing to do
        return drop_duplicates(
            self.storage,
            self.plan,
            books,
            self.work,
            check=self.lock.check,
            notify=lambda line: self._tell("finishing", note=line),
        )

    def _report(self, books: Books, *, succeeded: bool) -> Report:
        return make_report(
            job=self.job.spec.name,
            output=self.storage.url(),
            fingerprint=self.plan.fingerprint,
            books=books,
            runs=read_runs(self.storage),
            succeeded=succeeded,
            max_error_rate=self.work.errors.max_error_rate,
            steps=self.job.spec.named_steps,
        )

    def _tell(self, phase: str, note: str = "") -> None:
        failed = len(self.failures.keys() - self.done)
        tell_shards(self.job.spec.name, planned=self.shards_total, committed=len(self.done), failed=failed)
        self.observer(
            Progress(
                phase=phase,
                shards_total=self.shards_total,
                shards_done=len(self.done),
                rows_total=self.rows_total,
                rows_before=self.rows_before,
                stats=self.stats,
                retries=self.retries,
                note=note,
            )
        )
