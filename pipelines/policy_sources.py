"""What a job's engine would load files from, and whose code it would run: what `pipelines.policy` decides about."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from pipelines.model_weights import load_format, streams_weights
from pipelines.settings import ModelSettings

_DRAFTER = "model.engine.speculative_config.model"
_DRAFT_LOAD = "model.engine.speculative_config.draft_load_config"
_EXTRA = "model_loader_extra_config"
_PLUGIN = "reasoning_parser_plugin"

#: Where vLLM imports what a job names (`resolve_obj_by_qualname` and `import_module` in vLLM 0.26 and 0.32), and at any depth below:
#: an import path has a mark; names without one are torch's and vLLM's own. worker_cls, scheduler_cls, backpressure_cls … end in `_cls`.
_CODE = frozenset(
    {
        "backend",  # of compilation_config
        "distributed_executor_backend",
        "inductor_passes",
        "logits_processors",
        "model_class_overrides",
        "policy",  # of a tier of kv_transfer_config
    }
)
_MARKS = ".:/"
#: Files that are unpickled, or say what is called: any text names one.
_FILES = frozenset(
    {
        "cache_dir",  # of compilation_config: compiled graphs
        "log_config_file",  # `logging.config.dictConfig`, whose factories are any callable
        "pylogging_config_file",
    }
)
#: torch's settings, of which some name programs to run (`cpp.cxx`) and folders to run them from: none may be text.
_COMPILER = "inductor_compile_config"
#: What the model's own configuration and its processor are told: no names of classes.
_NO_CODE_BELOW = frozenset({"hf_overrides", "mm_processor_kwargs", "override_generation_config"})
#: What `plugins_of` tells of.
_PLUGINS = ((_PLUGIN,), ("structured_outputs_config", _PLUGIN))


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
        ("model.engine.mm_encoder_fp8_scale_path", engine.get("mm_encoder_fp8_scale_path")),
        *((key, None if _is_proposer(model) else drafter) for key, drafter in _drafters(engine)),
        # what lies there passes for the hub's
        *((f"{at}.download_dir", load.get("download_dir")) for at, load in _loads(engine)),
        *(
            (key, text)
            for key, text in _extra_texts(engine)
            if key.endswith((".tensorizer_uri", ".tensorizer_dir"))
        ),
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
    within = "structured_outputs_config"
    given = [
        (f"model.engine.{_PLUGIN}", model.engine.get(_PLUGIN)),
        (f"model.engine.{within}.{_PLUGIN}", _mapping(model.engine, within).get(_PLUGIN)),
    ]
    return [(key, str(path)) for key, path in given if path]


def imports_of(model: ModelSettings) -> list[tuple[str, str]]:
    """(key, name) of whatever else the engine would import or unpickle because the job names it, vLLM's own code aside.

    A name is an import path (`acme.workers.Worker`, `acme.logits:Bias`), an installed plugin's, or the path of a file or folder.
    """
    found = [
        (".".join(("model.engine", *keys)), text)
        for keys, text in _texts(model.engine)
        if _may_name_code(keys) and any(_is_code(_as_read(key), text) for key in keys)
    ]
    if _is_proposer(model):
        found += [(key, str(drafter)) for key, drafter in _drafters(model.engine) if drafter]
    return found


def names_file(key: str) -> bool:
    """Whether what `imports_of` found at this key is a file or folder, with a slash or without."""
    return any(_as_read(part) in _FILES for part in key.split("."))


def _texts(given: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """(the keys that lead there, text) for every text in engine arguments; an element of a list has its list's keys."""
    if isinstance(given, Mapping):
        for name, value in given.items():
            yield from _texts(value, (*keys, str(name)))
    elif isinstance(given, (list, tuple, set, frozenset)):
        for element in given:
            yield from _texts(element, keys)
    elif isinstance(given, str):
        yield keys, given
    elif callable(given):  # a job may be given from Python
        yield keys, f"{given.__module__}.{given.__qualname__}"


def _may_name_code(keys: tuple[str, ...]) -> bool:
    return keys[0] not in _NO_CODE_BELOW and tuple(map(_as_read, keys)) not in _PLUGINS


def _is_code(key: str, text: str) -> bool:
    """Whether a text at or below a key is code of somebody else's: vLLM's own, and the short names that it knows, are not."""
    if not text:
        return False
    if key in _FILES or key == _COMPILER or key.endswith("_plugin"):
        return True
    if text.startswith(("vllm.", "vllm:")):
        return False
    if key.endswith("module_path"):  # kv_connector_module_path, spec_module_path …: a module needs no dot
        return True
    return (key in _CODE or key.endswith("_cls")) and any(mark in text for mark in _MARKS)


def _as_read(key: str) -> str:
    """A key as vLLM reads it."""
    return key.replace("-", "_")


