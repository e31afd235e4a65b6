"""How many shards an engine works on at once: enough that their waiting requests keep it full.

A shard is done with its longest answer, and the next one comes only then. With few rows in hand the engine empties meanwhile.
SIMULATED, one 7B engine of 512 requests, 4,000 rows of workload W2 (tests/unit/test_feeding.py): 108 s in one shard; with three
in flight 115 s in shards of 512 rows, 139 s in shards of 256 and 185 s in shards of 128; by `auto` 108 s in each of them.
"""

from __future__ import annotations

import math

from pipelines.settings import ModelSettings, PoolSettings, SamplingSettings

#: Rows in hand for each request that an engine runs at once.
ROWS_EACH = 6
LEAST = 3
#: Each shard costs the engine's worker a call and a record on storage.
MOST = 64
#: Requests that an engine runs at once where neither the job nor the model says: `vllm_defaults` on a large GPU.
_REQUESTS = 512


def fed(
    pool: PoolSettings, model: ModelSettings, sampling: SamplingSettings, *, shards: int, rows: int | None
) -> PoolSettings:
    """The pool with a number for `shards_in_flight: auto`.

    Never more than an engine's fair share of the shards: the first engine to be ready would take those of the others.

    Args:
        pool: settled but for this.
        model: of its engines.
        sampling: of their requests.
        shards: that are to be worked on.
        rows: of these shards together that are to be asked; None: not known.
    """
    if pool.shards_in_flight != "auto":
        return pool
    wanted = LEAST
    if rows:
        requests = int(model.engine.get("max_num_seqs") or _REQUESTS) // sampling.n
        wanted = math.ceil(ROWS_EACH * (pool.admission.high or requests) * shards / rows)
    fair = math.ceil(shards / pool.most_engines)
    return pool.model_copy(update={"shards_in_flight": max(LEAST, min(wanted, fair, MOST))})
