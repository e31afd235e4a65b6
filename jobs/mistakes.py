"""Validation errors in the user's terms: file and line, key, what was given, what is allowed.

Pydantic's messages name Python types and union branches; these are written from the fields themselves.
"""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types as at
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from jobs.job_file import Key, Tree
from jobs.references import references_in
from jobs.spec import JobSpec

_LEADING_KEY = re.compile(r"([a-z_]+(?:\.[\w-]+)+):? ")


def describe(error: ValidationError, values: dict[str, Any], tree: Tree, source: str) -> list[str]:
    """One line for each mistake, in the order of the keys."""
    lines: dict[str, None] = {}
    for found in error.errors(include_url=False):
        for key, text in _mistakes(found, values, tree):
            dotted = ".".join(key)
            lines[f"{tree.where(key, source)}: {dotted + ': ' if dotted else ''}{text}"] = None
    return list(lines)


def field_at(key: Key) -> FieldInfo | None:
    """The field of a key, if the job file has such a key."""
    model: type[BaseModel] | None = JobSpec
    found: FieldInfo | None = None
    for name in key:
        found = model.model_fields.get(name) if model else None
        if found is None:
            return None
        model = _section(found)
    return found


def is_free(key: Key) -> bool:
    """Whether a key holds a mapping of any keys, such as `model.engine`."""
    found = field_at(key)
    return found is not None and get_origin(found.annotation) is dict


def allows_null(key: Key) -> bool:
    """Whether null is a value of this key; also true inside lists and below the first level of free mappings."""
    found = field_at(key)
    if found is not None:
        return accepts(found, types.NoneType)
    return bool(key[:-1]) and not is_free(key[:-1]) and field_at(key[:-1]) is None


def accepts(field: FieldInfo, kind: type) -> bool:
    """Whether one of the field's types is `kind` (or a list, for `list`)."""
    return any(
        (get_origin(option) or option) is kind for option, _ in _options(field.annotation, field.metadata)
    )


def _mistakes(found: Any, values: dict[str, Any], tree: Tree) -> Iterable[tuple[Key, str]]:
    place = _locate(found["loc"], values)
    if place is None:
        return
    key, field = place
    kind = found["type"]
    given = _at(values, key)
    if kind == "value_error":
        for line in str(found["ctx"]["error"]).split("\n"):
            # A check across sections begins its lines with the key that it is about.
            about = _LEADING_KEY.match(line)
            inner = tuple(about[1].split(".")) if about and not key else ()
            known = field_at(inner) is not None or is_free(inner[:-1])
            yield (inner, line[about.end() :]) if about and known else (key, line)
    elif kind == "extra_forbidden":
        yield key, _unknown(key)
    elif kind == "missing":
        yield key, f"missing; expected {_allowed(field)}" + _explained(field)
    elif found["loc"][-1] == "[key]":
        yield key, "an empty key is not allowed"
    else:
        yield key, f"expected {_allowed(field)}, got {_shown(given, key, tree)}{_hint(field, given)}"


def _locate(loc: Sequence[int | str], values: dict[str, Any]) -> tuple[Key, FieldInfo] | None:
    """The key that an error is about, and its field (of the section, for a key that it does not know).

    Leaves out positions in lists and the names of a union's branches. None for the branch of a union that is not
    meant: where a mapping was given, only what is wrong with it as a mapping is of interest.
    """
    key: Key = ()
    field = FieldInfo.from_annotation(JobSpec)
    rest = list(loc)
    while rest:
        given = rest.pop(0)
        if isinstance(given, int):
            continue
        part = str(given)
        section = _section(field)
        if section is None:
            if get_origin(field.annotation) is dict and part != "[key]":
                return (*key, part), FieldInfo.from_annotation(get_args(field.annotation)[1])
            break
        branches = [option for option, _ in _options(field.annotation, field.metadata)]
        if (
            len([option for option in branches if option is not types.NoneType]) > 1
        ):  # `part` names one of them
            if not isinstance(_at(values, key), dict):
                break
            if section.__name__ not in part:
                return None
            if not rest:
                break
            part = str(rest.pop(0))
        key = (*key, part)
        if part not in section.model_fields:
            break
        field = section.model_fields[part]
    return key, field


def _section(field: FieldInfo) -> type[BaseModel] | None:
    for option, _ in _options(field.annotation, field.metadata):
        if get_origin(option) is tuple:  # of steps
            option = get_args(option)[0]
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


def _at(values: Any, key: Key) -> Any:
    for name in key:
        values = values.get(name) if isinstance(values, dict) else None
    return values


