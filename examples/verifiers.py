"""Verifiers for the recipes in `conf/recipes/`: functions of `map` steps."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any


def exact(record: dict[str, Any]) -> dict[str, Any]:
    """Whether the text is the known answer to the letter, and its length in characters."""
    text = record["generated_text"]
    return {"correct": text == record["answer"], "length": len(text)}


def agreement(record: dict[str, Any]) -> dict[str, Any]:
    """How far the second answer says the same as the first: the F1 score of their words, as SQuAD counts it."""
    first, second = (_words(text) for text in (record["parsed"]["answer"], record["again"]))
    common = (first & second).total()
    return {"agreement": 2 * common / (first.total() + second.total()) if common else 0.0}


def _words(text: str) -> Counter[str]:
    return Counter(re.findall(r"\w+", text.lower()))
