"""A model of the Hugging Face hub: its revision, its files, and how they come into a folder (`pipelines.model_source`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.errors import ModelError
from pipelines.model_manifest import FileEntry, entries
from pipelines.model_weights import PICKLES, refuse_pickles, wanted

#: Files copied at once.
PARALLEL = 8
#: Seconds for the hub to answer a question.
HUB_TIMEOUT_S = 15.0

Note = Callable[[int], None]
"""Called with the number of bytes that were copied."""


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


def _literal(name: str) -> str:
    """The file name as a pattern of fnmatch that matches nothing else."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
