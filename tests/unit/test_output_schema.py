"""Typed output: JSON Schemas as Arrow types, what passes as an answer, and how a bad one is tried again."""

from __future__ import annotations

import asyncio
import json
from array import array
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import load
from jobs.fingerprint import fingerprint, output_schema_of, steps_of
from jobs.output_schemas import json_columns
from jobs.proposal import checked_identity
from pipelines.engine import Answer, Sample
from pipelines.errors import RowError, SpecError
from pipelines.output_schema import Checker, arrow_type_of
from pipelines.row_settings import RowSettings
from pipelines.settings import SamplingSettings
from pipelines.structured import Structured
from tests.local.runs import job, write_questions
from tests.unit.stages import committed

CARD = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "rank": {"type": "integer"},
        "share": {"type": ["number", "null"]},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/Tag"}},
        "kind": {"anyOf": [{"const": "a"}, {"type": "null"}]},
    },
    "required": ["name", "rank"],
    "$defs": {"Tag": {"enum": ["new", "old"]}},
}
CARD_TYPE = pa.struct(
    [
        ("name", pa.string()),
        ("rank", pa.int64()),
        ("share", pa.float64()),
        ("tags", pa.list_(pa.string())),
        ("kind", pa.string()),
    ]
)


def test_a_schema_becomes_a_struct_in_its_own_order() -> None:
    assert arrow_type_of(CARD) == (CARD_TYPE, None)


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": ["string", "integer"]}, "a union of types"),
        ({"anyOf": [{"type": "string"}, {"type": "object", "properties": {"a": {"type": "string"}}}]}, "a union of types"),
        ({"type": "object", "additionalProperties": {"type": "integer"}}, "an object with keys of any name"),
        ({"type": "object", "properties": {"a": {"type": "string"}}, "additionalProperties": True}, "an object with keys of any name"),
        ({"$defs": {"N": {"type": "object", "properties": {"n": {"$ref": "#/$defs/N"}}}}, "$ref": "#/$defs/N"}, "a schema that contains itself"),
        ({"type": "array"}, "an array whose items have no one type"),
        ({"enum": ["a", 1]}, "values of several types"),
        ({"$ref": "https://x.y/z"}, "the reference https://x.y/z"),
        ({}, "a schema without a type"),
    ],
)  # fmt: skip
def test_what_arrow_cannot_express_becomes_json_text(schema: dict[str, Any], reason: str) -> None:
    assert arrow_type_of(schema) == (pa.string(), reason)


CARDS = st.fixed_dictionaries(
    {"name": st.text(max_size=20), "rank": st.integers(-(2**63), 2**63 - 1)},
    optional={
        "share": st.none() | st.floats(allow_nan=False, allow_infinity=False),
        "tags": st.lists(st.sampled_from(["new", "old"])),
        "kind": st.sampled_from(["a", None]),
    },
)


@given(st.lists(CARDS, max_size=5))
def test_every_value_of_the_schema_comes_back_from_its_column(cards: list[dict[str, Any]]) -> None:
    checker = Checker(SamplingSettings(output_schema=CARD))
    texts = [json.dumps(card) for card in cards]
    assert [checker.problem(text, "stop") for text in texts] == [None] * len(cards)
    whole = [{name: card.get(name) for name in CARD_TYPE.names} for card in cards]
    assert checker.column([*texts, None]).to_pylist() == [*whole, None]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"name": "x"', "no JSON"),
        ('{"name": "x"}', "'rank' is a required property"),
        ('{"name": 1, "rank": 1}', "name: 1 is not of type 'string'"),
        ('{"name": "x", "rank": NaN}', "NaN is no JSON"),
        ('{"name": "x", "rank": 9223372036854775808}', "does not fit its column"),
        ('{"name": "\\ud800", "rank": 1}', "does not fit its column"),
        ('{"name": "x", "rank": 1, "tags": ["odd"]}', "tags.0: 'odd' is not one of"),
        ("[" * 100_000, "no JSON"),
    ],
)
def test_an_answer_that_is_not_of_the_schema_has_a_reason(text: str, words: str) -> None:
    checker = Checker(SamplingSettings(output_schema=CARD))
    problem = checker.problem(text, "stop")
    assert problem is not None
    assert words in problem
    assert len(problem) < 600
    assert checker.column([text]).to_pylist() == [None]


def test_other_constraints_are_checked_too() -> None:
    def problem(text: str, finish: str = "stop", **given: Any) -> str | None:
        return Checker(SamplingSettings(structured_outputs=given)).problem(text, finish)

    assert problem("yes", choice=["yes", "no"]) is None
    assert problem("ye", choice=["yes", "no"]) == "'ye' is none of the choices"
    assert problem("a1", regex=r"a\d+") is None
    assert problem("a1b", regex=r"a\d+") == "'a1b' does not match the regular expression"
    assert problem("x", grammar="root ::= x") is None
    assert problem("x", "length", grammar="root ::= x") == "the answer was cut off at max_tokens"


# ── Other tries ──────────────────────────────────────────────────────────────────────────────────────────────────


def tried(*tries: list[tuple[str, str]], **sampling: Any) -> tuple[Any, Structured, list[tuple[int, bool]]]:
    """(the texts or the error, what was counted, how the engine was asked) when its answers are these (text, finish)."""
    asked: list[tuple[int, bool]] = []

    async def ask(number: int, cut: bool) -> Answer:
        asked.append((number, cut))
        samples = [
            Sample(token_ids=array("i", range(len(text))), text=text, finish_reason=finish)
            for text, finish in tries[number]
        ]
        return Answer(samples=samples, cached_tokens=0, ttft_s=None)

    structured = Structured(SamplingSettings(**sampling))
    try:
        outcome: Any = [sample.text for sample in asyncio.run(structured.answer(ask)).samples]
    except RowError as error:
        outcome = error
    return outcome, structured, asked


