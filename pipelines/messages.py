"""What a row asks, in OpenAI's shape: one user turn, or a list of messages with role and content; and the conversation
that it becomes with the answer."""

from __future__ import annotations

import contextlib
import json
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
#: The type of a content part that is an image, and where it says which; without that it is `images_column`'s next.
IMAGE, SOURCE = "image", "image"


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
        fields["content"] = _content(number, content)
    elif content is None and "tool_calls" in fields:
        pass  # an assistant turn may only call tools
    elif not isinstance(content, str):
        raise RowError(
            "prompt_error",
            f"message {number}: content must be text or a list of text parts, found {type(content).__name__}",
        )
    return fields


def _content(number: int, parts: list[Any]) -> str | list[Message]:
    """Text parts as one text, joined by newlines as vLLM does for templates that take strings; the parts, where one of
    them is an image."""
    found = [_part(number, part) for part in parts]
    texts = [part for part in found if isinstance(part, str)]
    if len(texts) == len(found):
        return "\n".join(texts)
    return [{"type": "text", "text": part} if isinstance(part, str) else part for part in found]


def _part(number: int, part: Any) -> str | Message:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if isinstance(part, Mapping) and kind in (IMAGE, "image_url"):
        # A column of structs has every field in every part, null where it does not apply.
        named = [part[key] for key in ("image_url", "image", "url", "path") if part.get(key) is not None]
        source = (
            named[0].get("url", named[0]) if named and isinstance(named[0], Mapping) else (named or [None])[0]
        )
        if source is not None:
            return {"type": IMAGE, SOURCE: source}
        if kind == IMAGE:
            return {"type": IMAGE}
        raise RowError("bad_image", f"message {number}: a part of type 'image_url' without its url")
    text = part.get("text") if isinstance(part, Mapping) else part
    if not isinstance(text, str):
        raise RowError(
            "prompt_error",
            f"message {number}: content part of type {kind!r}; only text and images are supported",
        )
    return text


def image_sources(messages: Any) -> list[Any]:
    """What the images among the parts of messages, or of their JSON text, are read from; none of what is no messages."""
    if isinstance(messages, str):
        try:
            messages = json.loads(messages)
        except (ValueError, RecursionError):
            return []
    found = []
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, Mapping) else None
        for part in content if isinstance(content, list) else ():
            with contextlib.suppress(RowError):
                read = _part(0, part)
                found += [read[SOURCE]] if isinstance(read, Mapping) and SOURCE in read else []
    return found


def _says_something(message: Message) -> bool:
    content = message.get("content", "")
    if isinstance(content, list):
        return True  # an image says something
    return bool(str(content).strip()) or "tool_calls" in message


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
        if isinstance(message.get("content"), list):
            return RowError(
                "prompt_error",
                f"message {number}: has images, and the column of {key} holds text only; leave {key} out",
            )
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
