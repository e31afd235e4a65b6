"""The whole Ray graph: shards in, one outcome per shard out."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import ray
import ray.data

from pipelines.advance import Between
from pipelines.commit import Commit
from pipelines.contracts import Shard, Work
from pipelines.generate import Generate
from pipelines.generations import pools_of
from pipelines.kept import KeptIn
from pipelines.part import Footer
from pipelines.prepare import Prepare
from pipelines.shared_answers import is_shared_by_engines, shelf_beside_driver
from pipelines.stage import Failure, Parcel
from pipelines.stop import StopFlag


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How one attempt at a shard ended: with a footer, or with a failure."""

    shard_id: str
    footer: Footer | None
    failure: Failure | None


@dataclass(frozen=True, kw_only=True)
class EngineResources:
    """What Ray reserves for one engine actor."""

    num_gpus: float
    num_cpus: float

    def fit(self, node: Mapping[str, float]) -> bool:
        """Whether a node with these resources of Ray's can hold one engine."""
        return node.get("GPU", 0) >= self.num_gpus and node.get("CPU", 0) >= self.num_cpus


def stream(
    shards: Sequence[Shard],
    work: Work,
    resources: Sequence[EngineResources],
    stop: StopFlag,
    pass_: int,
    kept_in: KeptIn = MappingProxyType({}),
) -> Iterator[Outcome]:
    """Run shards through prepare → generate → commit on the connected Ray cluster; outcomes as they come.

    `resources`: for each of `generations.pools_of(work)`; between two pools is a stage of its own (`advance.Between`).
    `pass_`: how often this run has called here before; within one pass only Ray repeats a shard (`attempts`). Once
    `stop` is set, shards come back with the failure `Stopped`. The largest shards go first, so that the tail is short.
    `kept_in`: where `pipelines.kept` is to look. A shard without an outcome is the caller's to notice.
    """
    _configure(work)
    largest_first = sorted(shards, key=lambda shard: (-(shard.rows or 0), -shard.bytes, shard.ordinal))
    # One row per block, or Ray packs rows together: several shards in one call, delivered at its end.
    dataset: ray.data.Dataset = ray.data.from_items(
        [
            Parcel.row(shard, **{"pass": pass_, "kept_in": kept_in.get(shard.id, ())})
            for shard in largest_first
        ],
        override_num_blocks=len(shards),
    )
    each: dict[str, Any] = {
        "batch_size": 1,
        "batch_format": "pyarrow",
        "fn_constructor_kwargs": {"own_process": True},
    }
    beside: dict[str, Any] = {**each, "compute": _beside(work)}
    dataset = dataset.map_batches(Prepare, num_cpus=PREPARE_CPUS, fn_constructor_args=[work, stop], **beside)
    with shelf_beside_driver(work) as shelf:
        for number, (pool, need) in enumerate(zip(pools_of(work), resources, strict=True)):
            if number:
                dataset = dataset.map_batches(
                    Between, num_cpus=COMMIT_CPUS, fn_constructor_args=[work, number], **beside
                )
            dataset = dataset.map_batches(
                Generate,
                compute=_engines(pool[0].work),
                num_gpus=need.num_gpus or None,
                num_cpus=need.num_cpus,
                fn_constructor_args=[work, stop, number, shelf if is_shared_by_engines(pool) else None],
                **each,
            )
        outcomes = dataset.map_batches(Commit, num_cpus=COMMIT_CPUS, fn_constructor_args=[work], **beside)
        for row in outcomes.iter_rows():
            yield Outcome(
                shard_id=row["shard"],
                footer=Footer.from_json(row["footer"], row["shard"]) if row["footer"] else None,
                failure=Failure(**json.loads(row["failure"])) if row["failure"] else None,
            )


#: Commits must find a place while reads are waiting, or prepared shards fill the object store.
PREPARE_CPUS = 0.5
COMMIT_CPUS = 0.1


def _engines(work: Work) -> ray.data.ActorPoolStrategy:
    """The pool of engines. An elastic one keeps a shard waiting at each engine: how Ray sees that there is more work."""
    pool, in_flight = work.pool, _in_flight(work)
    return ray.data.ActorPoolStrategy(
        min_size=pool.least_engines,
        max_size=pool.most_engines,
        max_concurrent_calls_per_actor=in_flight,
        max_tasks_in_flight_per_actor=in_flight + _is_elastic(work),
    )


def _in_flight(work: Work) -> int:
    """Shards that an engine works on at once; `auto` is a number by now (`jobs.feeding`)."""
    assert work.pool.shards_in_flight != "auto"
    return work.pool.shards_in_flight


def _is_elastic(work: Work) -> bool:
    return work.pool.least_engines < work.pool.most_engines


def _beside(work: Work) -> ray.data.ActorPoolStrategy:
    """Actors for the stages around the engines: one, and up to one per engine where that is not enough.

    Not tasks: Ray ends idle task workers after a second, and each new one loads its tokenizer again (3 s of CPU).
    """
    return ray.data.ActorPoolStrategy(min_size=1, max_size=work.pool.most_engines)


def _configure(work: Work) -> None:
    """Settings that must stand before the dataset is built; see ARCHITECTURE.md."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.verbose_progress = False
    # A shard may take hours on a large model; Ray's own limit of 30 minutes without a finished block would end the job.
    context.execution_no_progress_timeout_s = -1
    # An engine actor that dies while it starts (a lost node) is replaced; a model that cannot load is no death.
    context.max_consecutive_actor_init_deaths = 3
    if _is_elastic(work):
        # One engine more when each has its shards and one that waits; Ray's own 175 % of them is never reached. One
        # less, of those that have nothing to do, when half of their places are empty or no shard waits any more.
        in_flight = _in_flight(work)
        context.autoscaling_config.actor_pool_util_upscaling_threshold = (in_flight + 1) / in_flight
    logging.getLogger("ray.data").setLevel(logging.ERROR)
