"""Python values as Arrow columns of given types: what does not fit is an error of its record, never converted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.errors import RowError
from pipelines.template import one_line


def typed_columns(
    outcomes: Sequence[Mapping[str, Any] | RowError], types: Mapping[str, pa.DataType], code: str
) -> tuple[dict[str, pa.Array], dict[int, RowError]]:
    """(one array per column, null where there is an error; errors by place: those given, and values of other types)."""
    errors = {place: outcome for place, outcome in enumerate(outcomes) if isinstance(outcome, RowError)}
    added = {}
    for name, type_ in types.items():
        values = [None if isinstance(outcome, RowError) else outcome[name] for outcome in outcomes]
        added[name], wrong = _array(values, type_)
        for place, reason in wrong.items():
            errors.setdefault(place, RowError(code, f"{name}: {reason}"))
    if errors:
        sound = pa.array([place not in errors for place in range(len(outcomes))])
        added = {name: pc.if_else(sound, array, None) for name, array in added.items()}
    return added, dict(sorted(errors.items()))


def _array(values: Sequence[Any], type_: pa.DataType) -> tuple[pa.Array, dict[int, str]]:
    """The values as `type_`; why those cannot be it that are null instead."""
    fits = _fits(type_)
    wrong = {
        place: f"{value!r:.80} is no {type_}"
        for place, value in enumerate(values)
        if value is not None and not fits(value)
    }
    sound = [None if place in wrong else value for place, value in enumerate(values)]
    try:
        return pa.array(sound, type_), wrong
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        for place, value in enumerate(sound):  # too large, not UTF-8 …
            try:
                pa.array([value], type_)
            except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
                wrong[place], sound[place] = one_line(error), None
        return pa.array(sound, type_), wrong


def _fits(type_: pa.DataType) -> Callable[[Any], bool]:
    """Whether Python's type is the one meant; Arrow itself would read True as 1, and 1 as a time."""
    if pa.types.is_list(type_):
        inner = _fits(type_.value_type)
        return lambda value: (
            isinstance(value, list | tuple) and all(item is None or inner(item) for item in value)
        )
    if pa.types.is_boolean(type_):
        return lambda value: isinstance(value, bool)
    if pa.types.is_integer(type_):
        return lambda value: (
            (isinstance(value, int) and not isinstance(value, bool))
            or (isinstance(value, float) and value.is_integer())
        )
    if pa.types.is_floating(type_):
        return lambda value: isinstance(value, int | float) and not isinstance(value, bool)
    if pa.types.is_string(type_):
        return lambda value: isinstance(value, str)
    return lambda value: not isinstance(value, int | float)  # dates and times: Arrow tells
