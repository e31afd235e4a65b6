"""The node's cache of models: each (source, revision) is copied once, whole or not at all.

<DRAY_MODELS, or ~/.cache/dray/models>/
  <name>-<16 hex>/             one model, read-only by agreement; dray-model.json tells what it is
  <name>-<16 hex>.config/      the same without weights, for stages that need the tokenizer only
  .partial/<name>-<16 hex>/    on its way; becomes the folder above by one rename
  .locks/<name>-<16 hex>       held by the process that copies it; the others wait and find it there
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.errors import ModelError, OutputError
from pipelines.model_hub import HubSilent, Note
from pipelines.model_manifest import MANIFEST, Manifest, NewerManifest, is_whole, read_manifest
from pipelines.model_source import clear_traces, open_source

_NAME = re.compile(r"[^A-Za-z0-9._-]+")


def cache_root() -> Path:
    """Where models are kept on this node."""
    return Path(os.environ.get("DRAY_MODELS") or "~/.cache/dray/models").expanduser()


def pull(
    source: str,
    revision: str | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    to: str | os.PathLike[str] | None = None,
    weights: bool = True,
    token: str | bool | None = None,
    note: Note = lambda count: None,
) -> tuple[Path, Manifest]:
    """The folder of a whole model, copied there where it is not yet; and its manifest.

    `source` is a hub id, an absolute folder or a URL. `to` is a folder of the user's instead of the cache. A revision
    that is in the cache needs neither hub nor store. One process copies, others wait for it; one that was killed is gone
    on with. Raises ModelError, StorageError, and OutputError where `to` holds something else.
    """
    if to is None and (found := cached_model(source, revision, options, weights=weights)):
        return found
    origin = open_source(source, revision, options, token=token)
    try:
        there = origin.revision()
    except HubSilent:
        if to is None and (found := cached_model(source, asked=revision, weights=weights)):
            return found
        raise
    if to is None:
        root, name = cache_root(), _entry_name(source, there, options, weights)
        final, partial, lock = root / name, root / ".partial" / name, root / ".locks" / name
    else:
        final = Path(os.path.abspath(os.path.expanduser(to)))
        partial, lock = (final.with_name(f".{final.name}.{kind}") for kind in ("partial", "lock"))
    try:
        with _locked(lock):
            if manifest := _standing(final, source, there, replace=to is None):
                return final, manifest
            partial.mkdir(parents=True, exist_ok=True)
            files = origin.copy(partial, weights=weights, note=note)
            manifest = Manifest(
                source=source, revision=there, asked=revision, files=files, pulled_at=time.time()
            )
            clear_traces(partial)
            _write_last(partial / MANIFEST, manifest.to_json())
            if final.is_dir():  # an empty folder of the user's
                final.rmdir()
            partial.rename(final)
            _sync(final.parent)
    except PermissionError as error:
        raise ModelError(
            f"{error.filename}: cannot be written; set DRAY_MODELS to a folder that can be"
        ) from None
    if to is not None:
        lock.unlink(missing_ok=True)
    return final, manifest


def cached_model(
    source: str,
    revision: str | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    asked: str | None = None,
    weights: bool = True,
) -> tuple[Path, Manifest] | None:
    """What the cache holds of a source: of that revision, or the latest that was pulled as `asked`.

    `options` are those of `pull`.
    """
    if revision is not None:
        for complete in (True,) if weights else (True, False):
            folder = cache_root() / _entry_name(source, revision, options, complete)
            manifest = _manifest_of(folder)
            if manifest is not None and is_whole(folder, manifest):
                return folder, manifest
        return None
    if "://" in source or os.path.isabs(source):
        return None  # what lies there now, only its listing tells
    found = [
        (folder, manifest)
        for folder, manifest in cached_models()
        if (manifest.source, manifest.asked) == (source, asked)
        and (not weights or not folder.name.endswith(".config"))
    ]
    return max(found, key=lambda entry: entry[1].pulled_at, default=None)


def cached_models() -> list[tuple[Path, Manifest]]:
    """All whole models of the cache, those without weights too, by folder name."""
    root = cache_root()
    found = []
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        manifest = None if folder.name.startswith(".") else _manifest_of(folder)
        if manifest is not None and is_whole(folder, manifest):
            found.append((folder, manifest))
    return found


def unfinished() -> list[Path]:
    """Folders of copies that are on their way, or were stopped there."""
    partial = cache_root() / ".partial"
    return sorted(partial.iterdir()) if partial.is_dir() else []


def damaged_entries() -> list[Path]:
    """Folders of the cache whose files are not as many or as large as their manifest says."""
    root = cache_root()
    folders = (
        []
        if not root.is_dir()
        else [path for path in sorted(root.iterdir()) if not path.name.startswith(".")]
    )
    whole = {folder for folder, _ in cached_models()}
    return [folder for folder in folders if folder not in whole]


def _manifest_of(folder: Path) -> Manifest | None:
    """None also where it cannot be read: that entry is damaged, the others are not."""
    try:
        return read_manifest(folder)
    except (ModelError, OSError):
        return None


def _standing(final: Path, source: str, revision: str, *, replace: bool) -> Manifest | None:
    """The manifest of what stands at `final`; None when there is nothing, or nothing whole, which is taken away.

    Raises NewerManifest for what a later Dray put there.
    """
    if not final.exists() or (final.is_dir() and not any(final.iterdir())):
        return None
    try:
        manifest = read_manifest(final)
    except NewerManifest:
        raise
    except (ModelError, OSError):
        manifest = None
    if (
        manifest is not None
        and is_whole(final, manifest)
        and (manifest.source, manifest.revision) == (source, revision)
    ):
        return manifest
    if not replace:
        raise OutputError(
            f"{final} holds something else already: choose another folder for --to, or delete that one"
        )
    shutil.rmtree(final)
    return None


def _entry_name(source: str, revision: str, options: Mapping[str, Any] | None, weights: bool) -> str:
    """A listing is a store's word only, so copies from two endpoints are two models; a digest is the same anywhere."""
    endpoint = {key: (options or {}).get(key) for key in ("endpoint_url", "client_kwargs")}
    served = ""
    if revision.startswith("listing:") and any(endpoint.values()):
        served = f"\0{json.dumps(endpoint, sort_keys=True, default=str)}"
    digest = hashlib.sha256(f"{source.rstrip('/')}\0{revision}{served}".encode()).hexdigest()[:16]
    name = _NAME.sub("-", source.rstrip("/").rpartition("://")[2]).strip("-.")[-60:]
    return f"{name}-{digest}" + ("" if weights else ".config")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock file; the kernel lets go of it when the process ends, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write_last(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
