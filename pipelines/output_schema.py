"""Typed output: a JSON Schema as an Arrow type, and whether an answer keeps what its sampling asks of it.

    sampling.output_schema ─► constrained decoding ─► text ─► `Checker` ─► `parsed` column, or another try

Source of the vocabulary: JSON Schema 2020-12 (json-schema.org/draft/2020-12), as pydantic writes it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError

from pipelines.settings import SamplingSettings
from pipelines.template import one_line

_PLAIN: dict[str, pa.DataType] = {
    "string": pa.string(),
    "integer": pa.int64(),
    "number": pa.float64(),
    "boolean": pa.bool_(),
}


class _NoType(Exception):
    """What Arrow has no type for, in words."""


def arrow_type_of(schema: Mapping[str, Any]) -> tuple[pa.DataType, str | None]:
    """(the type of a column of such values, None); for what Arrow cannot express (text with the JSON, why)."""
    try:
        return _type(schema, schema, ()), None
    except _NoType as reason:
        return pa.string(), str(reason)


def schema_problem(schema: Mapping[str, Any]) -> str | None:
    """Why this is no JSON Schema; None where it is one."""
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        return f"not a JSON Schema: {'.'.join(map(str, error.path)) or 'the whole'}: {error.message:.300}"
    return None


def _type(schema: Any, root: Mapping[str, Any], within: tuple[str, ...]) -> pa.DataType:
    if not isinstance(schema, Mapping):
        raise _NoType("a schema that allows anything")
    if "$ref" in schema:
        return _referred(schema["$ref"], root, within)
    if len(schema.get("allOf", ())) == 1:
        return _type(schema["allOf"][0], root, within)
    for union in ("anyOf", "oneOf"):
        if union in schema:
            kinds = [kind for kind in schema[union] if kind != {"type": "null"}]
            if len(kinds) != 1:
                raise _NoType("a union of types")
            return _type(kinds[0], root, within)
    if "const" in schema or "enum" in schema:
        return _of_values(schema.get("enum", [schema.get("const")]))
    kind = schema.get("type")
    if isinstance(kind, list):
        kinds = [one for one in kind if one != "null"]
        if len(kinds) != 1:
            raise _NoType("a union of types")
        kind = kinds[0]
    if kind in _PLAIN:
        return _PLAIN[kind]
    if kind == "array":
        if "prefixItems" in schema or "items" not in schema:
            raise _NoType("an array whose items have no one type")
        return pa.list_(_type(schema["items"], root, within))
    if kind == "object":
        properties = schema.get("properties")
        if not properties or schema.get("additionalProperties") not in (None, False):
            raise _NoType("an object with keys of any name")
        return pa.struct([(name, _type(inner, root, within)) for name, inner in properties.items()])
    raise _NoType("a schema without a type")


def _referred(reference: str, root: Mapping[str, Any], within: tuple[str, ...]) -> pa.DataType:
    if reference in within:
        raise _NoType("a schema that contains itself")
    found: Any = root
    for part in reference.removeprefix("#").strip("/").split("/"):
        found = (
            found.get(part.replace("~1", "/").replace("~0", "~"))
            if part and isinstance(found, Mapping)
            else None
        )
    if not reference.startswith("#/") or found is None:
        raise _NoType(f"the reference {reference}")
    return _type(found, root, (*within, reference))


def _of_values(values: Sequence[Any]) -> pa.DataType:
    kinds = {type(value) for value in values if value is not None}
    for kind, type_ in ((bool, "boolean"), (str, "string"), (int, "integer"), (float, "number")):
        if kinds == {kind}:
            return _PLAIN[type_]
    raise _NoType("values of several types")


class Checker:
    """Whether a text is what the sampling's `output_schema` or `structured_outputs` asks for, and its value."""

    def __init__(self, sampling: SamplingSettings) -> None:
        schema, structured = sampling.output_schema, sampling.structured_outputs
        self.asks = sampling.is_structured
        """Whether anything is asked for."""
        self.type: pa.DataType | None = None
        """Of the column `parsed`; None where there is none."""
        self._as_text = False
        self._validator = None
        self._choices = structured and structured.choice
        self._pattern: re.Pattern[str] | None = None
        if schema is not None:
            assert not isinstance(schema, str)  # `jobs.loading` has put the class's schema in its place
            self.type, reason = arrow_type_of(schema)
            self._as_text = reason is not None
            self._validator = Draft202012Validator(schema)
        if structured is not None and structured.regex is not None:
            try:
                self._pattern = re.compile(structured.regex)
            except re.error:
                self._pattern = (
                    None  # the engine's dialect has more than Python's; then only its end is looked at
                )

    def problem(self, text: str, finish_reason: str) -> str | None:
        """Why the text is not what was asked for; None where it is."""
        if self._validator is not None:
            return self._json_problem(text, finish_reason)
        if self._choices is not None:
            return None if text in self._choices else f"{text!r:.80} is none of the choices"
        if self._pattern is not None:
            return (
                None
                if self._pattern.fullmatch(text)
                else f"{text!r:.80} does not match the regular expression"
            )
        return "the answer was cut off at max_tokens" if self.asks and finish_reason == "length" else None

    def column(self, texts: Sequence[str | None]) -> pa.Array:
        """The values of the texts in `type`; null for those that are not what was asked for."""
        assert self.type is not None
        return pa.array([self._cell(text) for text in texts], self.type)

    def _cell(self, text: str | None) -> Any:
        if text is None or self._json_problem(text, "stop") is not None:
            return None
        value = _loads(text)
        return json.dumps(value, ensure_ascii=False) if self._as_text else value

    def _json_problem(self, text: str, finish_reason: str) -> str | None:
        assert self._validator is not None
        try:
            value = _loads(text)
        except (ValueError, RecursionError) as error:
            cut = "the answer was cut off at max_tokens: " if finish_reason == "length" else ""
            return f"{cut}no JSON: {one_line(error)}: {text!r:.120}"
        for wrong in self._validator.iter_errors(value):
            where = ".".join(map(str, wrong.absolute_path))
            return f"{where + ': ' if where else ''}{wrong.message:.300}"
        try:
            pa.array([None if self._as_text else value, None], self.type)
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            return f"does not fit its column: {one_line(error)}"
        return None


def _loads(text: str) -> Any:
    return json.loads(text, parse_constant=_no_number)


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
