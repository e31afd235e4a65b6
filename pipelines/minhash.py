"""Near-duplicate texts by MinHash and locality-sensitive hashing, in numpy, with constants of its own.

    text ─► set of word n-grams ─► signature (num_perm minima) ─► band hashes + one byte of each minimum

Two signatures agree in a share of their places that estimates the Jaccard similarity of the two sets. Texts that share
no band are never compared; those that do are compared by the bytes (b-bit minwise hashing, Li and König 2010).
Everything is the same on each machine and in each process: no random generator, no salted hash.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.hashes import GOLDEN, U64, Mask, mixed, repeated

U32 = npt.NDArray[np.uint32]
Bytes = npt.NDArray[np.uint8]

#: A pair at the threshold shares a band at least so often; what it shares it is then compared by.
_RECALL = 0.98
#: n-grams × hash functions at once: 512 KiB of 64-bit values, which stay in a core's cache (32 MiB took twice as long).
_BLOCK = 1 << 16
#: The minimum over no n-grams: texts without words are equal to each other and similar to nothing else.
_NOTHING = np.uint32(0xFFFFFFFF)
#: A run of letters and digits; where a script writes no blanks between words, each character (Han, kana).
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")


@dataclass(frozen=True)
class Bands:
    """How a signature is cut: `count` bands of `rows` places each; places beyond them serve the comparison only."""

    count: int
    rows: int


@lru_cache
def bands_for(threshold: float, num_perm: int) -> Bands:
    """The fewest candidates with which a pair at the threshold still meets in `_RECALL` of all cases."""
    for rows in range(num_perm, 1, -1):
        count = num_perm // rows
        if 1 - (1 - threshold**rows) ** count >= _RECALL:
            return Bands(count, rows)
    return Bands(num_perm, 1)


# ── Signatures ───────────────────────────────────────────────────────────────────────────────────────────────────


def words_of(text: str) -> list[str]:
    """The words of a text; where it has none, what stands between its blanks."""
    return _WORD.findall(text) or text.split()


def signatures(texts: Sequence[Sequence[str]], ngram: int, num_perm: int) -> U32:
    """One row of `num_perm` minima for each text, given by its words."""
    found = np.full((len(texts), num_perm), _NOTHING, np.uint32)
    hashes, counts = _ngrams(texts, ngram)
    starts = np.cumsum(counts) - counts
    factors, addends = _functions(num_perm)
    per_block = max(1, _BLOCK // num_perm)
    text = 0
    while text < len(texts):
        # As many whole texts as fit a block, and at least one.
        end = int(np.searchsorted(starts + counts, starts[text] + per_block, "right"))
        end = max(end, text + 1)
        first, last = int(starts[text]), int(starts[end - 1] + counts[end - 1])
        some = np.flatnonzero(counts[text:end])  # reduceat needs a value for each
        if len(some):
            for block in range(first, last, per_block):  # more than one only for a text larger than a block
                stop = min(block + per_block, last)
                # Multiply-add-shift (Dietzfelbinger 1996): pairwise independent, in 64 bits that may overflow.
                values = (hashes[block:stop, None] * factors + addends) >> np.uint64(32)
                heads = np.maximum(starts[text:end][some] - block, 0)
                minima = np.minimum.reduceat(values, heads, axis=0).astype(np.uint32)
                rows = text + some
                found[rows] = np.minimum(found[rows], minima)
        text = end
    return found


def _ngrams(texts: Sequence[Sequence[str]], ngram: int) -> tuple[U64, npt.NDArray[np.int64]]:
    """32-bit hashes of the n-grams of all texts, one after the other, and how many each text has."""
    lengths = np.array([len(words) for words in texts], np.int64)
    if not lengths.sum():
        return np.empty(0, np.uint64), lengths
    encoded = pa.array([word for words in texts for word in words], pa.string()).dictionary_encode()
    distinct = np.array([_hash_of(word) for word in encoded.dictionary.to_pylist()], np.uint64)
    words = distinct[encoded.indices.to_numpy()]
    # n-grams start at each word that has n - 1 behind it; a shorter text has one, of all its words.
    counts = np.where(lengths, np.maximum(lengths - ngram + 1, 1), 0)
    heads = np.arange(counts.sum()) + np.repeat(
        (np.cumsum(lengths) - lengths) - (np.cumsum(counts) - counts), counts
    )
    sizes = np.repeat(np.minimum(lengths, ngram), counts)
    hashes = np.zeros(len(heads), np.uint64)
    for offset in range(min(ngram, int(lengths.max()))):
        inside = offset < sizes
        at = heads[inside] + offset
        hashes[inside] = mixed(hashes[inside] * GOLDEN + words[at])
    return mixed(hashes) >> np.uint64(32), counts


def _hash_of(word: str) -> int:
    return int.from_bytes(
        hashlib.blake2b(word.encode(errors="surrogatepass"), digest_size=8).digest(), "little"
    )


@lru_cache
def _functions(num_perm: int) -> tuple[U64, U64]:
    """Factors and addends of the hash functions."""
    numbers = mixed(np.arange(1, 2 * num_perm + 1, dtype=np.uint64) * GOLDEN)
    return numbers[:num_perm], numbers[num_perm:]


def band_hashes(found: U32, bands: Bands) -> U32:
    """One 32-bit hash for each band of each signature. Two bands that collide cost a comparison, no more."""
    hashes = np.zeros((len(found), bands.count), np.uint64)
    cut = found[:, : bands.count * bands.rows].reshape(len(found), bands.count, bands.rows)
    for row in range(bands.rows):
        hashes = mixed(hashes * GOLDEN + cut[:, :, row])
    return (hashes >> np.uint64(32)).astype(np.uint32)


def low_bytes(found: U32) -> Bytes:
    """What is kept of a signature for comparing: the lowest byte of each minimum."""
    return found.astype(np.uint8)


# ── Who is a duplicate ───────────────────────────────────────────────────────────────────────────────────────────


def places_needed(threshold: float, num_perm: int) -> int:
    """In how many bytes two signatures must agree: the threshold's share, and chance agreements of the others."""
    share = threshold + (1 - threshold) / 256
    return int(np.ceil(share * num_perm - 1e-9))


