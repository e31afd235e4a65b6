"""Answers kept beside an output, so that a later job that asks the same need not ask again: `reuse` in the job file.

    .dray/answers/<digest>-<k>/<part name>      all answers of one generation to one shard

`digest` stands for the model and the sampling settings, `k` counts the generations of a job that share them. Within a file
an answer has the key of its request (`pipelines.answer_keys`). Steps, and how the prompt came about, are in no key: who edits a
later step finds what the earlier ones asked. Files can be deleted at any time.
"""

from __future__ import annotations

import io
import itertools
import logging
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.answer_keys import KEY_BYTES
from pipelines.contracts import GENERATION_SCHEMA, Work
from pipelines.engine import Answer, Sample
from pipelines.generations import Generation, generations_of
from pipelines.stage import Parcel
from pipelines.storage import Storage

_log = logging.getLogger(__name__)

#: Shard id → (index of the source in `contracts.Reuse.sources`, name of a part of it), for parts that may hold answers to it.
KeptIn = Mapping[str, Sequence[tuple[int, str]]]

_ANSWER = [field for field in GENERATION_SCHEMA if field.name not in ("row", "error_code", "error_message")]
KEPT_SCHEMA = pa.schema([pa.field("key", pa.binary(KEY_BYTES), nullable=False), *_ANSWER])


class KeptAnswers:
    """What one generation of a job finds kept, and keeps."""

    def __init__(self, work: Work, generation: Generation) -> None:
        assert work.reuse is not None
        options = work.output.storage_options
        self._own = Storage(work.output.path, options)
        self._sources = [Storage(url, options) for url in work.reuse.sources]
        self._keep = work.reuse.keep
        digests = {one.index: work.reuse.digests[one.index] for one in generations_of(work) if one.asks}
        self._digest = digests[generation.index]
        before = [digest for index, digest in digests.items() if index < generation.index]
        self._k = before.count(self._digest)

    def recall(self, parcel: Parcel, keys: Mapping[int, bytes]) -> dict[int, Answer]:
        """The answers that one generation of a shard finds kept, by the positions of its rows. `keys`: `answer_keys` of its
        prompts. Blocks."""
        wanted: dict[bytes, list[int]] = {}
        for row, key in keys.items():
            wanted.setdefault(key, []).append(row)
        found: dict[int, Answer] = {}
        for storage, part in self._places(parcel):
            for k in itertools.count():
                kept = _read(storage, f"{_folder(self._digest, k)}/{part}") if wanted else None
                if kept is None:
                    break
                for key, answer in _answers(kept, wanted.keys()):
                    found.update(dict.fromkeys(wanted.pop(key, ()), answer))
        return found

    def keep(self, parcel: Parcel, keys: Mapping[int, bytes]) -> None:
        """Write the shard's answers of this generation, by the keys that `recall` was given. Blocks."""
        if not self._keep:
            return
        assert parcel.generations is not None
        answered = parcel.generations.filter(pc.is_null(parcel.generations["error_code"]))
        columns = [answered[field.name] for field in _ANSWER]
        key = pa.array([keys[row] for row in answered["row"].to_pylist()], KEPT_SCHEMA.field("key").type)
        sink = io.BytesIO()
        pq.write_table(pa.table([key, *columns], schema=KEPT_SCHEMA), sink, compression="zstd")
        self._own.write(f"{_folder(self._digest, self._k)}/{parcel.shard.part_name}", sink.getvalue())

    def _places(self, parcel: Parcel) -> Iterator[tuple[Storage, str]]:
        """Where answers to this shard's prompts may be: what an earlier attempt kept, then what the driver has found."""
        if self._keep:
            yield self._own, parcel.shard.part_name
        for source, part in parcel.notes.get("kept_in", ()):
            yield self._sources[source], part


def _folder(digest: str, k: int) -> str:
    return f".dray/answers/{digest}-{k}"


def _read(storage: Storage, name: str) -> pa.Table | None:
    """None where there is no such file; nor is a damaged one any use."""
    try:
        with storage.open_input(name) as file:
            return pq.read_table(file)
    except FileNotFoundError:
        return None
    except pa.ArrowInvalid as error:
        _log.warning("%s is damaged, its answers are asked for again: %s", storage.url(name), error)
        return None


def _answers(kept: pa.Table, wanted: Iterable[bytes]) -> Iterator[tuple[bytes, Answer]]:
    """The answers with these keys; a file has the samples of one answer together, in their order from 0, and an answer for
    each of equal prompts."""
    keys = pa.array(list(wanted), kept.schema.field("key").type)
    rows = kept.filter(pc.is_in(kept["key"], value_set=keys)).to_pylist()
    answers = itertools.accumulate(row["sample_index"] == 0 for row in rows)
    for _, group in itertools.groupby(zip(answers, rows, strict=True), lambda pair: pair[0]):
        samples = [row for _, row in group]
        yield (
            samples[0]["key"],
            Answer(
                samples=[
                    Sample(
                        token_ids=array("i", sample["token_ids"]),
                        text=sample["text"],
                        finish_reason=sample["finish_reason"],
                        logprobs=sample["logprobs"],
                        values=None if sample["values"] is None else np.asarray(sample["values"], np.float32),
                    )
                    for sample in samples
                ],
                cached_tokens=samples[0]["cached_tokens"],
                ttft_s=None,
                image_tokens=samples[0].get("image_tokens") or 0,  # older files have none
            ),
        )
