"""Batch files that nobody should write: each line is taken, or refused by a message, whatever it holds."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.openai_body import ENDPOINTS, IGNORED, NEUTRAL, SHARED, BatchMistakes
from jobs.openai_lines import Lines
from jobs.openai_shared import prompt_of, sampling_of
from pipelines.settings import ROW_PARAMS
from tests.unit.fuzz import FACTOR, examples
from tests.unit.test_openai_batch import PROMPTS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(0 if FACTOR > 1 else 300)]

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
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
        return
    request.prompt.encode()
    json.dumps([request.own, lines.common, sampling_of(lines.shared), prompt_of(lines.shared)])
