"""The keys of a part's records, kept beside the part, so that a driver need not read the texts again.

`.dray/dedup/keys/<part>-<digest>.arrow` is written before the part. It is named by the digest of the part's rows: an
attempt that comes second cannot leave its own keys for the part that stands. It is a copy that may be missing or
damaged: `read_keys` makes it anew from the part.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.dedup import key_width, keys_of, keys_version
from pipelines.errors import PartDamaged
from pipelines.part import Footer, Part, part_of, raise_if_damaged
from pipelines.step_settings import DedupStep, StepSettings, dedup_step
from pipelines.storage import Storage

KEYS = ".dray/dedup/keys"
_MADE_BY, _DIGEST = b"dray.keys", b"dray.digest"


@dataclass(frozen=True)
class Keys:
    """The records of a part that have not failed, in their order."""

    keys: npt.NDArray[np.uint8]
    """One row of `key_width` bytes for each record."""
    runs: tuple[str, ...]
    """Runs that have answered some of them."""
    run: npt.NDArray[np.int32]
    """For each record which of `runs` has."""


def good_records(rows: pa.Table) -> pa.Table:
    """The rows of a part that have not failed, in their order."""
    return rows.filter(pc.is_null(rows["error_code"]))


def make_keys(rows: pa.Table, step: DedupStep) -> Keys:
    """The keys of a part's rows; failed ones have none. Columns needed: those of the step, `error_code`, `run_id`."""
    good = good_records(rows)
    runs = good["run_id"].combine_chunks().dictionary_encode()
    return Keys(keys_of(good, step), tuple(runs.dictionary.to_pylist()), runs.indices.to_numpy())


def columns_needed(step: DedupStep) -> list[str]:
    return list(dict.fromkeys((*step.columns, "error_code", "run_id")))


def keys_name(footer: Footer) -> str:
    """The object that holds the keys of a part."""
    assert footer.digest is not None  # parts have had one for longer than there is dedup
    return f"{KEYS}/{footer.shard.part_name.removesuffix('.parquet')}-{footer.digest[:16]}.arrow"


def keep_keys(storage: Storage, rows: pa.Table, footer: Footer, steps: Sequence[StepSettings]) -> None:
    """Write the keys of a part that is about to be put; nothing where the job has no `dedup`."""
    step = dedup_step(steps)
    if step is not None and footer.stats.samples:
        storage.write(keys_name(footer), _packed(make_keys(rows, step), step))


def read_keys(storage: Storage, part: Part, step: DedupStep) -> Keys | None:
    """The keys of a part, made anew and kept where they are not to be had; None when the part has changed since it was
    listed. Raises PartDamaged, FileNotFoundError."""
    if not part.footer.stats.samples:
        return Keys(np.empty((0, key_width(step)), np.uint8), (), np.empty(0, np.int32))
    name = keys_name(part.footer)
    found = storage.read_versioned(name)
    keys = None if found is None else _unpacked(found[0], step)
    if keys is not None and len(keys.keys) == part.footer.stats.samples:
        return keys
    keys = keys_from_part(storage, part, step)
    if keys is not None:
        storage.write(name, _packed(keys, step))
    return keys


def keys_from_part(storage: Storage, part: Part, step: DedupStep) -> Keys | None:
    """The keys of a part from its rows. As `read_keys`."""
    where = storage.url(f"data/{part.name}")
    try:
        with storage.open_input(f"data/{part.name}") as file:
            if part_of(file, part.name, where).footer.digest != part.footer.digest:
                return None
            with pq.ParquetFile(file) as parquet:
                return make_keys(parquet.read(columns_needed(step)), step)
    except KeyError as error:
        raise PartDamaged(f"{where} is damaged: it has no column {error}") from error
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise_if_damaged(error, where)
        raise


def _packed(keys: Keys, step: DedupStep) -> bytes:
    width = key_width(step)
    column = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(width), len(keys.keys), [None, pa.py_buffer(np.ascontiguousarray(keys.keys))]
    )
    runs = pa.DictionaryArray.from_arrays(pa.array(keys.run, pa.int32()), pa.array(keys.runs, pa.string()))
    table = pa.table({"key": column, "run_id": runs}).replace_schema_metadata(
        {_MADE_BY: keys_version(step), _DIGEST: _digest(keys)}
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _unpacked(data: bytes, step: DedupStep) -> Keys | None:
    """None for keys that are damaged or were made by another version."""
    try:
        with pa.ipc.open_file(pa.BufferReader(data)) as reader:
            table = reader.read_all().combine_chunks()
        told = table.schema.metadata or {}
        if told.get(_MADE_BY) != keys_version(step).encode() or not len(table):
            return None
        column, runs = table["key"].chunk(0), table["run_id"].chunk(0)
        found = Keys(
            np.frombuffer(column.buffers()[1], np.uint8, len(table) * key_width(step)).reshape(
                len(table), -1
            ),
            tuple(runs.dictionary.to_pylist()),
            runs.indices.to_numpy(),
        )
    except (pa.ArrowException, OSError, KeyError, ValueError, UnicodeDecodeError):
        return None
    return found if told.get(_DIGEST) == _digest(found).encode() else None


def _digest(keys: Keys) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(keys.keys).data)
    digest.update(np.ascontiguousarray(keys.run, np.int32).data)
    digest.update("\0".join(keys.runs).encode())
    return digest.hexdigest()
