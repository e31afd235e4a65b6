"""By what a request is told from another: equal keys, equal answers.

A key stands for the prompt's tokens and images, the row's own parameters and, where an answer is the row's own, the row.
What all requests of a generation have in common (model, sampling, task) is in none.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache

import numpy as np
import pyarrow as pa

from pipelines.contracts import Work
from pipelines.images import digests_of

KEY_BYTES = 16


def answer_keys(prompts: pa.Table, work: Work) -> dict[int, bytes]:
    """Position → key, for each row that has a prompt. `work`: the generation's.

    An answer is the row's own where it is sampled, unless `reuse.equal_prompts` is `all`.
    """
    is_drawn, shares = drawn(prompts, work), work.equal_prompts == "all"
    token_ids = prompts["token_ids"].combine_chunks()
    values, ends = token_ids.values.to_numpy(), token_ids.offsets.to_pylist()
    images = prompts["images"].combine_chunks()
    limits, row_ids = prompts["max_tokens"].to_pylist(), prompts["row_id"].to_pylist()
    params, seeds = prompts["params"].to_pylist(), prompts["seed"].to_pylist()
    has_images = images.is_valid().to_numpy(zero_copy_only=False)
    keys: dict[int, bytes] = {}
    for row in np.flatnonzero(token_ids.is_valid()).tolist():
        whose = row_ids[row] if is_drawn[row] and not shares else ""
        head = f"{limits[row]}\0{whose}\0"
        seed = seeds[row] if is_drawn[row] else None
        if params[row] is None and seed is None:
            digest = hashlib.blake2b(head.encode(), digest_size=KEY_BYTES)
        else:  # another kind of key, which no tokens can make equal to one of the first
            head += f"{params[row]}\0{seed}\0"
            digest = hashlib.blake2b(head.encode(), digest_size=KEY_BYTES, person=b"params")
        digest.update(values[ends[row] : ends[row + 1]].tobytes())
        if has_images[row]:
            digest.update(digests_of(images[row]))
        keys[row] = digest.digest()
    return keys


def drawn(prompts: pa.Table, work: Work) -> list[bool]:
    """Whether each row's answer is sampled, by its own temperature or the job's."""
    temperature = work.sampling.temperature

    @cache
    def is_drawn(params: str) -> bool:
        return bool(json.loads(params).get("temperature", temperature) != 0)

    if prompts["params"].null_count == len(prompts):
        return [temperature != 0] * len(prompts)
    of_rows = prompts["params"].to_pylist()
    return [temperature != 0 if params is None else is_drawn(params) for params in of_rows]