# ── Words ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _unknown(key: Key) -> str:
    *above, name = key
    parent = field_at(tuple(above))
    model = JobSpec if parent is None else _section(parent) or JobSpec
    names = list(model.model_fields)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    elsewhere = [
        f"{section}.{name}"
        for section, field in JobSpec.model_fields.items()
        if (inner := _section(field)) and name in inner.model_fields
    ]
    if near and near[0].lower() == name.lower().replace("-", "_"):
        return f"unknown key; did you mean {near[0]!r}?"
    if elsewhere:
        return f"unknown key; did you mean {' or '.join(elsewhere)}?"
    if near:
        return f"unknown key; did you mean {near[0]!r}?"
    if above == ["model"]:
        return f"unknown key; vLLM's own arguments go below model.engine (known here: {', '.join(names)})"
    return f"unknown key; known are {', '.join(names)}"


def _allowed(field: FieldInfo) -> str:
    options = _options(field.annotation, field.metadata)
    if any(getattr(rule, "pattern", None) for _, rules in options for rule in rules):
        text = (field.description or "").partition(";")[0].rstrip(".")
        return text[:1].lower() + text[1:]
    words = [_words(option, rules) for option, rules in options]
    return ", ".join(words[:-1]) + " or " + words[-1] if len(words) > 1 else words[0]


def _explained(field: FieldInfo) -> str:
    text = " ".join((field.description or "").split())
    first = text.partition(". ")[0].rstrip(".")
    return f" ({first[:1].lower() + first[1:]})" if first else ""


def _words(option: Any, rules: list[Any]) -> str:
    origin = get_origin(option)
    if origin is Literal:
        return " or ".join(", ".join(map(str, get_args(option))).rsplit(", ", 1))
    if origin in (list, tuple):
        inner = [_words(part, part_rules) for part, part_rules in _options(get_args(option)[0], ())]
        return "a list of " + " or ".join(map(_plural, inner))
    if option is types.NoneType:
        return "null"
    if option is str:
        return "text"
    if option is bool:
        return "true or false"
    if option is int:
        return "a whole number" + _bounds(rules)
    if option is float:
        return "a number" + _bounds(rules)
    if isinstance(option, type) and issubclass(option, BaseModel):
        names = list(option.model_fields)
        return f"a mapping of {', '.join(names[:6])}{' …' if len(names) > 6 else ''}"
    return "a mapping"


def _plural(words: str) -> str:
    return words.removeprefix("a ").replace("number", "numbers")


def _bounds(rules: list[Any]) -> str:
    found = {
        name: getattr(rule, name)
        for rule in rules
        for name in ("gt", "ge", "lt", "le")
        if hasattr(rule, name)
    }
    bounds = {
        name: f"{value:g}" if isinstance(value, float) else str(value)
        for name, value in found.items()
        if value is not None
    }
    if "ge" in bounds and "le" in bounds:
        return f" from {bounds['ge']} to {bounds['le']}"
    words = {"gt": "above", "ge": "of at least", "lt": "below", "le": "at most"}
    text = " and ".join(f"{words[name]} {value}" for name, value in bounds.items())
    return f" {text}" if text else ""


def _options(annotation: Any, rules: Iterable[Any]) -> list[tuple[Any, list[Any]]]:
    """The types of a union, or the one type, each with its constraints."""
    rules = _rules(rules)
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *more = get_args(annotation)
        return _options(inner, [*rules, *more])
    if origin in (Union, types.UnionType):
        return [option for part in get_args(annotation) for option in _options(part, rules)]
    return [(annotation, rules)]


def _rules(rules: Iterable[Any]) -> list[Any]:
    flat: list[Any] = []
    for rule in rules:
        if isinstance(rule, FieldInfo):
            flat += _rules(rule.metadata)
        elif isinstance(rule, at.GroupedMetadata):
            flat += list(rule)
        else:
            flat.append(rule)
    return flat


def _shown(value: Any, key: Key, tree: Tree) -> str:
    raw = _at(tree.values, key)
    if references_in(raw, "env"):
        return f"the value of {_cut(str(raw))}"  # which may be a secret
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a mapping"
    return _cut(repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= 80 else text[:79] + "…"


def _hint(field: FieldInfo, given: Any) -> str:
    if accepts(field, str) and isinstance(given, int | float) and not isinstance(given, bool):
        return "; put it in quotes"
    if given in ("", [], {}) or (isinstance(given, list) and "" in given):
        return "; it must not be empty"
    choices = [
        str(c) for o, _ in _options(field.annotation, ()) if get_origin(o) is Literal for c in get_args(o)
    ]
    near = difflib.get_close_matches(str(given), choices, n=1) if isinstance(given, str) else []
    return f"; did you mean {near[0]!r}?" if near else ""
