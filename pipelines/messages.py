"""What a row asks, in OpenAI's shape: one user turn, or a list of messages with role and content; and the conversation
that it becomes with the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.errors import RowError

Message = dict[str, Any]
Turns = str | list[Message]
"""The user turn alone, or a whole conversation."""
#: A conversation as a column.
CONVERSATION_TYPE = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


def checked(turns: Any) -> Turns | RowError:
    """The turns in OpenAI's shape, or why they are none."""
    if isinstance(turns, str):
        return turns if turns.strip() else RowError("empty_prompt", "the user turn is blank")
    if isinstance(turns, RowError):
        return turns
    if isinstance(turns, Mapping) or not isinstance(turns, Sequence):
        return RowError("prompt_error", f"expected text or a list of messages, found {type(turns).__name__}")
    try:
        messages = [_message(number, message) for number, message in enumerate(turns, 1)]
    except RowError as error:
        return error
    if not any(message["role"] != "system" and _says_something(message) for message in messages):
        return RowError("empty_prompt", "the messages hold no text besides a system turn")
    return messages


def _message(number: int, message: Any) -> Message:
    if not isinstance(message, Mapping):
        raise RowError(
            "prompt_error", f"message {number}: expected role and content, found {type(message).__name__}"
        )
    # A column of structs has every field in every message, null where it does not apply.
    fields = {name: value for name, value in message.items() if value is not None}
    role = fields.get("role")
    if not isinstance(role, str) or not role:
        raise RowError("prompt_error", f"message {number}: role must be text such as 'user', found {role!r}")
    content = fields.get("content")
    if isinstance(content, list):
        fields["content"] = _joined(number, content)
    elif content is None and "tool_calls" in fields:
        pass  # an assistant turn may only call tools
    elif not isinstance(content, str):
        raise RowError(
            "prompt_error",
            f"message {number}: content must be text or a list of text parts, found {type(content).__name__}",
        )
    return fields


def _joined(number: int, parts: list[Any]) -> str:
    """Text parts as one text, joined by newlines as vLLM does for templates that take strings."""
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise RowError(
                "prompt_error", f"message {number}: content part of type {kind!r}; only text is supported"
            )
        texts.append(text)
    return "\n".join(texts)


def _says_something(message: Message) -> bool:
    return bool(str(message.get("content", "")).strip()) or "tool_calls" in message


def has_system(turns: Turns) -> bool:
    return not isinstance(turns, str) and turns[0]["role"] == "system"


def conversation(turns: Turns, system: Any) -> list[Message]:
    messages = [{"role": "user", "content": turns}] if isinstance(turns, str) else turns
    if system is None or has_system(messages):  # a row's own system turn wins
        return messages
    return [{"role": "system", "content": system}, *messages]


def continued(messages: list[Message] | RowError, text: Turns | RowError) -> Turns | RowError:
    """The messages and one more user turn; the error of either, or of a turn that is blank."""
    if isinstance(messages, RowError):
        return messages
    turn = checked(text)
    return turn if isinstance(turn, RowError) else [*messages, {"role": "user", "content": turn}]


def told_whole(messages: list[Message], key: str) -> RowError | None:
    """Why a column of `CONVERSATION_TYPE` cannot hold the messages, which `checked` has made; `key` is where the job file
    asks for it.

    What it cannot hold is not left out: a later turn would be asked after another conversation than this one.
    """
    for number, message in enumerate(messages, 1):
        try:
            "".join(map(str, message.values())).encode()
        except UnicodeEncodeError:  # which a chat template need not show
            return RowError("invalid_utf8", f"message {number}: its text is not UTF-8")
        if more := sorted(map(str, message.keys() - {"role", "content"})):
            return RowError(
                "prompt_error",
                f"message {number}: has {', '.join(more)}, and the column of {key} holds role and content only; "
                f"leave {key} out, or the fields",
            )
    return None


def conversations(asked: pa.ChunkedArray, answers: pa.ChunkedArray) -> pa.Array:
    """For each record the messages that were asked, of `CONVERSATION_TYPE`, and the answer as the assistant's; null where
    one of them is."""
    asked = asked.combine_chunks()
    answers = answers.combine_chunks().cast(pa.string())
    whole = asked.is_valid().to_numpy(zero_copy_only=False) & answers.is_valid().to_numpy(
        zero_copy_only=False
    )
    there = pa.array(whole)
    asked, said = asked.filter(there), answers.filter(there)
    messages = asked.flatten()
    roles = pa.repeat(pa.scalar("assistant", pa.string()), len(said))
    every = pa.concat_arrays([messages, pa.StructArray.from_arrays([roles, said], fields=[*messages.type])])
    # Each answer goes where its messages end.
    lengths = asked.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
    places = np.insert(np.arange(len(messages)), np.cumsum(lengths), len(messages) + np.arange(len(said)))
    counts = np.zeros(len(whole), np.int64)
    counts[whole] = lengths + 1
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())
    return pa.ListArray.from_arrays(
        offsets, every.take(pa.array(places)), type=CONVERSATION_TYPE, mask=pa.array(~whole)
    )
