"""Run a job: plan, stream the pending shards through Ray, reconcile, finish. Resuming is running again."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from jobs.books import (
    SUCCESS,
    Books,
    clear_superseded,
    clear_unreferenced_errors,
    committed_shards,
    fold,
)
from jobs.cluster import connected, engine_resources
from jobs.ledger import Ledger, new_run_id, read_runs
from jobs.loading import LoadedJob
from jobs.lock import OutputLock
from jobs.output import succeed, write_card, write_stats
from jobs.planning import Plan
from jobs.proposal import propose, work_of
from jobs.report import Report, make_report
from pipelines.contracts import Shard, ShardStats, Work
from pipelines.errors import DrayError, ErrorBudgetSpent, Interrupted, JobIncomplete
from pipelines.run import EngineResources, Outcome, stream
from pipelines.stage import Failure
from pipelines.storage import Storage

log = logging.getLogger("dray")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is; sent to the observer after each change."""

    phase: str
    """`planning`, `waiting` (for the output's lock), `starting`, `running`, `finishing` or `done`."""
    shards_total: int = 0
    shards_done: int = 0
    """Committed shards, those of earlier runs included."""
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
) -> Report:
    """Run a job to its end and return its report.

    Args:
        job: what `load` returned.
        run_id: names the run in the ledger and in its rows; a new one by default.
        observer: called with the progress, from this thread.
        relist: list the input again and extend the plan (`dray run`); False takes the plan as it is (`dray resume`).

    Raises:
        BadInput: nothing was started.
        ErrorBudgetSpent, JobIncomplete, EngineStartError, OutputLocked, Interrupted: committed shards stay; running
            again takes up the rest.
    """
    run_id = run_id or new_run_id()
    storage = Storage(job.spec.output.path, job.spec.output.storage_options)
    observer(Progress(phase="planning"))
    proposal = propose(job, relist=relist)
    if not storage.check_writable():
        log.warning(
            "%s: this store ignores conditional writes; two drivers started at once may repeat work",
            storage.url(),
        )
    with OutputLock(
        storage, run_id, notify=lambda line: observer(Progress(phase="waiting", note=line))
    ) as lock:
        plan = proposal.save()
        ledger = Ledger(storage, run_id)
        ledger.started(fingerprint=plan.fingerprint, shards=len(plan.shards), spec=job.raw)
        state, message = "failed", ""
        try:
            work = work_of(job, plan.input_schema, fingerprint=plan.fingerprint, run_id=run_id)
            driver = _Run(job, storage, plan, work, observer, lock)
            report = driver.to_the_end()
            state = "succeeded"
            return report
        except (KeyboardInterrupt, Interrupted):
            state, message = "interrupted", "stopped by the user or the system"
            raise Interrupted(
                f"stopped; committed shards are kept in {storage.url('')}: run the same command again to take up the rest"
            ) from None
        except DrayError as error:
            message = str(error)
            raise
        finally:
            ledger.append("ended", state=state, message=message)


