"""Prompts: each row's text and tokens, and each way in which a row can have none."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from pipelines.chat_options import CHAT_OPTIONS
from pipelines.contracts import PROMPT_SCHEMA
from pipelines.errors import ROW_ERROR_CODES, RowError, SpecError
from pipelines.prompt import PromptBuilder
from pipelines.settings import PromptSettings, SamplingSettings
from pipelines.template import Template, null

WORDS = ["<unk>", "<s>", "<|user|>", "<|system|>", "<|assistant|>", "a", "b", "c", "hello", "say", "en"]
CHAT = (
    "{% for m in messages %}{% if m.content == 'refuse' %}{{ raise_exception('roles\nmust alternate') }}{% endif %}"
    "<|{{ m.role }}|> {% if m.name is defined %}named {% endif %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}{{ extra }}"
)


def tokenizer(chat_template: str | None = CHAT) -> Any:
    """Whitespace words; adds `<s>` in front wherever special tokens are asked for."""
    raw = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    from transformers import (
        PreTrainedTokenizerFast,
    )  # not by those who only collect the tests: with torch it takes 6 s

    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", chat_template=chat_template)


def rows(**columns: Any) -> pa.Table:
    count = len(next(iter(columns.values())))
    return pa.table({**columns, "row_id": [f"f:{i}" for i in range(count)]})


def texts(table: pa.Table, chat_template: str | None = None, **prompt: Any) -> list[str]:
    """Prompt texts; errors as `code: message`."""
    found = PromptBuilder(PromptSettings(**prompt), tokenizer(chat_template)).texts(table)
    return [f"{item.code}: {item}" if isinstance(item, RowError) else item for item in found]


def build(table: pa.Table, chat_template: str | None = None, **prompt: Any) -> list[dict[str, Any]]:
    made = PromptBuilder(PromptSettings(**prompt), tokenizer(chat_template)).build(table)
    assert made.schema == PROMPT_SCHEMA
    assert made["row_id"].to_pylist() == table["row_id"].to_pylist()
    found: list[dict[str, Any]] = made.to_pylist()
    for row in found:
        assert (
            (row["token_ids"] is None)
            == (row["error_code"] is not None)
            == (row["error_message"] is not None)
        )
        assert row["error_code"] is None or row["error_code"] in ROW_ERROR_CODES
        assert "\n" not in (row["error_message"] or "")
    return found


# ── Templates ────────────────────────────────────────────────────────────────────────────────────────────────────

X = {"x": null("x"), "s": {"y": None, "z": 1}, "e": [], "t": "it's <b>"}


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ x or 'd' }}", "d"),
        ("{{ absent or 'd' }}", "d"),
        ("{{ x | default('d') }}", "d"),
        ("{% if x %}a{% else %}b{% endif %}", "b"),
        ("{% if not absent %}a{% endif %}", "a"),
        ("{{ x is none }} {{ x == none }} {{ none == x }} {{ x != 'a' }}", "True True True True"),
        ("{{ x is defined }} {{ absent is defined }} {{ t is defined }}", "False False True"),
        ("{{ s.y or 'd' }}", "d"),
        ("{{ s['y'] is none }}", "True"),
        ("{{ t }}", "it's <b>"),
        ("{{ t | tojson }}", '"it\'s <b>"'),
        ("{{ 'ä' | tojson }} {{ s | tojson }} {{ x | tojson }}", '"ä" {"y": null, "z": 1} null'),
        ("{% for i in range(3) %}{{ i }}{% endfor %}", "012"),
        ("a\n", "a"),
        ("a\n\n", "a\n"),
    ],
)
def test_templates_render(source: str, text: str) -> None:
    assert Template(source, "k").render(X) == text


@pytest.mark.parametrize(
    ("source", "code", "message"),
    [
        *(
            (source, "missing_value", "column 'x' is null or missing")
            for source in (
                "{{ x }}", "{{ x | upper }}", "{{ x ~ 'a' }}", "{{ x + 'a' }}", "{{ x.y }}", "{{ x['y'] }}", "{{ x | length }}",
                "{{ x | trim }}", "{{ 'a %s' % x }}", "{{ 'a {}'.format(x) }}", "{{ x | replace('a', 'b') }}", "{{ x() }}",
                "{% for i in x %}{% endfor %}", "{{ 'a' in x }}", "{{ x > 1 }}", "{{ [x] | join }}", "{{ x | int }}",
            )
        ),
        ("{{ absent }}", "missing_value", "column 'absent' is null or missing"),
        ("{{ s.y }}", "missing_value", "'y' is null or missing inside a value of the row"),
        ("{{ s.y | upper }}", "missing_value", "'y' is null or missing inside a value of the row"),
        ("{{ s.nope }}", "missing_value", "'nope' is null or missing inside a value of the row"),
        ("{{ s.get('y') }}", "missing_value", "an expression of the template is null"),
        ("{{ e | first }}", "missing_value", "No first item, sequence was empty."),
        ("{{ 1 / 0 }}", "prompt_error", "ZeroDivisionError: division by zero"),
        ("{{ t.__class__ }}", "prompt_error", "SecurityError: access to attribute '__class__' of 'str' object is unsafe."),
        ("{{ e.append(1) }}", "prompt_error", "SecurityError: access to attribute 'append' of 'list' object is unsafe."),
        ("{{ range(10**9) }}", "prompt_error", "OverflowError: Range too big. The sandbox blocks ranges larger than MAX_RANGE (100000)."),
        ("{{ s | tojson + b }}", "missing_value", "column 'b' is null or missing"),
    ],
)  # fmt: skip
def test_templates_refuse(source: str, code: str, message: str) -> None:
    with pytest.raises(RowError) as error:
        Template(source, "k").render(X)
    assert (error.value.code, str(error.value)) == (code, message)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
        pytest.param("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}", marks=pytest.mark.slow),
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
        "{{ 2 ** n }}", "{{ 'a' * n }}", "{{ n * [1] }}", "{{ 'a' | center(n) }}", "{{ 'a'.ljust(n) }}", "{{ [1] | batch(n, 1) | list }}",
        "{{ [1] | slice(n) | list }}", "{{ 1 | round(n) }}", "{{ '%9999999d' % 1 }}", "{{ '%*d' % (n, 1) }}", "{{ '%9999999s' | format(1) }}",
        "{{ '{:9999999}'.format(1) }}", "{{ '{:{w}}'.format(1, w=n) }}", "{% for i in range(99999) %}{{ text }}{% endfor %}",
    ],
)  # fmt: skip
def test_templates_do_no_endless_work(source: str) -> None:
    """Each of these took minutes, or the machine's memory."""
    with pytest.raises(RowError, match="TooMuchWork"):
        Template(source, "k").render({"n": 10**10, "text": "x" * 10_000})


