"""What a job would do: its input listed, cut into shards, and held against what its output already has."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, repeat
from typing import Any

import pyarrow as pa
from rich.console import Group, RenderableType
from rich.markup import escape

from jobs.books import SUCCESS, committed_shards
from jobs.cutting import CPU_TOKENS_PER_S, GPU_TOKENS_PER_S, SHARD_S
from jobs.engines import Engines, engines_of, hardware_here
from jobs.feeding import LEAST
from jobs.fingerprint import fingerprint, identity
from jobs.loading import LoadedJob
from jobs.output import check_claim, claim, read_spec
from jobs.output_schemas import json_columns
from jobs.pinning import described, pinned
from jobs.planning import Plan, extend, load_plan, new_plan, save_plan, summary
from jobs.reuse import reuse_of
from jobs.spec import JobSpec
from jobs.spec_columns import check_against_schema, columns_of_images, needed_columns
from pipelines.code import code_digest, code_path, load_function, user_folders
from pipelines.contracts import InputFile, Work, result_schema
from pipelines.errors import InputError, OutputError, OutputLocked
from pipelines.images import check_folder
from pipelines.listing import list_files
from pipelines.model_folder import check_model, folder_at_hand
from pipelines.schema import conform_all, infer_schema
from pipelines.settings import InputSettings
from pipelines.steps import added_by
from pipelines.storage import Storage
from pipelines.vision import Vision


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A plan that may not be saved yet, and what there is of its output."""

    job: LoadedJob
    """With the revision of its model pinned."""
    storage: Storage
    plan: Plan
    identity: dict[str, Any]
    """What the fingerprint was taken of."""

    @cached_property
    def committed(self) -> frozenset[str]:
        """Ids of the planned shards whose part stands."""
        return frozenset(committed_shards(self.storage, self.plan))

    @cached_property
    def engines(self) -> Engines:
        """The engines that the job would get, as far as that can be told without starting anything."""
        first = self.job.spec.pools[0]
        return engines_of(first, hardware_here(first))

    @cached_property
    def other_engines(self) -> tuple[Engines, ...]:
        """Those of the other pools, in the order in which shards pass through them."""
        return tuple(engines_of(one, hardware_here(one)) for one in self.job.spec.pools[1:])

    @property
    def _added(self) -> list[pa.Schema]:
        """The columns that each step adds."""
        spec = self.job.spec
        prompted = spec.prompt is not None
        answers = result_schema(self.plan.input_schema, spec.output, spec.sampling, prompted=prompted)
        return added_by(answers, spec.steps)

    @cached_property
    def summary(self) -> dict[str, Any]:
        """Shards, rows, bytes and files, as JSON values."""
        return {
            **summary(self.plan),
            "job": self.job.spec.name,
            "output": self.storage.url(),
            "model": described(self.job.pin),
            "committed_shards": len(self.committed),
            "finished": self.storage.exists(SUCCESS),
            "engine": self.engines.to_dict(),
            "other_engines": [engines.to_dict() for engines in self.other_engines],
            "steps": [
                {
                    "name": name,
                    "kind": step.kind,
                    "adds": {column.name: str(column.type) for column in added},
                    **({"by": list(step.dedup.columns), "method": step.dedup.method} if step.dedup else {}),
                }
                for (name, step), added in zip(self.job.spec.named_steps.items(), self._added, strict=True)
            ],
        }

    def save(self) -> Plan:
        """Make the output this job's and store what is new of the plan. Only under the output's lock.

        Raises OutputLocked when the plan was extended since it was proposed.
        """
        stored = load_plan(self.storage)
        if (stored.saved if stored else 0) != self.plan.saved:
            raise OutputLocked(
                f"{self.storage.url()}: another run has extended this plan meanwhile; run again to build on it"
            )
        if self.plan.new_segments:
            # A folder that is being extended is not a whole one.
            self.storage.delete(SUCCESS)
        claim(self.storage, self.job, self.plan.fingerprint, self.identity)
        saved = save_plan(self.storage, self.plan)
        if self.plan.new_segments:
            # Once more: where this process slept in between, another run may have finished the plan as it was.
            self.storage.delete(SUCCESS)
        return saved

    def render(self) -> RenderableType:
        """Lines for the terminal."""
        found = self.summary
        rows = f"{found['rows']:,}" if found["rows"] is not None else f"about {found['rows_estimated']:,}"
        formats = ", ".join(f"{n:,} {name}" for name, n in found["files_by_format"].items())
        largest = found["largest_shard"]
        lines = [
            f"[bold]{found['job']}[/] · spec {found['fingerprint']} → {found['output']}",
            f"input   {formats} files, {rows} rows, {found['bytes'] / 1e6:,.1f} MB to read",
            f"shards  {found['shards']:,}, {found['committed_shards']:,} of them committed"
            + (f", {found['new_shards']:,} new" if found["new_shards"] else ""),
        ]
        if largest and largest["rows"] is not None:
            lines.append(f"        the largest has {largest['rows']:,} rows")
        if found["model"]:
            lines.append(f"model   {escape(found['model'])}")
        if found["superseded_shards"]:
            lines.append(f"        {found['superseded_shards']:,} superseded by changed files")
        for head, line in zip(chain(["engine"], repeat("      ")), self.engines.lines(), strict=False):
            lines.append(f"{head}  {line}")
        for engines in self.other_engines:
            for head, line in zip(chain(["then  "], repeat("      ")), engines.lines(), strict=False):
                lines.append(f"{head}  {line}")
        if found["steps"]:
            lines.append(f"steps   {escape(' → '.join(['answers', *map(_step_words, found['steps'])]))}")
        lines += [f"note    {escape(line)}" for line in json_columns(self.job.spec)]
        if found["finished"] and found["committed_shards"] == found["shards"]:
            lines.append("nothing to do: the job is finished")
        return Group(*lines)


