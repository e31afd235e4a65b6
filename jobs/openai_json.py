"""JSON that others wrote: read so that what Dray makes of it can be written again, compared and shown."""

from __future__ import annotations

import json
import re
from typing import Any

#: Levels of lists and objects in each other. Python's own bound is its stack's: what one call still reads, a deeper one, or a
#: check of several calls a level, does not.
MOST_LEVELS = 64
#: What is said of a text that holds one.
SURROGATE = "holds half of a surrogate pair (\\ud800 to \\udfff), which is no text"
_SURROGATES = re.compile("[\ud800-\udfff]")
_SHOWN = 80


class TooDeep(ValueError):
    """A value of more than `MOST_LEVELS` levels."""


def read_json(text: str) -> Any:
    """Its value. Raises ValueError for what is no JSON, NaN among it, and TooDeep."""
    try:
        value = json.loads(text, parse_constant=_no_number)
    except RecursionError:
        raise TooDeep(f"nests more than {MOST_LEVELS} levels deep") from None
    if text.count("[") + text.count("{") > MOST_LEVELS and _is_deep(value):
        raise TooDeep(f"nests more than {MOST_LEVELS} levels deep")
    return value


def is_text(value: Any) -> bool:
    """Whether it can be written as UTF-8: JSON may escape half of a surrogate pair."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.isascii() or _SURROGATES.search(text) is None


def are_equal(a: Any, b: Any) -> bool:
    """Whether both are the same JSON, but for the order of keys: Python takes 1 for 1.0 and for true."""
    return bool(a == b) and (isinstance(a, str) or _canonical(a) == _canonical(b))


def shown(value: Any) -> str:
    """A value as messages show it, cut to a line's length."""
    text = printable(json.dumps(value, ensure_ascii=False))
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def printable(text: str) -> str:
    """The text, of which each half of a surrogate pair is replaced."""
    return text if text.isascii() else _SURROGATES.sub("\ufffd", text)


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MOST_LEVELS + 1):
        level = [one for one in level if isinstance(one, dict | list)]
        if not level:
            return False
        level = [item for one in level for item in (one.values() if isinstance(one, dict) else one)]
    return True


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
