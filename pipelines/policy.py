"""The platform's policy: what jobs may do on these machines. A YAML file that `DRAY_POLICY` names and no job overrides.

    models:
      allow: [Qwen/*, "s3://models/*"]           # fnmatch, over the model and whatever else the job loads
      trust_remote_code:
        - {source: acme/own-arch, revision: 4f0c…}
    pool:    {max_engines: 32, max_gpus: 64}
    outputs: {allow: ["s3://team-out/"]}
    storage: {endpoints: ["https://minio.example"]}

Read anew at each check: on the driver when a job is loaded, and for its model by every worker, under the worker's own
environment. A file that cannot be read, or has a key that is not known, allows nothing: it is an error.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar

import yaml
from pydantic import Field, PositiveInt, ValidationError

from pipelines.errors import DrayError, SpecError
from pipelines.policy_sources import (
    evasive_problems,
    foreign_code_problems,
    imports_of,
    names_file,
    obscure_problems,
    plugins_of,
    revision_of,
    sources_of,
    trusts,
    unreadable_problems,
)
from pipelines.settings import ModelSettings, PoolSettings, Settings, Text
from pipelines.storage import locate

VARIABLE = "DRAY_POLICY"
#: Storage options that say who asks, not which store.
_OF_CREDENTIALS = frozenset({"profile", "anon", "key", "secret", "token"})


class TrustedCode(Settings):
    """A model that may run code of its own."""

    source: Text
    """The model's source, the path of a parser's plugin, or what an engine argument imports (`acme.workers.Worker`), in full: no pattern."""
    revision: Text | None = None
    """The job's `model.revision` must be this one: a commit, or the `sha256:…` of a URL's. Only a local folder or plugin and what is
    imported, which the platform keeps itself, go without."""


class ModelsPolicy(Settings):
    """Which models."""

    allow: list[Text] | None = None
    """Patterns of fnmatch over hub ids, folders and URLs; null: any."""
    trust_remote_code: list[TrustedCode] = Field(default_factory=list)
    """Models whose own code may run, plugins of parsers, and what engine arguments may import."""


class PoolPolicy(Settings):
    """How large a pool."""

    max_engines: PositiveInt | None = None
    """Most engines of one job."""
    max_gpus: Annotated[int, Field(ge=0)] | None = None
    """Most GPUs of one job."""


class OutputsPolicy(Settings):
    """Where jobs may write."""

    allow: list[Text] | None = None
    """Folders and URLs: an output is one of them or lies below one. null: anywhere."""


class StoragePolicy(Settings):
    """Which stores, where `models` or `outputs` allow only some: a bucket's name says nothing of who serves it."""

    endpoints: list[Text] = Field(default_factory=list)
    """What `storage_options.endpoint_url` may be; the AWS variables and profiles of the machine are always allowed."""


class Policy(Settings):
    """All of it; an empty one allows everything but code: a model's own, plugins of its parsers, and what engine arguments import."""

    forbids_imports: ClassVar[bool] = True
    """Whether code that engine arguments name has to be in `models.trust_remote_code`."""
    models: ModelsPolicy = ModelsPolicy()
    """Which models."""
    pool: PoolPolicy = PoolPolicy()
    """How large a pool."""
    outputs: OutputsPolicy = OutputsPolicy()
    """Where jobs may write."""
    storage: StoragePolicy = StoragePolicy()
    """Which stores."""


class NoPolicy(Policy):
    """What holds where `DRAY_POLICY` is not set: an empty policy, under which engine arguments may import what they like."""

    forbids_imports: ClassVar[bool] = False


def read_policy() -> Policy:
    """The policy of this process. Raises SpecError for one that cannot be read or understood."""
    place = os.environ.get(VARIABLE)
    if not place:
        return NoPolicy()
    try:
        storage, name = locate(place)
        tree = yaml.safe_load(storage.read(name))
    except (DrayError, OSError, ValueError, yaml.YAMLError) as error:
        reason = (
            "there is no such file" if isinstance(error, FileNotFoundError) else " ".join(str(error).split())
        )
        raise SpecError(
            f"{VARIABLE}: {place}: the platform's policy cannot be read: {reason[:300]}"
        ) from None
    try:
        return Policy.model_validate({} if tree is None else tree)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the file"
        raise SpecError(f"{VARIABLE}: {place}: {key}: {first['msg']}") from None


def model_problems(policy: Policy, model: ModelSettings) -> list[str]:
    """What the policy has against a model, one line each."""
    problems = unreadable_problems(model)
    allowed = policy.models.allow
    for key, source in sources_of(model):
        if allowed is not None and not any(fnmatchcase(source, pattern) for pattern in allowed):
            problems.append(
                f"{key}: {source} is not allowed here; the platform's policy allows {', '.join(allowed) or 'none'}"
            )
    for key, path in plugins_of(model):
        problems += _code_problems(policy, key, path, None)
    if policy.forbids_imports:
        problems += obscure_problems(model) + _import_problems(policy, model)
    if trusts(model):
        for key, source in sources_of(model):
            said = f"model.engine.trust_remote_code: {key}"
            problems += _code_problems(policy, said, source, revision_of(key, model))
        problems += foreign_code_problems(model)
    if allowed is not None or trusts(model):
        problems += evasive_problems(model)
        problems += _options_problems(policy, "model", model.storage_options)
    return problems


