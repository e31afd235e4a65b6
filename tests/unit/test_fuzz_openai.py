"""Batch files that nobody should write: each line is taken, or refused by a message, whatever it holds."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.openai_body import CHAT, ENDPOINTS, IGNORED, NEUTRAL, SHARED, BatchMistakes
from jobs.openai_lines import Lines
from jobs.openai_shared import prompt_of, sampling_of
from pipelines.settings import ROW_PARAMS
from tests.unit.batch_files import PROMPTS
from tests.unit.fuzz import FACTOR, examples

pytestmark = [pytest.mark.slow, pytest.mark.timeout(0 if FACTOR > 1 else 300)]

#: Now and then with half of a surrogate pair, which JSON may escape.
TEXT = st.text(max_size=8) | st.text(st.sampled_from("a\ud800\udfff\U0001f600"), max_size=3)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
NAMES = [
    "role", "content", "type", "text", "image_url", "url", "tool_calls", "function", "name", "arguments", "json_schema", "schema",
    "json", "regex", "choice", "grammar", "properties",
]  # fmt: skip
#: What messages, tools and formats are made of, with anything inside.
SHAPED = ANYTHING | st.recursive(
    ANYTHING,
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(NAMES),
            inner | st.sampled_from(["user", "text", "function", "json_schema", "object", "{}"]),
            max_size=4,
        )
    ),
    max_leaves=8,
)
KEYS = sorted(
    {
        "model",
        *ROW_PARAMS,
        *IGNORED,
        *ENDPOINTS.values(),
        *(k for e in ENDPOINTS for k in (*SHARED[e], *NEUTRAL[e])),
    }
)


@examples(150)
@given(st.sampled_from(sorted(ENDPOINTS)), st.dictionaries(st.sampled_from(KEYS), SHAPED, max_size=4))
def test_a_body_is_taken_or_refused(url: str, body: dict[str, Any]) -> None:
    line = {"custom_id": "a", "method": "POST", "url": url, "body": {**PROMPTS[url], **body}}
    taken_or_refused(line)


def shared(strings: st.SearchStrategy[str]) -> st.SearchStrategy[dict[str, Any]]:
    """Bodies whose shared values have the right form, with such strings in them."""
    schema = st.dictionaries(st.sampled_from(["title", "description", "const"]), strings, max_size=2)
    variables = st.dictionaries(strings, strings | st.lists(strings, max_size=2), max_size=2)
    return st.fixed_dictionaries(
        {},
        optional={
            "guided_json": schema | schema.map(json.dumps),
            "chat_template_kwargs": variables,
            "reasoning_effort": strings,
            "tools": st.builds(
                lambda name, text: [{"type": "function", "function": {"name": name, "description": text}}],
                strings,
                strings,
            ),
        },
    )


@examples(100)
@given(shared(TEXT))
def test_shared_values_are_taken_or_refused(body: dict[str, Any]) -> None:
    taken_or_refused({"custom_id": "a", "method": "POST", "url": CHAT, "body": {**PROMPTS[CHAT], **body}})


@examples(60)
@given(ANYTHING | st.fixed_dictionaries(dict.fromkeys(("custom_id", "method", "url", "body"), ANYTHING)))
def test_a_line_is_taken_or_refused(line: Any) -> None:
    taken_or_refused(line)


def taken_or_refused(line: Any) -> None:
    lines = Lines("batch")
    try:
        [request] = lines.requests([json.dumps(line).encode()])
    except BatchMistakes as refused:
        assert all(f"{one.line}" in str(refused) and one.text for one in refused.mistakes)  # noqa: PT017 -- either will do
        written([str(refused), *map(asdict, refused.mistakes)])
        return
    written([request, lines.common, lines.shared, lines.varying])
    written([sampling_of(lines.shared), prompt_of(lines.shared)])


def written(value: Any) -> None:
    """As facts, messages and job files are."""
    json.dumps(value, ensure_ascii=False).encode()
