"""A whole run in this process: the product's runner and stages, without Ray, on a store that can crash under them.

    disk = Disk()
    with in_process(Life(disk, crash_at=17), Graph(seed)):
        jobs.run(job)           # raises Crashed at the 17th request

`Graph` stands in the place of `pipelines.run.stream`. It runs Prepare, Generate and Commit as Ray would, in a seeded
order, and does what Ray may do: shards are run twice, get lost, come back late. A `Life` is one process: after its
crash none of its requests has an effect any more, so that whatever still runs in it leaves no trace, as after SIGKILL.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any, TypeVar
from unittest import mock

import pyarrow as pa

import jobs.lock
import jobs.runner
import pipelines.generate
import pipelines.storage
from jobs.cluster import Reserved
from jobs.spec import JobSpec
from pipelines.advance import Between
from pipelines.commit import Commit
from pipelines.contracts import Shard, Work
from pipelines.generate import Generate
from pipelines.generations import pools_of
from pipelines.kept import KeptIn
from pipelines.part import Footer
from pipelines.prepare import Prepare
from pipelines.run import EngineResources, Outcome
from pipelines.stage import Failure, Parcel
from pipelines.storage_backend import Backend, ObjectInfo, VersionChanged

T = TypeVar("T")


class Crashed(BaseException):
    """The process is gone."""


class Disk:
    """What outlives processes: objects by path, in memory."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.lock = threading.RLock()


class Life:
    """One process's access to a disk. `crash_at`: the request at which it ends, before or `after` its effect."""

    def __init__(self, disk: Disk, crash_at: int | None = None, *, after: bool = False) -> None:
        self.disk = disk
        self.requests = 0
        self.crashed = False
        self._crash_at, self._after = crash_at, after

    def request(self, effect: Callable[[], T]) -> T:
        with self.disk.lock:
            self.requests += 1
            if self.crashed:
                raise Crashed
            if self.requests == self._crash_at:
                self.crashed = True
                if self._after:
                    effect()
                raise Crashed
            return effect()


class DiskBackend:
    """`pipelines.storage_backend.Backend` on a `Disk`, through a `Life`."""

    def __init__(self, life: Life) -> None:
        self._life, self._objects = life, life.disk.objects

    def list(self, folder: str) -> list[ObjectInfo]:
        def find() -> list[ObjectInfo]:
            start = f"{folder}/"
            return [
                described(path.removeprefix(start), data)
                for path, data in sorted(self._objects.items())
                if path.startswith(start)
            ]

        return self._life.request(find)

    def info(self, path: str) -> ObjectInfo:
        return self._life.request(lambda: described(path.rpartition("/")[2], self._there(path)))

    def read(self, path: str) -> tuple[bytes, str]:
        data = self._life.request(lambda: self._there(path))
        return data, version_of(data)

    def read_range(self, path: str, start: int, stop: int, version: str | None) -> bytes:
        data = self._life.request(lambda: self._there(path))
        if version is not None and version_of(data) != version:
            raise VersionChanged(path)
        return data[start:stop]

    def create(self, path: str, data: bytes) -> bool:
        return self._life.request(lambda: self._objects.setdefault(path, data) is data)

    def replace(self, path: str, data: bytes, version: str) -> bool:
        def swap() -> bool:
            if path not in self._objects or version_of(self._objects[path]) != version:
                return False
            self._objects[path] = data
            return True

        return self._life.request(swap)

    def write(self, path: str, data: bytes) -> None:
        self._life.request(lambda: self._objects.__setitem__(path, data))

    def delete(self, path: str, version: str | None) -> bool:
        def remove() -> bool:
            if version is not None and path in self._objects and version_of(self._objects[path]) != version:
                return False
            self._objects.pop(path, None)
            return True

        return self._life.request(remove)

    def is_exclusive(self, path: str) -> bool:
        return True

    def _there(self, path: str) -> bytes:
        if path not in self._objects:
            raise FileNotFoundError(path)
        return self._objects[path]


def version_of(data: bytes) -> str:
    """Equal content has an equal version, as S3's ETag."""
    return hashlib.md5(data).hexdigest()


def described(name: str, data: bytes) -> ObjectInfo:
    return ObjectInfo(name=name, size=len(data), version=version_of(data), modified=0.0)


class Flag:
    """`pipelines.stop.StopFlag` within one process."""

    def __init__(self) -> None:
        self._raised = False

    def set(self, grace_s: float) -> None:
        self._raised = True

    def is_set(self) -> bool:
        return self._raised

    def close(self) -> None:
        pass

    async def wait(self) -> float:
        await asyncio.Event().wait()  # nobody stops these runs
        raise AssertionError("unreachable")


