"""`parse` steps: columns out of a model's text, as JSON, by a regular expression, or between XML tags."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from datetime import date, datetime
from typing import Any

import pyarrow as pa

from pipelines.errors import RowError
from pipelines.step_settings import ParseStep, arrow_type

#: A text's columns, or why it has none.
Parse = Callable[[str], Mapping[str, Any] | RowError]


def parser(step: ParseStep) -> Parse:
    """The function that reads one text."""
    if step.regex is not None:
        return _by_regex(step.regex, step.adds)
    if step.xml is not None:
        return _by_tags(step.xml)
    return _as_json(step.adds)


def _as_json(columns: Mapping[str, str]) -> Parse:
    decoder = json.JSONDecoder()
    types = {name: arrow_type(kind) for name, kind in columns.items()}

    def read(text: str) -> Mapping[str, Any] | RowError:
        found = _first_object(decoder, text)
        if found is None:
            return RowError("parse_error", f"no JSON object in {text!r:.200}")
        if missing := [name for name in columns if name not in found]:
            return RowError(
                "parse_error", f"the JSON object has no {', '.join(missing)}; it has {', '.join(found)}"
            )
        return {name: _with_times(found[name], type_) for name, type_ in types.items()}

    return read


def _with_times(value: Any, type_: pa.DataType) -> Any:
    """A JSON value, dates and times read from the texts that they are in JSON."""
    if pa.types.is_list(type_) and isinstance(value, list):
        return [_with_times(item, type_.value_type) for item in value]
    return _from_text(value, type_) if pa.types.is_temporal(type_) and isinstance(value, str) else value


def _first_object(decoder: json.JSONDecoder, text: str) -> dict[str, Any] | None:
    """The first JSON object in a text, whatever stands around it: prose, a Markdown fence, a thought."""
    start = text.find("{")
    while start >= 0:
        try:
            found, _ = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            start = text.find("{", start + 1)
            continue
        return found if isinstance(found, dict) else None
    return None


def _by_regex(regex: str, columns: Mapping[str, str]) -> Parse:
    pattern = re.compile(regex, re.DOTALL)

    def read(text: str) -> Mapping[str, Any] | RowError:
        match = pattern.search(text)
        if match is None:
            return RowError("parse_error", f"{regex!r:.80} is not in {text!r:.200}")
        return {name: _from_text(match[name], arrow_type(kind)) for name, kind in columns.items()}

    return read


def _by_tags(columns: Mapping[str, str]) -> Parse:
    patterns = {
        name: re.compile(f"<{re.escape(name)}>(.*?)</{re.escape(name)}>", re.DOTALL) for name in columns
    }

    def read(text: str) -> Mapping[str, Any] | RowError:
        found = {name: pattern.search(text) for name, pattern in patterns.items()}
        if missing := [f"<{name}>" for name, match in found.items() if match is None]:
            return RowError("parse_error", f"no {', '.join(missing)} in {text!r:.200}")
        return {
            name: _from_text(match[1].strip(), arrow_type(columns[name]))
            for name, match in found.items()
            if match
        }

    return read


def _from_text(text: str | None, type_: pa.DataType) -> Any:
    """A value of the column's type where the text is one; else the text, which does not fit and fails the record."""
    if text is None:
        return None
    try:
        if pa.types.is_integer(type_):
            return int(text)
        if pa.types.is_floating(type_):
            return float(text)
        if pa.types.is_boolean(type_):
            return {"true": True, "false": False}.get(text.strip().lower(), text)
        if pa.types.is_date(type_):
            return date.fromisoformat(text)
        if pa.types.is_timestamp(type_):
            return datetime.fromisoformat(text)
        return _with_times(json.loads(text), type_) if pa.types.is_list(type_) else text
    except ValueError:
        return text
