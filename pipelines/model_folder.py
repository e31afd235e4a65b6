"""Is this a model, and where is it on this machine? What can be told of `model.source` without loading anything."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from pipelines.engine_args import check_engine_args
from pipelines.errors import ModelError
from pipelines.model_cache import cached_model, pull
from pipelines.model_shape import cached, weight_names
from pipelines.model_weights import (
    check_load_format,
    check_weights,
    loads_weights,
    refuse_pickles,
    streams_weights,
)
from pipelines.settings import LoraSettings, ModelSettings

#: The weights of a LoRA adapter; vLLM would take a pickle in its place.
ADAPTER = "adapter_model.safetensors"
#: Endings of architectures that generate.
_GENERATE = ("ForCausalLM", "ForConditionalGeneration")
#: `name` or `owner/name`, as the Hugging Face hub allows them.
_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


def check_model(model: ModelSettings) -> None:
    """Raise ModelError for a source that is no model folder, URL or hub id, for weights that are pickles, and for unknown
    engine arguments. What is behind a URL or a hub id is looked at when its revision is pinned.
    """
    check_engine_args(model.engine)
    check_load_format(model.engine)
    if model.lora is not None and os.path.isabs(model.lora.source):
        check_adapter(model.lora.source, Path(model.lora.source))
    source = model.source
    if not os.path.isabs(source):
        if "://" in source:
            return
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
    _check_folder(model, Path(source))


def _check_folder(model: ModelSettings, folder: Path) -> None:
    if model.backend == "vllm":
        check_weights(model.source, (path.name for path in folder.iterdir()), model.engine)
        if model.engine.get("convert") == "classify" and loads_weights(model.engine):
            _check_head(model, folder)


def _check_head(model: ModelSettings, folder: Path) -> None:
    """Of a model that generates vLLM makes a classifier with the weights `score`. Where there are none, 0.32 leaves the head as
    the memory was, without a word."""
    config = json.loads((folder / "config.json").read_bytes())
    overrides = model.engine.get("hf_overrides") or {}
    architectures = {**config, **overrides}.get("architectures") or ()
    generates = any(name.endswith(_GENERATE) for name in architectures)
    config = {**config, **(config.get("text_config") or {}), **overrides}
    made = {"classifier_from_token", "method"} & config.keys()  # of the language model's own head
    names = weight_names(folder)
    if generates and names and not made and not any("score" in name.split(".") for name in names):
        raise ModelError(
            f"model.engine.convert: {model.source} has no head to classify by: there are no weights named `score` in its "
            "checkpoint; choose a classifier"
        )


def local_model(model: ModelSettings, *, weights: bool) -> ModelSettings:
    """The same model as folders of this machine, copied into its cache first where the source is a URL.

    Hub ids become folders only where `dray models pull` has brought them; others are left to the hub's own cache.
    `weights` False: only what a tokenizer needs. Raises ModelError, StorageError.
    """
    full = weights and loads_weights(model.engine)
    update: dict[str, Any] = {}
    if not (weights and streams_weights(model.engine)):
        folder = _folder_of(model.source, model.revision, model, weights=full)
        if folder is not None:
            update = {"source": str(folder), "revision": None}
    elif model.tokenizer is None and "://" in model.source:
        update["tokenizer"] = str(_folder_of(model.source, model.revision, model, weights=False))
    if model.tokenizer is not None:
        revision = model.engine.get("tokenizer_revision") or model.revision
        folder = _folder_of(model.tokenizer, revision, model, weights=False)
        if folder is not None:
            update["tokenizer"] = str(folder)
    if weights and model.lora is not None:
        update["lora"] = _local_adapter(model.lora, model)
    local = model.model_copy(update=update)
    if full and os.path.isdir(local.source):
        _check_folder(local, Path(local.source))
    return local


def folder_at_hand(model: ModelSettings) -> Path | None:
    """Where the model's configuration is on this machine, all of it; None where only a store or the hub could tell."""
    if os.path.isabs(model.source):
        folder = Path(model.source)
        return folder if (folder / "config.json").is_file() else None
    found = cached_model(model.source, model.revision, model.storage_options, weights=False) or cached_model(
        model.source, asked=model.revision, weights=False
    )
    if found is not None or "://" in model.source:
        return found[0] if found else None
    snapshot = cached(model.source, model)
    # The hub's cache has a file when somebody has asked for it: where the weights are, the others are.
    return snapshot if snapshot is not None and any(snapshot.glob("*.safetensors")) else None


def _local_adapter(lora: LoraSettings, model: ModelSettings) -> LoraSettings:
    """As a folder, from the hub too: vLLM itself would take a pickle from there."""
    folder = Path(lora.source)
    if not folder.is_absolute():
        folder, _ = pull(
            lora.source, lora.revision, model.storage_options, token=model.engine.get("hf_token")
        )
    check_adapter(lora.source, folder)
    return lora.model_copy(update={"source": str(folder), "revision": None})


def check_adapter(source: str, folder: Path) -> None:
    """Raise ModelError for a folder that is no LoRA adapter, or whose weights are a pickle."""
    if not (folder / "adapter_config.json").is_file():
        raise ModelError(f"model.lora.source: {source} is no LoRA adapter: it has no adapter_config.json")
    refuse_pickles(source, (path.name for path in folder.iterdir()))
    if not (folder / ADAPTER).is_file():
        raise ModelError(f"model.lora.source: {source} is no LoRA adapter: it has no {ADAPTER}")


def lora_rank(folder: Path) -> int:
    """The rank of a LoRA adapter. Raises ModelError for a configuration that does not tell."""
    try:
        return int(json.loads((folder / "adapter_config.json").read_bytes())["r"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"model.lora.source: {folder}/adapter_config.json gives no rank `r`: {error}"
        ) from None


def _folder_of(source: str, revision: str | None, model: ModelSettings, *, weights: bool) -> Path | None:
    """None: the source is taken as it is."""
    if "://" in source:
        return pull(source, revision, model.storage_options, weights=weights)[0]
    if os.path.isabs(source):
        return None
    found = cached_model(source, revision, model.storage_options, weights=weights) or cached_model(
        source, asked=revision, weights=weights
    )
    return found[0] if found else None
