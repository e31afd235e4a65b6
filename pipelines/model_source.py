"""Where a model comes from, and what its files are there: a store or a folder (`StoredModel`), or the hub (`pipelines.model_hub`).

Both say which revision is there now and copy the files of that revision into a folder; `pipelines.model_cache` decides
which folder, and when it counts as whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from pipelines.errors import ModelError
from pipelines.model_hub import PARALLEL, HubModel, Note
from pipelines.model_manifest import MANIFEST, FileEntry, Manifest, sha256_of
from pipelines.model_weights import refuse_pickles, wanted
from pipelines.storage import ObjectInfo, Storage, VersionChanged

#: Bytes of one request.
CHUNK = 32 << 20
#: Which of several safetensors files holds which weights.
INDEX = "model.safetensors.index.json"


class ModelSource(Protocol):
    """A model at its place of origin."""

    @property
    def names(self) -> list[str]:
        """All files that belong to the model."""

    def revision(self) -> str:
        """The revision that is there now. Raises ModelError, StorageError where there is no such model."""

    def copy(self, folder: Path, *, weights: bool, note: Note) -> tuple[FileEntry, ...]:
        """Copy the files into `folder`, going on with what an earlier call left there, and check them.

        `weights` False: only the small files (configuration, tokenizer). Raises ModelError for what does not agree.
        """


def open_source(
    source: str,
    revision: str | None,
    options: Mapping[str, Any] | None = None,
    *,
    token: str | bool | None = None,
) -> ModelSource:
    """The source that a hub id, a local folder or a URL names. `options` are fsspec's for its store."""
    if "://" in source or os.path.isabs(source):
        return StoredModel(Storage(source, options), revision)
    return HubModel(source, revision, token)