def _drafters(engine: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [
        ("model.engine.spec_model", engine.get("spec_model")),
        (_DRAFTER, _mapping(engine, "speculative_config").get("model")),
    ]


def _loads(engine: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """(key, arguments) of what says how weights are loaded: the engine's own, and the draft model's, which replace them."""
    drafter = _mapping(engine, "speculative_config")
    return [("model.engine", engine), (_DRAFT_LOAD, _mapping(drafter, "draft_load_config"))]


def _extra_texts(engine: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, text) of all that the loaders of weights are told; tensorizer's keys may lie deeper, in its `tensorizer_config`."""
    for at, load in _loads(engine):
        for keys, text in _texts(_mapping(load, _EXTRA)):
            yield ".".join((at, _EXTRA, *keys)), text


def _is_proposer(model: ModelSettings) -> bool:
    """Whether the draft "model" is a class that vLLM imports, as `SpeculativeConfig.__post_init__` decides it."""
    engine = model.engine
    method = engine.get("spec_method") or _mapping(engine, "speculative_config").get("method")
    if method:
        return bool(method == "custom_class")
    names = [str(drafter).split(".") for _, drafter in _drafters(engine) if drafter]
    return any(len(parts) > 1 and all(part.isidentifier() for part in parts) for parts in names)


def unreadable_problems(model: ModelSettings) -> list[str]:
    """Engine arguments that name sources in a form that cannot be looked into, one line each."""
    engine = model.engine
    given = [
        *(
            (f"model.engine.{key}", engine.get(key))
            for key in ("speculative_config", "default_mm_loras", "structured_outputs_config")
        ),
        (_DRAFT_LOAD, _mapping(engine, "speculative_config").get("draft_load_config")),
        *((f"{at}.{_EXTRA}", load.get(_EXTRA)) for at, load in _loads(engine)),
    ]
    return [f"{key}: must be a mapping" for key, value in given if value and not isinstance(value, Mapping)]


def obscure_problems(model: ModelSettings) -> list[str]:
    """Engine arguments in which code could hide, one line each; where a policy is in force."""
    problems = [
        f"{'.'.join(('model.engine', *keys))}: must be a mapping, not its text, under the platform's policy"
        for keys, text in _texts(model.engine)
        if text.lstrip("[ \t\r\n").startswith("{") and (len(keys) == 1 or _may_name_code(keys))
    ]
    overrides = model.engine.get("hf_overrides")
    if overrides and not isinstance(overrides, (Mapping, str)):
        problems.append("model.engine.hf_overrides: must be a mapping under the platform's policy")
    # whoever answers at the socket sends weights, and pickles
    sockets = [f"{at}.load_format" for at, load in _loads(model.engine) if load_format(load) == "ipc_cache"]
    sockets += [key for key, _ in _extra_texts(model.engine) if key.endswith((".socket_path", ".socket_dir"))]
    problems += [
        f"{key}: a cache of weights (ipc_cache) may send other weights than the model's, and code, which the platform's "
        "policy does not allow; leave it out"
        for key in sockets
    ]
    return problems


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
    for key, text in _extra_texts(model.engine):
        # of `load_format: sharded_state`, joined to the model's folder
        if key.endswith(".pattern") and (os.path.isabs(text) or ".." in text.split("/")):
            problems.append(
                f"{key}: {text} leads out of the model's folder, which the platform's policy does not allow"
            )
        if key.endswith((".s3_endpoint", ".s3_config_path")):
            problems.append(
                f"{key}: not allowed under the platform's policy, it may choose another store; leave it out"
            )
    loaded = (model.source, *(str(drafter) for _, drafter in _drafters(model.engine)))
    if trusts(model) and any("://" in source for source in loaded):
        problems += [
            f"{at}.load_format: with trust_remote_code the engine may not read a URL itself, unchecked; leave load_format out"
            for at, load in _loads(model.engine)
            if streams_weights(load)
        ]
    return problems


def foreign_code_problems(model: ModelSettings) -> list[str]:
    """Where trusted code would be taken from elsewhere than the trusted source and revision, one line each."""
    engine, drafter = model.engine, _mapping(model.engine, "speculative_config")
    processor = _mapping(engine, "mm_processor_kwargs")
    revisions = [
        ("code_revision", engine.get("code_revision"), model.revision, "model.revision"),
        (
            "mm_processor_kwargs.code_revision",
            processor.get("code_revision"),
            model.revision,
            "model.revision",
        ),
        (
            "speculative_config.code_revision",
            drafter.get("code_revision"),
            drafter.get("revision"),
            "its revision",
        ),
    ]
    problems = [
        f"model.engine.{key}: code is only trusted of {of}; leave it out"
        for key, given, revision, of in revisions
        if given not in (None, revision)
    ]
    if processor.get("cache_dir"):
        problems.append(
            "model.engine.mm_processor_kwargs.cache_dir: may hold other code than the trusted; leave it out"
        )
    if _names_code_map(engine.get("hf_overrides")):
        problems.append(
            "model.engine.hf_overrides: an `auto_map` may name code of another model; code is only trusted of the model "
            "that models.trust_remote_code of the platform's policy names; leave it out"
        )
    return problems


def _names_code_map(overrides: Any) -> bool:
    """Whether `auto_map` stands anywhere in overrides of a model's configuration; it says which module is whose class."""
    if not isinstance(overrides, Mapping):
        return False
    return "auto_map" in overrides or any(_names_code_map(value) for value in overrides.values())


def _is_folder(source: str) -> bool:
    return source.startswith((".", "~")) or os.path.isdir(source)


def _mapping(engine: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """An engine argument that is a mapping, its keys as vLLM reads them: `a-b` of a speculative_config is `a_b`."""
    given = engine.get(key)
    return {_as_read(str(name)): value for name, value in given.items()} if isinstance(given, Mapping) else {}
