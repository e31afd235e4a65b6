"""Which files of a model are read, and which are never: safetensors, no pickles.

A pickle runs code when it is loaded, so a checkpoint of nothing but pickles is refused before any engine starts, and
pickles beside safetensors are not even downloaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pipelines.errors import ModelError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
#: Endings of files that hold weights, or could.
WEIGHTS = (".safetensors", ".gguf", *PICKLES)
#: Weights for other engines.
_FOREIGN = (".h5", ".msgpack", ".onnx", ".onnx_data", ".tflite", ".ot")
#: Values of `model.engine.load_format` that read pickles.
_PICKLE_FORMATS = ("pt", "npcache")


def load_format(engine: Mapping[str, Any]) -> str:
    """`load_format` of engine arguments (or of a `draft_load_config`) as vLLM reads it: in small letters, `auto` by default."""
    return str(engine.get("load_format") or "auto").lower()


def loads_weights(engine: Mapping[str, Any]) -> bool:
    """Whether the engine reads weights at all: not with `load_format: dummy`."""
    return load_format(engine) != "dummy"


def streams_weights(engine: Mapping[str, Any]) -> bool:
    """Whether vLLM itself reads the weights from the object store (`load_format: runai_streamer…`)."""
    return load_format(engine).startswith("runai_streamer")


def check_load_format(engine: Mapping[str, Any]) -> None:
    """Raise ModelError for a `load_format` that reads pickles, the draft model's too."""
    _refuse_pickle_format("model.engine", engine)
    drafter = engine.get("speculative_config")
    draft = drafter.get("draft_load_config") if isinstance(drafter, Mapping) else None
    if isinstance(draft, Mapping):
        _refuse_pickle_format("model.engine.speculative_config.draft_load_config", draft)


def _refuse_pickle_format(key: str, given: Mapping[str, Any]) -> None:
    if load_format(given) in _PICKLE_FORMATS:
        raise ModelError(
            f"{key}.load_format: {given['load_format']!r} reads pickle files, which run code when they are loaded; leave "
            "it out and give a model with safetensors"
        )


def check_weights(source: str, names: Iterable[str], engine: Mapping[str, Any]) -> None:
    """Raise ModelError for a checkpoint whose only weights are pickles, by its file names."""
    check_load_format(engine)
    if loads_weights(engine):
        refuse_pickles(source, names)


def refuse_pickles(source: str, names: Iterable[str]) -> None:
    """Raise ModelError where there are pickles and no safetensors (or GGUF) file among `names`."""
    listed = sorted(names)
    pickles = [name for name in listed if name.endswith(PICKLES)]
    if pickles and not any(name.endswith((".safetensors", ".gguf")) for name in listed):
        raise ModelError(
            f"model {source}: its weights are pickles ({pickles[0]}), which run code when they are loaded, and there is "
            "no safetensors file: convert it (transformers' `save_pretrained` writes safetensors), or choose another model"
        )


def wanted(names: Iterable[str], *, weights: bool) -> list[str]:
    """The files to copy, sorted: no pickles, nothing hidden, no weights for other engines; `weights` False: none at all."""
    skipped = (*PICKLES, *_FOREIGN) if weights else (*WEIGHTS, *_FOREIGN)
    return sorted(
        name
        for name in names
        if not name.endswith(skipped) and not any(part.startswith(".") for part in name.split("/"))
    )
