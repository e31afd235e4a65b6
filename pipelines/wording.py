"""Words that many messages share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown(name: str, known: Iterable[str], what: str = "column") -> str:
    """`unknown column 'lnag'; did you mean 'lang'?`, or the list of columns where none is near."""
    names = list(known)
    if name in ("true", "false", "null", "none"):
        return f"unknown {what} {name!r}; write {'None' if name in ('null', 'none') else name.title()}"
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f"unknown {what} {name!r}; did you mean {near[0]!r}?"
    shown = ", ".join(sorted(names)[:12]) + (", …" if len(names) > 12 else "")
    return f"unknown {what} {name!r}; there are: {printable(shown) or 'none'}"


def first_line(error: Exception) -> str:
    """The first line of an exception's message; Arrow's can be many."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def printable(text: str) -> str:
    """The text on one line and without what a terminal would act on: `\n` and its like as escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
