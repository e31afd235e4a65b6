"""Near-duplicate texts by MinHash and locality-sensitive hashing, in numpy, with constants of its own.

    text ─► set of word n-grams ─► signature (num_perm minima) ─► band hashes + one byte of each minimum

Two signatures agree in a share of their places that estimates the Jaccard similarity of the two sets. Texts that share
no band are never compared; those that do are compared by the bytes (b-bit minwise hashing, Li and König 2010).
Everything is the same on each machine and in each process: no random generator, no salted hash.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import pyarrow as pa

U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]
Bytes = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

#: A pair at the threshold shares a band at least so often; what it shares it is then compared by.
_RECALL = 0.98
#: n-grams × hash functions in memory at once: 32 MiB of 64-bit values.
_BLOCK = 1 << 22
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
        hashes[inside] = mixed(hashes[inside] * np.uint64(0x9E3779B97F4A7C15) + words[at])
    return mixed(hashes) >> np.uint64(32), counts


def _hash_of(word: str) -> int:
    return int.from_bytes(
        hashlib.blake2b(word.encode(errors="surrogatepass"), digest_size=8).digest(), "little"
    )


def mixed(values: U64) -> U64:
    """Each value's bits spread over all 64 (the finaliser of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@lru_cache
def _functions(num_perm: int) -> tuple[U64, U64]:
    """Factors and addends of the hash functions."""
    numbers = mixed(np.arange(1, 2 * num_perm + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return numbers[:num_perm], numbers[num_perm:]


def band_hashes(found: U32, bands: Bands) -> U32:
    """One 32-bit hash for each band of each signature. Two bands that collide cost a comparison, no more."""
    hashes = np.zeros((len(found), bands.count), np.uint64)
    cut = found[:, : bands.count * bands.rows].reshape(len(found), bands.count, bands.rows)
    for row in range(bands.rows):
        hashes = mixed(hashes * np.uint64(0x9E3779B97F4A7C15) + cut[:, :, row])
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
    dropped = np.zeros(len(low), bool)
    if not len(low):
        return dropped
    # Equal signatures: all but the first go, whatever becomes of that one.
    whole = np.concatenate([low[order], hashes[order].view(np.uint8).reshape(len(low), -1)], axis=1)
    rows = np.ascontiguousarray(whole).view(np.dtype((np.void, whole.shape[1]))).reshape(-1)
    _, first = np.unique(rows, return_index=True)
    del whole, rows
    left = order[np.sort(first)]
    dropped[np.setdiff1d(order, left, assume_unique=True)] = True
    # Of the others, those that share a band with somebody.
    meets = np.zeros(len(left), bool)
    for band in range(hashes.shape[1]):
        _, codes, sizes = np.unique(hashes[left, band], return_inverse=True, return_counts=True)
        meets |= sizes[codes] > 1
    need = places_needed(threshold, low.shape[1])
    kept: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for record in left[meets].tolist():
        keys = list(enumerate(hashes[record].tolist()))
        met = list({other for key in keys for other in kept.get(key, ())})
        if met and int((low[met] == low[record]).sum(axis=1).max()) >= need:
            dropped[record] = True
        else:
            for key in keys:
                kept[key].append(record)
    return dropped
