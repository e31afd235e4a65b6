"""Answers in parts: which parsers there are, what they add, what is refused. vLLM's own parsers run in tests/local/test_parsers.py."""

from __future__ import annotations

import subprocess
import sys
from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import load
from jobs.inspect import report_of
from jobs.report import figures
from jobs.report_html import facts_of, render_html
from pipelines.answer_parsers import Parsed, known_parsers, open_parser, parsed_columns
from pipelines.contracts import GENERATION_SCHEMA
from pipelines.engine import Answer, Sample
from pipelines.errors import RowError, SpecError
from pipelines.settings import ModelSettings, SamplingSettings
from pipelines.step_settings import StepSettings
from pipelines.structured import Structured
from tests.local.runs import job, rows_of
from tests.unit.stages import committed

STEP = {"column": "again", "prompt": {"template": "{{ generated_text }}"}}


class Marked:
    """Reasoning ends at the mark; a call stands in brackets."""

    keeps_special_tokens = False

    def answer(self, text: str, token_ids: list[int]) -> str:
        return text.partition("|")[2]

    def parse(self, text: str, token_ids: list[int]) -> Parsed:
        reasoning, _, said = text.partition("|")
        if said.startswith("["):
            return Parsed(text="", reasoning=reasoning, tool_calls=[{"name": said[1:-1], "arguments": "{}"}])
        return Parsed(text=said, reasoning=reasoning or None, reasoning_tokens=len(token_ids) - len(said))


def test_the_parsers_of_the_installed_vllm_are_known_without_importing_it() -> None:
    assert {"qwen3", "deepseek_r1", "openai_gptoss"} <= set(known_parsers("reasoning_parser") or ())
    assert {"hermes", "llama3_json", "mistral"} <= set(known_parsers("tool_call_parser") or ())
    code = (
        "import sys; from pipelines.answer_parsers import known_parsers; known_parsers('reasoning_parser'); "
        "print('vllm' in sys.modules or 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "False"


def test_without_a_parser_nothing_is_opened_and_no_column_is_added(tmp_path: Path) -> None:
    assert open_parser(ModelSettings(source="no such model"), SamplingSettings(), None) is None
    spec = load(job(tmp_path / "in", tmp_path / "out")).spec
    assert not {"reasoning", "reasoning_tokens", "tool_calls"} & set(spec.result_columns)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"sampling": {"reasoning_parser": "qwen_3"}},
            r"sampling\.reasoning_parser: vLLM has no parser 'qwen_3'; did you mean qwen3\? There are: .*deepseek_r1, ",
        ),
        (
            {"sampling": {"tool_call_parser": "none at all"}},
            r"sampling\.tool_call_parser: vLLM has no parser 'none at all'; there are: .*hermes",
        ),
        (
            {"steps": [{"generate": {**STEP, "sampling": {"reasoning_parser": "qwen4"}}}]},
            r"steps\.generate\.sampling\.reasoning_parser: vLLM has no parser 'qwen4'; did you mean qwen3\?",
        ),
        (
            {
                "sampling": {"reasoning_parser": "qwen3"},
                "steps": [{"generate": {**STEP, "sampling": {"reasoning_parser": "deepseek_r1"}}}],
            },
            r"steps\.generate\.sampling\.reasoning_parser: 'deepseek_r1', but sampling\.reasoning_parser is 'qwen3'",
        ),
        (
            {"model": {"engine": {"reasoning_parser": "qwen3"}}},
            r"model\.engine\.reasoning_parser: give it as `sampling\.reasoning_parser`",
        ),
        (
            {"sampling": {"reasoning_parser": "openai_gptoss", "structured_outputs": {"regex": "a"}}},
            r"sampling\.reasoning_parser: vLLM constrains openai_gptoss answers from their first token on",
        ),
        (
            {"sampling": {"tool_call_parser": "hermes", "output_schema": {"type": "string"}}},
            r"an answer that follows output_schema calls no tools",
        ),
    ],
)
def test_what_is_refused_before_anything_runs(tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        load(job(tmp_path / "in", tmp_path / "out", **sections))


def test_a_job_without_a_prompt_has_no_answers_to_parse(tmp_path: Path) -> None:
    step = {"generate": {**STEP, "prompt": {"prompt_column": "question"}}}
    settings = job(tmp_path / "in", tmp_path / "out", sampling={"reasoning_parser": "qwen3"}, steps=[step])
    del settings["prompt"]
    with pytest.raises(SpecError, match=r"sampling\.reasoning_parser: the job has no prompt"):
        load(settings)


def test_a_parser_of_a_plugin_may_have_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "policy.yaml").write_text("models: {trust_remote_code: [{source: /plugins/mine.py}]}")
    monkeypatch.setenv("DRAY_POLICY", str(tmp_path / "policy.yaml"))
    engine = {"reasoning_parser_plugin": "/plugins/mine.py"}
    load(
        job(
            tmp_path / "in",
            tmp_path / "out",
            model={"engine": engine},
            sampling={"reasoning_parser": "mine"},
        )
    )