CHOICE = {"structured_outputs": {"choice": ["yes", "no"]}, "temperature": 0}


def test_a_good_answer_is_asked_for_once() -> None:
    texts, structured, asked = tried([("yes", "stop")], **CHOICE)
    assert (texts, asked, structured.spent.repairs) == (["yes"], [(0, False)], 0)


def test_a_cut_answer_is_asked_for_again_with_more_tokens_and_not_greedily() -> None:
    texts, structured, asked = tried([("ye", "length")], [("no", "stop")], **CHOICE, max_tokens=8)
    assert (texts, asked) == (["no"], [(0, False), (1, True)])
    assert (structured.spent.repairs, structured.spent.tokens) == (1, 2)
    settings = RowSettings(SamplingSettings(**CHOICE, max_tokens=8))
    assert settings.again(None, True).max_tokens == 16
    assert settings.again(None, False).max_tokens == 8
    assert settings.again(None, False).temperature == 0.5
    assert RowSettings(SamplingSettings(**CHOICE, max_tokens=2**30)).again(None, True).max_tokens == 2**31 - 1
    warm = settings.again('{"temperature": 0.9}', True)
    assert (warm.temperature, warm.max_tokens) == (0.9, 16)


def test_an_answer_that_stays_bad_is_the_rows_error() -> None:
    error, structured, asked = tried(*[[("maybe", "stop")]] * 4, **CHOICE, repairs=3)
    assert (error.code, len(asked), structured.spent.tokens) == ("invalid_output", 4, 20)
    assert "'maybe' is none of the choices" in str(error)
    error, _, asked = tried([("maybe", "stop")], **CHOICE, repairs=0)
    assert (error.code, len(asked)) == ("invalid_output", 1)


def test_of_several_samples_the_bad_ones_are_replaced_as_far_as_may_be() -> None:
    many = {**CHOICE, "temperature": 1.0, "n": 3}
    first = [("yes", "stop"), ("maybe", "stop"), ("so", "stop")]
    texts, structured, _ = tried(first, [("what", "stop"), ("no", "stop"), ("hm", "stop")], **many)
    assert texts == ["yes", "no", "so"]
    assert structured.spent.tokens == len("what") + len("maybe") + len("hm")


# ── In a job ─────────────────────────────────────────────────────────────────────────────────────────────────────


def settings(folder: Path, **sampling: Any) -> dict[str, Any]:
    return job(folder / "in", folder / "out", sampling=sampling)


def test_a_pydantic_class_stands_for_its_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "schemas_of_mine.py").write_text(
        "from pydantic import BaseModel\nclass Card(BaseModel):\n    rank: int\n    name: str | None\n"
        "class Plain: pass\n"
    )
    monkeypatch.chdir(tmp_path)
    loaded = load(settings(tmp_path, output_schema="schemas_of_mine:Card"))
    assert isinstance(loaded.spec.sampling.output_schema, dict)
    assert arrow_type_of(loaded.spec.sampling.output_schema)[0] == pa.struct(
        [("rank", pa.int64()), ("name", pa.string())]
    )
    assert "parsed" in loaded.spec.result_columns
    with pytest.raises(
        SpecError, match=r"sampling.output_schema: schemas_of_mine:Plain is no pydantic model"
    ):
        load(settings(tmp_path, output_schema="schemas_of_mine:Plain"))
    with pytest.raises(SpecError, match="has no function 'Nobody'"):
        load(settings(tmp_path, output_schema="schemas_of_mine:Nobody"))


def test_mistakes_in_schemas_are_told_when_loading(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"sampling\.output_schema: not a JSON Schema: type"):
        load(settings(tmp_path, output_schema={"type": "text"}))
    with pytest.raises(SpecError, match="not both"):
        load(settings(tmp_path, output_schema=CARD, structured_outputs={"choice": ["a"]}))
    with pytest.raises(SpecError, match="exactly one of choice, regex, grammar"):
        load(settings(tmp_path, structured_outputs={"choice": ["a"], "regex": "a"}))
    assert json_columns(load(settings(tmp_path, output_schema={"type": ["string", "integer"]})).spec) == [
        "sampling.output_schema has a union of types: its column holds JSON text"
    ]
    assert json_columns(load(settings(tmp_path, output_schema=CARD)).spec) == []


def test_the_fingerprint_keeps_the_schema_with_the_order_of_its_keys(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", rows=1)
    step = {"generate": {"column": "c", "prompt": {"template": "x"}, "sampling": {"output_schema": CARD}}}

    def identity_of(schema: dict[str, Any]) -> dict[str, Any]:
        whole = {**settings(tmp_path, output_schema=schema), "steps": [step]}
        return json.loads(json.dumps(checked_identity(load(whole)), sort_keys=True))

    stored = identity_of(CARD)
    assert list(output_schema_of(stored)["properties"]) == CARD_TYPE.names  # type: ignore[index]
    assert steps_of(stored)[0].adds(pa.schema([])).field("c_parsed").type == CARD_TYPE
    other = {**CARD, "required": ["name"]}
    assert fingerprint(identity_of(other)) != fingerprint(stored)


def test_the_simulated_engine_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", rows=1)
    with pytest.raises(AssertionError, match="the simulated engine cannot constrain its answers"):
        committed(settings(tmp_path, output_schema=CARD))
