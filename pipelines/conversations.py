"""What a prompt asks of each row, before any model's chat template: where its turns come from.

    columns ─► turns (template | prompt_column | function, messages_column before them) ─► messages

A row whose turns cannot be made has its error in their place.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import pyarrow as pa

from pipelines.code import load_function
from pipelines.errors import ROW_ERROR_CODES, RowError, SpecError
from pipelines.messages import Message, Turns, checked, continued, conversation, has_system
from pipelines.settings import PromptSettings
from pipelines.template import Template, null, one_line
from pipelines.values import column_values, first_error, records


class Conversations:
    """What a job's prompt asks of each row, before any model's chat template. `folders` as for `PromptBuilder`.

    Raises SpecError on construction: template syntax, a function that cannot be imported.
    """

    def __init__(self, settings: PromptSettings, folders: Sequence[str] = (), key: str = "prompt") -> None:
        self._system = None if settings.system is None else Template(settings.system, f"{key}.system")
        self._source = _source(settings, folders, key)

    def __call__(self, table: pa.Table, *, chat: bool = True) -> Iterator[str | list[Message] | RowError]:
        """For each row its messages in OpenAI's shape, or its error; with `chat` False its text."""
        for turns, system in zip(self._source(table), self._systems(table), strict=True):
            outcome = checked(turns)
            if isinstance(outcome, RowError) or (isinstance(outcome, str) and not chat):
                yield outcome
            elif not chat:
                yield RowError("prompt_error", _NO_CHAT)
            elif isinstance(system, RowError) and not has_system(outcome):
                yield system
            else:
                yield conversation(outcome, system)

    def _systems(self, table: pa.Table) -> Iterator[str | RowError | None]:
        if self._system is None:
            return iter([None] * table.num_rows)
        if not self._system.columns:  # the same for all rows
            return iter([_attempt(self._system.render)] * table.num_rows)
        return _rendered(self._system, table)


# ── Where the turns come from ────────────────────────────────────────────────────────────────────────────────────

_NO_CHAT = "the prompt function returned messages, but no chat template is applied (prompt.chat, or the model has none)"
_T = TypeVar("_T")
Source = Callable[[pa.Table], Iterable[Turns | RowError]]


def _source(settings: PromptSettings, folders: Sequence[str], key: str) -> Source:
    if settings.messages_column is None:
        return _user_turns(settings, folders, key)
    column = settings.messages_column

    def history(table: pa.Table) -> Iterator[list[Message] | RowError]:
        return (_value_or_error(value, column, _parsed) for value in column_values(table, column))

    if settings.template is None and settings.prompt_column is None:
        return history
    turns = _user_turns(settings, folders, key)
    return lambda table: (
        continued(messages, turn) for messages, turn in zip(history(table), turns(table), strict=True)
    )


def _user_turns(settings: PromptSettings, folders: Sequence[str], key: str) -> Source:
    if settings.template is not None:
        template = Template(settings.template, f"{key}.template")
        return lambda table: _rendered(template, table)
    if settings.prompt_column is not None:
        prompt_column = settings.prompt_column
        return lambda table: texts_of(table, prompt_column)
    assert settings.function is not None  # PromptSettings has exactly one source
    function = load_function(settings.function, folders, f"{key}.function")
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        raise SpecError(
            f"{key}.function: {settings.function} must be a plain function, not async or a generator"
        )
    return lambda table: _called(function, table)


def _attempt(render: Callable[[dict[str, Any]], str]) -> str | RowError:
    try:
        return render({})
    except RowError as error:
        return error


def _rendered(template: Template, table: pa.Table) -> Iterator[str | RowError]:
    names = [name for name in table.column_names if name in template.columns]
    names = list(dict.fromkeys(names))
    nulls = {name: null(name) for name in names}
    columns = [column_values(table, name, nulls[name]) for name in names]
    rows: Iterable[tuple[Any, ...]] = zip(*columns, strict=True) if columns else [()] * table.num_rows
    render = template.render
    for values in rows:
        try:
            yield first_error(values) or render(dict(zip(names, values)))  # noqa: B905 -- equal by construction
        except RowError as error:
            yield error


def _called(function: Callable[..., Any], table: pa.Table) -> Iterator[Turns | RowError]:
    names = [
        name for name in dict.fromkeys(table.column_names) if name not in ("error_code", "error_message")
    ]
    for record in records(table, names):
        if isinstance(record, RowError):
            yield record
            continue
        try:
            yield function(record)
        except RowError as error:
            known = error.code in ROW_ERROR_CODES
            yield error if known else RowError("prompt_error", f"{error.code}: {one_line(error)}")
        except (Exception, SystemExit) as error:  # noqa: BLE001 -- whatever user code raises is its row's error
            yield RowError("prompt_error", f"prompt.function: {one_line(error)}")


def texts_of(table: pa.Table, column: str) -> Iterator[str | RowError]:
    """The texts in a column; the errors of rows where it is null or something else."""
    return (_value_or_error(value, column, _text) for value in column_values(table, column))


def _value_or_error(value: Any, column: str, convert: Callable[[Any], _T]) -> _T | RowError:
    if isinstance(value, RowError):
        return value
    if value is None:
        return RowError("missing_value", f"column {column!r} is null")
    try:
        return convert(value)
    except RowError as error:
        return error


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise RowError("prompt_error", f"expected text, found {type(value).__name__}")
    return value


def _parsed(value: Any) -> list[Message]:
    if not isinstance(value, str):
        return value  # type: ignore[no-any-return]  # `checked` looks at the shape
    try:
        messages: Any = json.loads(value)
    except ValueError as error:
        raise RowError("prompt_error", f"messages are not JSON: {one_line(error)}") from None
    if not isinstance(messages, list):
        raise RowError("prompt_error", f"messages must be a list, found {type(messages).__name__}")
    return messages