class _Run:
    """One driver's pass over one output, under its lock."""

    def __init__(
        self, job: LoadedJob, storage: Storage, plan: Plan, work: Work, observer: Observer, lock: OutputLock
    ) -> None:
        self.job, self.storage, self.plan, self.work, self.lock = job, storage, plan, work, lock
        self.observer = observer
        self.attempts: Counter[str] = Counter()
        self.failures: dict[str, Failure] = {}
        self.stats = ShardStats(shards=0)
        self.retries = 0
        committed = committed_shards(storage, plan)
        self.done = len(committed)
        rows = [shard.rows for shard in plan.shards]
        self.rows_total = None if None in rows else sum(n for n in rows if n is not None)
        self.rows_before = sum(shard.rows or 0 for shard in plan.shards if shard.id in committed)

    def to_the_end(self) -> Report:
        pending = self._pending()
        if not pending and self.storage.exists(SUCCESS):
            self._tell("done", note=f"nothing to do: all {len(self.plan.shards):,} shards are committed")
            return self._report(fold(self.storage, self.plan), succeeded=True)
        self.storage.delete(SUCCESS)
        if pending:
            self._tell("starting")
            with connected(self.job.spec.cluster):
                resources = engine_resources(self.job.spec)
                while pending:
                    for together in self._groups(pending):
                        self._attempt(together, resources)
                    pending = self._pending()
        return self._finish()

    def _pending(self) -> list[Shard]:
        """Planned shards without a part, by a fresh listing. Raises JobIncomplete when one is out of attempts."""
        committed = committed_shards(self.storage, self.plan)
        pending = [shard for shard in self.plan.shards if shard.id not in committed]
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
                f"{len(spent)} of {len(self.plan.shards)} shards have no part after {limit} attempts; "
                f"the first is {spent[0].part_name} ({why}). Committed shards are kept: run again to try the rest"
            )
        return pending

    def _groups(self, pending: list[Shard]) -> list[list[Shard]]:
        """What to run together: a shard whose engine died under it runs alone, and last, lest it take others along."""
        suspects = [s for s in pending if s.id in self.failures and self.failures[s.id].kind == "EngineDied"]
        others = [shard for shard in pending if shard not in suspects]
        return [group for group in (others, *([shard] for shard in suspects)) if group]

    def _attempt(self, pending: list[Shard], resources: EngineResources) -> None:
        import ray.exceptions

        before = self.done
        heard: set[str] = set()
        try:
            for outcome in stream(pending, self.attempts, self.work, resources):
                self.lock.check()
                heard.add(outcome.shard_id)
                self._take(outcome)
        except ray.exceptions.RayError as error:
            # The listing afterwards tells what is missing; Ray's own verdict on a shard is not trusted.
            log.warning("Ray ended the stream: %s", error)
            for shard in pending:
                self.failures.setdefault(shard.id, Failure.of("generate", error))
        if self.done == before:
            # Without progress, silence counts as a failed attempt, or a stream that breaks would be tried for ever.
            self.attempts.update(shard.id for shard in pending if shard.id not in heard)

    def _take(self, outcome: Outcome) -> None:
        if outcome.footer is not None:
            self.stats += outcome.footer.stats
            self.done += 1
            self._check_budget_early()
        elif outcome.failure is not None:
            failure = outcome.failure
            log.warning(
                "shard %s: %s failed: %s\n%s", outcome.shard_id, failure.stage, failure.message, failure.trace
            )
            # One engine of a pool that works already may fail to start: a bad node is not the job's end.
            if failure.scope == "job" and not (failure.kind == "EngineStartError" and self.stats.shards):
                raise failure.to_error()
            self.attempts[outcome.shard_id] += 1
            self.failures[outcome.shard_id] = failure
            self.retries += 1
        self._tell("running")

    def _check_budget_early(self) -> None:
        """Stop as soon as the failed rows exceed what the whole job may have."""
        total = self.rows_total
        if total and self.stats.rows_failed > self.work.errors.max_error_rate * total:
            raise self._over_budget(self.stats, total)

    def _finish(self) -> Report:
        self._tell("finishing")
        self.lock.check()
        clear_superseded(self.storage, self.plan)
        books = fold(self.storage, self.plan)
        if not books.complete:
            problem = books.problems[0] if books.problems else f"{books.missing[0].part_name} is gone"
            raise JobIncomplete(f"the output's books do not agree: {problem} (`dray verify` lists all)")
        self.lock.check()
        clear_unreferenced_errors(self.storage, books)
        succeeded = books.totals.error_rate <= self.work.errors.max_error_rate
        write_stats(self.storage, books)
        report = self._report(books, succeeded=succeeded)
        write_card(self.storage, report)
        if not succeeded:
            raise self._over_budget(books.totals, books.totals.rows_in)
        succeed(self.storage, report)
        self._tell("done")
        return report

    def _report(self, books: Books, *, succeeded: bool) -> Report:
        return make_report(
            job=self.job.spec.name,
            output=self.storage.url(),
            fingerprint=self.plan.fingerprint,
            books=books,
            runs=read_runs(self.storage),
            succeeded=succeeded,
            max_error_rate=self.work.errors.max_error_rate,
        )

    def _over_budget(self, stats: ShardStats, total: int) -> ErrorBudgetSpent:
        common = sorted(stats.error_codes.items(), key=lambda item: -item[1])[:3]
        rate = stats.rows_failed / total
        enough = math.ceil(rate * 1000) / 1000
        return ErrorBudgetSpent(
            f"{stats.rows_failed:,} of {total:,} rows failed ({rate:.2%}), errors.max_error_rate is "
            f"{self.work.errors.max_error_rate:.2%}: {', '.join(f'{code} {n:,}' for code, n in common)}. Committed rows "
            f"are kept in {self.storage.url('')}; see their error_message, then run again with "
            f"errors.max_error_rate={enough:g} or more to accept them"
        )

    def _tell(self, phase: str, note: str = "") -> None:
        self.observer(
            Progress(
                phase=phase,
                shards_total=len(self.plan.shards),
                shards_done=self.done,
                rows_total=self.rows_total,
                rows_before=self.rows_before,
                stats=self.stats,
                retries=self.retries,
                note=note,
            )
        )
