"""Where the answers that a job may reuse are: which parts of earlier outputs can hold them, for each of its shards.

A shard looks where its rows were: in the parts of the same files at the same places. Where a file has grown or shrunk since,
its rows may have moved by as much as it did, and parts that far away are looked at as well. So a job that only edits a
later step, or whose input has grown, finds all that it has asked before, and a shard opens a handful of files, however
many there are. Whether an answer fits is decided by its key alone (`pipelines.kept`).
"""

from __future__ import annotations

import bisect
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from jobs.fingerprint import model_identity
from jobs.loading import LoadedJob
from jobs.planning import Plan, load_plan
from pipelines.contracts import Reuse, Shard, Span, Work
from pipelines.errors import SpecError
from pipelines.kept import KeptIn
from pipelines.settings import SamplingSettings
from pipelines.storage import Storage
from pipelines.task import GENERATE, Task

#: Stands in an output that keeps answers.
KEPT = ".dray/answers/_KEPT"
#: Part of every digest: another form of kept answers is not read as this one.
_FORM = 1


def reuse_of(job: LoadedJob) -> Reuse | None:
    """None for a job that neither keeps answers nor takes any."""
    settings = job.spec.reuse
    keep = bool(settings.outputs) if settings.keep is None else settings.keep
    if not keep and not settings.outputs:
        return None
    asked = [("model", GENERATE, job.spec.sampling)]
    for key, step in job.spec.asking_steps.items():
        asked.append((f"{key}.model" if step.model else "model", step.task, step.asked_sampling))
    models = {key: _content_of(key, job) for key, _, _ in asked}  # once each: folders are read for it
    digests = tuple(_digest(models[key], task, sampling) for key, task, sampling in asked)
    return Reuse(keep=keep, sources=settings.outputs, digests=digests)


def _digest(model: Mapping[str, Any], task: Task, sampling: SamplingSettings) -> str:
    """Of what all requests of a generation have in common: 16 hex digits."""
    hidden = {"max_tokens_column", "params_column"}  # each row's own parameters are in its key
    if sampling.temperature == 0 and sampling.params_column is None:  # else rows may be sampled by it
        hidden.add("seed")
    of = {
        "form": _FORM,
        "model": model,
        "task": asdict(task),
        "sampling": sampling.model_dump(mode="json", exclude=hidden, exclude_none=True),
    }
    # Sorted: what comes from a set stands in another order in each process.
    return hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:16]


def _content_of(key: str, job: LoadedJob) -> dict[str, Any]:
    """The model that stands under `key` in the job file; where a folder lies is not what it holds."""
    identity = model_identity(key, job.spec.models[key], job)
    return {
        name.removeprefix(key): value["sha256"] if isinstance(value, dict) and "sha256" in value else value
        for name, value in identity.items()
    }


def kept_in(work: Work, plan: Plan, shards: Sequence[Shard]) -> KeptIn:
    """Which parts of `reuse.outputs` to look into for these shards of the plan. Raises SpecError for a source without answers."""
    found: dict[str, list[tuple[int, str]]] = {}
    sources = work.reuse.sources if work.reuse else ()
    now = _extents(plan) if sources else {}
    for number, url in enumerate(sources):
        old = _kept_plan(Storage(url, work.output.storage_options), f"reuse.outputs[{number}]")
        before, places = _extents(old), _Places(old)
        for shard in shards:
            names = (
                name
                for span in shard.spans
                for name in places.near(span, abs(now[span.path] - before.get(span.path, 0)))
            )
            found.setdefault(shard.id, []).extend((number, name) for name in dict.fromkeys(names))
    return found


class _Places:
    """The parts of a plan, by the places of their rows."""

    def __init__(self, plan: Plan) -> None:
        by_path: dict[str, list[tuple[int, int, str]]] = {}
        for shard in plan.shards:
            for span in shard.spans:
                by_path.setdefault(span.path, []).append((span.start, span.stop, shard.part_name))
        self._by_path = {path: sorted(spans) for path, spans in by_path.items()}
        self._longest = {
            path: max(stop - start for start, stop, _ in spans) for path, spans in by_path.items()
        }

    def near(self, span: Span, slack: int) -> Iterator[str]:
        """Parts with a row not further than `slack` from the span."""
        spans = self._by_path.get(span.path, [])
        first = bisect.bisect_left(spans, (span.start - slack - self._longest.get(span.path, 0),))
        for start, stop, name in spans[first : bisect.bisect_left(spans, (span.stop + slack,))]:
            if span.start - slack < stop and start < span.stop + slack:
                yield name


def _extents(plan: Plan) -> dict[str, int]:
    """How far each file goes, in its spans' unit."""
    found: dict[str, int] = {}
    for shard in plan.shards:
        for span in shard.spans:
            found[span.path] = max(found.get(span.path, 0), span.stop)
    return found


def _kept_plan(storage: Storage, key: str) -> Plan:
    plan = load_plan(storage)
    if plan is None:
        raise SpecError(f"{key}: {storage.url()} is no output of a Dray job (it has no .dray/ with a plan)")
    if not storage.exists(KEPT):
        raise SpecError(
            f"{key}: {storage.url()} has no kept answers; a job keeps them with reuse.keep: true (or once it has reuse.outputs)"
        )
    return plan
