"""Images among the turns: content parts in, and what a chat template is to render, beside the images' sources in its order.

    {type: image_url, image_url: {url}} ┐
    {type: image, image|url|path}       ├─► {type: image}, which the template makes the model's own placeholder of
    {type: image} and `images_column`   ┘

Which placeholder that is, and how many tokens become of it, Dray does not know: the first is the template's matter, the
second that of vLLM's processor of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipelines.errors import RowError
from pipelines.messages import IMAGE, SOURCE, Message, Turns

#: What a template is asked to show, to see whether it shows it.
_PROBE = "dray probe"


def places_images(render: Callable[[list[Message]], str]) -> bool:
    """Whether a chat template takes content parts, and puts something where an image is."""
    text = {"type": "text", "text": _PROBE}
    try:
        shown, bare = (
            render([{"role": "user", "content": parts}]) for parts in ([{"type": IMAGE}, text], [text])
        )
    except Exception:  # noqa: BLE001 -- templates for text join it with `+`, or raise of their own
        return False
    # A template for text shows the parts as Python writes them.
    return _PROBE in shown and "'type'" not in shown and shown != bare


def takes_parts_only(render: Callable[[list[Message]], str]) -> bool:
    """Whether a chat template loses content that is a text: some models' expect a list of parts, also where all is text."""

    def shown(content: Any) -> bool:
        try:
            return _PROBE in render([{"role": "user", "content": content}])
        except Exception:  # noqa: BLE001 -- see above
            return False

    return not shown(_PROBE) and shown([{"type": "text", "text": _PROBE}])


def has_images(turns: Turns) -> bool:
    """Whether a message has an image among its parts."""
    return not isinstance(turns, str) and any(_is_image(part) for turn in turns for part in _parts(turn))


def with_images(turns: Turns, given: Sequence[Any] | None, *, placed: bool) -> tuple[Turns, list[Any]]:
    """(the turns for the chat template, the sources of the images in its order).

    `given`: what `images_column` has for the row, None where there is none. They fill the parts that name no image, and
    where there are no such parts come before the text of the last user turn. `placed`: see `places_images`; else the
    turns' text is to hold the model's placeholder itself. Raises RowError.
    """
    if isinstance(turns, str) or not (placed or has_images(turns)):
        return turns, list(given or ())
    if not placed:
        raise RowError(
            "prompt_error",
            "the model's chat template has no place for images; write the model's own placeholder into the text, and "
            "give the images as prompt.images_column",
        )
    turns = [as_parts(turn) for turn in turns]
    open_places = sum(SOURCE not in part for turn in turns for part in _parts(turn) if _is_image(part))
    if given and not open_places:
        _put_before_text(turns, len(given))
    elif open_places != len(given or ()):
        named = "no prompt.images_column" if given is None else f"{len(given)} in prompt.images_column"
        raise RowError(
            "bad_image", f"the messages have places for {open_places} images, and there are {named}"
        )
    rest = iter(given or ())
    sources = [
        part[SOURCE] if SOURCE in part else next(rest)
        for turn in turns
        for part in _parts(turn)
        if _is_image(part)
    ]
    return [_without_sources(turn) for turn in turns], sources


def _put_before_text(turns: list[Message], count: int) -> None:
    last = next((place for place in reversed(range(len(turns))) if turns[place]["role"] == "user"), None)
    if last is None:
        raise RowError("bad_image", "there are images, and no user turn that they could stand in")
    turns[last] = {**turns[last], "content": [{"type": IMAGE}] * count + _parts(turns[last])}


def as_parts(turn: Message) -> Message:
    """As vLLM gives messages to a template that takes parts: text is one of them. A tool's answer stays as it is."""
    if isinstance(turn.get("content"), str) and turn["role"] != "tool":
        return {**turn, "content": [{"type": "text", "text": turn["content"]}]}
    return turn


def _without_sources(turn: Message) -> Message:
    if not _parts(turn):
        return turn
    return {**turn, "content": [{"type": IMAGE} if _is_image(part) else part for part in _parts(turn)]}


def _parts(turn: Message) -> list[Any]:
    content = turn.get("content")
    return content if isinstance(content, list) else []


def _is_image(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == IMAGE
