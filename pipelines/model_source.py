"""Where a model comes from, and what its files are there: a store or a folder (`StoredModel`), or the hub (`HubModel`).

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
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from pipelines.errors import ModelError
from pipelines.model_manifest import MANIFEST, FileEntry, Manifest, entries, sha256_of
from pipelines.model_weights import PICKLES, refuse_pickles, wanted
from pipelines.storage import ObjectInfo, Storage, VersionChanged

#: Files copied at once, and bytes of one request.
PARALLEL = 8
CHUNK = 32 << 20
#: Which of several safetensors files holds which weights.
INDEX = "model.safetensors.index.json"
#: Seconds for the hub to answer a question.
HUB_TIMEOUT_S = 15.0

Note = Callable[[int], None]
"""Called with the number of bytes that were copied."""


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


@dataclass
class HubModel:
    """A model of the Hugging Face hub. Its revision is a commit; huggingface_hub downloads and resumes."""

    source: str
    asked: str | None = None
    token: str | bool | None = None
    _info: Any = field(default=None, repr=False)

    @property
    def names(self) -> list[str]:
        return [file.rfilename for file in self._asked_hub().siblings or ()]

    def revision(self) -> str:
        return str(self._asked_hub().sha)

    def copy(self, folder: Path, *, weights: bool, note: Note) -> tuple[FileEntry, ...]:
        from huggingface_hub import snapshot_download

        info = self._asked_hub()
        siblings = {file.rfilename: file for file in info.siblings or ()}
        if weights:
            refuse_pickles(self.source, siblings)
        names = wanted(siblings, weights=weights)
        try:
            snapshot_download(
                self.source,
                revision=info.sha,
                local_dir=folder,
                allow_patterns=[_literal(name) for name in names],
                ignore_patterns=[f"*{ending}" for ending in PICKLES],
                token=self.token,
                max_workers=PARALLEL,
            )
        except Exception as error:  # whichever HTTP client huggingface_hub has, with errors of its own
            raise ModelError(
                f"model {self.source}: the hub did not give all of it: {_reason(error)}"
            ) from error
        found = entries(folder, names)
        for file in found:
            note(file.size)
            stored = siblings[file.name].lfs
            if stored is not None and stored.sha256 != file.sha256:
                (folder / file.name).unlink()
                raise ModelError(
                    f"model {self.source}: {file.name} came damaged (sha256 {file.sha256[:12]}…, the hub says "
                    f"{stored.sha256[:12]}…): pull it again"
                )
        return found

    def _asked_hub(self) -> Any:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        if self._info is None:
            try:
                self._info = HfApi(token=self.token).model_info(
                    self.source, revision=self.asked, timeout=HUB_TIMEOUT_S, files_metadata=True
                )
            except RevisionNotFoundError:
                raise ModelError(
                    f"model {self.source}: the hub has no revision {self.asked!r} of it"
                ) from None
            except RepositoryNotFoundError:
                raise ModelError(
                    f"model {self.source}: the hub has no such model, or hides it; for a private one set HF_TOKEN"
                ) from None
            except Exception as error:  # as above
                raise HubSilent(f"model {self.source}: the hub does not answer: {_reason(error)}") from error
        return self._info


class HubSilent(ModelError):
    """No network, or HF_HUB_OFFLINE: the hub can say nothing of the model."""


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


def _literal(name: str) -> str:
    """The file name as a pattern of fnmatch that matches nothing else."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
