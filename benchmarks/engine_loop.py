"""Dray's own loop around one engine and nothing else: what the framework costs is told against it.

    python benchmarks/engine_loop.py JOB.yaml RESULT.json ANSWERS.parquet

The shards of a job of Dray's are planned as `dray run` plans them, all read, rendered and tokenised before the engine starts,
and then answered by the code of the engine's actor with as many shards in flight. No Ray, no processes beside it, nothing is
detokenised, and one file of lengths is written after the clock has stopped. RESULT.json is that of `bare_vllm.py`.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jobs.engines import engines_of, hardware_here
from jobs.feeding import fed
from jobs.loading import load
from jobs.proposal import propose, work_of
from pipelines.answering import Answering, Started
from pipelines.contracts import Work
from pipelines.engine import Engine, EngineInfo, open_engine
from pipelines.prepare import Prepare
from pipelines.stage import Parcel


def main(job_file: str, answers: str) -> dict[str, Any]:
    """Answer all shards of the job; one pass with its times."""
    began = time.monotonic()
    job = load(job_file)
    proposal = propose(job)
    job, plan = proposal.job, proposal.plan
    work = work_of(job, plan.input_schema, fingerprint=plan.fingerprint, run_id="loop")
    prepare = Prepare(work)
    parcels = [prepare.shard(Parcel(shard=shard)) for shard in plan.shards]
    prepare_s = time.monotonic() - began
    settled = engines_of(job.spec, hardware_here(job.spec)).pool
    rows = sum(shard.rows or 0 for shard in plan.shards)
    pool = fed(settled, work.model, work.sampling, shards=len(plan.shards), rows=rows)
    assert pool.shards_in_flight != "auto"
    engine = open_engine(work.model, work.sampling, pool)
    done, info, ended_at = asyncio.run(_answered(engine, work, parcels, pool.shards_in_flight))
    _write(done, Path(answers))
    return {
        "phases": {"prepare_s": prepare_s, "engine_start_s": info.start_s},
        "passes": [{"variant": "", "ready_at": info.ready_at, "written_at": ended_at, "output": [answers]}],
    }


async def _answered(
    engine: Engine, work: Work, parcels: list[Parcel], in_flight: int
) -> tuple[list[Parcel], EngineInfo, float]:
    """The shards with their answers, the engine, and the Unix time of the last answer."""
    try:
        info = await engine.start()
        started, numbers = Started.of(engine, info, work), itertools.count()
        places, done = asyncio.Semaphore(in_flight), []

        async def one(place: int, parcel: Parcel) -> None:
            async with places:
                asked = Answering(parcel, work, started, numbers, priority=place)
                await asked.run(asked.answerable)
                done.append(asked.parcel(attempt=1, engine_deaths=0))

        async with asyncio.TaskGroup() as group:
            for place, parcel in enumerate(parcels):
                group.create_task(one(place, parcel))
        return done, info, time.time()
    finally:
        await engine.stop()


def _write(done: list[Parcel], path: Path) -> None:
    """`id`, `generated_text` (empty), `prompt_tokens`, `completion_tokens` of each row: what the sides are held against."""
    tables = []
    for parcel in done:
        assert parcel.prompts is not None
        assert parcel.generations is not None
        asked = parcel.prompts.take(parcel.generations["row"])
        lengths = pc.list_value_length(parcel.generations["token_ids"])
        columns = {"id": asked["row_id"], "generated_text": pc.if_else(pc.is_valid(lengths), "", None)}
        columns |= {"prompt_tokens": pc.list_value_length(asked["token_ids"]), "completion_tokens": lengths}
        tables.append(pa.table(columns))
    pq.write_table(pa.concat_tables(tables), path)


if __name__ == "__main__":
    found = main(sys.argv[1], sys.argv[3])
    Path(sys.argv[2]).write_text(json.dumps(found))
