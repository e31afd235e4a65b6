"""`input.path` into input files: each entry resolved in one bulk listing, Parquet footers read in parallel."""

from __future__ import annotations

import fnmatch
import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Literal

from pipelines.contracts import InputFile
from pipelines.errors import InputError
from pipelines.read_parquet import footer_of
from pipelines.sample import density
from pipelines.schema import check_names, wanted_columns
from pipelines.settings import InputSettings
from pipelines.storage import ObjectInfo, Storage, locate

Format = Literal["parquet", "jsonl", "csv"]

#: Ending → format; the text ones also with `.gz` after them.
ENDINGS: dict[str, Format] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
}
#: Found beside data and never data: passed over in folders and globs, whatever `format` says.
_ENDINGS_OF_COMPANIONS = (".md", ".crc", ".md5", ".sha256", ".html", ".yaml", ".yml", ".lock", ".png", ".svg")
_COMPANIONS = ("README", "LICENSE", "LICENCE", "NOTICE", "CHANGELOG", "Makefile")
_COMPANION_NAMES = {"dataset_infos.json", "dataset_info.json", "state.json"}  # `datasets` writes them

#: Footers are two small requests each: waiting, not work.
_THREADS = 16
_MAGIC = re.compile(r"[*?\[]")


def list_files(
    settings: InputSettings,
    needed: frozenset[str] = frozenset(),
    known: Mapping[str, InputFile] | None = None,
    images: frozenset[str] = frozenset(),
    messages: frozenset[str] = frozenset(),
) -> list[InputFile]:
    """The files that `input.path` names, entry by entry, by path within an entry, each once.

    Names with a leading `.` or `_`, and everything in folders so named, are left out of folders and globs; so are
    companions of data such as README.md. An output of Dray stands for its `data/`. `needed`: columns beside
    `input.columns` that will be read, for `data_bytes`. `known`: files of the plan by path; those still at their
    planned version are returned as they are, without a look at their footers. `images`: those of the columns that hold
    images of prompts; `messages`: those that hold messages, with images among their parts. Raises InputError (no such path, nothing there, an ending that tells no format, a damaged footer).
    """
    entries = [settings.path] if isinstance(settings.path, str) else settings.path
    found: dict[str, InputFile] = {}
    for entry in entries:
        for file in _entry(entry, settings):
            found.setdefault(file.path, file)
    files = [_if_known(file, known or {}) for file in found.values()]
    return _estimated(_with_footers(files, settings, needed, images, messages), settings, images, messages)


def _if_known(file: InputFile, known: Mapping[str, InputFile]) -> InputFile:
    planned = known.get(file.path)
    same = planned is not None and (planned.version, planned.size) == (file.version, file.size)
    return planned if same and planned is not None else file


# ── One entry ───────────────────────────────────────────────────────────────────────────────────────────────────


def _entry(entry: str, settings: InputSettings) -> list[InputFile]:
    options = settings.storage_options
    if not entry.endswith("/") and not re.fullmatch(r"[^:/]+://[^/]*", entry):
        storage, name = locate(entry, options)
        try:
            info = storage.info(name)  # also a file whose name has glob characters in it
            return [_file(storage, info, settings, named=True)]
        except FileNotFoundError:
            pass
    if _MAGIC.search(entry.partition("://")[2] or entry):
        return _glob(entry, settings)
    storage = Storage(entry.rstrip("/") or "/", options)
    objects = storage.list()
    if not objects:
        raise InputError(f"{entry}: no such file, or an empty folder; correct input.path")
    inside = _of_dray(entry, objects)
    files = [info for info in inside if not _passed_over(info.name)]
    if not files:
        raise InputError(
            f"{entry}: no data file in this folder (names with a leading . or _ are not read); correct input.path"
        )
    return [_file(storage, info, settings) for info in sorted(files, key=lambda info: info.name)]


def _of_dray(entry: str, objects: list[ObjectInfo]) -> list[ObjectInfo]:
    """Of a Dray output the dataset only: `stats/` and reports are about it, `errors/` are the rows it failed on."""
    names = {info.name for info in objects}
    if ".dray/spec.json" not in names:
        return objects
    if "data/_SUCCESS" not in names:
        raise InputError(
            f"{entry}: is the output of a Dray job that has not finished; finish it with `dray resume`, or name "
            f"{entry.rstrip('/')}/data/ to take what is there"
        )
    return [info for info in objects if info.name.startswith("data/")]