def test_a_large_template_has_room() -> None:
    source = "{% for i in range(300) %}{% for j in range(300) %}{{ '%06d' % j ~ ' 1234567' }}{% endfor %}{% endfor %}"
    assert len(Template(source, "k").render({})) == 300 * 300 * 14


@pytest.mark.parametrize(
    "source",
    ["{% for i in x %}" * 30 + "{% endfor %}" * 30, "{{ " + "9" * 5000 + " }}", "{{ " + "(" * 5000 + "x"],
)
def test_templates_that_python_cannot_compile(source: str) -> None:
    with pytest.raises(SpecError, match="k: the template"):
        Template(source, "k")


def test_a_power_is_not_computed_while_compiling() -> None:
    Template("{{ 10 ** 10 ** 10 }}", "k")


def test_binary_values_are_not_printed() -> None:
    assert texts(rows(x=[b"ab"]), template="{{ x }}") == [
        "prompt_error: TypeError: the value is binary, not text"
    ]


def test_template_columns() -> None:
    template = Template(
        "{{ a }} {{ b | default('') }} {% if c is defined %}{% endif %} {% set d = 1 %}{{ d }}", "k"
    )
    assert template.columns == {"a", "b", "c"}
    assert template.optional == {"b", "c"}


@pytest.mark.parametrize("key", ["template", "system"])
def test_template_syntax_names_key_and_line(key: str) -> None:
    settings = {"template": "x", key: "a\nb {{ }"}
    with pytest.raises(SpecError, match=rf"^prompt\.{key}: line 2 of the template: "):
        PromptBuilder(PromptSettings(**settings), tokenizer())