def _step_words(step: dict[str, Any]) -> str:
    """`parse (+ score int64)`, `dedup (by question, exact)`."""
    if step["kind"] == "dedup":
        return f"{step['name']} (by {', '.join(step['by'])}, {step['method']})"
    added = ", ".join(f"{name} {kind}" for name, kind in step["adds"].items())
    return f"{step['name']} (+ {added})" if added else str(step["name"])


def propose(job: LoadedJob, *, relist: bool = True) -> Proposal:
    """Plan a job without writing anything.

    `relist` lists the input and extends an existing plan; without it an existing plan is taken as it is. Raises
    BadInput for whatever is wrong with model, function, input, columns or output.
    """
    storage = Storage(job.spec.output.path, job.spec.output.storage_options)
    for model in job.spec.models.values():  # before a hub or a store is asked for it
        check_model(model)
    job = pinned(job, read_spec(storage))
    spec = job.spec
    covered = checked_identity(job)
    print_ = fingerprint(covered)
    check_claim(storage, print_, covered)
    plan = load_plan(storage)
    if not relist:
        if plan is None:
            raise OutputError(f"{storage.url()} has no plan to resume: use `dray run`")
    else:
        plan = _planned(spec, plan, print_)
    if spec.input.images_folder and (plan.new_segments or not storage.exists(SUCCESS)):
        check_images_folder(spec.input)
    return Proposal(job=job, storage=storage, plan=plan, identity=covered)


def _planned(spec: JobSpec, plan: Plan | None, print_: str) -> Plan:
    """A new plan of the input as it is listed now, or this one and what has come since."""
    known = plan.by_path if plan else {}
    files = list_files(spec.input, needed_columns(spec), known, *columns_of_images(spec))
    if plan is None:
        schema = input_schema(spec, files)
        plan = new_plan(files, schema, print_, **_cutting(spec))
        if not plan.shards:
            raise InputError(f"{spec.input.path}: the input has no rows")
        return plan
    unseen = [file for file in files if file is not known.get(file.path)]
    conform_all(unseen, plan.input_schema, spec.input)
    return extend(plan, files, on_changed=spec.input.on_changed, **_cutting(spec))


def checked_identity(job: LoadedJob) -> dict[str, Any]:
    """What the fingerprint of a job covers. Raises BadInput for a model or a prompt function that is not there, and for images
    that the model does not take."""
    for model in job.spec.models.values():
        check_model(model)
    check_images(job.spec)
    for key, function in job.spec.functions.items():
        load_function(function, own_folders(), key)
    return identity(job, own_folders())


def check_images(spec: JobSpec, *, at_hand: bool = False) -> None:
    """Raise SpecError for images that their model does not take. `at_hand`: only of models that are on this machine; no store and
    no hub is asked."""
    for key, (_, model) in spec.images_columns.items():
        folder = folder_at_hand(model) if at_hand else None
        if folder is not None or not at_hand:
            Vision(model, folder=folder).check(key)


def check_images_folder(settings: InputSettings) -> None:
    """Raise StorageError where no image of any row could be read below `input.images_folder`; one request."""
    if settings.images_folder is not None:
        check_folder(settings.images_folder, settings.storage_options)


def input_schema(spec: JobSpec, files: list[InputFile]) -> pa.Schema:
    """The columns that will be read, checked against everything in the job that names a column."""
    schema = infer_schema(files, spec.input, needed_columns(spec))
    check_against_schema(spec, schema)
    return schema


def work_of(job: LoadedJob, schema: pa.Schema, *, fingerprint: str, run_id: str) -> Work:
    """What the workers need to know of the job."""
    spec = job.spec
    folders = (user_folders(function, own_folders()) for function in spec.functions.values())
    return Work(
        job=spec.name,
        run_id=run_id,
        fingerprint=fingerprint,
        code_digest=code_digest(),
        code_path=code_path(),
        user_modules=tuple(dict.fromkeys(folder for each in folders for folder in each)),
        input=spec.input,
        prompt=spec.prompt,
        model=spec.model,
        sampling=spec.sampling,
        output=spec.output,
        pool=spec.pool,
        errors=spec.errors,
        input_schema=schema,
        steps=spec.steps,
        reuse=reuse_of(job),
        equal_prompts=spec.reuse.equal_prompts,
    )


def own_folders() -> tuple[str, ...]:
    """Where a user's prompt package may lie besides the installed ones: the working directory, after all others."""
    return (os.getcwd(),)


def _cutting(spec: JobSpec) -> dict[str, Any]:
    """How to cut, for `jobs.cutting.cut`: from the pool's size at planning; a saved plan never changes with it."""
    first = spec.pools[0]
    pool = first.pool if first.pool.replicas != "auto" else engines_of(first, hardware_here(first)).pool
    speed = CPU_TOKENS_PER_S if first.pool.device == "cpu" else GPU_TOKENS_PER_S
    return {
        "rows": spec.shards.rows,
        "target_tokens": speed * SHARD_S,
        "output_tokens": (first.sampling.max_tokens or 1024) / 2 * first.sampling.n,
        "feed": pool.most_engines * (LEAST if pool.shards_in_flight == "auto" else pool.shards_in_flight),
    }
