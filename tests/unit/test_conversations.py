"""Several turns in one job: prompts that go on with a conversation, conversations as columns, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import load
from jobs.inspect import report_of, verify
from jobs.preview import preview
from jobs.proposal import propose
from jobs.report_rows import hidden_columns
from pipelines.contracts import extra_fields
from pipelines.errors import SpecError
from pipelines.generations import pools_of
from pipelines.messages import CONVERSATION_TYPE, conversations
from pipelines.step_settings import StepSettings
from tests.local.runs import content, job, rows_of, write_questions
from tests.unit.stages import committed, run

GREEDY = {"temperature": 0, "max_tokens": 16}
SYSTEM = {"role": "system", "content": "Be brief."}
OPENING = {"system": "Be brief.", "template": "{{ question }}"}


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def turn(column: str, messages: str, text: str, /, **more: Any) -> dict[str, Any]:
    """A generate step that goes on with the conversation in `messages`."""
    prompt = {"messages_column": messages, "template": text}
    return {"generate": {"column": column, "prompt": prompt, "sampling": GREEDY, **more}}


def settings(folder: Path, *steps: dict[str, Any], out: str = "out", **sections: Any) -> dict[str, Any]:
    whole = {
        "prompt": OPENING,
        "sampling": GREEDY,
        "shards": {"rows": 4},
        "steps": [*steps],
        "output": {"path": str(folder / out), "conversation": "chat"},
    }
    return job(folder / "in", folder / out, **{**whole, **sections})


def answered(folder: Path, chats: list[list[dict[str, Any]]]) -> list[str]:
    """What a job of one generation answers to each of these, in their order."""
    (folder / "in").mkdir(parents=True)
    schema = pa.schema([("chat", CONVERSATION_TYPE)])
    pq.write_table(
        pa.Table.from_pylist([{"chat": chat} for chat in chats], schema), folder / "in" / "c.parquet"
    )
    prompt = {"messages_column": "chat"}
    done = committed(job(folder / "in", folder / "out", prompt=prompt, sampling=GREEDY))
    return [row["generated_text"] for row in rows_of(done.folder).to_pylist()]


# ── The column ───────────────────────────────────────────────────────────────────────────────────────────────────

MESSAGES = st.lists(st.builds(said, st.sampled_from(["system", "user", "assistant"]), st.text(max_size=3)), max_size=4)  # fmt: skip
RECORDS = st.lists(st.tuples(st.none() | MESSAGES, st.none() | st.text(max_size=3)), max_size=12)


@given(RECORDS, st.integers(0, 12), st.integers(0, 3))
def test_an_answer_stands_behind_the_messages_that_it_answers(
    records: list[tuple[Any, str | None]], cut: int, start: int
) -> None:
    asked = pa.array([one for one, _ in records], CONVERSATION_TYPE)
    answers = pa.array([one for _, one in records], pa.string())
    # Chunks that are slices of others, as `take` and Parquet leave them.
    columns = [pa.chunked_array([one[start:cut], one[cut:]], one.type) for one in (asked, answers)]
    expected = [
        None if messages is None or text is None else [*messages, said("assistant", text)]
        for messages, text in [*records[start:cut], *records[cut:]]
    ]
    made = conversations(*columns)
    made.validate(full=True)
    assert made.type == CONVERSATION_TYPE
    assert made.to_pylist() == expected


def test_three_turns_are_asked_with_all_that_was_said_before(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", rows=10)
    steps = [
        turn("user", "chat", "What would you ask next?"),
        turn("second", "chat", "{{ user }}", conversation="chat_2"),
        turn("third", "chat_2", "And in {{ kind }}?", conversation="messages"),
    ]
    done = committed(settings(tmp_path, *steps))
    assert [len(pool) for pool in pools_of(done.work("r"))] == [4]  # all in one engine
    rows = rows_of(done.folder).to_pylist()
    names = list(rows[0])
    assert names[names.index("run_id") + 1] == "chat"
    assert names[-1] == "messages"
    first = [
        [SYSTEM, said("user", row["question"]), said("assistant", row["generated_text"])] for row in rows
    ]
    second = [
        [*chat, said("user", row["user"]), said("assistant", row["second"])]
        for chat, row in zip(first, rows, strict=True)
    ]
    third = [
        [*chat, said("user", f"And in {row['kind']}?"), said("assistant", row["third"])]
        for chat, row in zip(second, rows, strict=True)
    ]
    assert [row["chat"] for row in rows] == first
    assert [row["chat_2"] for row in rows] == second
    assert [row["messages"] for row in rows] == third
    # The same messages, each asked in a job of its own.
    for name, chats in (("generated_text", first), ("second", second), ("third", third)):
        alone = answered(tmp_path / f"alone-{name}", [chat[:-1] for chat in chats])
        assert [row[name] for row in rows] == alone
    assert len({row["third"] for row in rows}) > 1
    verdict = verify(done.storage, deep=True)
    assert (verdict["problems"], verdict["rows_ok"]) == ([], 10)
    told = report_of(done.storage).stats.steps
    assert told["generate-3"]["prompt_tokens"] > told["generate-2"]["prompt_tokens"]


def test_each_sample_has_a_conversation_of_its_own(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", rows=5)
    several = {"n": 3, "temperature": 1.0, "seed": 1, "max_tokens": 12}
    whole = settings(tmp_path, turn("again", "chat", "Sure?", conversation="more"), sampling=several)
    rows = content(committed(whole).folder)
    assert len(rows) == 15
    for row in rows:
        assert row["chat"][1:] == [said("user", row["question"]), said("assistant", row["generated_text"])]
        assert row["more"] == [*row["chat"], said("user", "Sure?"), said("assistant", row["again"])]
    assert len({json.dumps(row["more"]) for row in rows}) > 5


def test_a_conversation_goes_through_the_other_steps(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", rows=8)
    steps = [
        {"name": "words", "parse": {"column": "generated_text", "regex": r"(?P<word>\S+)", "on_error": "null"}},
        {"filter": {"where": "word is not None"}},
        {"explode": {"column": "chat", "into": "message"}},
        {"name": "of-user", "filter": {"where": "message.role != 'system'"}},
        turn("comment", "chat", "{{ message.role }}: {{ chat[-1].content | length }}"),
        {"dedup": {"columns": ["comment"]}},
    ]  # fmt: skip
    done = committed(settings(tmp_path, *steps))
    rows = rows_of(done.folder).to_pylist()
    assert rows
    for row in rows:
        assert row["message"] == row["chat"][int(row["row_id"].rpartition("/")[2])]
        assert row["chat"][-1] == said("assistant", row["generated_text"])


@pytest.mark.parametrize("failed_rows", ["inline", "separate"])
def test_a_failed_record_has_no_conversation_until_it_is_mended(tmp_path: Path, failed_rows: str) -> None:
    write_questions(tmp_path / "in", rows=6)
    output = {"path": str(tmp_path / "out"), "conversation": "chat", "failed_rows": failed_rows}
    long = {"template": "{% if kind == 'digits' %}{{ question * 600 }}{% else %}{{ question }}{% endif %}"}
    more = turn("again", "chat", "Sure?", conversation="more")
    one = {"errors": {"max_error_rate": 1.0}}
    failed = committed(settings(tmp_path, more, prompt=long, output=output, **one))
    rows = [*rows_of(failed.folder).to_pylist(), *(rows_of(failed.folder, "errors").to_pylist() if failed_rows == "separate" else [])]  # fmt: skip
    bad = [row for row in rows if row["error_code"]]
    assert 0 < len(bad) < 6
    assert {row["error_code"] for row in bad} == {"prompt_too_long"}
    assert all(row["chat"] is None and row["more"] is None for row in bad)
    assert all(len(row["more"]) == 4 for row in rows if not row["error_code"])
    short = settings(tmp_path, more, prompt={"template": "{{ question }}"}, output=output, **one)
    mended = replace(failed, settings=short)
    run(mended.retry("again"), failed.plan.shards)
    clean = committed({**short, "output": {**output, "path": str(tmp_path / "clean")}})
    assert content(failed.folder) == content(clean.folder)
    assert verify(failed.storage, deep=True)["problems"] == []


def test_a_preview_shows_the_conversations_of_steps(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", rows=3)
    whole = settings(tmp_path, turn("again", "chat", "Sure?", conversation="more"))
    seen = preview(load(whole), rows=2, generate=True)
    done = committed(whole)
    assert [row["answers"][0]["steps"]["more"] for row in seen] == [
        row["more"] for row in rows_of(done.folder).to_pylist()[:2]
    ]


# ── Conversations of the input ───────────────────────────────────────────────────────────────────────────────────

CHATS: list[list[dict[str, Any]]] = [
    [said("user", "one"), said("assistant", "two")],
    [said("system", "Mine."), said("user", "one"), said("assistant", "two")],
    [],
]


@pytest.mark.parametrize("kind", ["structs", "json"])
@pytest.mark.parametrize("source", [{"template": "{{ next }}?"}, {"prompt_column": "next"}])
def test_the_next_turn_stands_behind_the_messages(tmp_path: Path, kind: str, source: dict[str, str]) -> None:
    (tmp_path / "in").mkdir()
    chats = [*CHATS, None, CHATS[0]]
    texts = [None if chat is None else json.dumps(chat) for chat in chats]
    turns = pa.array(texts) if kind == "json" else pa.array(chats, CONVERSATION_TYPE)
    asked = pa.table({"turns": turns, "next": ["three", "four", "five", "six", " "]})
    pq.write_table(asked, tmp_path / "in" / "q.parquet")
    prompt = {"system": "Yours.", "messages_column": "turns", **source}
    done = committed(settings(tmp_path, prompt=prompt, errors={"max_error_rate": 1.0}))
    rows = rows_of(done.folder).to_pylist()
    mark = "?" if "template" in source else ""
    yours = said("system", "Yours.")
    assert [row["chat"] and row["chat"][:-1] for row in rows[:4]] == [
        [yours, *CHATS[0], said("user", f"three{mark}")],
        [*CHATS[1], said("user", f"four{mark}")],  # a system turn of its own stays
        [yours, said("user", f"five{mark}")],
        None,
    ]
    assert [row["error_code"] for row in rows] == [None, None, None, "missing_value", None if mark else "empty_prompt"]  # fmt: skip


def test_what_a_conversation_cannot_hold_is_its_rows_error(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    chats = [
        [{"role": "user", "content": "one", "name": None}],
        [{"role": "user", "content": "one", "name": "Ann"}],
        [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
        [{"role": "user", "content": "one \ud800"}],
    ]
    texts = pa.array([json.dumps(chat) for chat in chats])
    pq.write_table(pa.table({"turns": texts}), tmp_path / "in" / "q.parquet")
    whole = settings(tmp_path, prompt={"messages_column": "turns"}, errors={"max_error_rate": 1.0})
    rows = rows_of(committed(whole).folder).to_pylist()
    assert [row["error_code"] for row in rows] == [None, "prompt_error", None, "invalid_utf8"]
    assert "message 1: has name" in rows[1]["error_message"]
    assert "output.conversation" in rows[1]["error_message"]
    assert rows[2]["chat"][0] == said("user", "a\nb")
    # Where no column is asked for they are the chat template's.
    plain = committed({**whole, "output": {"path": str(tmp_path / "plain")}})
    codes = [row["error_code"] for row in rows_of(plain.folder).to_pylist()]
    assert codes == [None, None, None, "prompt_error"]


# ── Before any engine starts ─────────────────────────────────────────────────────────────────────────────────────


def said_when_planning(whole: dict[str, Any]) -> str:
    with pytest.raises(SpecError) as told:
        propose(load(whole))
    return str(told.value)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"prompt": {"template": "a", "prompt_column": "question"}}, "To go on with a conversation give messages_column"),
        ({"prompt": {"messages_column": "question", "function": "a.b:c"}}, "found messages_column and function"),
        ({"prompt": {"template": "a", "chat": False}}, "output.conversation: needs the chat template"),
        ({"output": {"conversation": "row_id"}}, "output.conversation: 'row_id' is a result column already"),
        ({"output": {"conversation": "question"}}, "the input column 'question' has the name of a result column"),
        ({"prompt": None, "steps": [turn("a", "x", "y")]}, "output.conversation: it is the job's own prompt's"),
        ({"steps": [turn("a", "chat", "y", conversation="a")]}, "'a' is the name of another of the step's columns"),
        ({"steps": [turn("a", "chat", "y", conversation="a_parsed")]}, "'a_parsed' is the name of another"),
        ({"steps": [turn("a", "chat", "y", conversation="kind")]}, "adds the column 'kind', which is there already"),
        ({"steps": [turn("a", "later", "y"), turn("b", "chat", "y", conversation="later")]}, "there is no column 'later' by then"),
        ({"steps": [turn("a", "answer_parts", "y")]}, "there is no column 'answer_parts' by then"),
        ({"steps": [{"explode": {"column": "chat", "into": "m"}}, turn("a", "m", "y")]}, "prompt.messages_column: 'm' holds struct<role: string, content: string> values"),
        ({"steps": [{"generate": {"column": "a", "conversation": "b", "prompt": {"template": "x", "chat": False}}}]}, "conversation: needs the chat template"),
        ({"steps": [{"judge": {"column": "a", "rubric": "good?", "conversation": "b"}}]}, "steps.judge.conversation: unknown key"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_told_when_planning(tmp_path: Path, sections: dict[str, Any], words: str) -> None:
    write_questions(tmp_path / "in", rows=1)
    output = {"path": str(tmp_path / "out"), "conversation": "chat", **sections.get("output", {})}
    assert words in said_when_planning(settings(tmp_path, **{**sections, "output": output}))


def test_messages_have_a_role_and_a_content(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    shared = pa.array([[{"from": "human", "value": "one"}]])
    pq.write_table(pa.table({"turns": shared}), tmp_path / "in" / "q.parquet")
    words = said_when_planning(settings(tmp_path, prompt={"messages_column": "turns"}))
    assert "prompt.messages_column: 'turns' holds list<" in words
    assert "not a list of role and content or JSON text" in words


def test_a_plan_names_the_columns_and_a_change_of_them_is_another_dataset(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", rows=1)
    step = turn("again", "chat", "Sure?", conversation="more")
    planned = propose(load(settings(tmp_path, step)))
    assert planned.summary["steps"][0]["adds"]["more"] == str(CONVERSATION_TYPE)
    spec = planned.job.spec
    assert extra_fields(spec.output, spec.sampling) == [pa.field("chat", CONVERSATION_TYPE)]
    other = {"path": str(tmp_path / "out"), "conversation": "talk"}
    renamed = propose(load(settings(tmp_path, output=other)))
    assert renamed.identity["output.conversation"] == "talk"


def test_conversations_are_hidden_where_anything_is(tmp_path: Path) -> None:
    steps = [StepSettings.model_validate(turn("again", "chat", "Sure?", conversation="more"))]
    assert hidden_columns(["question"], {}, steps, "chat") == {"question", "chat", "more"}
    assert hidden_columns([], {}, steps, "chat") == frozenset()
