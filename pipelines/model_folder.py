"""Is this a model? What can be told of `model.source` without loading anything."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from pipelines.engine_args import check_engine_args
from pipelines.errors import ModelError
from pipelines.settings import ModelSettings

#: `name` or `owner/name`, as the Hugging Face hub allows them.
_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


def check_model(model: ModelSettings) -> None:
    """Raise ModelError for a source that is no model folder and no hub id, and for unknown engine arguments."""
    check_engine_args(model.engine)
    source = model.source
    if not os.path.isabs(source):
        if "://" in source:
            raise ModelError(
                f"model.source: {source}: models are loaded from a hub id or a local folder; copy it to one first"
            )
        if not _HUB_ID.fullmatch(source):
            raise ModelError(
                f"model.source: {source!r} is neither a folder nor a hub id such as Qwen/Qwen2.5-7B-Instruct"
            )
        return
    config = Path(source) / "config.json"
    if not Path(source).is_dir():
        raise ModelError(f"model.source: there is no folder {source}")
    try:
        json.loads(config.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"model.source: {source} is no model: it has no config.json") from None
    except ValueError as error:
        raise ModelError(f"model.source: {config} is not JSON: {error}") from None