def near_duplicates(hashes: U32, low: Bytes, order: npt.NDArray[np.int64], threshold: float) -> Mask:
    """Which records are similar to one that is kept and comes before them in `order`.

    A record is compared with those that are kept only. So all that are left are dissimilar, and to take away some of
    the others first changes nothing: what is kept stays the same.
    """
    # Equal signatures: all but the first go, whatever becomes of that one.
    first, second = _digests(hashes, low)
    dropped = np.zeros(len(low), bool)
    dropped[order] = repeated(first[order], second[order])
    left = order[~dropped[order]]
    # Of the others, those that share a band with somebody; who shares a band is in one group.
    groups, meets = _groups(hashes[left])
    left, groups = left[meets], groups[meets]
    # For each group the last record that was kept, and for each record the one before it: chains, and no Python objects.
    last = np.full(int(groups.max(initial=-1)) + 1, -1, np.int32)
    before = np.full(groups.shape, -1, np.int32)
    need = places_needed(threshold, low.shape[1])
    for record in range(len(left)):
        bands = np.flatnonzero(groups[record] >= 0)
        mine = groups[record, bands]
        met, through, similar = last[mine], bands, False
        while len(met) and not similar:
            met, through = met[met >= 0], through[met >= 0]
            if len(met):
                agree = (low[left[met]] == low[left[record]]).sum(axis=1)
                similar = bool(agree.max() >= need)
                met = before[met, through]
        if similar:
            dropped[left[record]] = True
        else:
            before[record, bands] = last[mine]
            last[mine] = record
    return dropped


def _groups(hashes: U32) -> tuple[npt.NDArray[Any], Mask]:
    """For each record and band the number of the group with this hash, -1 where it is alone in it; and who is not always
    alone."""
    groups: npt.NDArray[Any] = np.full(hashes.shape, -1, np.int32 if hashes.size < 2**31 else np.int64)
    count = 0
    for band in range(hashes.shape[1]):
        _, codes, sizes = np.unique(hashes[:, band], return_inverse=True, return_counts=True)
        numbers = np.where(sizes > 1, np.cumsum(sizes > 1) - 1 + count, -1)
        groups[:, band] = numbers[codes]
        count += int((sizes > 1).sum())
    meets: Mask = np.max(groups, axis=1, initial=-1) >= 0
    return groups, meets


def _digests(hashes: U32, low: Bytes) -> tuple[U64, U64]:
    """128 bits for each record's whole key."""
    first, second = np.zeros(len(low), np.uint64), np.ones(len(low), np.uint64)
    for columns in (hashes, low):
        for column in range(columns.shape[1]):
            first = first * GOLDEN + columns[:, column]
            second = mixed(second + columns[:, column])
    return first, second
