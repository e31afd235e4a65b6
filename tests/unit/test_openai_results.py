"""A batch file through all stages with the simulated engine: the results are OpenAI's, each request stands in one file once."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openai.types as types
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.books import SUCCESS
from jobs.inspect import verify
from jobs.openai_batch import Batch, convert
from jobs.openai_body import CHAT, COMPLETIONS, EMBEDDINGS
from jobs.openai_job import REQUESTS
from jobs.openai_results import Counts, Unanswered, write_results
from pipelines.errors import ROW_ERROR_CODES, OutputError
from pipelines.part import FOOTER_KEY
from pipelines.storage import Storage
from tests.local.runs import TINY, rows_of
from tests.tiny_vision import vision_tokenizer
from tests.unit.batch_files import bodies
from tests.unit.stages import committed, planned, run
from tests.unit.test_images import RED

JOB = {
    "model.backend": "simulated",
    "model.simulated.tokens_per_s": 1e7,
    "model.engine.max_model_len": 512,
    "pool.device": "cpu",
}


@dataclass(frozen=True)
class Answered:
    """A batch that has run."""

    batch: Batch
    folder: Path

    def write(self, **how: Any) -> Counts:
        files = [str(self.folder / name) for name in ("results.jsonl", "results.errors.jsonl")]
        batch = self.batch
        return write_results(
            batch.out, *files, endpoint=batch.endpoint, encoding_format=batch.encoding_format, **how
        )

    def lines(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def good(self) -> list[dict[str, Any]]:
        return self.lines("results.jsonl")

    @property
    def bad(self) -> list[dict[str, Any]]:
        return self.lines("results.errors.jsonl")


def answered(
    folder: Path, lines: list[dict[str, Any]], /, finished: bool = True, **overrides: Any
) -> Answered:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "batch.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    how = JOB | {key.replace("__", "."): value for key, value in overrides.items()}
    model = how.pop("model", str(TINY))
    batch = convert(str(folder / "batch.jsonl"), str(folder / "work"), model=model, overrides=how)
    output = committed(batch.settings)
    assert verify(output.storage, deep=True)["problems"] == []
    if finished:
        output.storage.write(SUCCESS, b"{}")
    return Answered(batch, folder)


def body(line: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = line["response"]["body"]
    return found


def test_a_chat_is_answered_as_openai_answers(tmp_path: Path) -> None:
    done = answered(tmp_path, bodies(CHAT, {"n": 2, "temperature": 1, "max_tokens": 3}))
    assert done.write() == Counts(completed=1, failed=0)
    [line] = done.good
    assert set(line) == {"id", "custom_id", "response", "error"}
    assert line["id"].startswith("batch_req_")
    assert (line["custom_id"], line["error"]) == ("r0", None)
    assert set(line["response"]) == {"status_code", "request_id", "body"}
    assert line["response"]["status_code"] == 200
    said = types.chat.ChatCompletion.model_validate(body(line), strict=True)
    rows = rows_of(tmp_path / "work" / "out").to_pylist()
    assert [choice.message.content for choice in said.choices] == [row["generated_text"] for row in rows]
    assert [choice.index for choice in said.choices] == [0, 1]
    assert {choice.finish_reason for choice in said.choices} <= {"stop", "length"}
    assert said.model == "tiny-model"
    assert said.usage is not None
    assert said.usage.completion_tokens == sum(row["completion_tokens"] for row in rows)
    assert said.usage.total_tokens == rows[0]["prompt_tokens"] + said.usage.completion_tokens
    assert said.usage.prompt_tokens_details is not None
    assert said.usage.prompt_tokens_details.cached_tokens == rows[0]["cached_tokens"]


def test_requests_are_sampled_each_as_it_says(tmp_path: Path) -> None:
    limits = [1, 2, None, 3]
    done = answered(
        tmp_path, bodies(CHAT, *[{"max_tokens": limit, "seed": 5, "top_p": 0.9} for limit in limits])
    )
    assert done.write() == Counts(completed=4, failed=0)
    used = [body(line)["usage"]["completion_tokens"] for line in done.good]
    assert [used[0], used[1], used[3]] == [1, 2, 3]
    assert used[2] > 3
    assert [body(line)["choices"][0]["finish_reason"] for line in done.good] == [
        "length",
        "length",
        "stop",
        "length",
    ]


def test_completions_are_text(tmp_path: Path) -> None:
    done = answered(tmp_path, bodies(COMPLETIONS, {}, {"prompt": "More"}))
    done.write()
    said = [types.Completion.model_validate(body(line), strict=True) for line in done.good]
    rows = rows_of(tmp_path / "work" / "out").to_pylist()
    assert [one.choices[0].text for one in said] == [row["generated_text"] for row in rows]
    assert {one.object for one in said} == {"text_completion"}


@pytest.mark.parametrize("encoding_format", ["float", "base64"])
def test_embeddings_are_lists_or_base64(tmp_path: Path, encoding_format: str) -> None:
    asked = {"dimensions": 8, "encoding_format": encoding_format}
    done = answered(tmp_path, bodies(EMBEDDINGS, asked, {**asked, "input": "longer than the other text"}))
    assert done.write() == Counts(completed=2, failed=0)
    rows = rows_of(tmp_path / "work" / "out").to_pylist()
    for line, row in zip(done.good, rows, strict=True):
        found = body(line)
        [data] = found["data"]
        if encoding_format == "base64":
            assert isinstance(data["embedding"], str)
            data["embedding"] = np.frombuffer(base64.b64decode(data["embedding"]), "<f4").tolist()
        said = types.CreateEmbeddingResponse.model_validate(found, strict=True)
        assert said.data[0].embedding == row["embedding"]
        assert len(row["embedding"]) == 8
        assert said.usage.total_tokens == row["embedding_prompt_tokens"] > 0
    assert rows[0]["embedding_prompt_tokens"] < rows[1]["embedding_prompt_tokens"]


def test_failed_requests_have_a_file_of_their_own(tmp_path: Path) -> None:
    blank = {"messages": [{"role": "user", "content": " "}]}
    long = {"messages": [{"role": "user", "content": "many words " * 400}]}
    done = answered(tmp_path, bodies(CHAT, {}, blank, {}, long))
    assert done.write() == Counts(completed=2, failed=2)
    assert [line["custom_id"] for line in done.good] == ["r0", "r2"]
    assert [line["custom_id"] for line in done.bad] == ["r1", "r3"]
    first, second = (line["response"] for line in done.bad)
    assert first["status_code"] == 400
    error = first["body"]["error"]
    assert error == {
        "message": "the messages hold no text besides a system turn",
        "type": "invalid_request_error",
        "param": "messages",
        "code": "empty_prompt",
    }
    assert types.shared.ErrorObject.model_validate(error)
    assert second["body"]["error"]["code"] == "prompt_too_long"


def test_images_come_within_the_file(tmp_path: Path) -> None:
    def asked(url: str) -> dict[str, Any]:
        parts = [
            {"type": "text", "text": "What?"},
            {"type": "image_url", "image_url": {"url": url, "detail": "low"}},
        ]
        return {"messages": [{"role": "user", "content": parts}]}

    inside = f"data:image/png;base64,{base64.b64encode(RED).decode()}"
    lines = bodies(CHAT, asked(inside), asked("https://example.com/red.png"), {})
    done = answered(tmp_path, lines, model=str(vision_tokenizer(tmp_path / "model")))
    assert done.write() == Counts(completed=2, failed=1)
    seen, bare = (body(line)["usage"]["prompt_tokens"] for line in done.good)
    assert seen > bare + 20  # the simulated engine takes 32 tokens for an image
    assert body(done.bad[0])["error"]["code"] == "bad_image"


def rewritten(done: Answered, change: Callable[[pa.Table], pa.Table]) -> None:
    """The same output with other rows in its parts, as no engine here would give."""
    for path in (done.folder / "work" / "out" / "data").glob("*.parquet"):
        footer, table = pq.read_metadata(path).metadata[FOOTER_KEY], change(pq.read_table(path))
        with pq.ParquetWriter(path, table.schema) as writer:
            writer.write_table(table)
            writer.add_key_value_metadata({FOOTER_KEY: footer})


#: A number that would come back from a parser as another text.
WRITTEN = ' {"a": 1.50}\n'


def with_column(table: pa.Table, name: str, values: list[Any], type_: pa.DataType) -> pa.Table:
    column = pa.array(values, type_)
    if name not in table.column_names:
        return table.append_column(name, column)
    return table.set_column(table.column_names.index(name), name, column)


@pytest.mark.parametrize("code", sorted(ROW_ERROR_CODES.keys() - {"parse_error", "step_error"}))
def test_every_error_has_a_fitting_status(tmp_path: Path, code: str) -> None:
    done = answered(tmp_path, bodies(CHAT, {}))
    rewritten(done, lambda table: with_column(table, "error_code", [code], pa.string()))
    done.write()
    [line] = done.bad
    wanted = {"engine_crash": 500, "prompt_crash": 500, "invalid_output": 500, "request_timeout": 504}
    assert line["response"]["status_code"] == wanted.get(code, 400)
    kind = "invalid_request_error" if line["response"]["status_code"] == 400 else "server_error"
    assert (body(line)["error"]["code"], body(line)["error"]["type"]) == (code, kind)
    assert done.good == []


def test_reasoning_and_calls_stand_in_the_message(tmp_path: Path) -> None:
    done = answered(tmp_path, bodies(CHAT, {}, {}))
    calls = [{"name": "weather", "arguments": '{"place": "Bonn"}'}, {"name": "time", "arguments": "{}"}]
    kind = pa.list_(pa.struct([("name", pa.string()), ("arguments", pa.string())]))

    def change(table: pa.Table) -> pa.Table:
        table = with_column(table, "reasoning", ["so it is", None], pa.string())
        table = with_column(table, "reasoning_tokens", [3, 0], pa.int32())
        table = with_column(table, "generated_text", ["", WRITTEN], pa.string())
        table = with_column(table, "finish_reason", ["stop", "stop"], pa.string())
        return with_column(table, "tool_calls", [calls, None], kind)

    rewritten(done, change)
    done.write()
    first, second = (types.chat.ChatCompletion.model_validate(body(line), strict=True) for line in done.good)
    [choice] = first.choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    assert choice.message.tool_calls is not None
    assert [call.function.model_dump() for call in choice.message.tool_calls] == calls  # type: ignore[union-attr]
    assert len({call.id for call in choice.message.tool_calls}) == 2
    assert choice.message.reasoning == "so it is"  # type: ignore[attr-defined]
    assert first.usage is not None
    assert first.usage.completion_tokens_details is not None
    assert first.usage.completion_tokens_details.reasoning_tokens == 3
    assert (second.choices[0].finish_reason, second.choices[0].message.content) == ("stop", WRITTEN)
    assert second.choices[0].message.tool_calls is None


@settings(max_examples=12)
@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 9), st.integers(1, 3))
def test_every_request_stands_in_one_file_once_in_its_order(
    tmp_path_factory: pytest.TempPathFactory, good: list[bool], shard: int, n: int
) -> None:
    tmp_path = tmp_path_factory.mktemp("batch")
    asked = [{"n": n, "messages": [{"role": "user", "content": "Hello" if fine else " "}]} for fine in good]
    done = answered(tmp_path, bodies(CHAT, *asked), shards__rows=shard)
    assert done.write() == Counts(completed=sum(good), failed=len(good) - sum(good))
    assert [line["custom_id"] for line in done.good] == [f"r{i}" for i, fine in enumerate(good) if fine]
    assert [line["custom_id"] for line in done.bad] == [f"r{i}" for i, fine in enumerate(good) if not fine]
    assert len({line["id"] for line in done.good + done.bad}) == len(good)
    assert all(len(body(line)["choices"]) == n for line in done.good)
    assert (tmp_path / "results.errors.jsonl").exists() is (not all(good))
    shutil.rmtree(tmp_path)


def test_written_again_the_files_are_the_same(tmp_path: Path) -> None:
    blank = {"messages": [{"role": "user", "content": " "}]}
    done = answered(tmp_path, bodies(CHAT, {}, blank))
    done.write()
    before = [(tmp_path / name).read_bytes() for name in ("results.jsonl", "results.errors.jsonl")]
    done.write()
    assert before == [(tmp_path / name).read_bytes() for name in ("results.jsonl", "results.errors.jsonl")]


def test_errors_that_are_none_any_more_go(tmp_path: Path) -> None:
    done = answered(tmp_path, bodies(CHAT, {}))
    (tmp_path / "results.errors.jsonl").write_text("{}\n")
    done.write()
    assert not (tmp_path / "results.errors.jsonl").exists()


def test_what_a_retry_has_answered_is_no_error_any_more(tmp_path: Path) -> None:
    long = {"messages": [{"role": "user", "content": "many words " * 400}]}
    done = answered(tmp_path, bodies(CHAT, {}, long, {}))
    assert done.write() == Counts(completed=2, failed=1)
    output = planned(done.batch.settings)
    run(output.retry("second", "model.engine.max_model_len=8192"), output.plan.shards)
    assert done.write() == Counts(completed=3, failed=0)
    assert [line["custom_id"] for line in done.good] == ["r0", "r1", "r2"]
    assert not (tmp_path / "results.errors.jsonl").exists()


def test_results_go_to_any_store(tmp_path: Path) -> None:
    done = answered(tmp_path, bodies(CHAT, {}))
    done.write()
    place = "memory://results/of"
    write_results(done.batch.out, f"{place}/a.jsonl", f"{place}/b.jsonl", endpoint=CHAT)
    assert Storage(place).read("a.jsonl") == (tmp_path / "results.jsonl").read_bytes()
    assert [info.name for info in Storage(place).list()] == ["a.jsonl"]


def test_an_unfinished_output_gives_what_is_committed_if_asked(tmp_path: Path) -> None:
    (tmp_path / "batch.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in bodies(CHAT, *[{}] * 9))
    )
    how = JOB | {"shards.rows": 3}
    batch = convert(str(tmp_path / "batch.jsonl"), str(tmp_path / "work"), model=str(TINY), overrides=how)
    output = planned(batch.settings)
    run(output.work("r"), [output.plan.shards[0], output.plan.shards[2]])
    done = Answered(batch, tmp_path)
    with pytest.raises(OutputError, match="is not finished: run the batch again"):
        done.write()
    assert not (tmp_path / "results.jsonl").exists()
    requests = str(tmp_path / "work" / REQUESTS)
    why = Unanswered(requests=requests, code="batch_expired", message="too late")
    assert done.write(unanswered=why) == Counts(completed=6, failed=3)
    assert [line["custom_id"] for line in done.good] == ["r0", "r1", "r2", "r6", "r7", "r8"]
    assert [line["custom_id"] for line in done.bad] == ["r3", "r4", "r5"]
    assert {line["response"] for line in done.bad} == {None}
    assert {line["error"]["code"] for line in done.bad} == {"batch_expired"}


def test_an_output_that_was_not_begun_gives_errors_only(tmp_path: Path) -> None:
    (tmp_path / "batch.jsonl").write_text("".join(json.dumps(line) + "\n" for line in bodies(CHAT, {}, {})))
    batch = convert(str(tmp_path / "batch.jsonl"), str(tmp_path / "work"), model=str(TINY))
    done = Answered(batch, tmp_path)
    requests = str(tmp_path / "work" / REQUESTS)
    why = Unanswered(requests=requests, code="batch_cancelled", message="cancelled")
    assert done.write(unanswered=why) == Counts(completed=0, failed=2)
    assert [line["custom_id"] for line in done.bad] == ["r0", "r1"]


def test_an_output_that_was_claimed_but_not_planned_gives_errors_only(tmp_path: Path) -> None:
    done = answered(tmp_path, bodies(CHAT, {}, {}))
    shutil.rmtree(tmp_path / "work" / "out" / ".dray" / "plan")
    shutil.rmtree(tmp_path / "work" / "out" / "data")
    why = Unanswered(requests=str(tmp_path / "work" / REQUESTS), code="batch_expired", message="too late")
    assert done.write(unanswered=why) == Counts(completed=0, failed=2)
    assert [line["custom_id"] for line in done.bad] == ["r0", "r1"]
    with pytest.raises(OutputError, match="with a plan"):
        done.write()


def test_the_model_may_have_another_name(tmp_path: Path) -> None:
    done = answered(tmp_path, bodies(CHAT, {"model": "gpt-4o"}))
    done.write(model="served")
    assert body(done.good[0])["model"] == "served"


def test_another_jobs_output_is_no_batch(tmp_path: Path) -> None:
    done = answered(tmp_path, bodies(CHAT, {}))
    rewritten(done, lambda table: table.drop_columns(["custom_id"]))
    with pytest.raises(OutputError, match="is not the output of a batch of requests"):
        done.write()
