"""What a row asks, in OpenAI's shape: one user turn, or a list of messages with role and content."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.errors import RowError

Message = dict[str, Any]
Turns = str | list[Message]
"""The user turn alone, or a whole conversation."""


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
