"""Rows to prompts: render or collect the turns, apply the model's chat template, tokenise.

    columns ─► turns (template | messages_column | prompt_column | function) ─► prompt text ─► token ids

Where an answer is given (`score` steps), its token ids follow the prompt's. Each step can fail for one row without touching its neighbours; the error travels in the row's place.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.code import load_function
from pipelines.contracts import PROMPT_SCHEMA
from pipelines.errors import ROW_ERROR_CODES, RowError, SpecError
from pipelines.messages import Message, Turns, checked, conversation, has_system
from pipelines.row_limits import row_limits
from pipelines.settings import PromptSettings, SamplingSettings
from pipelines.template import Template, null, one_line
from pipelines.values import column_values, first_error, records

#: Columns that reading adds; the last ones of these names, should the input have such columns itself.
_ADDED = ("row_id", "error_code", "error_message")


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    chat_template: Any

    def __call__(self, text: list[str], **options: Any) -> Any: ...

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...

    def get_chat_template(self, chat_template: str | None, tools: Any) -> str: ...


class PromptBuilder:
    """Builds the prompts of any number of tables. `folders` are the user's own, for `prompt.function`;
    `sampling` says where a row's own `max_tokens` stands, `key` where the settings stand in the job file, `answer` in which
    column the text is that follows the prompt.

    Raises SpecError on construction: template syntax, a function that cannot be imported, a chat without a chat
    template.
    """

    def __init__(
        self,
        settings: PromptSettings,
        tokenizer: Tokenizer,
        folders: Sequence[str] = (),
        sampling: SamplingSettings | None = None,
        key: str = "prompt",
        answer: str | None = None,
    ) -> None:
        self.settings = settings
        self._answer = answer
        self._sampling = sampling or SamplingSettings()
        self.tokenizer = tokenizer
        has_template = bool(getattr(tokenizer, "chat_template", None))
        self.chat = has_template if settings.chat is None else settings.chat
        """Whether the model's chat template is applied."""
        if not has_template:
            needs = {
                "system": settings.system,
                "messages_column": settings.messages_column,
                "tools": settings.tools,
                "chat": settings.chat,
            }
            for name, value in needs.items():
                if value:
                    raise SpecError(
                        f"{key}.{name}: the model's tokenizer has no chat template; "
                        f"choose an instruction-tuned model, or leave the key out"
                    )
        if settings.tools and not _shows_tools(tokenizer, settings.tools):
            raise SpecError(
                f"{key}.tools: the model's chat template does not show tools; take a model that was trained to call them, or "
                "describe them in the system turn"
            )
        self._conversations = Conversations(settings, folders, key)

    def build(self, table: pa.Table) -> pa.Table:
        """Prompts for all rows of `table`, in its order, as `contracts.PROMPT_SCHEMA`.

        `table` holds the input columns and `row_id`; where it has `error_code` and `error_message`, rows that carry a
        code keep it and get no tokens.
        """
        limits = row_limits(table, self._sampling)
        outcomes = [
            limit if isinstance(limit, RowError) and isinstance(text, str) else text
            for text, limit in zip(self.texts(table), limits, strict=True)
        ]
        token_ids = self._tokenise(outcomes, "prompt", special=not self.chat)
        answer_tokens = self._append_answers(table, outcomes, token_ids)
        errors = [outcome if isinstance(outcome, RowError) else None for outcome in outcomes]
        return pa.table(
            [
                _added_column(table, "row_id"),
                pa.array(token_ids, PROMPT_SCHEMA.field("token_ids").type),
                pa.array([None if isinstance(x, RowError) else x for x in limits], pa.int32()),
                pa.array(answer_tokens, pa.int32()),
                pa.array([error and error.code for error in errors], pa.string()),
                pa.array([error and str(error) for error in errors], pa.string()),
            ],
            schema=PROMPT_SCHEMA,
        )

    def texts(self, table: pa.Table) -> list[str | RowError]:
        """The text of each row's prompt as the model will see it, or the row's error."""
        broken = _broken_rows(table)
        if not broken:
            return self._texts(table)
        # Nothing is rendered for rows that could not be read: their values are not the user's.
        sound = iter(self._texts(table.filter(pc.is_null(_added_column(table, "error_code")))))
        return [broken[place] if place in broken else next(sound) for place in range(table.num_rows)]

    def _texts(self, table: pa.Table) -> list[str | RowError]:
        outcomes = list(self._conversations(table, chat=self.chat))
        asked = {place: messages for place, messages in enumerate(outcomes) if isinstance(messages, list)}
        texts = dict(zip(asked, self._render_chats(list(asked.values())), strict=True))
        return [
            texts[place] if isinstance(outcome, list) else outcome for place, outcome in enumerate(outcomes)
        ]

    def _render_chats(self, conversations: list[list[Message]]) -> list[str | RowError]:
        def render(batch: list[Any]) -> list[str]:
            # Keys of the job file first: the others are Dray's to decide.
            options = {**self.settings.chat_template_kwargs, "tokenize": False, "add_generation_prompt": True}
            if self.settings.tools is not None:
                options["tools"] = self.settings.tools
            texts: list[str] = self.tokenizer.apply_chat_template(batch, **options)
            return texts

        return _batch_or_singly(render, conversations, "the model's chat template: ")

    def _append_answers(
        self, table: pa.Table, outcomes: list[str | RowError], token_ids: list[Sequence[int] | None]
    ) -> list[int | None]:
        """Put each row's answer behind its prompt; how many ids it is. A row without one fails, as its outcome then says.

        Tokenised by itself: the boundary between prompt and answer is one between tokens, as it is while a model answers.
        """
        if self._answer is None:
            return [None] * len(outcomes)
        column = self._answer
        answers: list[str | RowError] = [
            _value_or_error(value, column, _text) for value in column_values(table, column)
        ]
        answer_ids = self._tokenise(answers, "answer", special=False)
        counts: list[int | None] = [None] * len(outcomes)
        for row, (prompt, answer) in enumerate(zip(token_ids, answer_ids, strict=True)):
            if prompt is None:
                continue
            if answer is None:
                outcomes[row], token_ids[row] = answers[row], None
            else:
                token_ids[row], counts[row] = [*prompt, *answer], len(answer)
        return counts

    def _tokenise(
        self, outcomes: list[str | RowError], what: str, *, special: bool
    ) -> list[Sequence[int] | None]:
        """Token ids per row; turns the outcomes of rows that cannot be tokenised, or to nothing, into errors.

        `special`: with the special tokens that the tokenizer adds to a text. A chat template writes them itself: adding
        them again would double BOS.
        """
        places = [place for place, outcome in enumerate(outcomes) if isinstance(outcome, str)]
        texts = [outcome for outcome in outcomes if isinstance(outcome, str)]

        def encode(batch: list[str]) -> list[Sequence[int]]:
            encoded = self.tokenizer(
                batch,
                add_special_tokens=special,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,  # "longer than the maximum" is checked where the engine's limit is known
            )
            ids: list[Sequence[int]] = encoded["input_ids"]
            return ids

        token_ids: list[Sequence[int] | None] = [None] * len(outcomes)
        for place, result in zip(places, _batch_or_singly(encode, texts, "tokenising: "), strict=True):
            if isinstance(result, RowError):
                outcomes[place] = result
            elif len(result) == 0:
                outcomes[place] = RowError("empty_prompt", f"the {what} has no tokens")
            else:
                token_ids[place] = result
        return token_ids


