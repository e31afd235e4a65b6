"""Run the failed rows of a job again, by other settings if given: `dray retry-failed`.

The same driver and the same stages as a run's; what is left to do are parts with failed rows, and their commit is a merge
(`pipelines.merge`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from jobs.books import (
    SUCCESS,
    Books,
    clear_unreferenced_errors,
    each,
    fold,
)
from jobs.fingerprint import explain_difference, fingerprint, steps_of
from jobs.inspect import opened
from jobs.ledger import Ledger, new_run_id
from jobs.loading import LoadedJob
from jobs.lock import OutputLock
from jobs.output import succeed, write_card, write_stats
from jobs.pinning import pinned
from jobs.planning import Plan
from jobs.proposal import check_images_folder, checked_identity, work_of
from jobs.report import Report
from jobs.runner import Driver, Observer, Progress
from jobs.shared_ledger import announcer
from jobs.spec_columns import check_against_schema
from jobs.stopping import StopRequest
from pipelines.attempts import clear_attempts
from pipelines.contracts import Retry, Shard, result_schema
from pipelines.errors import ROW_ERROR_CODES, JobIncomplete, SpecError
from pipelines.part import Footer, Part, read_part
from pipelines.step_settings import dedup_step, step_names
from pipelines.steps import added_by
from pipelines.storage import Storage
from pipelines.wording import unknown


def retry_failed(
    job: LoadedJob,
    *,
    error_codes: Sequence[str] | None = None,
    run_id: str | None = None,
    observer: Observer = lambda progress: None,
    stop: StopRequest | None = None,
) -> Report:
    """Run the failed rows of committed parts again and merge the results into these parts.

    Args:
        job: the output's job, as it was or with other settings for prompt, model, sampling, pool and errors.
        error_codes: only rows that failed with one of these; None: all.
        run_id, observer, stop: as `run` takes them.

    Returns the report of the whole output. Rows that get an answer bear this run's `run_id`; rows that fail again their
    new error. Shards that are not committed yet are left to `dray resume`.

    Raises:
        BadInput: nothing was started: no such output, settings that would change more than answers.
        ErrorBudgetSpent: what was answered is merged, and still more rows than `errors.max_error_rate` have failed (of an
            output without `_SUCCESS`).
        JobIncomplete, EngineStartError, OutputLocked, Interrupted: what was merged stays; another retry goes on.
    """
    codes = None if error_codes is None else tuple(dict.fromkeys(error_codes))
    _check_codes(codes or ())
    run_id = run_id or new_run_id()
    storage = Storage(job.spec.output.path, job.spec.output.storage_options)
    observer(Progress(phase="planning"))
    record, plan = opened(storage)
    job = pinned(job, record)
    identity = checked_identity(job)
    _check_settings(job, record, identity, plan)
    check_against_schema(job.spec, plan.input_schema)
    storage.check_writable()
    with OutputLock(
        storage, run_id, notify=lambda line: observer(Progress(phase="waiting", note=line))
    ) as lock:
        retry = Retry(error_codes=codes, fingerprint=fingerprint(identity))
        with Ledger(storage, run_id, announcer(job, storage)).recorded(
            "retry-failed", fingerprint=retry.fingerprint, error_codes=codes, spec=job.raw
        ) as ended:
            _, plan = opened(storage)  # as it is now that nobody else extends it
            work = work_of(job, plan.input_schema, fingerprint=plan.fingerprint, run_id=run_id)
            books = fold(storage, plan)
            parts = [part for part in books.parts if _matching(part.footer, codes)]
            if parts:
                check_images_folder(job.spec.input)
            rows = sum(_matching(part.footer, codes) for part in parts)
            work = replace(work, retry=retry)
            driver = _RetryDriver(job, storage, plan, work, observer, lock, stop or StopRequest())
            driver.take_on(parts, rows)
            ended.usage = driver.usage
            return driver.to_the_end()


class _RetryDriver(Driver):
    """Passes over the parts that have failed rows, until this run has merged them all."""

    UNDONE = "with failed rows are not merged"
    _accepted = False
    """`_SUCCESS` stood before this retry took it away."""

    def take_on(self, parts: Sequence[Part], rows: int) -> None:
        """What this retry is about; no other part is looked at until the end."""
        self._parts = {part.name: part.footer.shard for part in parts}
        self.shards_total, self.rows_total, self.rows_before = len(parts), rows, 0
        self.done = set()

    def to_the_end(self) -> Report:
        pending = self._pending()
        if pending:
            if dedup_step(self.work.steps) is not None:
                # Until the new answers are compared with those that stand.
                self._accepted = self.storage.exists(SUCCESS)
                self.storage.delete(SUCCESS)
            self._passes(pending)
        else:
            assert self.work.retry is not None
            codes = self.work.retry.error_codes
            of = f" with error_code {' or '.join(codes)}" if codes else ""
            self._tell("finishing", note=f"nothing to retry: no committed row has failed{of}")
        return self._finish(strict=bool(pending))

    def _rows_of(self, pending: Sequence[Shard]) -> int | None:
        # As many as the parts have on average: with 5 failed rows in each, three shards would leave 497 of 512 places empty.
        return math.ceil(len(pending) * (self.rows_total or 0) / self.shards_total)

    def _left(self) -> list[Shard]:
        """Shards whose part has failed rows to retry and does not hold what this run made of them."""
        assert self.work.retry is not None
        codes = self.work.retry.error_codes
        left = []
        for name, footer in each(self._parts, self._footer):
            if footer and _matching(footer, codes) and not footer.retry_by(self.work.run_id):
                left.append(self._parts[name])
        return left

    def _footer(self, name: str) -> Footer | None:
        try:
            return read_part(self.storage, name).footer
        except FileNotFoundError:
            return None  # `_finish` finds it missing

    def _take_footer(self, footer: Footer) -> None:
        # No word from the error window: that rows fail again is no news. The end judges the whole output.
        merged = footer.retry_by(self.work.run_id)
        if merged is not None:
            self._take_origin(merged.provenance)
            self._count(footer.shard, merged.stats)

    def _finish(self, *, strict: bool = True) -> Report:
        """Derived files anew, and `_SUCCESS` if that is due. `strict`: more failed rows than allowed are an error."""
        self._tell("finishing")
        self.lock.check()
        books = fold(self.storage, self.plan)
        if books.complete:
            books = self._without_duplicates(books)
        if not books.complete:
            self.storage.delete(SUCCESS)
        if books.problems:
            raise JobIncomplete(
                f"the output's books do not agree: {books.problems[0]} (`dray verify` lists all)"
            )
        self.lock.check()
        accepted = self.storage.exists(SUCCESS)
        # Fewer rows have failed than before: an output that was accepted, by whatever budget, stays so.
        within = books.complete and (
            accepted or self._accepted or books.totals.error_rate <= self.work.errors.max_error_rate
        )
        self._clear(books)
        write_stats(self.storage, books)
        report = self._report(books, succeeded=within)
        write_card(self.storage, books, report)
        if books.missing:
            self._tell(
                "done", note=f"{len(books.missing):,} shards are not committed yet: `dray resume` runs them"
            )
            return report
        if within and not accepted:
            self.lock.confirm()
            succeed(self.storage, report)
        if not within and strict:
            self.budget.check_total(books.totals, (part.footer for part in books.parts))
        self._tell("done")
        return report

    def _clear(self, books: Books) -> None:
        if books.complete:
            clear_unreferenced_errors(self.storage, self.plan, books)
            clear_attempts(self.storage)
        else:
            clear_attempts(self.storage, self.work.run_id)  # the first run's still count


def _matching(footer: Footer, codes: Sequence[str] | None) -> int:
    """Failed rows of a part that a retry is about."""
    return sum(n for code, n in footer.stats.error_codes.items() if codes is None or code in codes)


# ── What a retry may be asked ────────────────────────────────────────────────────────────────────────────────────


def parse_where(conditions: Sequence[str]) -> tuple[str, ...] | None:
    """Error codes of `error_code=CODE[,CODE…]`; None for no condition. Raises SpecError."""
    codes: list[str] = []
    for condition in conditions:
        column, equals, values = condition.partition("=")
        names = [name.strip() for name in values.split(",")]
        if column.strip() != "error_code" or not equals or not all(names):
            raise SpecError(f"--where: expected error_code=CODE[,CODE…], got {condition[:60]!r}")
        codes += names
    _check_codes(codes)
    return tuple(dict.fromkeys(codes)) if conditions else None


def _check_codes(codes: Sequence[str]) -> None:
    for code in codes:
        if code not in ROW_ERROR_CODES:
            raise SpecError(f"--where: {unknown(code, ROW_ERROR_CODES, 'error_code')}")


def _check_settings(job: LoadedJob, record: dict[str, Any], identity: dict[str, Any], plan: Plan) -> None:
    """Raise SpecError for settings that change which rows there are, or what stands beside the answers."""
    before = record["identity"]
    frozen = {
        key: (before.get(key), identity.get(key))
        for key in sorted({*before, *identity})
        if key.startswith(("input.", "output."))
    }
    # More or fewer alternatives, or another parser, fit the column that is there; a column cannot come or go.
    for key in ("sampling.logprobs", "sampling.reasoning_parser", "sampling.tool_call_parser"):
        if (key in before) != (key in identity):
            frozen[key] = (before.get(key), identity.get(key))
    frozen["steps.dedup"] = (_dedup_of(before), _dedup_of(identity))
    frozen["steps.explode, steps.gather"] = (_lists_of(before), _lists_of(identity))
    spec, prompted = job.spec, job.spec.prompt is not None
    answers = result_schema(plan.input_schema, spec.output, spec.sampling, prompted=prompted)
    frozen["columns of steps"] = (_step_columns(before, answers), _step_columns(identity, answers))
    # What a plan was made from is not in the identity.
    for section, key, default in (("input", "path", None), ("shards", "rows", "auto")):
        values = [(tree.get(section) or {}).get(key, default) for tree in (record["spec"], job.raw)]
        frozen[f"{section}.{key}"] = (values[0], values[1])
    changed = explain_difference(
        {key: old for key, (old, _) in frozen.items()}, {key: new for key, (_, new) in frozen.items()}
    )
    if changed:
        raise SpecError(
            f"{'; '.join(changed)}: a retry may change prompt, model, sampling, pool and errors, not what is read or how "
            "it is written; run a job with a new output.path for that"
        )


def _dedup_of(identity: dict[str, Any]) -> dict[str, Any] | None:
    """What duplicates are in all of an output, and under which name they are counted."""
    steps = steps_of(identity)
    step = dedup_step(steps)
    return None if step is None else {"name": step_names(steps)[-1], **step.model_dump(mode="json")}


def _lists_of(identity: dict[str, Any]) -> list[dict[str, Any]]:
    """Which rows there are."""
    steps = (step.explode or step.gather for step in steps_of(identity))
    return [{type(step).__name__: step.model_dump(mode="json")} for step in steps if step is not None]


def _step_columns(identity: dict[str, Any], answers: pa.Schema) -> list[str]:
    added = added_by(answers, steps_of(identity))
    return [f"{column.name} {column.type}" for columns in added for column in columns]
