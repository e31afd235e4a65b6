"""An OpenAI batch file as an ordinary job: `dray run-batch`, and whoever else takes such files.

    batch.jsonl ─ `convert` ─► <folder>/requests.parquet   custom_id, the prompt, what lines have of their own
                               <folder>/job.yaml           extends the user's; what all lines share
                               <folder>/batch.json         of which file this was made, and what it says
    jobs.run ────────────────► <folder>/out ─ `jobs.openai_results` ─► results.jsonl

The file is read once, line by line, and checked as a whole before anything is written. Called again with the same file
`convert` leaves `requests.parquet` as it is: a job refuses input that has changed, even if only its date has.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.loading import LoadedJob, load
from jobs.openai_body import ENDPOINTS
from jobs.openai_job import (
    OUT,
    PARAMS,
    REQUESTS,
    Facts,
    as_yaml,
    check_against_lines,
    given_by,
    job_settings,
    limits_of,
)
from jobs.openai_lines import Lines, Request
from pipelines.errors import InputError, SpecError
from pipelines.storage import Storage, locate

JOB, FACTS = "job.yaml", "batch.json"
#: A row group is written when it has so many rows, or bytes of text.
_GROUP_ROWS, _GROUP_BYTES = 4096, 16 << 20
_READ_BYTES = 8 << 20


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A batch file that has become a job."""

    endpoint: str
    """The `url` of all lines."""
    requests: int
    job_file: str
    """Path or URL of the job file; `load` is for those at a URL, too."""
    out: str
    """Path or URL of the job's output."""
    model: str | None
    """What the bodies call the model; None where they name none."""
    encoding_format: str
    """Of embeddings: `float` or `base64`."""
    settings: dict[str, Any] = field(repr=False)
    """What stands in the job file."""

    def load(self) -> LoadedJob:
        """The job. Raises SpecError for what is wrong with it as a whole."""
        return load(self.settings if "://" in self.job_file else self.job_file)


def convert(
    source: str,
    folder: str,
    *,
    extends: str | None = None,
    model: str | None = None,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    storage_options: Mapping[str, Any] | None = None,
) -> Batch:
    """Make the batch file at `source` (a path or an fsspec URL) a job in `folder`, or find that it is one already.

    `extends`: a job file with model, engine, pool, cluster and whatever else is not the batch file's to say; `model` takes the
    place of its `model.source`; `overrides` as for `load`. `storage_options` are for `source`, by default
    `input.storage_options` of the job; `folder` is reached with its `output.storage_options`.

    Raises BatchMistakes for what is wrong with lines, SpecError for the rest: no model, a key that the lines say already, a
    folder that another file was converted to. The same arguments make the same files, to the byte.
    """
    given = given_by(extends, model, overrides)
    target = Storage(folder, given.storage_options("output"))
    options = given.storage_options("input") if storage_options is None else storage_options
    place, name = locate(source, options)
    facts = _stored(target)
    if facts is None:
        facts = _converted(place, name, target, limits_of(given))
    elif _digest(place, name) != facts.sha256:
        raise SpecError(
            f"{target.url()} holds the requests of {facts.source} as it was, and {place.url(name)} has other content: "
            "choose another output file or work folder, or delete that folder"
        )
    check_against_lines(given, facts)
    settings = job_settings(given, facts, target)
    target.write(JOB, as_yaml(settings).encode())
    return Batch(
        endpoint=facts.endpoint,
        requests=facts.requests,
        job_file=target.url(JOB),
        out=target.url(OUT),
        model=facts.model,
        encoding_format=facts.shared.get("encoding_format", "float"),
        settings=settings,
    )


# ── The batch file ───────────────────────────────────────────────────────────────────────────────────────────────


def _stored(target: Storage) -> Facts | None:
    found = target.read_versioned(FACTS)
    return None if found is None else Facts(**json.loads(found[0]))


class _Source:
    """The lines of the file, and the digest of what was read."""

    def __init__(self, place: Storage, name: str) -> None:
        self._place, self._name = place, name
        self._digest = hashlib.sha256()

    def __iter__(self) -> Iterator[bytes]:
        try:
            raw = cast(io.RawIOBase, self._place.open_input(self._name))
            with io.BufferedReader(raw, _READ_BYTES) as file:
                for line in file:
                    self._digest.update(line)
                    yield line
        except (FileNotFoundError, IsADirectoryError):
            raise InputError(f"{self._place.url(self._name)}: no such file") from None

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


def _digest(place: Storage, name: str) -> str:
    source = _Source(place, name)
    for _ in source:
        pass
    return source.sha256


def _converted(place: Storage, name: str, target: Storage, limits: Mapping[str, int | None]) -> Facts:
    """Read and check the file, and write what is made of it: the facts last, so that they say that all is there."""
    source, lines = _Source(place, name), Lines(place.url(name), limits)
    with tempfile.TemporaryDirectory(prefix="dray-batch-") as folder:
        # Which parameters all lines share is known at the end; so the rows wait for it on the disk.
        raw = os.path.join(folder, REQUESTS)
        _write_raw(lines.requests(source), raw)
        facts = Facts(
            source=lines.source,
            sha256=source.sha256,
            endpoint=lines.endpoint,
            requests=lines.count,
            model=lines.model,
            common=lines.common,
            varying=lines.varying,
            shared=lines.shared,
        )
        with target.writing(REQUESTS) as file:
            _write_requests(raw, file, facts)
    target.write(FACTS, json.dumps(asdict(facts), indent=1, ensure_ascii=False).encode())
    return facts


def _write_raw(requests: Iterator[Request], raw: str) -> None:
    """All requests as they are, in row groups of bounded size."""
    schema = pa.schema([(name, pa.string()) for name in ("custom_id", "prompt", PARAMS)])
    rows: list[tuple[str, str, str]] = []
    size = 0
    with pq.ParquetWriter(raw, schema, compression="lz4") as writer:

        def flush() -> None:
            columns = [pa.array(column, pa.string()) for column in zip(*rows, strict=True)]
            writer.write_table(pa.table(columns, schema=schema))

        for request in requests:
            rows.append((request.custom_id, request.prompt, json.dumps(request.own, ensure_ascii=False)))
            size += len(request.prompt)
            if len(rows) >= _GROUP_ROWS or size >= _GROUP_BYTES:
                flush()
                rows, size = [], 0
        if rows:
            flush()


def _write_requests(raw: str, file: BinaryIO, facts: Facts) -> None:
    """The same with the column's name, and with what is left of their own parameters once the common ones are the job's."""
    names = ["custom_id", ENDPOINTS[facts.endpoint], *([PARAMS] if facts.varying else [])]
    schema = pa.schema([(name, pa.string()) for name in names])
    with pq.ParquetFile(raw) as parquet, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for group in range(parquet.num_row_groups):
            columns = parquet.read_row_group(group).columns
            if facts.varying:
                own = [_without(text, facts.common) for text in columns[-1].to_pylist()]
                columns[-1] = pa.chunked_array([pa.array(own, pa.string())])
            writer.write_table(pa.table(columns[: len(names)], schema=schema))


def _without(text: str, common: Mapping[str, Any]) -> str | None:
    own = {key: value for key, value in json.loads(text).items() if key not in common}
    return json.dumps(own, ensure_ascii=False, sort_keys=True) if own else None
