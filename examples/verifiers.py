"""Verifiers for the recipes in `conf/recipes/`: functions of `map` steps."""

from __future__ import annotations

from typing import Any


def exact(record: dict[str, Any]) -> dict[str, Any]:
    """Whether the text is the known answer to the letter, and its length in characters."""
    text = record["generated_text"]
    return {"correct": text == record["answer"], "length": len(text)}
