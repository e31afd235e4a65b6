"""What a model's files say of images: whether it takes them, and the chat template that places them. No weights, no vLLM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.errors import ModelError, RowError, SpecError
from pipelines.image_turns import has_images, places_images, with_images
from pipelines.images import Image, ImageReader
from pipelines.messages import Message, Turns
from pipelines.model_folder import local_model
from pipelines.settings import ModelSettings
from pipelines.template import one_line
from pipelines.values import column_values

#: `ImageReader`'s images of each row that may have some, by its position.
Images = dict[int, list[Image]]


class Vision:
    """The images of a job's prompts, as far as its model takes any. `model` None: it takes none. `folder`: where the model is
    on this machine, if that is known."""

    def __init__(
        self,
        model: ModelSettings | None = None,
        reader: ImageReader | None = None,
        folder: Path | None = None,
    ) -> None:
        self._model, self._reader, self._folder = model, reader or ImageReader(), folder

    def check(self, key: str) -> None:
        """Raise SpecError where the job names images, at this key, for a model that takes none."""
        if not self.takes_images:
            source = self._model.source if self._model else ""
            raise SpecError(
                f"{key}: the model {source!r} takes no images, it has no preprocessor_config.json or processor_config.json; "
                "choose a vision-language model, or leave the key out"
            )

    @property
    def takes_images(self) -> bool:
        """Whether the model comes with a processor, which vLLM needs for whatever is no text."""
        return self._processor is not None

    @property
    def chat_template(self) -> str | None:
        """The processor's, which vLLM prefers to the tokenizer's; None where they have one between them."""
        template = (self._processor or {}).get("chat_template")
        return template if isinstance(template, str) else None

    def attach(
        self,
        table: pa.Table,
        column: str | None,
        asked: Sequence[Turns | RowError],
        render: Callable[[list[Message]], str],
    ) -> tuple[list[Turns | RowError], Images]:
        """(what each row asks, with a part in the place of each image; the images of rows that may have some).

        `column` holds images of the rows; `render` is the chat template. Rows whose images are none have the error in their place.
        """
        turns = list(asked)
        given = [None] * len(asked) if column is None else column_values(table, column)
        sources: dict[int, list[Any]] = {}
        for row, (turn, images) in enumerate(zip(asked, given, strict=True)):
            if isinstance(turn, RowError) or (column is None and not has_images(turn)):
                continue
            try:
                listed = None if column is None else _listed(images, column)
                turns[row], sources[row] = with_images(turn, listed, placed=self._places_images(render))
            except RowError as error:
                turns[row] = error
        found = dict(zip(sources, self._reader.read(list(sources.values())), strict=True))
        for row, outcome in found.items():
            if isinstance(outcome, RowError):
                turns[row] = outcome
        return turns, {row: images for row, images in found.items() if not isinstance(images, RowError)}

    def _places_images(self, render: Callable[[list[Message]], str]) -> bool:
        if not self.takes_images:
            raise RowError("bad_image", "the model takes no images")
        if self._placed is None:
            self._placed = places_images(render)
        return self._placed

    _placed: bool | None = None

    @cached_property
    def _processor(self) -> dict[str, Any] | None:
        if self._model is None:
            return None
        from transformers.processing_utils import ProcessorMixin
        from transformers.utils import cached_file

        model = (
            local_model(self._model, weights=False)
            if self._folder is None
            else self._model.model_copy(update={"source": str(self._folder), "revision": None})
        )
        engine = model.engine
        where = {
            "revision": model.revision,
            "cache_dir": engine.get("download_dir"),
            "token": engine.get("hf_token"),
        }
        try:
            found, _ = ProcessorMixin.get_processor_dict(model.source, **where)
            # A chat template alone is any model's; older ones describe their image processor in a file of its own.
            described = found.keys() - {"chat_template"} or cached_file(
                model.source,
                "preprocessor_config.json",
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_gated_repo=False,
                **where,
            )
        except Exception as error:  # whatever transformers and the hub's client raise
            raise ModelError(
                f"model {model.source!r}: its processor cannot be read: {one_line(error)}"
            ) from error
        return dict(found) if described else None


def _listed(images: Any, column: str) -> list[Any]:
    """A row's value as a list of images."""
    if isinstance(images, RowError):
        raise images
    if images is None:
        raise RowError("missing_value", f"column {column!r} is null")
    return images if isinstance(images, list) else [images]
