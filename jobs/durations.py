"""Spans of time as people write them: `90s`, `30m`, `8h`, `7d`, `2w`."""

from __future__ import annotations

import re

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_FORM = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>[smhdw])")


def seconds_of(text: str) -> float | None:
    """`1.5h` → 5400.0; None for what is no duration."""
    match = _FORM.fullmatch(text.strip())
    return float(match["number"]) * _UNITS[match["unit"]] if match else None
