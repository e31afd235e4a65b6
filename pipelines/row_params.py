"""Each row's own sampling parameters, from `sampling.params_column`, or from `max_tokens_column` its `max_tokens` alone.

    a struct or JSON text ──RowParams──► Own ──the prompts' columns──► RowSettings (`row_settings`)

A row's parameters are checked by the settings that they make of the job's, each distinct set of them once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Any, NamedTuple

import pyarrow as pa
from pydantic import Field, TypeAdapter, ValidationError

from pipelines.arrow_types import is_text_or_null
from pipelines.contracts import PARAMS_TYPE
from pipelines.errors import RowError
from pipelines.settings import MOST_TOKENS, ROW_PARAMS, SamplingSettings

#: Distinct sets of parameters that are remembered, and texts of them.
MOST_KNOWN = 1024
#: vLLM holds a seed in 64 bits; it adds a sample's index to it, as other tries add to it.
_MOST_SEED = 2**63 - 2**20
_SEED = TypeAdapter(Annotated[int, Field(ge=0, le=_MOST_SEED)])
#: Characters of what was given that an error shows.
_SHOWN = 80
_ALLOWED = ", ".join(ROW_PARAMS)
#: `float`: of decimals, which structs may hold.
_JSON = json.JSONEncoder(sort_keys=True, default=float)
#: What pydantic's messages begin with.
_SHOULD = "Input should be "


class Own(NamedTuple):
    """One row's own parameters; None where the job's hold."""

    max_tokens: int | None = None
    seed: int | None = None
    params: str | None = None
    """All others as JSON text, the same text for the same parameters. Limits and seeds stand apart: where each row has
    another one, the others are still few."""


_NONE = Own()


class RowParams:
    """Reads them, of any number of tables."""

    def __init__(self, sampling: SamplingSettings) -> None:
        self._sampling = sampling
        self._job = sampling.model_dump()
        self._checked = lru_cache(MOST_KNOWN)(self._check)
        self._of_text = lru_cache(MOST_KNOWN)(self._of_json)

    def __call__(self, table: pa.Table) -> list[Own | RowError]:
        """One per row of `table`, or why the row's parameters will not do.

        A column that is not among the table's is null in every row (as a column that a later file lacks).
        """
        name = self._sampling.params_column or self._sampling.max_tokens_column
        if name is None or name not in table.column_names:
            return [_NONE] * table.num_rows
        column = table.column(table.schema.get_all_field_indices(name)[0])
        if self._sampling.params_column is None:
            read: Callable[[Any], Own | RowError] = self._limit
        else:
            read = self._of_struct if pa.types.is_struct(column.type) else self._of_text
        return [_NONE if value is None else read(value) for value in column.to_pylist()]

    def _limit(self, value: int) -> Own | RowError:
        least = max(1, self._sampling.min_tokens)
        if least <= value <= MOST_TOKENS:
            return Own(value)
        name = self._sampling.max_tokens_column
        return RowError(
            "invalid_request",
            f"max_tokens_column {name!r} is {value}; it must be from {least} to {MOST_TOKENS}",
        )

    def _of_json(self, text: str) -> Own | RowError:
        try:
            given = json.loads(text)
        except (ValueError, RecursionError):
            return self._error(f"{_shown(text)} is not JSON; it must be an object of these keys: {_ALLOWED}")
        if not isinstance(given, dict):
            return self._error(f"{_shown(text)} is no object; it must be one of these keys: {_ALLOWED}")
        return self._of_struct(given)

    def _of_struct(self, given: dict[str, Any]) -> Own | RowError:
        given = {key: item for key, item in given.items() if item is not None}
        seed = given.pop("seed", None)
        if seed is not None:
            # By itself, lest sets of parameters that differ in nothing else are checked one by one.
            try:
                seed = _SEED.validate_python(None if isinstance(seed, bool) else seed)
            except ValidationError:
                allowed = f"a whole number from 0 to {_MOST_SEED}"
                return self._error(f"seed is {_shown(seed)}; it must be {allowed}")
        if not given:
            return Own(seed=seed)
        try:
            text = _JSON.encode(given)
        except (TypeError, ValueError, RecursionError):
            return self._error(
                f"{_shown(given)} has no form in JSON; it must be an object of these keys: {_ALLOWED}"
            )
        checked = self._checked(text)
        return checked if isinstance(checked, RowError) else checked._replace(seed=seed)

    def _check(self, text: str) -> Own | RowError:
        """Of the row's parameters but its seed."""
        given = json.loads(text)
        for key in given:
            if key not in ROW_PARAMS:
                return self._error(f"{_shown(key)} is no key that a row may set; there are {_ALLOWED}")
        try:
            settings = SamplingSettings.model_validate({**self._job, **given})
        except ValidationError as error:
            return self._error(_reason(error, given))
        differing = {}
        for key in sorted(given):
            value = getattr(settings, key)
            if value != getattr(self._sampling, key):
                differing[key] = value
        limit = differing.pop("max_tokens", None)
        return Own(limit, params=json.dumps(differing) if differing else None)

    def _error(self, text: str) -> RowError:
        return RowError("invalid_request", f"params_column {self._sampling.params_column!r}: {text}")


def own_columns(own: Sequence[Own | RowError]) -> list[pa.Array]:
    """`max_tokens`, `seed` and `params` of `contracts.PROMPT_SCHEMA`."""
    rows = [_NONE if isinstance(one, RowError) else one for one in own]
    return [
        pa.array([row.max_tokens for row in rows], pa.int32()),
        pa.array([row.seed for row in rows], pa.int64()),
        pa.array([row.params for row in rows], PARAMS_TYPE),
    ]


def params_type_problem(name: str, type_: pa.DataType) -> str | None:
    """Why a column of this type cannot be `sampling.params_column`."""
    if is_text_or_null(type_):
        return None
    if not pa.types.is_struct(type_):
        return f"{name!r} holds {type_} values, not structs or JSON text of {_ALLOWED}"
    others = [field.name for field in type_ if field.name not in ROW_PARAMS]
    if others:
        return f"{name!r} has {', '.join(map(repr, others))}, which no row may set; it may have {_ALLOWED}"
    return None


def _reason(error: ValidationError, given: Mapping[str, Any]) -> str:
    """What is wrong with the first parameter that is: pydantic's words, which name neither key nor value, for a row's reader."""
    found = error.errors(include_url=False)
    key = found[0]["loc"][0] if found[0]["loc"] else None
    if key is None:
        return str(found[0]["ctx"]["error"])
    of_key = [one for one in found if one["loc"][0] == key]
    # That an item of a list is wrong tells more than that the list is no text.
    items = [one for one in of_key if isinstance(one["loc"][-1], int)][:1]
    place, value = str(key), given[str(key)]
    for one in items:
        place, value = f"{key}[{one['loc'][-1]}]", value[one["loc"][-1]]
    texts = dict.fromkeys(one["msg"] for one in items or of_key)
    allowed = [text.removeprefix(_SHOULD) for text in texts if text.startswith(_SHOULD)]
    reason = f"it must be {' or '.join(allowed)}" if allowed else "; ".join(texts)
    return f"{place} is {_shown(value)}; {reason}"


def _shown(value: object) -> str:
    text = ascii(value)  # what no encoding has room for may be in it
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
