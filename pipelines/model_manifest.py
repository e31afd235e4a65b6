"""`dray-model.json`: what a model consists of, file by file. Written last, so that its presence means a whole model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelines.errors import ModelError

MANIFEST = "dray-model.json"
_FORMAT = 1
_BLOCK = 4 << 20


class NewerManifest(ModelError):
    """A manifest of a later Dray: its model may be whole, so nobody may take it away."""


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One file of a model."""

    name: str
    """Relative to the model's folder, with `/` between its parts."""
    size: int
    """Bytes."""
    sha256: str
    """64 hex digits."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All files of a model, and where they came from."""

    source: str
    """A hub id, a URL or a local folder."""
    revision: str | None
    """A hub commit, or `revision_of` a stored model."""
    asked: str | None = None
    """The revision that was asked for, such as `main`."""
    files: tuple[FileEntry, ...] = ()
    pulled_at: float = 0.0
    """Unix time."""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def digest(self) -> str:
        """`sha256:` and 64 hex digits over names and contents; the same wherever the model lies."""
        lines = [f"{file.name}\0{file.sha256}\n" for file in sorted(self.files, key=lambda file: file.name)]
        return f"sha256:{hashlib.sha256(''.join(lines).encode()).hexdigest()}"

    def to_json(self) -> bytes:
        return json.dumps({"format": _FORMAT, **asdict(self)}, indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes, where: str) -> Manifest:
        """Raises ModelError, naming `where` it stands, for what is no manifest or has unsafe names; NewerManifest."""
        try:
            tree: dict[str, Any] = json.loads(data)
            written = int(tree.pop("format"))
            if written > _FORMAT:
                raise NewerManifest(f"{where}: written by a newer Dray; upgrade this one")
            manifest = cls(**{**tree, "files": tuple(FileEntry(**file) for file in tree["files"])})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ModelError(
                f"{where}: not a model's manifest ({error}); make it with `dray models pull`"
            ) from None
        for file in manifest.files:
            if file.name.startswith("/") or ".." in file.name.split("/"):
                raise ModelError(f"{where}: the file name {file.name!r} leads out of the model's folder")
        return manifest


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder; None where there is none. Raises as `Manifest.from_json`, and OSError."""
    try:
        data = (folder / MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return Manifest.from_json(data, str(folder / MANIFEST))


def is_whole(folder: Path, manifest: Manifest) -> bool:
    """Whether every file is there in its full size: a look, not a reading (`damaged` reads)."""
    try:
        return all((folder / file.name).stat().st_size == file.size for file in manifest.files)
    except OSError:
        return False


def damaged(folder: Path, manifest: Manifest) -> list[str]:
    """What is wrong with each file that is not as the manifest says, after reading all of them."""
    found = []
    for file in manifest.files:
        path = folder / file.name
        try:
            digest = sha256_of(path)
        except OSError as error:
            found.append(f"{file.name}: {error.strerror or error}")
            continue
        if digest != file.sha256:
            found.append(
                f"{file.name}: its content has sha256 {digest[:12]}…, the manifest {file.sha256[:12]}…"
            )
    return found


def sha256_of(path: Path) -> str:
    """64 hex digits over a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def entries(folder: Path, names: Iterable[str]) -> tuple[FileEntry, ...]:
    """Entries for files of a folder; reads all of them."""
    return tuple(
        FileEntry(name=name, size=(folder / name).stat().st_size, sha256=sha256_of(folder / name))
        for name in names
    )
