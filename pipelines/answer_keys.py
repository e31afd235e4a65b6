"""By what a request is told from another: equal keys, equal answers.

A key stands for the prompt's tokens and images, the row's own token limit and, where an answer is the row's own, the row.
What all requests of a generation have in common (model, sampling, task) is in none.
"""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa

from pipelines.contracts import Work
from pipelines.images import digests_of

KEY_BYTES = 16


def answer_keys(prompts: pa.Table, work: Work) -> dict[int, bytes]:
    """Position → key, for each row that has a prompt. `work`: the generation's.

    An answer is the row's own where it is sampled, unless `reuse.equal_prompts` is `all`.
    """
    is_own = work.sampling.temperature != 0 and work.equal_prompts != "all"
    token_ids = prompts["token_ids"].combine_chunks()
    values, ends = token_ids.values.to_numpy(), token_ids.offsets.to_pylist()
    images = prompts["images"].combine_chunks()
    limits, row_ids = prompts["max_tokens"].to_pylist(), prompts["row_id"].to_pylist()
    has_images = images.is_valid().to_numpy(zero_copy_only=False)
    keys: dict[int, bytes] = {}
    for row in np.flatnonzero(token_ids.is_valid()).tolist():
        whose = row_ids[row] if is_own else ""
        digest = hashlib.blake2b(f"{limits[row]}\0{whose}\0".encode(), digest_size=KEY_BYTES)
        digest.update(values[ends[row] : ends[row + 1]].tobytes())
        if has_images[row]:
            digest.update(digests_of(images[row]))
        keys[row] = digest.digest()
    return keys