def test_one_row_does_not_touch_its_neighbours() -> None:
    table = rows(x=["a", None, "b", " ", "c"], n=[1, 1, 0, 1, 1])
    found = build(table, template="{{ x }}{% if 1 / n %}{% endif %}")
    assert [row["error_code"] for row in found] == [
        None,
        "missing_value",
        "prompt_error",
        "empty_prompt",
        None,
    ]
    assert found[1]["error_message"] == "column 'x' is null or missing"
    assert found[2]["error_message"] == "ZeroDivisionError: division by zero"
    assert [row["token_ids"] for row in found] == [[1, 5], None, None, None, [1, 7]]


def test_rows_that_could_not_be_read_keep_their_error() -> None:
    table = pa.table(
        {
            "x": ["a", None, "b", "c"],
            "row_id": list("0123"),
            "error_code": pa.array([None, "invalid_row", None, "invalid_utf8"]),
            "error_message": pa.array([None, "line 2", None, None]),
        }
    )
    found = build(table, template="{{ x }}")
    assert [row["token_ids"] for row in found] == [[1, 5], None, [1, 6], None]
    assert [row["error_code"] for row in found] == [None, "invalid_row", None, "invalid_utf8"]
    assert found[1]["error_message"] == "line 2"
    assert found[3]["error_message"] == ROW_ERROR_CODES["invalid_utf8"]


def test_text_that_is_not_utf8_is_its_rows_error() -> None:
    bad = pa.array([b"a", b"\xff", b"b"], pa.binary()).view(pa.string())
    for prompt in ({"template": "{{ x }}"}, {"prompt_column": "x"}, {"template": "{{ x or 'd' }}"}):
        found = build(rows(x=bad), **prompt)
        assert [row["error_code"] for row in found] == [None, "invalid_utf8", None]
        assert found[1]["error_message"] == "column 'x' is not UTF-8"


def test_an_empty_table() -> None:
    table = rows(x=pa.array([], pa.string()))
    assert build(table, template="{{ x }}") == []
    assert build(table, CHAT, template="{{ x }}", system="s") == []


@pytest.mark.parametrize(
    "column",
    [["a", None], pa.array(["a", None], pa.large_string()), pa.array(["a", None]).dictionary_encode()],
)
def test_prompt_column(column: Any) -> None:
    assert texts(rows(x=column), prompt_column="x") == ["a", "missing_value: column 'x' is null"]


# ── Chat ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_chat_template_is_applied_whenever_there_is_one() -> None:
    table = rows(x=["hello"])
    assert texts(table, CHAT, template="say {{ x }}") == ["<|user|> say hello <|assistant|>"]
    assert texts(table, CHAT, template="say {{ x }}", chat=False) == ["say hello"]
    assert texts(table, None, template="say {{ x }}") == ["say hello"]


def test_special_tokens_are_added_once() -> None:
    table = rows(x=["hello"])
    assert build(table, CHAT, template="{{ x }}")[0]["token_ids"] == [
        2,
        8,
        4,
    ]  # the chat template writes its own
    assert build(table, CHAT, template="{{ x }}", chat=False)[0]["token_ids"] == [1, 8]


def test_system_turns_are_templates() -> None:
    table = rows(x=["a", "b", "c"], lang=["en", None, "en"])
    assert texts(table, CHAT, template="{{ x }}", system="say {{ lang }}") == [
        "<|system|> say en <|user|> a <|assistant|>",
        "missing_value: column 'lang' is null or missing",
        "<|system|> say en <|user|> c <|assistant|>",
    ]
    assert (
        texts(table, CHAT, template="{{ x }}", system="hello")[1]
        == "<|system|> hello <|user|> b <|assistant|>"
    )


def test_chat_template_variables() -> None:
    found = texts(
        rows(x=["a"]),
        CHAT,
        template="{{ x }}",
        chat_template_kwargs={"extra": "!", "add_generation_prompt": False},
    )
    assert found == ["<|user|> a <|assistant|>!"]


