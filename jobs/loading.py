"""From a job file to a job: merge, override, fill in references, validate. Every mistake is one line.

    file ─extends─► tree ─overrides─► raw tree ─references─► values ─► JobSpec

The raw tree is what gets stored: references instead of values, and no secrets.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import yaml
from pydantic import ValidationError

from jobs.job_file import Key, Origin, Tree, parse_value, read_job_file, shown, tree_at, tree_of
from jobs.mistakes import accepts, allows_null, describe, field_at
from jobs.output_schemas import with_schemas
from jobs.policy import check_job
from jobs.references import MASK, References, is_one_reference, is_secret_name, masked, references_in
from jobs.schedule import parse_moment, variables_of
from jobs.spec import JobSpec
from pipelines.errors import SpecError
from pipelines.step_settings import ASKING
from pipelines.wording import printable

_MOST_MISTAKES = 10
_OVERRIDE = "override"


@dataclass(frozen=True, kw_only=True)
class LoadedJob:
    """A job with what is known of how it came about."""

    spec: JobSpec
    """All references filled in, local paths absolute."""
    raw: dict[str, Any]
    """The merged tree with references unfilled, secrets masked and local paths absolute: fit for storing, and for
    `load` again from anywhere."""
    variables: dict[str, str]
    """The run variables that were used to fill in `${run.…}`."""
    unfilled: dict[Key, Any]
    """Values that mention run variables, as they are before those are filled in; for the fingerprint."""
    referenced: dict[Key, Any]
    """Values that mention environment variables, as written."""
    source: str
    """The job file as messages name it."""
    files: tuple[Path, ...] = ()
    """The job file and all that it extends."""
    origins: dict[Key, Origin] = field(default_factory=dict, repr=False)
    pin: dict[str, Any] | None = None
    """Which revision the model's name stands for in this job: `jobs.pinning`."""

    def where(self, key: str) -> str:
        """`conf/jobs/demo.yaml:7`: where a dotted key was set."""
        tree = Tree({}, self.origins)
        return str(tree.where(tuple(key.split(".")), self.source))


def load(
    source: str | os.PathLike[str] | Mapping[str, Any],
    overrides: Sequence[str] | Mapping[str, Any] = (),
    variables: Mapping[str, str] | None = None,
    *,
    date: str | None = None,
    directory: str | os.PathLike[str] | None = None,
    environ: Mapping[str, str] | None = None,
) -> LoadedJob:
    """Load and validate a job file, or the same as a mapping.

    `overrides` are `key.of.it=value` with YAML values, or a mapping from dotted keys to values. `date` (`2026-11-22`,
    `2026-11-22T02:00`; by default now) is the time that the run variables `date`, `hour`, `datetime` and `id` are of,
    in the zone of `schedule.timezone` (in `extends`, which is read first, in UTC). `variables` are more of them, or
    others for these: `{"shop": "north"}` for `${run.shop}`.
    Relative paths of data and models are relative to `directory`, by default the working directory, as for every
    other command; those of `extends` to the file that names them. What the platform's policy (`DRAY_POLICY`) forbids is
    refused here.

    Raises SpecError with one line for each mistake: file and line, key, what was given, what is allowed.
    """
    base = Path(os.path.abspath(directory or os.getcwd()))
    env = os.environ if environ is None else environ
    given = {name.removeprefix("run."): str(value) for name, value in (variables or {}).items()}
    now = datetime.now(UTC)
    references = References(env, {**_run_variables(date, now, ZoneInfo("UTC")), **given})

    def fill_extends(text: str, key: Key, origin: Origin) -> str:
        try:
            return references.fill(text)
        except SpecError as error:
            raise SpecError(f"{origin}: {'.'.join(key)}: {error}") from None

    if isinstance(source, Mapping):
        name = "job"
        tree = tree_of(source, name, base, fill_extends)
    else:
        path = base / os.path.expanduser(source)
        name = shown(path)
        tree = read_job_file(path, fill_extends)
    tree = overridden(tree, overrides)
    run = {**_run_variables(date, now, _zone_of(tree, references)), **given}
    references = References(env, run)

    problems: list[str] = []
    values = _filled(tree, references, name, problems)
    _refuse(problems)
    values = _with_absolute_paths(_without_nulls(values, ()), base)
    try:
        spec = JobSpec.model_validate(values)
    except ValidationError as error:
        _refuse(describe(error, values, tree, name))
        raise
    spec = with_schemas(spec)
    check_job(spec)
    before_run = References(references.env, None)
    return LoadedJob(
        spec=spec,
        raw=masked(_with_absolute_paths(deepcopy(tree.values), base)),
        variables=run,
        unfilled={
            key: fill(value, key, before_run)
            for key, value in _leaves(tree.values)
            if references_in(value, "run")
        },
        referenced={key: value for key, value in _leaves(tree.values) if references_in(value, "env")},
        source=name,
        files=tree.files,
        origins=tree.origins,
    )


def _refuse(problems: list[str]) -> None:
    distinct = list(dict.fromkeys(map(printable, problems)))
    if distinct:
        rest = len(distinct) - _MOST_MISTAKES
        lines = distinct[:_MOST_MISTAKES] + ([f"… and {rest} more"] if rest > 0 else [])
        raise SpecError("\n".join(lines))


def _run_variables(date: str | None, now: datetime, zone: ZoneInfo) -> dict[str, str]:
    return variables_of(now.astimezone(zone) if date is None else parse_moment(date, zone))