def _shows_tools(tokenizer: Tokenizer, tools: list[dict[str, Any]]) -> bool:
    """Whether the chat template, of several the one for tools, does anything with them: others leave them out silently."""
    return "tools" in str(tokenizer.get_chat_template(None, tools))


def no_prompts(table: pa.Table) -> pa.Table:
    """`contracts.PROMPT_SCHEMA` for rows that nothing is asked about: their ids, and reading's errors."""
    given = {name: _added_column(table, name) for name in ("row_id", "error_code", "error_message")}
    columns = [given.get(field.name, pa.nulls(len(table), field.type)) for field in PROMPT_SCHEMA]
    return pa.table(columns, schema=PROMPT_SCHEMA)


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
    if settings.template is not None:
        template = Template(settings.template, f"{key}.template")
        return lambda table: _rendered(template, table)
    if settings.messages_column is not None:
        messages_column = settings.messages_column
        return lambda table: (
            _value_or_error(value, messages_column, _parsed)
            for value in column_values(table, messages_column)
        )
    if settings.prompt_column is not None:
        prompt_column = settings.prompt_column
        return lambda table: (
            _value_or_error(value, prompt_column, _text) for value in column_values(table, prompt_column)
        )
    assert settings.function is not None  # PromptSettings has exactly one source
    function = load_function(settings.function, folders, f"{key}.function")
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        raise SpecError(
            f"{key}.function: {settings.function} must be a plain function, not async or a generator"
        )
    return lambda table: _called(function, table)


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


def _parsed(value: Any) -> Turns:
    if not isinstance(value, str):
        return value  # type: ignore[no-any-return]  # `checked` looks at the shape
    try:
        messages = json.loads(value)
    except ValueError as error:
        raise RowError("prompt_error", f"messages are not JSON: {one_line(error)}") from None
    if not isinstance(messages, list):
        raise RowError("prompt_error", f"messages must be a list, found {type(messages).__name__}")
    return messages


# ── Columns ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _broken_rows(table: pa.Table) -> dict[int, RowError]:
    if "error_code" not in table.column_names:
        return {}
    codes = _added_column(table, "error_code")
    if codes.null_count == len(codes):
        return {}
    messages = _added_column(table, "error_message").to_pylist()
    return {
        place: RowError(code, messages[place] or ROW_ERROR_CODES.get(code, code))
        for place, code in enumerate(codes.to_pylist())
        if code is not None
    }


def _added_column(table: pa.Table, name: str) -> pa.ChunkedArray:
    return table.column(table.schema.get_all_field_indices(name)[-1])


def _attempt(render: Callable[[dict[str, Any]], str]) -> str | RowError:
    try:
        return render({})
    except RowError as error:
        return error


def _batch_or_singly(call: Callable[[list[Any]], list[Any]], items: list[Any], what: str) -> list[Any]:
    """`call` on all items at once; if that raises, one by one, with RowErrors in the failing items' places."""
    if not items:
        return []
    try:
        return call(items)
    except Exception:  # noqa: BLE001 -- the batch does not tell which of its rows is at fault
        results: list[Any] = []
        for item in items:
            try:
                results.extend(call([item]))
            except Exception as error:  # noqa: BLE001 -- templates and tokenizers raise anything
                results.append(RowError("prompt_error", what + one_line(error)))
        return results