@pytest.mark.parametrize("key", ["tokenize", "return_dict", "return_tensors", "conversation", "messages"])
def test_options_that_would_leave_no_prompt_are_no_variables(key: str) -> None:
    with pytest.raises(ValueError, match=f"chat_template_kwargs.{key} is no variable of chat templates"):
        PromptSettings(template="x", chat_template_kwargs={"fine": 1, key: False})


def test_a_job_file_may_have_a_chat_template_of_its_own() -> None:
    found = texts(rows(x=["a"]), CHAT, template="{{ x }}", chat_template_kwargs={"chat_template": "hello"})
    assert found == ["hello"]


@pytest.mark.slow
def test_all_options_of_apply_chat_template_are_known() -> None:
    from transformers import PreTrainedTokenizerBase

    there = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters.values()
    named = {one.name for one in there if one.kind is not inspect.Parameter.VAR_KEYWORD}
    assert named <= CHAT_OPTIONS
    assert CHAT_OPTIONS - named == {"messages", "conversations"}  # the renderer's, to which variables go on


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def test_tools_stand_where_the_chat_template_puts_them() -> None:
    template = "{% for tool in tools or () %}[{{ tool.function.name }}] {% endfor %}" + CHAT
    assert texts(rows(x=["a"]), template, template="{{ x }}", tools=[TOOL]) == [
        "[weather] <|user|> a <|assistant|>"
    ]
    assert texts(rows(x=["a"]), template, template="{{ x }}") == ["<|user|> a <|assistant|>"]


def test_a_chat_template_that_would_leave_tools_out_is_refused() -> None:
    with pytest.raises(SpecError, match=r"^prompt\.tools: the model's chat template does not show tools"):
        texts(rows(x=["a"]), CHAT, template="{{ x }}", tools=[TOOL])
    with pytest.raises(SpecError, match=r"^prompt\.tools: the model's tokenizer has no chat template"):
        texts(rows(x=["a"]), None, template="{{ x }}", tools=[TOOL])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tools": [TOOL, {"name": "weather"}]}, "tool 2 is not of the form"),
        ({"tools": [{**TOOL, "function": {"name": ""}}]}, "tool 1 is not of the form"),
        ({"tools": []}, "at least 1"),
        ({"tools": [TOOL], "chat": False}, "tools need the chat template"),
        ({"tools": [TOOL], "chat_template_kwargs": {"tools": [TOOL]}}, "not both"),
    ],
)
def test_what_is_no_tool(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptSettings(template="x", **wrong)


def test_a_row_that_the_chat_template_refuses() -> None:
    found = build(rows(x=["a", "refuse", "b"]), CHAT, template="{{ x }}")
    assert [row["error_code"] for row in found] == [None, "prompt_error", None]
    assert found[1]["error_message"] == "the model's chat template: TemplateError: roles"
    assert [found[i]["token_ids"] for i in (0, 2)] == [[2, 5, 4], [2, 6, 4]]


@pytest.mark.parametrize("key", ["system", "messages_column", "chat"])
def test_a_chat_needs_a_chat_template(key: str) -> None:
    settings = {"messages_column": "m"} if key == "messages_column" else {"template": "x", key: "y"}
    with pytest.raises(SpecError, match=rf"^prompt\.{key}: the model's tokenizer has no chat template"):
        PromptBuilder(PromptSettings(**settings), tokenizer(None))


# ── Messages ─────────────────────────────────────────────────────────────────────────────────────────────────────

USER = {"role": "user", "content": "a"}


@pytest.mark.parametrize("as_json", [True, False])
def test_messages(as_json: bool) -> None:
    conversations = [[USER, {"role": "assistant", "content": "b", "name": None}, USER], None]
    column = [c and json.dumps(c) for c in conversations] if as_json else conversations
    assert texts(rows(m=column), CHAT, messages_column="m") == [
        "<|user|> a <|assistant|> b <|user|> a <|assistant|>",
        "missing_value: column 'm' is null",
    ]


def test_a_rows_own_system_turn_wins() -> None:
    own = [{"role": "system", "content": "b"}, USER]
    table = rows(m=[json.dumps(own), json.dumps([USER])], lang=pa.array([None, None], pa.string()))
    assert texts(table, CHAT, messages_column="m", system="{{ lang }}") == [
        "<|system|> b <|user|> a <|assistant|>",
        "missing_value: column 'lang' is null or missing",
    ]


@pytest.mark.parametrize(
    ("messages", "outcome"),
    [
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}], "<|user|> a\nb <|assistant|>"),
        ([], "empty_prompt: the messages hold no text besides a system turn"),
        ([{"role": "system", "content": "a"}], "empty_prompt: the messages hold no text besides a system turn"),
        ([{"role": "user", "content": " \n"}], "empty_prompt: the messages hold no text besides a system turn"),
        ([USER, "b"], "prompt_error: message 2: expected role and content, found str"),
        ([{"content": "a"}], "prompt_error: message 1: role must be text such as 'user', found None"),
        ([{"role": 1, "content": "a"}], "prompt_error: message 1: role must be text such as 'user', found 1"),
        ([{"role": "user"}], "prompt_error: message 1: content must be text or a list of text parts, found NoneType"),
        ([{"role": "user", "content": 1}], "prompt_error: message 1: content must be text or a list of text parts, found int"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "bad_image: message 1: a part of type 'image_url' without its url"),
            ([{"role": "user", "content": [{"type": "input_audio"}]}], "prompt_error: message 1: content part of type 'input_audio'; only text and images are supported"),
            ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}]}], "bad_image: the model takes no images"),
        ({"role": "user"}, "prompt_error: messages must be a list, found dict"),
        ("x", "prompt_error: messages must be a list, found str"),
    ],
)  # fmt: skip
def test_the_shape_of_messages(messages: Any, outcome: str) -> None:
    assert texts(rows(m=[json.dumps(messages)]), CHAT, messages_column="m") == [outcome]