def _zone_of(tree: Tree, references: References) -> ZoneInfo:
    """`schedule.timezone`, before anything is validated; UTC for what is no zone, which validation will say."""
    schedule = tree.values.get("schedule")
    name = schedule.get("timezone") if isinstance(schedule, dict) else None
    try:
        return ZoneInfo(references.fill(name)) if isinstance(name, str) else ZoneInfo("UTC")
    except (SpecError, ValueError, OSError, KeyError):
        return ZoneInfo("UTC")


# ── Overrides ────────────────────────────────────────────────────────────────────────────────────────────────────


def overridden(tree: Tree, overrides: Sequence[str] | Mapping[str, Any]) -> Tree:
    """The tree with the overrides above it, as `load` takes them. Raises SpecError."""
    if isinstance(overrides, str):
        overrides = [overrides]
    if isinstance(overrides, Mapping):
        pairs = list(overrides.items())
    else:
        pairs = [_split(text) for text in overrides]
    for dotted, value in pairs:
        key = tuple(dotted.split("."))
        if not all(key):
            raise SpecError(f"{_OVERRIDE}: {dotted!r} is no key; expected one such as sampling.temperature")
        tree = tree.merged(tree_at(key, value, _OVERRIDE))
    return tree


def _split(text: str) -> tuple[str, Any]:
    dotted, equals, value = text.partition("=")
    dotted = dotted.strip()
    if not equals or not dotted:
        raise SpecError(f"{_OVERRIDE}: expected key=value, such as sampling.temperature=0, got {text[:60]!r}")
    return dotted, _value(tuple(dotted.split(".")), value)


def _value(key: Key, text: str) -> Any:
    """YAML, but text is text where the key takes text: `prompt.template=Say: {{ x }}`, `model.revision=007`."""
    found = field_at(key)
    takes_text = found is not None and accepts(found, str)
    try:
        value = parse_value(text)
    except (yaml.YAMLError, SpecError):
        if text.startswith(("[", '"', "'")) or (text.startswith("{") and not takes_text):
            raise SpecError(f"{_OVERRIDE}: {'.'.join(key)}: {text[:60]!r} is not valid YAML") from None
        return text
    if takes_text:
        as_list = isinstance(value, list) and found is not None and accepts(found, list)
        return value if value is None or isinstance(value, str) or as_list else text
    return text if isinstance(value, dict) and not text.startswith("{") else value


# ── References, nulls, paths ─────────────────────────────────────────────────────────────────────────────────────


def _leaves(values: Any, key: Key = ()) -> list[tuple[Key, Any]]:
    if isinstance(values, dict):
        return [leaf for name, value in values.items() for leaf in _leaves(value, (*key, name))]
    return [(key, values)]


def _filled(tree: Tree, references: References, name: str, problems: list[str]) -> dict[str, Any]:
    def walk(value: Any, key: Key) -> Any:
        if isinstance(value, dict):
            return {part: walk(item, (*key, part)) for part, item in value.items()}
        try:
            if value == MASK and (key[1:2] == ("storage_options",) or is_secret_name(key[-1])):
                raise SpecError("a secret that was not stored; give it as ${env:NAME}, or with an override")
            return fill(value, key, references)
        except SpecError as error:
            problems.append(f"{tree.where(key, name)}: {'.'.join(key)}: {error}")
            return value

    filled: dict[str, Any] = walk(tree.values, ())
    return filled


def fill(value: Any, key: Key, references: References) -> Any:
    """A value of the tree, `key` in it, with its references filled in. Raises SpecError."""
    if isinstance(value, list):
        return [fill(item, key, references) for item in value]
    if isinstance(value, dict):
        return {name: fill(item, key, references) for name, item in value.items()}
    if not isinstance(value, str):
        return value
    text = references.fill(value)
    if key[:2] in (("model", "engine"), ("prompt", "chat_template_kwargs")) and is_one_reference(value):
        # These keys take any type, so nothing would turn the "2" of an environment variable into a number later.
        try:
            parsed = parse_value(text)
        except (yaml.YAMLError, SpecError):
            return text
        return parsed if isinstance(parsed, int | float) else text
    return text


def _without_nulls(values: dict[str, Any], key: Key) -> dict[str, Any]:
    """Null means null where the key knows it (`max_tokens: null`), and otherwise takes an inherited value away."""
    kept = {}
    for name, value in values.items():
        below = (*key, name)
        if isinstance(value, dict):
            kept[name] = _without_nulls(value, below)
        elif value is not None or allows_null(below):
            kept[name] = value
    return kept


def _with_absolute_paths(values: dict[str, Any], base: Path) -> dict[str, Any]:
    def data(path: Any) -> Any:
        if not isinstance(path, str) or not path or "://" in path or path.startswith("${"):
            return path
        return os.path.normpath(base / os.path.expanduser(path))

    def model(source: Any) -> Any:
        if not isinstance(source, str):
            return source
        local = source.startswith((".", "~", "/")) or (base / source).is_dir()
        return data(source) if local else source

    def change(section: str, key: str, how: Any) -> None:
        inside = values.get(section)
        if isinstance(inside, dict) and key in inside:
            given = inside[key]
            inside[key] = [how(item) for item in given] if isinstance(given, list) else how(given)

    change("input", "path", data)
    change("input", "images_folder", data)
    change("output", "path", data)
    for section in (values, *_asking_steps(values)):
        found = section.get("model")
        for place in (found, found.get("lora")) if isinstance(found, dict) else ():
            for key in ("source", "tokenizer"):
                if isinstance(place, dict) and key in place:
                    place[key] = model(place[key])
    return values


def _asking_steps(values: dict[str, Any]) -> list[dict[str, Any]]:
    steps = values.get("steps")
    named = [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []
    found = [step.get(kind) for step in named for kind in ASKING]
    return [step for step in found if isinstance(step, dict)]
