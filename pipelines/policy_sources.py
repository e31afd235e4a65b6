"""What a job's engine would load files from, and whose code it would run: what `pipelines.policy` decides about."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from pipelines.model_weights import streams_weights
from pipelines.settings import ModelSettings

_DRAFTER = "model.engine.speculative_config.model"


def sources_of(model: ModelSettings) -> list[tuple[str, str]]:
    """(key, source) for everything that the engine would load files from."""
    engine = model.engine
    generation = engine.get("generation_config")
    given = [
        ("model.source", model.source),
        ("model.tokenizer", model.tokenizer),
        ("model.lora.source", model.lora.source if model.lora else None),
        ("model.engine.hf_config_path", engine.get("hf_config_path")),
        ("model.engine.generation_config", None if generation in ("auto", "vllm") else generation),
        ("model.engine.spec_model", engine.get("spec_model")),
        (_DRAFTER, _mapping(engine, "speculative_config").get("model")),
        *(
            (f"model.engine.default_mm_loras.{name}", source)
            for name, source in _mapping(engine, "default_mm_loras").items()
        ),
    ]
    return [(key, str(source)) for key, source in given if source]


def revision_of(key: str, model: ModelSettings) -> str | None:
    """The revision that a source of `sources_of` is loaded at; None where the job cannot say one, or does not."""
    if key in ("model.source", "model.engine.hf_config_path"):
        return model.revision
    if key == "model.tokenizer":
        return str(model.engine.get("tokenizer_revision") or model.revision or "") or None
    if key == "model.lora.source":
        return model.lora.revision if model.lora else None
    if key == _DRAFTER:
        return str(_mapping(model.engine, "speculative_config").get("revision") or "") or None
    return None


def trusts(model: ModelSettings) -> bool:
    """Whether a job asks for a model's own code anywhere."""
    drafter = _mapping(model.engine, "speculative_config")
    return bool(model.engine.get("trust_remote_code") or drafter.get("trust_remote_code"))


def plugins_of(model: ModelSettings) -> list[tuple[str, str]]:
    """(key, path) of the files of Python that the engine would run besides the model's own."""
    name, within = "reasoning_parser_plugin", "structured_outputs_config"
    given = [
        (f"model.engine.{name}", model.engine.get(name)),
        (f"model.engine.{within}.{name}", _mapping(model.engine, within).get(name)),
    ]
    return [(key, str(path)) for key, path in given if path]


def unreadable_problems(model: ModelSettings) -> list[str]:
    """Engine arguments that name sources in a form that cannot be looked into, one line each."""
    return [
        f"model.engine.{key}: must be a mapping"
        for key in ("speculative_config", "default_mm_loras", "structured_outputs_config")
        if model.engine.get(key) and not isinstance(model.engine[key], Mapping)
    ]


def evasive_problems(model: ModelSettings) -> list[str]:
    """Sources that would not be what their text says, one line each; for models that the policy restricts."""
    problems = []
    for key, source in sources_of(model):
        if ".." in source.split("/"):
            problems.append(f"{key}: {source} has a part `..`, which the platform's policy does not allow")
        elif not os.path.isabs(source) and "://" not in source and _is_folder(source):
            problems.append(
                f"{key}: {source} is a folder relative to the working directory; the platform's policy takes absolute "
                "paths, URLs and hub ids"
            )
    if trusts(model) and streams_weights(model.engine) and "://" in model.source:
        problems.append(
            "model.engine.load_format: with trust_remote_code the engine may not read a URL itself, unchecked; leave "
            "load_format out"
        )
    return problems


def _is_folder(source: str) -> bool:
    return source.startswith((".", "~")) or os.path.isdir(source)


def _mapping(engine: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    given = engine.get(key)
    return given if isinstance(given, Mapping) else {}
