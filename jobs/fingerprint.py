"""The fingerprint of a job: a digest of everything that changes a row's answer or the columns it is written in.

Taken of the validated job, so that a default and the same value written out are equal, with one difference: values
that mention run variables count as written (`${run.date}`), or each day's run would be another job. What only changes
where and how fast a job runs (pool, cluster, errors, storage, names and paths of data) is left out.

Keys that are null or empty are left out, so that a later Dray can add keys without disowning older outputs.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from jobs.loading import LoadedJob
from jobs.references import is_secret_name
from pipelines.code import digest_of_package
from pipelines.contracts import FORMAT_VERSION
from pipelines.engine_args import RESULT_NEUTRAL_ARGS
from pipelines.errors import ModelError
from pipelines.settings import ModelSettings
from pipelines.step_settings import StepSettings

#: Of these sections, the keys that change what is written; None: all of them.
_COUNTED: dict[str, frozenset[str] | None] = {
    "input": frozenset({"columns", "filter", "format", "id_column"}),
    "prompt": None,
    "model": frozenset({"source", "revision", "tokenizer", "backend", "engine", "lora"}),
    "sampling": None,
    "output": frozenset({"columns", "rename", "failed_rows", "provenance", "conversation"}),
}

#: (section, key) of values whose keys count in their order: that of a column's fields, and that of the prompt's text.
_ORDERED = (("sampling", "output_schema"), ("prompt", "tools"))
#: Keys of steps that name the columns which these add: of `parse`, `map` and `gather`.
_ADDS = ("json", "xml", "adds", "columns")

_SMALL_FILES = frozenset({".json", ".jinja", ".model", ".txt", ".tiktoken", ".spm", ".vocab"})
_WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf"})
_HASHED_WHOLE = 64 << 20
_SAMPLED = 1 << 20


def identity(job: LoadedJob, folders: Sequence[str] = ()) -> dict[str, Any]:
    """What the fingerprint covers, by dotted key: JSON values, fit for storing.

    A value that came from an environment variable is given as its reference and a digest. `folders` are the user's
    own, for `prompt.function`. Raises SpecError for a function that cannot be found, ModelError for a model folder
    that cannot be read.
    """
    found: dict[str, Any] = {"format_version": FORMAT_VERSION}
    for section, counted in _COUNTED.items():
        if section != "model":
            settings = getattr(job.spec, section)
            values = {} if settings is None else settings.model_dump(mode="json")
            for key in counted if counted is not None else values:
                _add(found, (section, key), values[key], job)
    for key, model in job.spec.models.items():
        found |= model_identity(key, model, job)
    if job.spec.reuse.equal_prompts == "all":  # the others give each row an answer that it might have alone
        found["reuse.equal_prompts"] = "all"
    if job.spec.steps:
        found["steps"] = [_step_identity(step) for step in job.spec.steps]
    for key, function in job.spec.functions.items():
        found[f"{key} code"] = digest_of_package(function.partition(":")[0], folders)
    return dict(sorted(found.items()))


def model_identity(key: str, model: ModelSettings, job: LoadedJob) -> dict[str, Any]:
    """A model's part of an `identity`; `key` is where it stands in the job file."""
    found: dict[str, Any] = {}
    values = model.model_dump(mode="json")
    for name in _COUNTED["model"] or ():
        _add(found, (*key.split("."), name), values[name], job)
    for name in RESULT_NEUTRAL_ARGS:
        neutral = f"{key}.engine.{name}"
        found = {k: value for k, value in found.items() if k != neutral and not k.startswith(f"{neutral}.")}
    if model.backend == "simulated":
        found[f"{key}.simulated"] = [model.simulated.min_tokens, model.simulated.max_tokens]
        _add(found, (*key.split("."), "simulated", "prefix"), model.simulated.prefix or None, job)
    for name in ("source", "tokenizer"):
        place = getattr(model, name)
        if place is not None and os.path.isabs(place):  # `load` made local folders absolute
            trusted = bool(model.engine.get("trust_remote_code"))
            found[f"{key}.{name}"] = _folder(place, code=trusted)
    if model.lora is not None and os.path.isabs(model.lora.source):
        found[f"{key}.lora.source"] = _folder(model.lora.source)
    return found


def _folder(place: str, *, code: bool = False) -> dict[str, str]:
    return {"folder": os.path.basename(place), "sha256": digest_of_model(place, code=code)}


def _step_identity(step: StepSettings) -> dict[str, Any]:
    """A step, without what is said of its model elsewhere, and without how it is run."""
    hidden = {step.kind: {"model", "pool"}} if step.asks is not None else None
    values = step.model_dump(mode="json", by_alias=True, exclude_defaults=True, exclude=hidden)
    for settings, key in _ordered(values):
        settings[key] = json.dumps(settings[key])
    return values


