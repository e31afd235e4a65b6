"""Rows to prompts: what each row asks (`pipelines.conversations`), the model's chat template applied, tokenised.

    columns ─► messages, or a text ─► prompt text ─► token ids

Where an answer is given (`score` steps), its token ids follow the prompt's. Each step can fail for one row without touching its neighbours; the error travels in the row's place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.contracts import PROMPT_SCHEMA
from pipelines.conversations import Conversations, texts_of
from pipelines.errors import ROW_ERROR_CODES, RowError, SpecError
from pipelines.image_turns import as_parts, takes_parts_only
from pipelines.images import images_array
from pipelines.messages import CONVERSATION_TYPE, Message, Turns, told_whole
from pipelines.row_params import RowParams, own_columns
from pipelines.settings import PromptSettings, SamplingSettings
from pipelines.template import one_line
from pipelines.vision import Images, Vision

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
    `sampling` says where a row's own parameters stand, `key` where the settings stand in the job file, `answer` in which
    column the text is that follows the prompt, `conversation` which key of the job file wants the messages as a column,
    `vision` what the model makes of images.

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
        conversation: str | None = None,
        vision: Vision | None = None,
    ) -> None:
        self.settings = settings
        self._vision = vision or Vision()
        if settings.images_column is not None:
            self._vision.check(f"{key}.images_column")
        self._answer = answer
        self._conversation = conversation
        self._own = RowParams(sampling or SamplingSettings())
        self.tokenizer = tokenizer
        self._parts_only: dict[str | None, bool] = {}
        """By chat template, None the tokenizer's own."""
        self._own_template = bool(getattr(tokenizer, "chat_template", None))
        may_see = settings.images_column or settings.messages_column or settings.function
        has_template = self._own_template or bool(may_see and self._vision.chat_template)
        self.chat = has_template if settings.chat is None else settings.chat
        """Whether the model's chat template is applied."""
        if not has_template:
            needs = {
                f"{key}.system": settings.system,
                f"{key}.messages_column": settings.messages_column,
                f"{key}.tools": settings.tools,
                f"{key}.chat": settings.chat,
                conversation or "": conversation,
            }
            for name, value in needs.items():
                if value:
                    raise SpecError(
                        f"{name}: the model's tokenizer has no chat template; "
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
        own = self._own(table)
        asked, images = self._asked(table)
        outcomes = [
            params if isinstance(params, RowError) and isinstance(text, str) else text
            for text, params in zip(self._rendered(asked, images), own, strict=True)
        ]
        token_ids = self._tokenise(outcomes, "prompt", special=not self.chat)
        answer_tokens = self._append_answers(table, outcomes, token_ids)
        errors = [outcome if isinstance(outcome, RowError) else None for outcome in outcomes]
        return pa.table(
            [
                _added_column(table, "row_id"),
                pa.array(token_ids, PROMPT_SCHEMA.field("token_ids").type),
                *own_columns(own),
                pa.array(answer_tokens, pa.int32()),
                self._messages(asked, token_ids),
                images_array([(ids and images.get(row)) or None for row, ids in enumerate(token_ids)]),
                pa.array([error and error.code for error in errors], pa.string()),
                pa.array([error and str(error) for error in errors], pa.string()),
            ],
            schema=PROMPT_SCHEMA,
        )

    def texts(self, table: pa.Table) -> list[str | RowError]:
        """The text of each row's prompt as the model will see it, or the row's error."""
        return self._rendered(*self._asked(table))

    def _asked(self, table: pa.Table) -> tuple[list[Turns | RowError], Images]:
        """Each row's messages, without a chat template its text, or its error; and the images of rows that may have some."""
        broken = _broken_rows(table)
        asked: list[Turns | RowError]
        if not broken:
            asked = self._of_sound(table)
        else:
            # Nothing is rendered for rows that could not be read: their values are not the user's.
            sound = iter(self._of_sound(table.filter(pc.is_null(_added_column(table, "error_code")))))
            asked = [broken[place] if place in broken else next(sound) for place in range(table.num_rows)]
        return self._vision.attach(table, self.settings.images_column, asked, self._seeing)

    def _seeing(self, messages: list[Message]) -> str:
        """One conversation, by the chat template for images."""
        return self._apply_template([messages], self._vision.chat_template)[0]

    def _of_sound(self, table: pa.Table) -> list[Turns | RowError]:
        asked = list(self._conversations(table, chat=self.chat))
        if self._conversation is None:
            return asked
        key = self._conversation
        return [(told_whole(turns, key) or turns) if isinstance(turns, list) else turns for turns in asked]

    def _rendered(self, asked: Sequence[Turns | RowError], images: Images) -> list[str | RowError]:
        chats = {place: messages for place, messages in enumerate(asked) if isinstance(messages, list)}
        texts: dict[int, str | RowError] = {}
        for seeing in (False, True):
            of_kind = {place: chats[place] for place in chats if (place in images) == seeing}
            if not of_kind:
                continue
            template = self._vision.chat_template if seeing or not self._own_template else None
            texts |= zip(of_kind, self._render_chats(list(of_kind.values()), template), strict=True)
        return [texts[place] if isinstance(turns, list) else turns for place, turns in enumerate(asked)]

    def _messages(
        self, asked: Sequence[Turns | RowError], token_ids: Sequence[Sequence[int] | None]
    ) -> pa.Array:
        """What each row that has tokens asks, where that becomes a column; else nulls."""
        if self._conversation is None:
            return pa.nulls(len(asked), CONVERSATION_TYPE)
        kept = [None if ids is None else turns for turns, ids in zip(asked, token_ids, strict=True)]
        return pa.array(kept, CONVERSATION_TYPE)

    def _render_chats(self, conversations: list[list[Message]], template: str | None) -> list[str | RowError]:
        """By the tokenizer's own template, or another."""
        if conversations and self._takes_parts_only(template):
            conversations = [[as_parts(turn) for turn in turns] for turns in conversations]

        def render(batch: list[Any]) -> list[str]:
            return self._apply_template(batch, template)

        return _batch_or_singly(render, conversations, "the model's chat template: ")

    def _takes_parts_only(self, template: str | None) -> bool:
        if template not in self._parts_only:
            self._parts_only[template] = takes_parts_only(
                lambda messages: self._apply_template([messages], template)[0]
            )
        return self._parts_only[template]

    def _apply_template(self, batch: list[Any], template: str | None) -> list[str]:
        # Keys of the job file first: the others are Dray's to decide.
        options = {**self.settings.chat_template_kwargs, "tokenize": False, "add_generation_prompt": True}
        if self.settings.tools is not None:
            options["tools"] = self.settings.tools
        if template is not None:
            options["chat_template"] = template
        texts: list[str] = self.tokenizer.apply_chat_template(batch, **options)
        return texts

    def _append_answers(
        self, table: pa.Table, outcomes: list[str | RowError], token_ids: list[Sequence[int] | None]
    ) -> list[int | None]:
        """Put each row's answer behind its prompt; how many ids it is. A row without one fails, as its outcome then says.

        Tokenised by itself: the boundary between prompt and answer is one between tokens, as it is while a model answers.
        """
        if self._answer is None:
            return [None] * len(outcomes)
        column = self._answer
        answers: list[str | RowError] = list(texts_of(table, column))
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
