"""`dray run-batch` as somebody from OpenAI's Batch API has it: a file as it is, the tiny model, real Ray and vLLM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai.types.chat as types
import pytest
from click.testing import CliRunner, Result

from jobs.cli import main
from tests.local.runs import CONF, TINY, held_out

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(400)]


def written(path: Path) -> list[dict[str, Any]]:
    """Write a batch file: questions with limits of their own, one in parts, one that asks nothing. Returns its lines."""
    lines = []
    for number, question in enumerate(held_out(12)):
        content: Any = question.question
        if number == 4:
            content = [{"type": "text", "text": content}]
        if number == 7:
            content = "  "
        body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": content}], "temperature": 0}
        body |= {"max_completion_tokens": 1} if number % 3 == 0 else {"max_tokens": 30}
        lines.append(
            {"custom_id": f"q-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
        )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_batch_file_is_answered_as_it_is(tmp_path: Path) -> None:
    lines = written(tmp_path / "batch.jsonl")

    def run_batch() -> Result:
        files = ["-i", str(tmp_path / "batch.jsonl"), "-o", str(tmp_path / "results.jsonl")]
        job = [str(CONF / "models" / "tiny.yaml"), "pool.cpus_per_engine=1"]
        return CliRunner().invoke(main, ["run-batch", *files, "--model", str(TINY), *job, "--json"])

    first = run_batch()
    assert first.exit_code == 0, first.output
    told = json.loads(first.stdout)["batch"]
    assert (told["requests"], told["completed"], told["failed"]) == (12, 11, 1)
    good, bad = read(tmp_path / "results.jsonl"), read(tmp_path / "results.errors.jsonl")
    assert [line["custom_id"] for line in bad] == ["q-7"]
    assert bad[0]["response"]["body"]["error"]["code"] == "empty_prompt"
    assert [line["custom_id"] for line in good] == [f"q-{number}" for number in range(12) if number != 7]
    right = 0
    for line in good:
        number = int(line["custom_id"].removeprefix("q-"))
        said = types.ChatCompletion.model_validate(line["response"]["body"], strict=True)
        assert said.usage is not None
        if number % 3 == 0:
            assert said.usage.completion_tokens == 1
        else:
            assert said.choices[0].finish_reason == "stop"
            right += said.choices[0].message.content == held_out(12)[number].answer
    assert right >= 5, "of seven whole answers"

    before = {path.name: path.read_bytes() for path in tmp_path.glob("results*.jsonl")}
    parts = {path: path.stat().st_mtime_ns for path in (tmp_path / "results.dray" / "out" / "data").iterdir()}
    again = run_batch()
    assert again.exit_code == 0, again.output
    assert before == {path.name: path.read_bytes() for path in tmp_path.glob("results*.jsonl")}
    assert parts == {path: path.stat().st_mtime_ns for path in parts}

    (tmp_path / "batch.jsonl").write_text(json.dumps(lines[0]) + "\n")
    other = run_batch()
    assert other.exit_code == 2
    assert "has other content: choose another output file or work folder" in other.output
