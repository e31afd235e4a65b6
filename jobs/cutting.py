"""Input files into shards: small files packed together, large ones split, never by who will do the work.

A shard is either a piece of one file or a pack of whole ones, in input order. That keeps replacement simple: a file
that changes takes along only files that are packed with it, whole.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from pipelines.contracts import InputFile, Shard, Span, shard_id
from pipelines.errors import SpecError
from pipelines.lengths import IMAGE_TOKENS

#: Most shards of one job: at some 30 ms of overhead each (ARCHITECTURE.md), and one object each in `data/`.
MAX_SHARDS = 100_000
#: `auto`: most rows and (estimated, unpacked) bytes of a shard, because its rows travel through memory as one piece.
MAX_ROWS, MAX_BYTES = 50_000, 128 << 20
#: `auto`: a small input is cut finer so that every engine has something to do, but not below this many rows.
MIN_ROWS = 64
#: Assumed speed of one engine, prompt and answer tokens per second, and the engine time that a shard aims at. A 7B
#: model on an H200 is some 8 times faster and a 70B one slower: 60 s assumed come to between 8 and 120 s.
GPU_TOKENS_PER_S, CPU_TOKENS_PER_S = 4_000, 200
SHARD_S = 60
TARGET_TOKENS = GPU_TOKENS_PER_S * SHARD_S
#: `auto`: towards the end shards are cut finer, so that engines end together, but not below this share of a shard, nor
#: below as many rows as three shards need to fill an engine (SIMULATED, four engines of three shards each: 13 shards end
#: after 325 s with equal shards and 271 s so; with an eighth of 1,000 rows engines starve, and 24 take 25 % longer).
LAST_SHARE, LAST_ROWS = 1 / 4, 512
#: Rough for English text and code; Chinese has fewer bytes per token, which makes shards larger than meant. An image counts as
#: in admission, `lengths.IMAGE_TOKENS`, whatever its file's size: that also bounds how many files prepare holds of those that
#: rows name by path.
BYTES_PER_TOKEN = 4


def cut(
    files: Sequence[InputFile],
    fingerprint: str,
    *,
    rows: int | Literal["auto"] = "auto",
    first_ordinal: int = 0,
    target_tokens: float = TARGET_TOKENS,
    output_tokens: float = 256,
    feed: int = 1,
) -> list[Shard]:
    """Cut `files` into shards, numbered from `first_ordinal`. The same arguments give the same shards.

    Args:
        files: in the order of the output; empty ones get no shard.
        fingerprint: of the spec; part of each shard's identity.
        rows: rows of a shard, exact for Parquet and estimated for JSONL; `auto` estimates the engine's work.
        target_tokens: `auto`: tokens (prompt and answer) that a shard aims at.
        output_tokens: `auto`: expected answer tokens of one row, all its samples together.
        feed: `auto`: shards that keep all engines busy (replicas × shards in flight). The last ones are smaller.

    Raises SpecError when `rows` makes more than `MAX_SHARDS` shards of the job.
    """
    files = _filled(files)
    if not files:
        return []
    total, room = sum(map(_rows, files)), MAX_SHARDS - first_ordinal
    if room < 1:
        raise SpecError(f"the job has {MAX_SHARDS:,} shards already; put the new files into a new output")
    if rows != "auto":
        packs = list(itertools.islice(_packs(files, float(rows), math.inf), room + 1))
        if len(packs) > room:
            raise SpecError(
                f"shards.rows: {rows} cuts {total:,} rows into more than {room:,} shards (a job has at most "
                f"{MAX_SHARDS:,}); use {math.ceil(total / room):,} or more, or auto"
            )
    else:
        target = max(auto_rows(files, target_tokens, output_tokens, feed), total / room)
        most_bytes = max(float(MAX_BYTES), sum(file.data_bytes for file in files) / room)
        packs = list(itertools.islice(_packs(files, target, most_bytes, feed), room + 1))
        while len(packs) > room:  # packs and last pieces are not full
            target, most_bytes = target * 1.25, most_bytes * 1.25
            packs = list(itertools.islice(_packs(files, target, most_bytes, feed), room + 1))
    return [_shard(first_ordinal + i, pack, fingerprint) for i, pack in enumerate(packs)]


def cut_lazily(files: Sequence[InputFile], rows: int) -> Iterator[Shard]:
    """Shards of `rows` rows one by one, as many as the caller takes; for a preview, not for a plan."""
    for i, pack in enumerate(_packs(_filled(files), float(rows), math.inf)):
        yield _shard(i, pack, "")


def auto_rows(files: Sequence[InputFile], target_tokens: float, output_tokens: float, feed: int) -> float:
    """Rows per shard that come to `target_tokens`, within 1 and `MAX_ROWS`; fewer where `feed` needs more shards."""
    total = sum(map(_rows, files))
    text = sum(file.data_bytes - file.image_bytes for file in files) / BYTES_PER_TOKEN
    prompts = text + sum(file.images for file in files) * IMAGE_TOKENS
    target = target_tokens / (prompts / total + output_tokens)
    target = min(max(target, 1.0), float(MAX_ROWS))
    return min(target, max(float(MIN_ROWS), math.ceil(total / max(feed, 1))))


#: A span with its estimated rows and bytes.
_Piece = tuple[Span, float, float]


def _packs(
    files: Sequence[InputFile], most_rows: float, most_bytes: float, feed: int | None = None
) -> Iterator[list[_Piece]]:
    """Pieces of large files one by one; small files together, up to the limits, in order.

    With `feed`, which bounds rows less and less towards the end; without, pieces have exactly `most_rows`.
    """
    pack: list[_Piece] = []
    rows = data = 0.0
    left = sum(map(_rows, files))
    for file in files:
        limit = most_rows if feed is None else _rows_at(left, most_rows, feed)
        if pack and (rows + _rows(file) > limit or data + file.data_bytes > most_bytes):
            yield pack
            pack, rows, data = [], 0.0, 0.0
        n = max(math.ceil(_rows(file) / limit), math.ceil(file.data_bytes / most_bytes), 1)
        if n > 1:
            if pack:
                yield pack
                pack, rows, data = [], 0.0, 0.0
            # Without a limit on bytes the number of rows is the user's own: he gets exactly that.
            exact = math.isinf(most_bytes) and file.format == "parquet"
            pieces = (
                _between(
                    file,
                    "rows",
                    itertools.chain(range(0, _rows(file), int(most_rows)), [_rows(file)]),
                    _rows(file),
                )
                if exact
                else _split(file, _cuts(file, left, most_rows, most_bytes, feed))
            )
            for piece in pieces:
                yield [piece]
        else:
            pack.append(_whole(file))
            rows, data = rows + _rows(file), data + file.data_bytes
        left -= _rows(file)
    if pack:
        yield pack


def _filled(files: Sequence[InputFile]) -> list[InputFile]:
    return [file for file in files if file.size and file.rows != 0]


def _rows_at(left: float, most_rows: float, feed: int) -> float:
    """Most rows of a shard where `left` rows of the input are still to be cut: half of an equal share for each of the
    `feed` shards in flight, within the bounds above."""
    least = min(most_rows, max(LAST_SHARE * most_rows, float(LAST_ROWS)))
    return most_rows if feed == 1 else max(least, min(most_rows, left / (2 * feed)))


def _cuts(
    file: InputFile, left: float, most_rows: float, most_bytes: float, feed: int | None
) -> Iterator[float]:
    """Where to cut a file, as rising shares of it up to 1: evenly while the limit stays, finer where it sinks."""
    rows, at = float(_rows(file)), 0.0
    row_bytes = file.data_bytes / rows
    while True:
        limit = most_rows if feed is None else _rows_at(left - at, most_rows, feed)
        if row_bytes:
            limit = min(limit, most_bytes / row_bytes)
        pieces = math.ceil((rows - at) / limit - 1e-6)
        if pieces <= 1:
            yield 1.0
            return
        at += (rows - at) / pieces
        yield at / rows


def _split(file: InputFile, cuts: Iterable[float]) -> Iterable[_Piece]:
    """The file in pieces that end near `cuts` (shares of it); in one where it cannot be entered in the middle."""
    if file.format == "parquet":
        assert file.rows is not None
        return _between(file, "rows", _rising(_row_ends(file.rows, file.row_groups, cuts)), file.rows)
    if file.format == "jsonl" and file.compression == "none":
        ends = (math.floor(file.size * cut + 1e-6) for cut in cuts)
        return _between(file, "bytes", _rising(ends), file.size)
    return [_whole(file)]


def _row_ends(rows: int, row_groups: Sequence[int], cuts: Iterable[float]) -> Iterator[int]:
    """Cuts in rows, moved to the end of a row group where one is within a quarter of a piece.

    A shard that ends inside a row group makes its neighbour decode the group's beginning once more.
    """
    groups = list(itertools.accumulate(row_groups))
    for before, cut in itertools.pairwise(itertools.chain([0.0], cuts)):
        even = math.floor(rows * cut + 1e-6)
        at = bisect.bisect_left(groups, even)
        nearest = min(groups[max(at - 1, 0) : at + 1], key=lambda end: abs(end - even), default=even)
        close = abs(nearest - even) * 4 <= rows * (cut - before) and 0 < nearest < rows
        yield nearest if close and cut < 1.0 else even


def _rising(ends: Iterable[int]) -> Iterator[int]:
    """0, then each end that is past the one before."""
    last = 0
    yield last
    for end in ends:
        if end > last:
            yield (last := end)


def _between(
    file: InputFile, unit: Literal["rows", "bytes"], ends: Iterable[int], total: int
) -> Iterator[_Piece]:
    for start, stop in itertools.pairwise(ends):
        share = (stop - start) / total
        yield _span(file, unit, start, stop), _rows(file) * share, file.data_bytes * share


def _whole(file: InputFile) -> _Piece:
    if file.format == "parquet":
        assert file.rows is not None
        span = _span(file, "rows", 0, file.rows)
    else:
        whole = file.format == "jsonl" and file.compression == "none"
        span = _span(file, "bytes" if whole else "file", 0, file.size)
    return span, _rows(file), file.data_bytes


def _span(file: InputFile, unit: Literal["rows", "bytes", "file"], start: int, stop: int) -> Span:
    return Span(
        path=file.path,
        version=file.version,
        size=file.size,
        format=file.format,
        compression=file.compression,
        unit=unit,
        start=start,
        stop=stop,
    )


def _rows(file: InputFile) -> int:
    return file.rows if file.rows is not None else max(file.estimated_rows, 1)


def _shard(ordinal: int, pack: Sequence[_Piece], fingerprint: str) -> Shard:
    spans = tuple(span for span, _, _ in pack)
    known = all(span.unit == "rows" for span in spans)
    return Shard(
        ordinal=ordinal,
        id=shard_id(spans, fingerprint),
        spans=spans,
        rows=sum(span.stop - span.start for span in spans) if known else None,
        bytes=round(sum(data for _, _, data in pack)),
    )