@dataclass
class StoredModel:
    """A model in a folder of a store, or of this machine.

    Its revision is the digest of the manifest beside it (`sha256:…`), or, where there is none, of the names, sizes and
    versions that the store lists (`listing:…`).
    """

    storage: Storage
    asked: str | None = None

    @cached_property
    def objects(self) -> dict[str, ObjectInfo]:
        """By name. Raises ModelError where there is no model."""
        found = {info.name: info for info in self.storage.list()}
        if "config.json" not in found and "adapter_config.json" not in found:
            what = "it has no config.json" if found else "there is no such folder, or it is empty"
            raise ModelError(f"model {self.storage.root}: {what}")
        return found

    @cached_property
    def manifest(self) -> Manifest | None:
        """The one beside the model."""
        if MANIFEST not in self.objects:
            return None
        manifest = Manifest.from_json(self.storage.read(MANIFEST), self.storage.url(MANIFEST))
        for file in manifest.files:
            there = self.objects.get(file.name)
            if there is None or there.size != file.size:
                state = "is missing" if there is None else f"has {there.size:,} bytes"
                raise ModelError(
                    f"{self.storage.url(file.name)} {state}; {MANIFEST} beside it says {file.size:,} bytes: upload the "
                    "model again"
                )
        return manifest

    @property
    def names(self) -> list[str]:
        """What belongs to the model."""
        return (
            [file.name for file in self.manifest.files]
            if self.manifest
            else [*self.objects.keys() - {MANIFEST}]
        )

    def revision(self) -> str:
        if self.manifest is not None:
            found = self.manifest.digest
        else:
            files = [self.objects[name] for name in wanted(self.names, weights=True)]
            lines = "".join(f"{file.name}\0{file.size}\0{file.version}\n" for file in files)
            self._check_index()
            found = f"listing:{hashlib.sha256(lines.encode()).hexdigest()}"
        if self.asked not in (None, found):
            raise ModelError(
                f"model {self.storage.root}: revision {self.asked} is asked for, there is {found} now; put the model "
                "back, or ask for that one"
            )
        return found

    def _check_index(self) -> None:
        """Without a manifest only the index of sharded weights tells that a model is still being uploaded."""
        if INDEX not in self.objects:
            return
        try:
            named = set(json.loads(self.storage.read(INDEX))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(
                f"{self.storage.url(INDEX)}: not an index of weights ({error}); upload it again"
            ) from None
        missing = sorted(str(name) for name in named - self.objects.keys())
        if missing:
            raise ModelError(
                f"{self.storage.url(missing[0])} is missing, {INDEX} names it ({len(missing)} of {len(named)} files are): "
                "is the model still being uploaded? Try again when it is whole"
            )

    def copy(self, folder: Path, *, weights: bool, note: Note) -> tuple[FileEntry, ...]:
        self.revision()
        if weights:
            refuse_pickles(self.storage.root, self.names)
        names = wanted(self.names, weights=weights)
        known = {file.name: file.sha256 for file in self.manifest.files} if self.manifest else {}
        tasks: list[Callable[[], FileEntry]] = [
            lambda name=name: self._fetch(folder, self.objects[name], known.get(name), note)  # type: ignore[misc]
            for name in names
        ]
        return tuple(all_of(tasks))

    def _fetch(self, folder: Path, info: ObjectInfo, sha256: str | None, note: Note) -> FileEntry:
        """One file. A part that an earlier call left is gone on with where it is of the same version."""
        path = folder / info.name
        path.parent.mkdir(parents=True, exist_ok=True)
        version = hashlib.sha256(f"{info.version}\0{info.size}".encode()).hexdigest()[:12]
        part, done = (
            path.with_name(f".{path.name}.{version}.part"),
            path.with_name(f".{path.name}.{version}.done"),
        )
        if done.exists() and path.exists():
            path.replace(part)  # checked once more below: whole, so nothing is read from the store
        begun = part.stat().st_size if part.exists() else 0
        # Chunks before the last were synced before the next was begun; the last may be torn by a power cut.
        start = begun if done.exists() else max(0, (begun - 1) // CHUNK) * CHUNK
        with part.open("r+b" if begun else "wb") as file:
            file.truncate(start)
            file.seek(start)
            note(start)
            while start < info.size:
                try:
                    data = self.storage.read_range(
                        info.name, start, min(start + CHUNK, info.size), info.version
                    )
                except (VersionChanged, FileNotFoundError):
                    raise self._replaced(info.name) from None
                if not data:
                    raise ModelError(
                        f"{self.storage.url(info.name)} ends after {start:,} of {info.size:,} bytes"
                    )
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                start += len(data)
                note(len(data))
        try:
            self._check_unchanged(info)
            entry = _checked(self.storage.url(info.name), info.name, part, sha256)
        except ModelError:
            part.unlink()
            done.unlink(missing_ok=True)
            raise
        part.replace(path)
        done.touch()
        return entry

    def _check_unchanged(self, info: ObjectInfo) -> None:
        """Most stores do not hold a range to its version, so what was copied may be a mixture of two."""
        try:
            now = self.storage.info(info.name)
        except FileNotFoundError:
            raise self._replaced(info.name) from None
        if (now.version, now.size) != (info.version, info.size):
            raise self._replaced(info.name)

    def _replaced(self, name: str) -> ModelError:
        return ModelError(f"{self.storage.url(name)} was replaced while it was being copied: pull it again")


def all_of(tasks: Sequence[Callable[[], FileEntry]]) -> list[FileEntry]:
    """The results of all tasks, `PARALLEL` at a time; the first error, once none is under way any more."""
    with ThreadPoolExecutor(PARALLEL) as pool:
        futures = [pool.submit(task) for task in tasks]
        try:
            return [future.result() for future in futures]
        except BaseException:
            for future in futures:
                future.cancel()
            raise


def clear_traces(folder: Path) -> None:
    """Remove what copying leaves beside the files: parts, marks, huggingface_hub's records."""
    for trace in [*folder.rglob(".*.part"), *folder.rglob(".*.done")]:
        with suppress(FileNotFoundError):
            trace.unlink()
    shutil.rmtree(folder / ".cache", ignore_errors=True)


def _checked(url: str, name: str, path: Path, sha256: str | None) -> FileEntry:
    found = sha256_of(path)
    if sha256 is not None and found != sha256:
        raise ModelError(
            f"{url}: its content has sha256 {found[:12]}…, {MANIFEST} beside it says {sha256[:12]}…: the file is damaged "
            "or was replaced; upload the model again"
        )
    return FileEntry(name=name, size=path.stat().st_size, sha256=found)
