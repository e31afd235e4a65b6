"""What makes two records duplicates: the keys that they are compared by, and which of them go.

Keys are made where a part is written (`keys_of`), and compared where all of them are at hand (`duplicates`).
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.arrow_types import is_text, plain
from pipelines.hashes import repeated
from pipelines.minhash import band_hashes, bands_for, low_bytes, near_duplicates, signatures, words_of
from pipelines.step_settings import DedupStep

#: Bytes of an exact key: among 10^12 records two different ones have the same key once in 10^14 jobs.
KEY_BYTES = 16
#: Changes with whatever makes other keys of the same records.
_VERSION = 1


def is_comparable(type_: pa.DataType) -> bool:
    """Whether `exact` compares values of a type. Lists and structs have no one form that outlives a Parquet file."""
    type_ = plain(type_)
    is_float = pa.types.is_float32(type_) or pa.types.is_float64(type_)
    kinds = (
        pa.types.is_boolean,
        pa.types.is_integer,
        pa.types.is_decimal,
        pa.types.is_date,
        pa.types.is_timestamp,
    )
    return bool(is_text(type_) or is_float or pa.types.is_null(type_) or any(of(type_) for of in kinds))


def keys_version(step: DedupStep) -> str:
    """Names what keys are made by; keys of another version are to be made anew. Normalising depends on Unicode's."""
    made_by = [_VERSION, unicodedata.unidata_version, step.model_dump(mode="json")]
    return hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:16]


def key_width(step: DedupStep) -> int:
    """Bytes of a record's key."""
    if step.method == "exact":
        return KEY_BYTES
    return 4 * bands_for(step.threshold, step.num_perm).count + step.num_perm


# ── Keys ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def keys_of(good: pa.Table, step: DedupStep) -> npt.NDArray[np.uint8]:
    """`key_width` bytes for each record."""
    if not len(good):
        return np.empty((0, key_width(step)), np.uint8)
    columns = [good[name] for name in step.columns]
    if step.method == "exact":
        hashes = _exact([list(_values(column, step.normalize)) for column in columns])
        return np.frombuffer(b"".join(hashes), np.uint8).reshape(len(good), KEY_BYTES)
    texts = [
        words_of((value or b"").decode(errors="replace")) for value in _values(columns[0], step.normalize)
    ]
    found = signatures(texts, step.ngram, step.num_perm)
    hashes_of_bands = band_hashes(found, bands_for(step.threshold, step.num_perm))
    return np.concatenate([hashes_of_bands.view(np.uint8).reshape(len(good), -1), low_bytes(found)], axis=1)


def _exact(columns: list[list[bytes | None]]) -> Iterator[bytes]:
    for values in zip(*columns, strict=True):
        digest = hashlib.blake2b(digest_size=KEY_BYTES)
        for value in values:
            # With its length, or "ab", "c" would be "a", "bc"; null is no text.
            digest.update(b"-" if value is None else b"%d:" % len(value) + value)
        yield digest.digest()


def _values(column: pa.ChunkedArray, normalize: bool) -> Iterable[bytes | None]:
    """Each value as bytes that are the same before and after a Parquet file, which gives some types back as others."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    type_ = column.type
    if is_text(type_):
        found: list[bytes | None] = column.cast(pa.large_string()).cast(pa.large_binary()).to_pylist()
        return [value and normalized(value) for value in found] if normalize else found
    if pa.types.is_floating(type_):
        column = pc.add(column.cast(pa.float64()), 0.0)  # -0.0 is 0.0
    elif pa.types.is_date(type_):
        column = column.cast(pa.date32())
    elif pa.types.is_timestamp(type_):
        column = column.cast(pa.timestamp(type_.unit))  # UTC, whatever the zone
    texts = column.cast(pa.string())
    if pa.types.is_timestamp(type_):
        # Seconds come back as milliseconds: no zeros at the end of a fraction.
        texts = pc.replace_substring_regex(texts, r"\.?0*$", "") if type_.unit != "s" else texts
    return texts.cast(pa.binary()).to_pylist()  # type: ignore[no-any-return]


def normalized(text: bytes) -> bytes:
    """NFKC, lower case, one blank for each run of white space and none at the ends. What is not UTF-8 stays as it is."""
    words = unicodedata.normalize("NFKC", text.decode(errors="surrogateescape")).lower().split()
    return " ".join(words).encode(errors="surrogateescape")


# ── Verdicts ─────────────────────────────────────────────────────────────────────────────────────────────────────


def duplicates(
    keys: npt.NDArray[np.uint8], rounds: npt.NDArray[np.int32], step: DedupStep
) -> npt.NDArray[np.bool_]:
    """Which records go. Earlier rounds win, and within a round those that stand before; `keys`: in the plan's order.

    A record goes for one that stays. To ask again after some of those that go are gone gives the same others.
    """
    if step.method == "exact":
        halves = keys.view(np.uint64)
        return repeated(halves[:, 0], halves[:, 1], rounds)
    bands = 4 * bands_for(step.threshold, step.num_perm).count
    order = np.argsort(rounds, kind="stable")
    hashes = np.ascontiguousarray(keys[:, :bands]).view(np.uint32)
    return near_duplicates(hashes, keys[:, bands:], order, step.threshold)
