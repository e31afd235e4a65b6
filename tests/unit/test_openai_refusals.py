"""What an OpenAI batch file may not say: told by line and key before anything is written."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from jobs.openai_batch import convert
from jobs.openai_body import CHAT, COMPLETIONS, EMBEDDINGS, BatchMistakes
from pipelines.errors import InputError
from tests.local.runs import TINY
from tests.unit.batch_files import TOOL, Convert, converter, line


@pytest.fixture
def made(tmp_path: Path) -> Convert:
    return converter(tmp_path)


def mistakes(made: Convert, lines: Iterable[Any]) -> list[str]:
    """What is said of a file, without its path."""
    with pytest.raises(BatchMistakes) as refused:
        made(lines)
    text = str(refused.value)
    assert all(row.startswith(("…", "/")) for row in text.splitlines())
    return [row.partition("batch.jsonl:")[2] or row for row in text.splitlines()]


@pytest.mark.parametrize(
    ("url", "body", "says"),
    [
        (CHAT, {"messages": []}, "body.messages: expected a list of messages, got []"),
        (CHAT, {"messages": "hi"}, 'body.messages: expected a list of messages, got "hi"'),
        (CHAT, {"messages": [{"content": "x"}]}, "body.messages[0]: expected an object with role and content"),
        (CHAT, {"messages": [{"role": "user", "content": 3}]}, "body.messages[0].content: expected text"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
            'body.messages[0].content[0]: {"type": "input_audio"}: only parts of type text and image_url',
        ),
        (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, "body.messages: holds half of a surrogate pair"),
        (CHAT, {"logprobs": True}, "body.logprobs: true is not supported"),
        (CHAT, {"top_logprobs": 5}, "body.top_logprobs: 5 is not supported"),
        (CHAT, {"logit_bias": {"1": 5}}, "body.logit_bias: "),
        (CHAT, {"stream": True}, "body.stream: true is not supported (a batch has no stream)"),
        (CHAT, {"audio": {"voice": "x"}}, "body.audio: "),
        (CHAT, {"modalities": ["text", "audio"]}, "body.modalities: "),
        (CHAT, {"functions": []}, "body.functions: [] is not supported (give them as tools)"),
        (CHAT, {"parallel_tool_calls": False}, "body.parallel_tool_calls: false is not supported"),
        (CHAT, {"echo": True}, "body.echo: "),
        (CHAT, {"use_beam_search": True}, "body.use_beam_search: "),
        (CHAT, {"allowed_token_ids": [1]}, "body.allowed_token_ids: "),
        (CHAT, {"web_search_options": {}}, "body.web_search_options: {} is not supported (it would change the answer"),
        (CHAT, {"temprature": 0.5}, "body.temprature: 0.5 is not supported"),
        (CHAT, {"temperature": "0.5"}, 'body.temperature: "0.5": Input should be a valid number'),
        (CHAT, {"temperature": -1}, "body.temperature: -1: Input should be greater than or equal to 0"),
        (CHAT, {"temperature": True}, "body.temperature: true: true and false are not allowed here"),
        (CHAT, {"seed": "x"}, 'body.seed: "x": expected a whole number'),
        (CHAT, {"max_tokens": 0}, "body.max_tokens: 0: Input should be greater than 0"),
        (CHAT, {"max_tokens": 3, "max_completion_tokens": 4}, "body.max_completion_tokens: 4, and max_tokens is 3: give one"),
        (CHAT, {"min_tokens": 5, "max_tokens": 4}, "body: min_tokens 5 is above max_tokens 4"),
        (CHAT, {"n": 2, "temperature": 0}, "body: n > 1 with temperature 0 gives n equal answers"),
        (CHAT, {"n": "2"}, 'body.n: "2": Input should be a valid integer'),
        (CHAT, {"n": True}, "body.n: true: true and false are not allowed here"),
        (CHAT, {"n": 0}, "body.n: 0: Input should be greater than 0"),
        (CHAT, {"tools": [{"type": "web_search"}]}, "body.tools: "),
        (CHAT, {"tools": [TOOL], "tool_choice": "required"}, 'body.tool_choice: "required": only auto and none'),
        (CHAT, {"response_format": {"type": "structural_tag"}}, "body.response_format: "),
        (CHAT, {"response_format": {"type": "json_schema"}}, "body.response_format.json_schema.schema: expected a JSON Schema, got null"),
        (CHAT, {"guided_json": {"type": "nothing"}}, "body.guided_json: not a JSON Schema"),
        (CHAT, {"guided_regex": "a", "guided_choice": ["b"]}, "body.guided_regex and guided_choice: an answer has one form"),
        (CHAT, {"structured_outputs": {"structural_tag": "x"}}, "body.structured_outputs: expected one of json, json_object"),
        (CHAT, {"chat_template_kwargs": [1]}, "body.chat_template_kwargs: expected an object, got [1]"),
        (CHAT, {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "body.chat_template_kwargs.chat_template: no variable of the model's chat template"),
        (CHAT, {"chat_template_kwargs": {"tools": [TOOL]}}, "body.chat_template_kwargs.tools: no variable"),
        (CHAT, {"chat_template_kwargs": {"messages": [], "x": 1}}, "body.chat_template_kwargs.messages: no variable"),
        (CHAT, {"chat_template_kwargs": {"x": {"y\ud800": 1}}}, "body.chat_template_kwargs: holds half of a surrogate pair"),
        (CHAT, {"response_format": {"type": "\udfff"}}, "body.response_format: holds half of a surrogate pair"),
        (CHAT, {"temperature": "\ud800"}, "body.temperature: holds half of a surrogate pair"),
        (CHAT, {"a\ud800b": 1}, "body.a\ufffdb: holds half of a surrogate pair"),
        (CHAT, {"guided_json": '{"title": "\\ud800"}'}, "body.guided_json: expected a JSON Schema, got "),
        (CHAT, {"guided_json": '{"title":' + "[" * 70 + "]" * 70 + "}"}, "body.guided_json: expected a JSON Schema, got "),
        (CHAT, {"guided_json": "[" * 100_000}, "body.guided_json: expected a JSON Schema, got "),
        (CHAT, {"max_tokens": 2**31}, "body.max_tokens: 2147483648: Input should be less than or equal to 2147483647"),
        (CHAT, {"top_k": 2**31}, "body.top_k: 2147483648: Input should be less than or equal to 2147483647"),
        (CHAT, {"stop_token_ids": [2**31]}, "body.stop_token_ids: [2147483648]: Input should be less than or equal to 2147483647"),
        (COMPLETIONS, {"min_tokens": 20}, "body.min_tokens: 20: above the 16 tokens that an answer has where its line gives no max_tokens"),
        (COMPLETIONS, {"prompt": ["a", "b"]}, 'body.prompt: expected one text, got ["a", "b"]; give each text a line'),
        (COMPLETIONS, {"prompt": [1, 2]}, "body.prompt: expected one text, got [1, 2]"),
        (COMPLETIONS, {"prompt": None}, "body.prompt: expected one text, got null"),
        (COMPLETIONS, {"logprobs": 0}, "body.logprobs: 0 is not supported"),
        (COMPLETIONS, {"suffix": "end"}, "body.suffix: "),
        (COMPLETIONS, {"echo": True}, "body.echo: "),
        (COMPLETIONS, {"best_of": 2}, "body.best_of: "),
        (COMPLETIONS, {"tools": [TOOL]}, "body.tools: "),
        (EMBEDDINGS, {"input": ["a", "b"]}, "body.input: expected one text"),
        (EMBEDDINGS, {"temperature": 1}, "body.temperature: 1 is not supported"),
        (EMBEDDINGS, {"dimensions": -1}, "body.dimensions: -1: Input should be greater than 0"),
        (EMBEDDINGS, {"encoding_format": "int8"}, 'body.encoding_format: "int8": give float or base64'),
    ],
)  # fmt: skip
def test_a_body_is_refused_by_line_and_key(made: Convert, url: str, body: dict[str, Any], says: str) -> None:
    [said] = mistakes(made, [line("a", url, **body)])
    assert said.startswith(f'1 (custom_id "a"): {says}')


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "1: no JSON in UTF-8"),
        ('{"custom_id": NaN}', "1: no JSON in UTF-8 (NaN is no JSON)"),
        ("[1]", "1: expected an object with custom_id, method, url, body; got [1]"),
        ({**line("a"), "custom_id": 7}, "1: custom_id: expected text that no other line has, got 7"),
        ({**line("a"), "custom_id": "\udc00"}, "1: custom_id: expected text"),
        ({**line("a"), "method": "GET"}, '1 (custom_id "a"): method: expected "POST", got "GET"'),
        ({**line("a"), "url": "/v1/responses"}, '1 (custom_id "a"): url: expected one of /v1/chat/completions,'),
        ({**line("a"), "url": ["/v1/completions"]}, '1 (custom_id "a"): url: expected one of /v1/chat/completions,'),
        (line("a", model=3), '1 (custom_id "a"): body.model: expected a name, got 3'),
        ({**line("a"), "method": "\ud800"}, '1 (custom_id "a"): method: holds half of a surrogate pair'),
        (f'{{"custom_id": "a", "x": {"[" * 64 + "]" * 64}}}', '1: nests more than 64 levels deep: "{\\"custom_id\\": \\"a\\"'),
        (json.dumps(line("a", chat_template_kwargs={"x": 0})).replace("0", "[" * 400 + "]" * 400), "1: nests more than 64 levels deep"),
        ("[" * 400 + "]" * 400, "1: nests more than 64 levels deep"),
        ({**line("a"), "body": "x"}, '1 (custom_id "a"): body: expected an object, got "x"'),
        ({**line("a"), "boby": 1}, '1 (custom_id "a"): boby: a line has custom_id, method, url, body and nothing else'),
    ],
)  # fmt: skip
def test_a_line_is_refused(made: Convert, text: Any, says: str) -> None:
    [said] = mistakes(made, [text])
    assert said.startswith(says)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([line("a"), "", line("a")], '3 (custom_id "a"): custom_id: line 1 has it already; each line needs its own'),
        ([line("a"), line("b", COMPLETIONS)], '2 (custom_id "b"): url: "/v1/completions", and line 1 has "/v1/chat/completions"'),
        ([line("a", model="x"), line("b", model="y")], '2 (custom_id "b"): body.model: "y", and line 1 has "x": a file has one'),
        ([line("a", model="x"), line("b")], '2 (custom_id "b"): body.model: none, and line 1 has "x"'),
        ([line("a", n=2), line("b", n=2), line("c")], '3 (custom_id "c"): body.n: none, and line 1 has 2: it is the same for a whole job; split'),
        ([line("a"), line("b", tools=[TOOL])], '2 (custom_id "b"): body.tools: '),
        ([line("a", response_format={"type": "json_object"}), line("b")], '2 (custom_id "b"): body.response_format: none, and line 1 has'),
        ([line("a", chat_template_kwargs={"x": False}), line("b", chat_template_kwargs={"x": 0})], '2 (custom_id "b"): body.chat_template_kwargs: {"x": 0}, and line 1 has {"x": false}'),
        ([line("a", guided_json={"const": 1}), line("b", guided_json={"const": 1.0})], '2 (custom_id "b"): body.guided_json: {"const": 1.0}, and line 1 has {"const": 1}'),
        ([line("a", COMPLETIONS, min_tokens=20, max_tokens=30), line("b", COMPLETIONS, min_tokens=20)], '2 (custom_id "b"): body.min_tokens: 20: above the 16 tokens'),
        ([line("a", EMBEDDINGS, dimensions=4), line("b", EMBEDDINGS, dimensions=5)], '2 (custom_id "b"): body.dimensions: 5, and line 1 has 4'),
    ],
)  # fmt: skip
def test_lines_that_do_not_agree_name_each_other(made: Convert, lines: list[Any], says: str) -> None:
    [said] = mistakes(made, lines)
    assert said.startswith(says)


def test_all_mistakes_are_told_up_to_ten(made: Convert, tmp_path: Path) -> None:
    lines = [line(f"r{number}", stream=number % 2 == 0) for number in range(30)]
    said = mistakes(made, lines)
    assert [row.partition(" ")[0] for row in said] == [*(str(number) for number in range(1, 20, 2)), "…"]
    assert said[-1] == "… and 5 more"
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_a_file_without_requests(made: Convert, text: str) -> None:
    with pytest.raises(BatchMistakes, match=r"batch\.jsonl: holds no requests$") as refused:
        made([text])
    assert [(one.line, one.key, one.text) for one in refused.value.mistakes] == [
        (None, "", "holds no requests")
    ]


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        convert(str(tmp_path / "none.jsonl"), str(tmp_path / "work"), model=str(TINY))