def _code_problems(policy: Policy, key: str, source: str, revision: str | None) -> list[str]:
    if any(_is_trusted(entry, source, revision) for entry in policy.models.trust_remote_code):
        return []
    at = f"revision {revision}" if revision else "no revision"
    return [
        f"{key} {source} with {at} may not run code of its own here; only the platform's policy ({VARIABLE}) can allow "
        "that, by models.trust_remote_code for that very source and revision"
    ]


def _import_problems(policy: Policy, model: ModelSettings) -> list[str]:
    """What is imported has no revision: it is installed where the engine runs. A path has to be a whole one."""
    trusted = {entry.source for entry in policy.models.trust_remote_code if entry.revision is None}
    problems = []
    for key, name in imports_of(model):
        if ("/" in name or names_file(key)) and not os.path.isabs(name):
            problems.append(
                f"{key}: {name} is code by a path that depends on the working directory, which the platform's policy "
                f"({VARIABLE}) does not allow; leave it out, or give the absolute path of one that models.trust_remote_code names"
            )
        elif name not in trusted:
            problems.append(
                f"{key}: {name} is code that the platform's policy ({VARIABLE}) does not allow; leave it out, or have it "
                f"allowed by models.trust_remote_code for that very name, as {{source: {name}}}"
            )
    return problems


def pool_problems(policy: Policy, model: ModelSettings, pool: PoolSettings) -> list[str]:
    """What the policy has against a pool, one line each; what `auto` leaves open is held against it when settled."""
    problems = []
    engines = None if pool.replicas == "auto" else pool.most_engines
    most = policy.pool.max_engines
    if engines is not None and most is not None and engines > most:
        problems.append(
            f"pool.replicas: {engines} engines are more than the {most} that the platform's policy allows"
        )
    most = policy.pool.max_gpus
    if engines is not None and most is not None and pool.device != "cpu" and pool.engines_per_gpu != "auto":
        gpus = -(-engines * model.gpus_per_engine // pool.engines_per_gpu)
        if gpus > most and (pool.device == "gpu" or model.gpus_per_engine > 1):
            problems.append(
                f"pool.replicas: {engines} engines take {gpus} GPUs, more than the {most} that the platform's policy allows"
            )
    return problems


def output_problems(policy: Policy, path: str, options: Mapping[str, Any]) -> list[str]:
    """What the policy has against an output's place, `options` being its store's."""
    allowed = policy.outputs.allow
    if allowed is None:
        return []
    problems = _options_problems(policy, "output", options)
    place = _plain(path)
    if ".." in place.split("/") or not any(
        place == _plain(folder) or place.startswith(f"{_plain(folder)}/") for folder in allowed
    ):
        problems.append(
            f"output.path: {path} is not allowed here; the platform's policy allows {', '.join(allowed) or 'none'}"
        )
    return problems


def check_model_allowed(model: ModelSettings) -> None:
    """What a worker does before it loads anything. Raises SpecError."""
    problems = model_problems(read_policy(), model)
    if problems:
        raise SpecError("\n".join(problems))


def _options_problems(policy: Policy, section: str, options: Mapping[str, Any]) -> list[str]:
    """Options that lead to another store than the one that the URL names on this machine."""
    endpoints = policy.storage.endpoints
    problems = []
    for name in sorted(options.keys() - _OF_CREDENTIALS):
        if options[name] is None or (name == "endpoint_url" and _is_endpoint(options[name], endpoints)):
            continue
        problems.append(
            f"{section}.storage_options.{name}: not allowed under the platform's policy, it may choose another store; "
            f"leave it out, or give an endpoint_url of storage.endpoints ({', '.join(endpoints) or 'none'})"
        )
    return problems


def _is_endpoint(given: Any, endpoints: list[str]) -> bool:
    return isinstance(given, str) and given.rstrip("/") in {url.rstrip("/") for url in endpoints}


def _is_trusted(entry: TrustedCode, source: str, revision: str | None) -> bool:
    """Only a digest of the contents pins what lies at a URL: whoever writes there may forge a listing."""
    if entry.source != source or ("://" in source and not (revision or "").startswith("sha256:")):
        return False
    return entry.revision == revision if entry.revision else os.path.isabs(source)


def _plain(path: str) -> str:
    """A path or URL as it is compared: `s3a` is `s3`, `file://` is a path, no slash at its end."""
    protocol, mark, rest = path.partition("://")
    if not mark or protocol.lower() in ("file", "local"):
        return os.path.normpath(rest if mark else os.path.expanduser(path))
    return f"{'s3' if protocol.lower() == 's3a' else protocol.lower()}://{rest.rstrip('/')}"
