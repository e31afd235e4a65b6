"""The seed of one row's sampling."""

from __future__ import annotations

import hashlib


def row_seed(seed: int, row_id: str) -> int:
    """The sampling seed of one row: 63 bits, from the job's seed and the row's identity only."""
    digest = hashlib.blake2b(f"{seed}\0{row_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
