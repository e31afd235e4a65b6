"""An OpenAI batch file becomes a job: what is mapped, and that the same file makes the same job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from jobs.fingerprint import identity
from jobs.openai_batch import convert
from jobs.openai_body import CHAT, COMPLETIONS, EMBEDDINGS, IGNORED, BatchMistakes
from pipelines.errors import SpecError
from tests.local.runs import TINY
from tests.unit.batch_files import HELLO, TOOL, Convert, bodies, converter, rows


@pytest.fixture
def made(tmp_path: Path) -> Convert:
    return converter(tmp_path)


# ── What becomes of a good file ──────────────────────────────────────────────────────────────────────────────────


def test_a_chat_becomes_a_job(made: Convert) -> None:
    sampled = {"temperature": 0, "top_p": 1, "stop": "END", "max_completion_tokens": 7, "top_k": 3, "n": 1}
    batch = made(
        ["", *bodies(CHAT, *[{"model": "gpt-4o", "user": "u", "stream": False, **sampled}] * 2), "  "]
    )
    assert (batch.endpoint, batch.requests, batch.model) == (CHAT, 2, "gpt-4o")
    spec = batch.load().spec
    assert spec.model.source == str(TINY)
    assert spec.prompt is not None
    assert spec.prompt.messages_column == "messages"
    sampling = spec.sampling
    assert (sampling.temperature, sampling.stop, sampling.max_tokens, sampling.top_k) == (0.0, ["END"], 7, 3)
    assert spec.output.columns == ["custom_id"]
    assert spec.errors.max_error_rate == 1.0
    assert [set(row) for row in rows(batch)] == [{"custom_id", "messages"}] * 2
    assert [row["custom_id"] for row in rows(batch)] == ["r0", "r1"]
    assert json.loads(rows(batch)[0]["messages"]) == HELLO


def test_completions_are_not_chats(made: Convert) -> None:
    batch = made(bodies(COMPLETIONS, {}, {"prompt": ["twice"], "echo": False, "suffix": None}))
    spec = batch.load().spec
    assert spec.prompt is not None
    assert (spec.prompt.prompt_column, spec.prompt.chat) == ("prompt", False)
    assert spec.sampling.max_tokens == 16
    assert [row["prompt"] for row in rows(batch)] == ["Once", "twice"]


def test_embeddings_are_a_step(made: Convert) -> None:
    body = {"dimensions": 8, "encoding_format": "base64"}
    batch = made(bodies(EMBEDDINGS, body, {**body, "input": ["b"]}))
    spec = batch.load().spec
    assert spec.prompt is None
    [step] = spec.steps
    assert step.embed is not None
    assert (step.embed.dimensions, step.embed.asked_prompt.prompt_column) == (8, "input")
    assert batch.encoding_format == "base64"
    assert [row["input"] for row in rows(batch)] == ["a text", "b"]


def test_what_lines_have_of_their_own_is_a_column(made: Convert) -> None:
    batch = made(
        bodies(
            CHAT,
            {"temperature": 0.5, "max_tokens": 5, "seed": 3},
            {"temperature": 0.5, "max_completion_tokens": 6, "seed": 3},
            {"temperature": 0.5, "seed": 3, "stop": []},
            {"temperature": 0.5, "seed": None},
        )
    )
    found = [json.loads(row["sampling_params"] or "null") for row in rows(batch)]
    assert found == [{"max_tokens": 5, "seed": 3}, {"max_tokens": 6, "seed": 3}, {"seed": 3}, None]
    assert batch.settings["sampling"] == {
        "temperature": 0.5,
        "max_tokens": None,
        "params_column": "sampling_params",
    }


def test_a_seed_is_a_lines_own_also_where_all_have_it(made: Convert) -> None:
    batch = made(bodies(CHAT, {"seed": 1}, {"seed": 1}))
    assert [row["sampling_params"] for row in rows(batch)] == ['{"seed": 1}'] * 2
    assert "seed" not in batch.settings["sampling"]


@pytest.mark.parametrize(
    ("body", "becomes"),
    [
        ({"response_format": {"type": "text"}}, {}),
        ({"response_format": {"type": "json_object"}}, {"output_schema": {"type": "object"}}),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "integer"}},
                }
            },
            {"output_schema": {"type": "integer"}},
        ),
        ({"structured_outputs": {"choice": ["a", "b"]}}, {"structured_outputs": {"choice": ["a", "b"]}}),
        ({"structured_outputs": {"json": '{"type": "integer"}'}}, {"output_schema": {"type": "integer"}}),
        ({"structured_outputs": {"json_object": True}}, {"output_schema": {"type": "object"}}),
        ({"guided_regex": "a+"}, {"structured_outputs": {"regex": "a+"}}),
        ({"guided_json": {"type": "integer"}}, {"output_schema": {"type": "integer"}}),
        ({"guided_choice": ["x"]}, {"structured_outputs": {"choice": ["x"]}}),
        ({"guided_grammar": "root ::= 'a'"}, {"structured_outputs": {"grammar": "root ::= 'a'"}}),
        ({"n": 3}, {"n": 3}),
        ({"skip_special_tokens": False}, {"skip_special_tokens": False}),
    ],
)
def test_what_only_the_job_can_have(made: Convert, body: dict[str, Any], becomes: dict[str, Any]) -> None:
    batch = made(bodies(CHAT, body, body))
    assert batch.settings["sampling"] == {**becomes, "max_tokens": None}
    batch.load()


def test_tools_come_with_a_parser(made: Convert) -> None:
    lines = bodies(CHAT, {"tools": [TOOL], "tool_choice": "auto"}, {"tools": [TOOL]})
    with pytest.raises(SpecError, match=r"body.tools: .* sampling.tool_call_parser=hermes"):
        made(lines)
    spec = made(lines, overrides=["sampling.tool_call_parser=hermes"]).load().spec
    assert spec.prompt is not None
    assert spec.prompt.tools == [TOOL]


def test_tools_that_may_not_be_called_are_not_shown(made: Convert) -> None:
    assert "tools" not in made(bodies(CHAT, {"tools": [TOOL], "tool_choice": "none"})).settings["prompt"]


def test_earlier_calls_have_their_arguments_as_objects(made: Convert) -> None:
    def turn(arguments: str) -> dict[str, Any]:
        call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
        return {"role": "assistant", "content": None, "tool_calls": [call]}

    batch = made(bodies(CHAT, {"messages": [*HELLO, turn('{"a": 1}'), turn("broken"), turn("")]}))
    calls = [
        turn["tool_calls"][0]["function"]["arguments"] for turn in json.loads(rows(batch)[0]["messages"])[1:]
    ]
    assert calls == [{"a": 1}, "broken", {}]


def test_reasoning_effort_goes_to_the_template_as_vllms_server_gives_it(made: Convert) -> None:
    batch = made(bodies(CHAT, {"reasoning_effort": "low", "chat_template_kwargs": {"x": 1}}))
    asked = batch.settings["prompt"]["chat_template_kwargs"]
    assert asked == {"enable_thinking": True, "x": 1, "reasoning_effort": "low"}


def test_arguments_that_are_no_json_of_ours_stay_text(made: Convert) -> None:
    odd = ["[" * 100_000, '{"a": ' + "[" * 70 + "]" * 70 + "}", '{"a": NaN}', '{"a": "\\ud800"}']
    calls = [{"function": {"name": "x", "arguments": text}} for text in odd]
    batch = made(bodies(CHAT, {"messages": [*HELLO, {"role": "assistant", "tool_calls": calls}]}))
    assert json.loads(rows(batch)[0]["messages"])[1]["tool_calls"] == calls


def test_what_nests_as_deep_as_a_line_may_becomes_a_job(made: Convert) -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(28):
        schema = {"type": "object", "properties": {"x": schema}}
    deep: Any = 0
    for _ in range(60):
        deep = [deep]
    asked = {"guided_json": schema, "chat_template_kwargs": {"x": deep}}
    spec = made(bodies(CHAT, asked)).load().spec
    assert (spec.sampling.output_schema, spec.prompt and spec.prompt.chat_template_kwargs) == tuple(
        asked.values()
    )
    identity(made(bodies(CHAT, asked)).load())


def test_a_chats_least_length_is_held_against_no_limit(made: Convert) -> None:
    sampling = made(bodies(CHAT, {"min_tokens": 600})).load().spec.sampling
    assert (sampling.min_tokens, sampling.max_tokens) == (600, None)


def test_a_least_length_is_a_lines_own_where_limits_are(made: Convert) -> None:
    lines = bodies(
        COMPLETIONS,
        {"min_tokens": 20, "max_tokens": 30},
        {"min_tokens": 20, "max_completion_tokens": None, "max_tokens": 40},
    )
    batch = made(lines)
    assert batch.load().spec.sampling.max_tokens == 16
    assert [json.loads(row["sampling_params"]) for row in rows(batch)] == [
        {"max_tokens": 30, "min_tokens": 20}, {"max_tokens": 40, "min_tokens": 20},
    ]  # fmt: skip


def test_a_least_length_is_held_against_the_job_files_limit(made: Convert, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("sampling: {max_tokens: 9}\n")
    lines, job = bodies(CHAT, {"min_tokens": 10}), str(tmp_path / "job.yaml")
    with pytest.raises(BatchMistakes, match=r"body\.min_tokens: 10: above the 9 tokens"):
        made(lines, extends=job)
    assert (
        made(lines, extends=job, overrides=["sampling.max_tokens=20"]).load().spec.sampling.max_tokens == 20
    )
    assert (
        made(lines, extends=job, overrides={"sampling.max_tokens": None}).load().spec.sampling.max_tokens
        is None
    )


def test_images_stay_where_they_are(made: Convert) -> None:
    parts = [
        {"type": "text", "text": "What is it?"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}},
    ]
    batch = made(bodies(CHAT, {"messages": [{"role": "user", "content": parts}]}))
    assert json.loads(rows(batch)[0]["messages"])[0]["content"] == parts


def test_what_has_no_influence_is_ignored(made: Convert) -> None:
    body = dict.fromkeys(IGNORED, "anything")
    assert made(bodies(CHAT, body, {})).settings["sampling"] == {"max_tokens": None}


def test_texts_of_the_file_are_no_references(made: Convert) -> None:
    odd = ["${env:HOME}", "0o17", "1e-3", "no", "\x85\u2028", "😀", "{{ x }}"]
    batch = made(bodies(CHAT, {"stop": odd}, {"stop": odd}))
    assert batch.load().spec.sampling.stop == odd


# ── The user's job file and overrides ────────────────────────────────────────────────────────────────────────────


def test_a_model_is_needed(made: Convert) -> None:
    with pytest.raises(SpecError, match=r"model: missing; .* --model"):
        made(bodies(CHAT, {"model": "gpt-4o"}), model=None)


def test_a_job_file_brings_what_the_lines_do_not_say(made: Convert, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(
        f"name: mine\nmodel: {{source: {TINY}}}\nsampling: {{temperature: 0.3, max_tokens: 9}}\n"
        "errors: {max_error_rate: 0.5}\npool: {replicas: 2}\n"
    )
    batch = made(bodies(CHAT, {"temperature": 0.1}), model=None, extends=str(tmp_path / "job.yaml"))
    spec = batch.load().spec
    assert (spec.name, spec.pool.replicas, spec.errors.max_error_rate) == ("mine", 2, 0.5)
    assert (spec.sampling.temperature, spec.sampling.max_tokens) == (0.1, 9)
    assert batch.settings["extends"] == [str(tmp_path / "job.yaml")]


@pytest.mark.parametrize(
    "override",
    [
        "input.path=x",
        "output.columns=[a]",
        "prompt.template=x",
        "steps=[{filter: {where: x}}]",
        "sampling.max_tokens_column=x",
    ],
)
def test_what_the_batch_file_says_nobody_else_does(made: Convert, override: str) -> None:
    with pytest.raises(SpecError, match=r"override: .*: the batch file says that; leave it out"):
        made(bodies(CHAT, {}), overrides=[override])


def test_an_override_of_what_lines_say_is_refused(made: Convert) -> None:
    lines = bodies(CHAT, {"temperature": 0.1, "seed": 1, "n": 2})
    for key in ("temperature", "seed", "n"):
        with pytest.raises(SpecError, match=f"override: sampling.{key}: the lines of"):
            made(lines, overrides={f"sampling.{key}": 1})
    assert made(lines, overrides={"sampling.top_p": 0.5, "pool.replicas": 3}).settings["pool"] == {
        "replicas": 3
    }


# ── Again ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_same_file_makes_the_same_job_and_leaves_its_requests_alone(
    made: Convert, tmp_path: Path
) -> None:
    lines = bodies(CHAT, *[{"seed": number, "temperature": number / 10} for number in range(9)])
    work = tmp_path / "work"

    def content() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in work.iterdir() if path.is_file()}

    first, before = made(lines), content()
    stamp = (work / "requests.parquet").stat().st_mtime_ns
    assert made(lines) == first
    assert content() == before
    assert (work / "requests.parquet").stat().st_mtime_ns == stamp
    for path in work.iterdir():
        if path.is_file():
            path.unlink()
    assert made(lines) == first
    assert content() == before


def test_another_file_does_not_go_to_the_same_folder(made: Convert) -> None:
    made(bodies(CHAT, {}))
    with pytest.raises(SpecError, match="has other content: choose another output file or work folder"):
        made(bodies(CHAT, {}, {}))


def test_a_conversion_that_was_killed_is_made_anew(made: Convert, tmp_path: Path) -> None:
    made(bodies(CHAT, {}))
    (tmp_path / "work" / "batch.json").unlink()
    assert made(bodies(CHAT, {}, {})).requests == 2


def test_a_job_changes_with_its_overrides(made: Convert) -> None:
    lines = bodies(CHAT, {})
    made(lines)
    batch = made(lines, overrides=["pool.replicas=2"])
    assert yaml.safe_load(Path(batch.job_file).read_text())["pool"] == {"replicas": 2}


def test_a_file_goes_in_row_groups(made: Convert, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.openai_batch._GROUP_ROWS", 10)
    batch = made(bodies(CHAT, *[{"seed": number} for number in range(25)]))
    parquet = pq.ParquetFile(Path(batch.job_file).with_name("requests.parquet"))
    assert [parquet.metadata.row_group(group).num_rows for group in range(3)] == [10, 10, 5]
    assert [json.loads(row["sampling_params"])["seed"] for row in rows(batch)] == list(range(25))


def test_any_store_will_do(made: Convert, tmp_path: Path) -> None:
    import fsspec

    made(bodies(CHAT, {}))
    fsspec.filesystem("memory").pipe_file("/in/batch.jsonl", (tmp_path / "batch.jsonl").read_bytes())
    batch = convert("memory://in/batch.jsonl", "memory://work/x", model=str(TINY))
    assert batch.job_file == "memory://work/x/job.yaml"
    assert batch.load().spec.input.path == "memory://work/x/requests.parquet"
