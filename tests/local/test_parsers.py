"""Reasoning and tool calls by vLLM's own parsers: on real token ids, and in whole jobs. Behind an engine's constraints: test_reasoning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch  # noqa: F401 -- now: simulated engines of other tests keep it out of a process that has not got it yet

from jobs import load
from jobs.books import SUCCESS
from jobs.inspect import verify
from jobs.preview import preview
from jobs.retry import retry_failed
from jobs.reuse import KEPT, kept_in
from pipelines.answer_parsers import AnswerParser, open_parser
from pipelines.engine import open_engine
from pipelines.errors import ModelError, SpecError
from pipelines.settings import ModelSettings, PoolSettings, PromptSettings, SamplingSettings
from pipelines.tokenizer import load_tokenizer
from tests.local.runs import dray, job, rows_of
from tests.tiny_models import byte_level, thinking_model, with_weights
from tests.unit.stages import Output, committed, planned
from tests.unit.stages import run as run_stages

pytestmark = pytest.mark.timeout(400)

CALL = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
CALLED = [{"name": "f", "arguments": '{"a": 1}'}]
TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return thinking_model(tmp_path_factory.mktemp("model"))


def opened(model: Path, variables: dict[str, Any] | None = None, **sampling: Any) -> AnswerParser:
    prompt = PromptSettings(template="x", tools=[TOOL], chat_template_kwargs=variables or {})
    parser = open_parser(ModelSettings(source=str(model)), SamplingSettings(**sampling), prompt)
    assert parser is not None
    return parser


def parts(model: Path, text: str, **sampling: Any) -> tuple[Any, ...]:
    """(text, reasoning, its tokens, tool calls) of an answer that ends in the stop token."""
    tokenizer = load_tokenizer(ModelSettings(source=str(model)))
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    found = opened(model, **sampling).parse(text, ids)
    return found.text, found.reasoning, found.reasoning_tokens, found.tool_calls


@pytest.mark.parametrize("parser", ["qwen3", "deepseek_r1"])
def test_reasoning_is_told_from_the_answer(model: Path, parser: str) -> None:
    def split(text: str) -> tuple[Any, ...]:
        return parts(model, text, reasoning_parser=parser)[:3]

    assert split("<think>ab</think>42") == ("42", "ab", 4)
    assert split("ab</think>42") == ("42", "ab", 3), "the prompt may have opened the reasoning"
    assert split("<think>ab") == ("", "ab", 3), "an answer that never came"
    assert split("<think></think>42") == ("42", None, 0)
    assert split(f"<think>ab</think>{CALL}") == (CALL, "ab", 4)


def test_calls_are_taken_out_of_the_text(model: Path) -> None:
    def calls(text: str) -> tuple[Any, ...]:
        said, reasoning, tokens, found = parts(model, text, tool_call_parser="hermes")
        assert (reasoning, tokens) == (None, 0)
        return said, found

    assert calls(CALL) == ("", CALLED)
    assert calls(f"Well: {CALL}{CALL}") == ("Well: ", CALLED * 2)
    assert calls("no call") == ("no call", None)
    malformed = CALL.replace("}}", "}")
    assert calls(malformed) == (malformed, None)


def test_both_at_once(model: Path) -> None:
    both = {"reasoning_parser": "qwen3", "tool_call_parser": "hermes"}
    assert parts(model, f"<think>ab</think>Well: {CALL}", **both) == ("Well: ", "ab", 4, CALLED)
    assert opened(model, **both).answer(f"<think>ab</think>{CALL}", []) == CALL


def test_the_chat_templates_variables_say_whether_a_model_reasons(model: Path) -> None:
    off = opened(model, {"enable_thinking": False}, reasoning_parser="qwen3")
    assert (off.parse("42", [1, 2]).text, off.parse("42", [1, 2]).reasoning) == ("42", None)


def test_a_tokenizer_without_the_markers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError,
        match=r"sampling\.reasoning_parser: deepseek_r1 does not work for model '.*could not locate",
    ):
        opened(byte_level(tmp_path), reasoning_parser="deepseek_r1")


# ── Whole jobs, without an engine ────────────────────────────────────────────────────────────────────────────────


def simulated(model: Path, folder: Path, name: str, **sections: Any) -> dict[str, Any]:
    """A job whose answers begin with reasoning and a call."""
    source = folder / "in"
    source.mkdir(exist_ok=True)
    pq.write_table(pa.table({"question": [f"q{i}" for i in range(8)]}), source / "x.parquet")
    return job(
        source,
        folder / name,
        **{
            "model": {
                "source": str(model),
                "backend": "simulated",
                "engine": {"max_model_len": 512},
                "simulated": {"prefix": f"<think>ab</think>Well: {CALL}"},
            },
            "sampling": {
                "temperature": 0,
                "max_tokens": 100,
                "reasoning_parser": "qwen3",
                "tool_call_parser": "hermes",
            },
            "shards": {"rows": 4},
            **sections,
        },
    )


def columns(output: Output, *names: str) -> list[tuple[Any, ...]]:
    return [tuple(row[name] for name in names) for row in rows_of(output.folder).to_pylist()]


PARTS = ("generated_text", "reasoning", "reasoning_tokens", "tool_calls")


def test_a_job_writes_the_parts_of_its_answers_and_reuses_whole_ones(model: Path, tmp_path: Path) -> None:
    first = committed(simulated(model, tmp_path, "first", reuse={"keep": True}))
    assert columns(first, *PARTS) == [("Well: ", "ab", 4, CALLED)] * 8
    assert verify(first.storage, deep=True)["problems"] == []
    assert all(count > 10 for (count,) in columns(first, "completion_tokens"))

    first.storage.create(KEPT, b"")
    again = planned(simulated(model, tmp_path, "again", reuse={"outputs": [str(first.folder)]}))
    work = again.work("again")
    footers = run_stages(work, again.plan.shards, kept_in=kept_in(work, again.plan, again.plan.shards))
    assert sum(footer.stats.rows_reused for footer in footers) == 8
    assert columns(again, *PARTS) == columns(first, *PARTS)


def test_a_retry_may_change_the_parser_but_not_whether_there_is_one(model: Path, tmp_path: Path) -> None:
    output = committed(simulated(model, tmp_path, "out"))
    with pytest.raises(SpecError, match=r"sampling\.reasoning_parser: .*new output\.path"):
        retry_failed(load(output.settings, ["sampling.reasoning_parser=null"]))
    retry_failed(
        load(output.settings, ["sampling.reasoning_parser=deepseek_r1"])
    )  # no failed row: nothing to do


def test_a_retrys_answers_are_taken_apart_before_they_are_merged(model: Path, tmp_path: Path) -> None:
    output = committed(
        simulated(
            model, tmp_path, "out", prompt={"template": "{{ 1 // 0 if question == 'q3' else question }}"}
        )
    )
    assert [row["error_code"] for row in rows_of(output.folder).to_pylist()].count("prompt_error") == 1
    run_stages(output.retry("again", "prompt.template={{ question }}"), output.plan.shards)
    assert columns(output, *PARTS, "error_code") == [("Well: ", "ab", 4, CALLED, None)] * 8
    assert verify(output.storage, deep=True)["problems"] == []


def test_steps_have_parsers_of_their_own(model: Path, tmp_path: Path) -> None:
    step = {
        "column": "said",
        "prompt": {"template": "{{ question }} {{ reasoning }}"},
        "sampling": {"temperature": 0, "max_tokens": 8, "reasoning_parser": "qwen3"},
    }
    prefix = {"prefix": "<think>ab</think>", "max_tokens": 4}
    settings = simulated(model, tmp_path, "out", steps=[{"generate": step}])
    settings["model"]["simulated"] = prefix
    output = committed(settings)
    found = columns(output, "reasoning", "said_reasoning", "said_reasoning_tokens")
    assert found == [("ab", "ab", 4)] * 8
    assert all("<" not in text for pair in columns(output, "generated_text", "said") for text in pair)
    assert all(text for (text,) in columns(output, "said"))


def test_a_conversation_goes_on_with_what_was_said_alone(model: Path, tmp_path: Path) -> None:
    sampling = {"temperature": 0, "max_tokens": 100, "reasoning_parser": "qwen3"}
    settings = simulated(
        model,
        tmp_path,
        "out",
        sampling=sampling,
        output={"path": str(tmp_path / "out"), "conversation": "chat"},
    )
    settings["model"]["simulated"] = {"prefix": "<think>ab</think>", "max_tokens": 4}
    for chat, text in columns(committed(settings), "chat", "generated_text"):
        assert chat[-1] == {"role": "assistant", "content": text}
        assert "ab" not in text
    settings["sampling"] = {**sampling, "tool_call_parser": "hermes"}
    with pytest.raises(SpecError, match=r"output\.conversation: holds role and content.*tool_call_parser"):
        load(settings)


@pytest.mark.parametrize("said", ["", "Well: "])
def test_calls_are_part_of_an_exported_chat(model: Path, tmp_path: Path, said: str) -> None:
    settings = simulated(model, tmp_path, "out", prompt={"template": "{{ question }}", "tools": [TOOL]})
    settings["model"]["simulated"]["prefix"] = f"<think>ab</think>{said}{CALL}"
    output = committed(settings)
    output.storage.write(SUCCESS, b"{}")
    done = dray("export", "openai", str(output.folder), str(tmp_path / "chats"))
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "chats").rglob("*.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    call = {"id": "call_0", "type": "function", "function": CALLED[0]}
    answer = {"role": "assistant", **({"content": said} if said else {}), "tool_calls": [call]}
    assert sorted(line["messages"][0]["content"] for line in lines) == [f"q{i}" for i in range(8)]
    assert all(line == {"messages": [line["messages"][0], answer], "tools": [TOOL]} for line in lines)


def test_an_answer_that_was_cut_within_its_reasoning_is_no_failure(model: Path, tmp_path: Path) -> None:
    settings = simulated(model, tmp_path, "out")
    settings["sampling"]["max_tokens"] = 2
    output = committed(settings)
    assert columns(output, "generated_text", "finish_reason", "error_code") == [("", "length", None)] * 8
    assert all(text and "ab".startswith(text) for (text,) in columns(output, "reasoning"))


def test_a_preview_shows_the_prompts_tools_and_the_answers_parts(model: Path, tmp_path: Path) -> None:
    settings = simulated(model, tmp_path, "out", prompt={"template": "{{ question }}", "tools": [TOOL]})
    (row,) = preview(load(settings), rows=1, generate=True)
    assert row["prompt"].startswith("[f]<|im_start|>q")
    (answer,) = row["answers"]
    assert (answer["reasoning"], answer["tool_calls"]) == ("ab", CALLED)


# ── With a real engine ───────────────────────────────────────────────────────────────────────────────────────────


async def test_an_engine_whose_tokenizer_lacks_the_markers_does_not_load_its_model(tmp_path: Path) -> None:
    source = ModelSettings(source=str(with_weights(byte_level(tmp_path))))
    engine = open_engine(source, SamplingSettings(reasoning_parser="deepseek_r1"), PoolSettings(device="cpu"))
    with pytest.raises(ModelError, match=r"sampling\.reasoning_parser: deepseek_r1 does not work"):
        await engine.start()
    await engine.stop()