def test_a_generate_step_adds_the_same_columns_under_its_name() -> None:
    sampling = {"reasoning_parser": "qwen3", "tool_call_parser": "hermes"}
    step = StepSettings.model_validate({"generate": {**STEP, "sampling": sampling}})
    calls = pa.list_(pa.struct([("name", pa.string()), ("arguments", pa.string())]))
    added = step.adds(pa.schema([]))
    assert added.names[-3:] == ["again_reasoning", "again_reasoning_tokens", "again_tool_calls"]
    assert added.types[-3:] == [pa.string(), pa.int32(), calls]


def test_answers_become_columns_and_failed_ones_nulls() -> None:
    texts = ["so|yes", None, "so|[f]", "still thinking"]
    ids = [[1] * 5, None, [1] * 3, [1] * 4]
    rows = [{"row": row, "sample_index": 0, "token_ids": of} for row, of in enumerate(ids)]
    sampling = SamplingSettings(reasoning_parser="qwen3", tool_call_parser="hermes")
    said = parsed_columns(
        Marked(), sampling, pa.chunked_array([texts]), pa.Table.from_pylist(rows, GENERATION_SCHEMA)
    )
    assert said.text.to_pylist() == ["yes", None, "", ""]
    assert {name: values.to_pylist() for name, values in said.beside.items()} == {
        "reasoning": ["so", None, "so", "still thinking"],
        "reasoning_tokens": [2, None, None, 4],
        "tool_calls": [None, None, [{"name": "f", "arguments": "{}"}], None],
    }


def test_statistics_and_reports_sum_the_reasoning_of_all_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of answers that a step drops afterwards; a column of the input with that name is none of it."""

    class Halves(Marked):
        def parse(self, text: str, token_ids: list[int]) -> Parsed:
            return replace(super().parse(text, token_ids), reasoning_tokens=len(token_ids) // 2)

    monkeypatch.setattr("pipelines.advance.open_parser", lambda model, sampling, prompt: Halves())
    (tmp_path / "in").mkdir()
    asked = {"question": [f"q{i}" for i in range(6)], "reasoning_tokens": [1000] * 6}
    pq.write_table(pa.table(asked), tmp_path / "in" / "x.parquet")
    parsed = {"temperature": 0, "max_tokens": 20, "reasoning_parser": "qwen3"}

    def made(name: str, columns: list[str], **sections: Any) -> tuple[Any, ...]:
        steps = [
            {"filter": {"where": "question != 'q1'"}},
            {"generate": {**STEP, "sampling": {**parsed, "max_tokens": 16}}},
        ]
        settings = job(tmp_path / "in", tmp_path / name, steps=steps, **sections)
        settings["input"]["columns"] = columns
        settings["model"]["simulated"] = {"prefix": "so|", "max_tokens": 12}
        output = committed(settings)
        return rows_of(output.folder).to_pylist(), report_of(output.storage), facts_of(output.storage)

    rows, report, facts = made("out", ["question"], sampling=parsed)
    (own,) = {row["reasoning_tokens"] for row in rows if row["question"] == "q0"}
    step = sum(row["again_reasoning_tokens"] for row in rows)
    stats = report.stats
    assert len(rows) == 5
    assert stats.steps["generate"]["reasoning_tokens"] == step > 0
    assert stats.reasoning_tokens > sum(row["reasoning_tokens"] for row in rows) + step, "q1's as well"
    assert 0 < own < stats.reasoning_tokens < stats.completion_tokens
    words = figures(report)
    assert words["tokens in / out"].endswith(f" ({stats.reasoning_tokens:,} reasoning)")
    assert words["step generate"].endswith(f" output tokens ({step:,} reasoning)")
    assert report.to_dict()["stats"]["reasoning_tokens"] == stats.reasoning_tokens
    assert f"<dt>Reasoning tokens</dt><dd>{stats.reasoning_tokens:,}</dd>" in render_html(facts)

    rows, report, facts = made("carried", ["question", "reasoning_tokens"])
    assert {row["reasoning_tokens"] for row in rows} == {1000}
    step = sum(row["again_reasoning_tokens"] for row in rows)
    assert report.stats.reasoning_tokens == step


async def checked(*texts: tuple[str, str]) -> Answer:
    """The answer to a choice of yes and no, when the engine's are these (text, finish reason)."""
    tries = iter(texts)

    async def ask(number: int, cut: bool) -> Answer:
        text, finish = next(tries)
        sample = Sample(token_ids=array("i", range(len(text))), text=text, finish_reason=finish)
        return Answer(samples=[sample], cached_tokens=0, ttft_s=None)

    sampling = SamplingSettings.model_validate({"structured_outputs": {"choice": ["yes", "no"]}})
    return await Structured(sampling, Marked()).answer(ask)


async def test_a_constraint_holds_for_what_follows_the_reasoning() -> None:
    assert (await checked(("so|yes", "stop"))).samples[0].text == "so|yes"
    assert (await checked(("so|maybe", "stop"), ("no|no", "stop"))).samples[0].text == "no|no"
    with pytest.raises(RowError, match="'so' is none of the choices"):
        await checked(("yes|so", "stop"), ("yes|so", "stop"))


async def test_an_answer_that_was_cut_within_its_reasoning_says_so() -> None:
    with pytest.raises(RowError, match="cut off at max_tokens within its reasoning"):
        await checked(("I think yes", "length"), ("I think yes", "length"))
