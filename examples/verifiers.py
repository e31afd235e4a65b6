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
    """How far the second answer says the same as the first, from 0 to 1."""
    return {"agreement": _overlap(record["pair"]["answer"], record["again"])}


def novelty(record: dict[str, Any]) -> dict[str, Any]:
    """How far the task is from the nearest of those that the model was shown: 0 is one of them, 1 has no word of any."""
    task = record["parsed"]["task"]
    return {"novelty": 1.0 - max(_overlap(task, shown) for shown in record["tasks"])}


def kept_numbers(record: dict[str, Any]) -> dict[str, Any]:
    """The share of the text's numbers that stand in the rewritten text as well; 1 where it has none."""
    said, kept = (set(re.findall(r"\d+", text)) for text in (record["text"], record["generated_text"]))
    return {"kept_numbers": len(said & kept) / len(said) if said else 1.0}


def _overlap(first: str, second: str) -> float:
    """The F1 score of the words of two texts, as SQuAD counts it."""
    one, other = (Counter(re.findall(r"\w+", text.lower())) for text in (first, second))
    common = (one & other).total()
    return 2 * common / (one.total() + other.total()) if common else 0.0