def _glob(pattern: str, settings: InputSettings) -> list[InputFile]:
    parts = pattern.split("/")
    first = next(i for i, part in enumerate(parts) if _MAGIC.search(part))
    root, rest = "/".join(parts[:first]), "/".join(parts[first:])
    if root.endswith((":/", ":")):
        raise InputError(f"{pattern}: the bucket cannot be a pattern; name it")
    storage = Storage(root or ("/" if pattern.startswith("/") else "."), settings.storage_options)
    matches = glob_pattern(rest)
    files = [
        info
        for info in storage.list()
        # a pattern may match a folder (`year=*`): its files then, less the hidden ones
        if (match := matches.fullmatch(info.name))
        and not _passed_over(match["below"] or info.name.rpartition("/")[2])
    ]
    if not files:
        raise InputError(f"{pattern}: no data file matches; correct input.path")
    return [_file(storage, info, settings) for info in sorted(files, key=lambda info: info.name)]


def glob_pattern(pattern: str) -> re.Pattern[str]:
    """`*`, `?` and `[…]` within a name, `**` over folders. Hidden names match only where the pattern spells the dot.

    The group `below` is what follows when the pattern matches a folder of the path.
    """
    hidden = r"(?![._])"
    out = ""
    parts = pattern.strip("/").split("/")
    for i, part in enumerate(parts):
        if part == "**":
            out += f"(?:{hidden}[^/]+/)*" if i < len(parts) - 1 else f"{hidden}[^/]+"
            continue
        body = fnmatch.translate(part).removeprefix("(?s:").removesuffix(r")\Z")
        # fnmatch's `.*` and `.` cross folders
        body = re.sub(r"(?<!\\)\.(?![^\[]*\])", "[^/]", body)
        out += (hidden if part[:1] in "*?[" else "") + f"(?:{body})" + ("/" if i < len(parts) - 1 else "")
    return re.compile(f"(?s:{out})(?:/(?P<below>.+))?")


def _passed_over(name: str) -> bool:
    parts = name.split("/")
    base = parts[-1]
    return (
        any(part.startswith((".", "_")) for part in parts)
        or base in _COMPANION_NAMES
        or (base.partition(".")[0] in _COMPANIONS and _format_of(base) is None)
        or base.lower().endswith(_ENDINGS_OF_COMPANIONS)
    )


def _format_of(base: str) -> Format | None:
    """By the ending, the one before `.gz`."""
    return ENDINGS.get(posixpath.splitext(base.lower().removesuffix(".gz"))[1])


def _file(storage: Storage, info: ObjectInfo, settings: InputSettings, *, named: bool = False) -> InputFile:
    path = storage.url(info.name)
    base = posixpath.basename(info.name)
    gzipped = base.lower().endswith(".gz")
    known = _format_of(base)
    format_ = known if settings.format == "auto" else settings.format
    if format_ is None or (gzipped and format_ == "parquet"):
        remedy = "rename it" if named else "move it away, name the files with a glob (input.path)"
        raise InputError(
            f"{path}: its ending tells no format that Dray reads ({', '.join(ENDINGS)}, and .gz after the text "
            f"ones); {remedy}, or set input.format"
        )
    return InputFile(
        path=path,
        size=info.size,
        version=info.version,
        format=format_,
        compression="gzip" if gzipped else "none",
    )


# ── Sizes ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _with_footers(
    files: Sequence[InputFile],
    settings: InputSettings,
    needed: frozenset[str],
    images: frozenset[str],
    messages: frozenset[str],
) -> list[InputFile]:
    columns = wanted_columns(settings, needed)
    seen, told = (names if columns is None else names.intersection(columns) for names in (images, messages))
    options: dict[str, Any] = settings.storage_options
    schemas: dict[Any, Any] = {}  # thousands of files share one schema object

    def look(file: InputFile) -> InputFile:
        if file.format != "parquet" or file.rows is not None:
            return file
        footer = footer_of(file.path, options)
        check_names(file.path, footer.schema.names)
        in_messages = [footer.message_images(name) for name in told]
        return replace(
            file,
            rows=footer.rows,
            estimated_rows=footer.rows,
            row_groups=footer.row_groups,
            data_bytes=footer.data_bytes(columns),
            image_bytes=footer.data_bytes(seen) + sum(size for _, size in in_messages),
            images=sum(map(footer.values, seen)) + sum(count for count, _ in in_messages),
            schema=schemas.setdefault(footer.schema, footer.schema),
        )

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(look, files))


def _estimated(
    files: Iterable[InputFile], settings: InputSettings, images: frozenset[str], messages: frozenset[str]
) -> list[InputFile]:
    """Text files with a guess at their rows, unpacked bytes and images."""
    files = list(files)
    for format_ in ("jsonl", "csv"):
        group = [file for file in files if file.format == format_ and not file.estimated_rows and file.size]
        if not group:
            continue
        guess = density(group, settings, images, messages)
        for i, file in enumerate(files):
            if file.format == format_ and not file.estimated_rows and file.size:
                files[i] = guess.estimate(file)
    return files