class Graph:
    """The stages over some shards, as Ray might run them; lives as long as the output, over crashes.

    `in_flight`: shards that are generated before one of them is committed.
    """

    def __init__(self, seed: int, in_flight: int = 3, *, faults: bool = True) -> None:
        self.random = Random(seed)
        self.in_flight = in_flight
        self.faults = faults
        self.generated: Counter[str] = Counter()
        """Shard id → how often an engine has answered it."""
        self.repeats = 0
        """Shards that were run once more without need: what Ray does when it loses a result."""
        self._losses = 2
        """How often a shard may still get lost: one that always does is out of attempts some time."""
        self._zombies: list[tuple[Work, pa.Table]] = []
        """Shards that dead drivers' workers had answered and not yet committed."""

    def stream(
        self,
        shards: Sequence[Shard],
        work: Work,
        resources: Sequence[EngineResources],
        flag: Flag,
        pass_: int,
        kept_in: KeptIn,
    ) -> Iterator[Outcome]:
        order = self.random.sample(shards, len(shards))
        if self.faults:
            lost = [shard for shard in order if self._losses and self.random.random() < 0.05]
            self._losses -= min(len(lost), self._losses)
            order = [shard for shard in order if shard not in lost]
            again = [shard for shard in order if self.random.random() < 0.1]
            self.repeats += len(again)
            order += again
        waiting: list[pa.Table] = []
        late: list[Outcome] = []
        try:
            with stages(work, flag) as (prepare, generate, commit):
                for shard in order:
                    self.commit_zombies()
                    batch = generate(
                        prepare(
                            pa.Table.from_pylist(
                                [Parcel.row(shard, **{"pass": pass_, "kept_in": kept_in.get(shard.id, ())})]
                            )
                        )
                    )
                    parcel = Parcel.from_batch(batch)
                    self.generated[shard.id] += parcel.generations is not None
                    waiting.append(batch)
                    if len(waiting) == self.in_flight:
                        late.append(outcome_of(commit(self._one_of(waiting))))
                    while late and self.random.random() < 0.5:
                        yield self._one_of(late)
                while waiting:
                    late.append(outcome_of(commit(self._one_of(waiting))))
        except Crashed:
            self._zombies += [(work, batch) for batch in waiting if self.random.random() < 0.5]
            raise
        while late:
            yield self._one_of(late)

    def commit_zombies(self, *, all_of_them: bool = False) -> None:
        """Some commit what they hold, long after their driver's end."""
        for work, batch in list(self._zombies):
            if all_of_them or self.random.random() < 0.3:
                self._zombies.remove((work, batch))
                Commit(work)(batch)

    def _one_of(self, items: list[T]) -> T:
        return items.pop(self.random.randrange(len(items)))


Stage = Callable[[pa.Table], pa.Table]


@contextlib.contextmanager
def stages(work: Work, flag: Flag) -> Iterator[tuple[Stage, Stage, Stage]]:
    """The product's stages, each as a plain call; the engines of all pools, and what is between them, as one."""
    pools = range(len(pools_of(work)))
    with asyncio.Runner() as runner:
        prepare, commit = Prepare(work, flag), Commit(work)  # type: ignore[arg-type]
        engines = [Generate(work, flag, pool) for pool in pools]  # type: ignore[arg-type]
        betweens = [Between(work, pool) for pool in pools[1:]]

        def generate(batch: pa.Table) -> pa.Table:
            batch = runner.run(engines[0](batch))
            for between, engine in zip(betweens, engines[1:], strict=True):
                batch = runner.run(engine(between(batch)))
            return batch

        try:
            yield prepare, generate, commit
        finally:
            for engine in engines:
                engine._starter.shutdown()


def reserved(spec: JobSpec) -> list[Reserved]:
    """In the place of `jobs.cluster.settle`: there is no cluster."""
    return [Reserved(pool=one.pool, each=EngineResources(num_gpus=0, num_cpus=1)) for one in spec.pools]


def outcome_of(batch: pa.Table) -> Outcome:
    row = batch.to_pylist()[0]
    return Outcome(
        shard_id=row["shard"],
        footer=Footer.from_json(row["footer"], row["shard"]) if row["footer"] else None,
        failure=Failure(**json.loads(row["failure"])) if row["failure"] else None,
    )


@contextlib.contextmanager
def in_process(life: Life, graph: Graph) -> Iterator[None]:
    """`jobs.run` within this life and on this graph."""
    replaced: dict[Any, dict[str, Any]] = {
        pipelines.storage: {"open_backend": lambda *given: backend_of(life)},
        # A later life is a later process: the lock of a crashed one is taken over at once.
        jobs.lock: {"_process_started": lambda pid: str(id(life))},
        # torch would be missing in the rest of this test process
        pipelines.generate: {"do_without_torch": lambda model: None},
        jobs.runner: {
            "stream": graph.stream,
            "connected": lambda cluster: contextlib.nullcontext(),
            "settle": reserved,
            "StopFlag": Flag,
        },
    }
    with contextlib.ExitStack() as patches:
        for module, names in replaced.items():
            patches.enter_context(mock.patch.multiple(module, **names))
        yield


def backend_of(life: Life) -> Backend:
    return DiskBackend(life)