def test_messages_that_are_not_json() -> None:
    (found,) = texts(rows(m=["[{"]), CHAT, messages_column="m")
    assert found.startswith("prompt_error: messages are not JSON: JSONDecodeError: ")


# ── Functions ────────────────────────────────────────────────────────────────────────────────────────────────────

FUNCTIONS = """
from pipelines.errors import RowError

def text(row): return f"say {row['x']} {row['row_id']}"
def messages(row): return [{"role": "user", "content": row["x"]}]
def answers(row):
    if row["x"] == "raise": raise ValueError("no\\nway")
    if row["x"] == "exit": raise SystemExit(3)
    if row["x"] == "refuse": raise RowError("missing_value", "needs y")
    if row["x"] == "own": raise RowError("my_code", "mine")
    return {"none": None, "blank": " ", "number": 3, "text": "a"}[row["x"]]
def keys(row): return " ".join(sorted(row))
def shout(row):
    row["x"] = row["x"].upper()
    return row["x"]
async def slow(row): return ""
"""


@pytest.fixture(scope="module")
def functions(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("functions")
    (folder / "prompt_functions.py").write_text(FUNCTIONS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        yield (str(folder),)


def call(
    functions: tuple[str, ...], name: str, table: pa.Table, chat_template: str | None = None
) -> list[str]:
    settings = PromptSettings(function=f"prompt_functions:{name}")
    found = PromptBuilder(settings, tokenizer(chat_template), functions).texts(table)
    return [f"{item.code}: {item}" if isinstance(item, RowError) else item for item in found]


def test_functions_return_text_or_messages(functions: tuple[str, ...]) -> None:
    table = rows(x=["a", "b"])
    assert call(functions, "text", table) == ["say a f:0", "say b f:1"]
    assert call(functions, "messages", table, CHAT)[0] == "<|user|> a <|assistant|>"
    assert call(functions, "messages", table)[0].startswith(
        "prompt_error: the prompt function returned messages"
    )


def test_functions_see_the_rows_own_columns(functions: tuple[str, ...]) -> None:
    table = rows(x=["a"]).append_column("error_code", pa.array([None], pa.string()))
    table = table.append_column("error_message", pa.array([None], pa.string()))
    assert call(functions, "keys", table) == ["row_id x"]
    assert call(functions, "shout", rows(x=["a", "b"])) == ["A", "B"]


@pytest.mark.parametrize(
    ("x", "outcome"),
    [
        ("text", "a"),
        ("raise", "prompt_error: prompt.function: ValueError: no"),
        ("exit", "prompt_error: prompt.function: SystemExit: 3"),
        ("refuse", "missing_value: needs y"),
        ("own", "prompt_error: my_code: RowError: mine"),
        ("none", "prompt_error: expected text or a list of messages, found NoneType"),
        ("number", "prompt_error: expected text or a list of messages, found int"),
        ("blank", "empty_prompt: the user turn is blank"),
        ("nokey", "prompt_error: prompt.function: KeyError: 'nokey'"),
    ],
)
def test_functions_that_fail(functions: tuple[str, ...], x: str, outcome: str) -> None:
    assert call(functions, "answers", rows(x=["text", x, "text"])) == ["a", outcome, "a"]


def test_functions_that_cannot_be_used(functions: tuple[str, ...]) -> None:
    with pytest.raises(SpecError, match="must be a plain function, not async"):
        call(functions, "slow", rows(x=["a"]))
    with pytest.raises(SpecError, match="has no function 'txt'"):
        call(functions, "txt", rows(x=["a"]))


# ── Tokens ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_prompt_without_tokens_is_an_error() -> None:
    bare = tokenizer(None)
    bare.backend_tokenizer.post_processor = None
    bare.backend_tokenizer.normalizer = None
    made = PromptBuilder(PromptSettings(template="{{ x }}"), bare).build(rows(x=["a", "\u200b"]))
    assert made["error_code"].to_pylist() == [None, None]  # one unknown word
    nothing = type(
        "Nothing", (), {"chat_template": None, "__call__": lambda *a, **k: {"input_ids": [[] for _ in a[1]]}}
    )
    made = PromptBuilder(PromptSettings(template="{{ x }}"), nothing()).build(rows(x=["a"]))
    assert made["error_code"].to_pylist() == ["empty_prompt"]


def test_text_that_cannot_be_tokenised_is_its_rows_error() -> None:
    found = build(
        rows(m=[json.dumps([USER]), json.dumps([{"role": "user", "content": "\ud800"}])]),
        CHAT,
        messages_column="m",
    )
    assert [row["error_code"] for row in found] == [None, "prompt_error"]
    assert found[1]["error_message"].startswith("tokenising: ")
    assert found[0]["token_ids"] == [2, 5, 4]


def test_input_columns_may_share_names_with_dray() -> None:
    table = pa.table(
        [pa.array(["mine"]), pa.array(["old"]), pa.array(["f:0"]), pa.array([None], pa.string()), pa.array([None], pa.string())],
        names=["row_id", "error_code", "row_id", "error_code", "error_message"],
    )  # fmt: skip
    builder = PromptBuilder(PromptSettings(template="{{ row_id }} {{ error_code }}"), tokenizer(None))
    assert builder.texts(table) == ["mine old"]
    assert builder.build(table)["row_id"].to_pylist() == ["f:0"]


def test_vllm_is_not_imported() -> None:
    assert "vllm" not in Path(sys.modules["pipelines.prompt"].__file__ or "").read_text()


def test_each_row_may_have_its_own_max_tokens() -> None:
    table = rows(x=["a", "b", "c", "a", None], n=pa.array([7, None, 2, 2**40, 0]))
    sampling = SamplingSettings(max_tokens_column="n", min_tokens=3)
    made = PromptBuilder(PromptSettings(template="{{ x }}"), tokenizer(None), sampling=sampling).build(table)
    assert made.schema == PROMPT_SCHEMA
    found = made.to_pylist()
    assert [row["max_tokens"] for row in found] == [7, None, None, None, None]
    assert [row["error_code"] for row in found] == [
        None,
        None,
        "invalid_request",  # below min_tokens
        "invalid_request",
        "missing_value",  # the prompt's own error comes first
    ]
    assert found[2]["error_message"] == "max_tokens_column 'n' is 2; it must be from 3 to 2147483647"
    without = PromptBuilder(PromptSettings(template="{{ x }}"), tokenizer(None), sampling=sampling)
    assert without.build(rows(x=["a"]))["max_tokens"].to_pylist() == [None]