def _ordered(step: Mapping[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """Where a step's values have keys whose order counts: in an identity they stand as text."""
    settings = [value for value in step.values() if isinstance(value, dict)]
    sections = [(one.get(section) or {}, key) for one in settings for section, key in _ORDERED]
    # What a step adds, by name, is written in that order; `columns` of other steps are lists.
    added = [(one, key) for one in settings for key in _ADDS if isinstance(one.get(key), dict | str)]
    return [(section, key) for section, key in sections if key in section] + added


def steps_of(identity: Mapping[str, Any]) -> tuple[StepSettings, ...]:
    """The steps in an `identity`."""
    steps = deepcopy(list(identity.get("steps", ())))
    for step in steps:
        for settings, key in _ordered(step):
            settings[key] = json.loads(settings[key])
    return tuple(StepSettings.model_validate(step) for step in steps)


def output_schema_of(identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """`sampling.output_schema` in an `identity`."""
    found = identity.get("sampling.output_schema")
    schema: dict[str, Any] | None = None if found is None else json.loads(found)
    return schema


def fingerprint(of: Mapping[str, Any]) -> str:
    """16 hex digits over an `identity`."""
    comparable = {key: _comparable(value) for key, value in of.items()}
    return hashlib.sha256(json.dumps(comparable, sort_keys=True).encode()).hexdigest()[:16]


def explain_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`sampling.temperature: 0.0 → 0.7` for each key in which two identities differ."""
    differing = [
        (key, old.get(key), new.get(key))
        for key in sorted({*old, *new})
        if _comparable(old.get(key)) != _comparable(new.get(key))
    ]
    return [f"{key}: {_shown(a, b)} → {_shown(b, a)}" for key, a, b in differing]


def digest_of_model(folder: str | os.PathLike[str], *, code: bool = False) -> str:
    """16 hex digits over a local model folder: names and contents of its configuration, tokenizer and weights.

    Weight files above 64 MiB count by size and by a MiB each from their beginning, middle and end: reading 15 GB takes
    longer than planning should, and training moves every tensor. Times do not count: a copy is the same model. Python
    files count where the model may run its own `code`. Raises ModelError.
    """
    place = Path(folder)
    suffixes = _SMALL_FILES | _WEIGHTS | ({".py"} if code else frozenset())
    digest = hashlib.sha256()
    try:
        inside = [*place.iterdir(), *place.glob("additional_chat_templates/*")]
        for path in sorted(path for path in inside if path.suffix in suffixes and path.is_file()):
            name = path.relative_to(place).as_posix()
            digest.update(f"{name}\0{_digest_of_file(path)}\n".encode())
    except FileNotFoundError:
        raise ModelError(f"model.source: there is no folder {place}") from None
    except OSError as error:
        raise ModelError(f"model.source: {place} cannot be read: {error.strerror}") from None
    return digest.hexdigest()[:16]


def _digest_of_file(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if path.suffix not in _WEIGHTS or size <= _HASHED_WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(str(size).encode())
        for start in (0, size // 2, size - _SAMPLED):
            file.seek(start)
            digest.update(file.read(_SAMPLED))
    return digest.hexdigest()


def _add(found: dict[str, Any], key: tuple[str, ...], value: Any, job: LoadedJob) -> None:
    if key in _ORDERED and value is not None:
        found[".".join(key)] = json.dumps(job.unfilled.get(key, value))
        return
    if isinstance(value, dict) and key not in job.unfilled:
        for name, item in value.items():
            _add(found, (*key, name), item, job)
        return
    value = job.unfilled.get(key, value)
    if value is None:
        return
    if key in job.referenced or is_secret_name(key[-1]):
        secret = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
        value = {"reference": job.referenced.get(key), "sha256": secret}
    found[".".join(key)] = value


def _comparable(value: Any) -> Any:
    """What a digest stands for counts, not the reference or the folder's name that stands next to it."""
    return {"sha256": value["sha256"]} if isinstance(value, dict) and "sha256" in value else value


def _shown(value: Any, other: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, dict) and "sha256" in value:
        what = value.get("reference") or value.get("folder") or "a secret"
        return f"{what} (content {value['sha256'][:8]})"
    text = json.dumps(value, ensure_ascii=False)
    if len(text) > 60 and isinstance(value, str) and isinstance(other, str):
        # Long prompts are shown from where they part.
        pairs = zip(text, json.dumps(other, ensure_ascii=False), strict=False)
        common = next((place for place, (a, b) in enumerate(pairs) if a != b), 0)
        text = ("…" if common > 20 else "") + text[max(0, common - 20) :]
    return text if len(text) <= 60 else text[:59] + "…"
