"""Places in storage compared by name alone: does an output lie where its input is read?"""

from __future__ import annotations

import os
import re
from urllib.parse import urlsplit

#: What a job writes below its output; `_SUCCESS`, README and report are no data files.
_WRITTEN = (
    "data/part-000000-0123456789abcdef.parquet",
    "errors/part-000000-0123456789abcdef.parquet",
    "stats/shards.parquet",
    ".dray/plan/000000.arrow",
)
_MAGIC = re.compile(r"[*?\[]")
#: Names of the same store.
_ALIASES = {"s3a": "s3", "s3n": "s3", "gcs": "gs", "": "file", "local": "file"}


def is_url(path: str) -> bool:
    """Whether `path` names a store rather than a place on this machine."""
    return "://" in path and scheme(path) != "file"


def scheme(path: str) -> str:
    """`s3`, `gs`, …; `file` for local paths."""
    name = path.partition("://")[0].lower() if "://" in path else ""
    return _ALIASES.get(name, name)


def canonical(path: str) -> str:
    """One spelling for each place: absolute, without links (local), user names or doubled slashes."""
    kind = scheme(path)
    rest = path.partition("://")[2] if "://" in path else path
    if kind == "file":
        return "file://" + os.path.realpath(os.path.expanduser(rest))
    if kind in ("http", "https"):
        parts = urlsplit(path)
        rest = parts.netloc.rpartition("@")[2].lower() + parts.path
    else:
        rest = rest.partition("?")[0] if kind != "s3" else rest
    return f"{kind}://" + "/".join(part for part in rest.split("/") if part)


def overlap(*, input_path: str, output_path: str) -> str:
    """How the output lies in the input (`is`, `lies in`, `is matched by`, `holds`), or nothing.

    The output's own folder may hold the input as long as nothing is written there: a job may read `out/raw/` and
    write `out/data/`.
    """
    source, target = canonical(input_path), canonical(output_path)
    if not _MAGIC.search(source.partition("://")[2]):
        if source == target:
            return "is"
        if target.startswith(source.rstrip("/") + "/"):
            return "lies in"
        folders = {f"{target}/{name.partition('/')[0]}" for name in _WRITTEN}
        return "holds" if any(source == f or source.startswith(f + "/") for f in folders) else ""
    pattern = re.compile(_glob_as_regex(source))
    for name in _WRITTEN:
        place = f"{target}/{name}"
        while "/" in place.partition("://")[2]:
            if pattern.fullmatch(place):  # a folder that a glob matches is read as a whole
                return "is matched by"
            place = place.rpartition("/")[0]
    return ""


def _glob_as_regex(pattern: str) -> str:
    parts = re.split(r"(\*\*/?|\*|\?|\[[^\]]+\])", pattern)
    made = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(
        made.get(part) or ("[" + part[1:-1].replace("!", "^", 1) + "]" if _is_set(part) else re.escape(part))
        for part in parts
        if part
    )


def _is_set(part: str) -> bool:
    return part.startswith("[") and part.endswith("]") and len(part) > 2
