"""OpenAI batch files for tests, and the jobs that they become with the tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from jobs.openai_batch import Batch, convert
from jobs.openai_body import CHAT, COMPLETIONS, EMBEDDINGS
from tests.local.runs import TINY

HELLO = [{"role": "user", "content": "Hello"}]
PROMPTS: dict[str, dict[str, Any]] = {
    CHAT: {"messages": HELLO},
    COMPLETIONS: {"prompt": "Once"},
    EMBEDDINGS: {"input": "a text"},
}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def line(custom_id: str, url: str = CHAT, /, **body: Any) -> dict[str, Any]:
    """A request whose body has a prompt and this."""
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {**PROMPTS[url], **body}}


def bodies(url: str, *every: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [line(f"r{number}", url, **body) for number, body in enumerate(every)]


Convert = Callable[..., Batch]


def converter(tmp_path: Path) -> Convert:
    """Converts these lines, for the tiny model."""

    def convert_lines(lines: Iterable[Any], /, **how: Any) -> Batch:
        texts = [one if isinstance(one, str) else json.dumps(one) for one in lines]
        (tmp_path / "batch.jsonl").write_text("\n".join(texts) + "\n")
        return convert(str(tmp_path / "batch.jsonl"), str(tmp_path / "work"), **{"model": str(TINY), **how})

    return convert_lines


def rows(batch: Batch) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(
        Path(batch.job_file).with_name("requests.parquet")
    ).to_pylist()
    return found
