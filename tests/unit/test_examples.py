"""The examples' datasets and checker, and the tiny model's tokenizer; its answers are tested with vLLM."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

pytestmark = pytest.mark.slow


EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


questions = _load("questions")
docstrings = _load("docstrings")
check_answers = _load("check_answers")
corpus = _load("corpus")
verifiers = _load("verifiers")


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (40, "forty"),
        (58, "fifty-eight"),
        (100, "one hundred"),
        (1005, "one thousand five"),
        (4721, "four thousand seven hundred twenty-one"),
    ],
)
def test_numbers_in_words(number: int, words: str) -> None:
    assert questions.number_in_words(number) == words


def test_held_out_questions_are_never_trained_on() -> None:
    train, held_out = questions.questions("train"), questions.questions("held-out")
    assert not {q.question for q in train} & {q.question for q in held_out}
    assert len({q.question for q in train}) == len(train)
    assert {q.kind for q in held_out} == set(questions.KINDS)


def test_a_held_out_number_is_held_out_in_every_phrasing() -> None:
    held_out = questions.questions("held-out")
    every = questions.questions("train") + held_out
    of_4721 = [q for q in every if q.kind == "words" and " 4721" in q.question]
    assert len(of_4721) == 5
    assert len({q in held_out for q in of_4721}) == 1


def test_weekdays_go_both_ways() -> None:
    asked = {q.question: q.answer for q in questions.questions("train") + questions.questions("held-out")}
    assert asked["What day comes 3 days after Friday?"] == "Monday"
    assert asked["What day comes 1 day before Monday?"] == "Sunday"


def test_questions_are_the_same_rows_however_many_files(tmp_path: Path) -> None:
    (one,) = questions.write(tmp_path / "one" / "q.parquet", rows=103)
    many = questions.write(tmp_path / "many" / "q.parquet", rows=103, files=4)
    table = pq.read_table(one)
    assert table.column_names == ["id", "question", "answer", "kind"]
    assert set(table.schema.types) == {pa.string()}
    assert len(many) == 4
    assert ds.dataset(many).to_table().equals(table)
    assert table.slice(0, 1).to_pylist() == [
        {
            "id": "q-000000",
            "question": "What is 4750 in words?",
            "answer": "four thousand seven hundred fifty",
            "kind": "words",
        }
    ]


def test_docstrings_are_parsed_not_imported(tmp_path: Path) -> None:
    root = tmp_path / "lib"
    (root / "pkg").mkdir(parents=True)
    (root / "pkg" / "__init__.py").write_text('"""Pkg."""\nraise SystemExit\n')
    (root / "pkg" / "a.py").write_text(
        'class C:\n    "A class."\n    async def m(self): "A method."\nif 1:\n    def f(): "Nested."\n'
    )
    (root / "test").mkdir()
    (root / "test" / "b.py").write_text('"""Not this."""')
    assert [(doc.name, doc.module, doc.kind, doc.doc) for doc in docstrings.docstrings(root)] == [
        ("pkg", "pkg", "module", "Pkg."),
        ("pkg.a.C", "pkg.a", "class", "A class."),
        ("pkg.a.C.m", "pkg.a", "function", "A method."),
        ("pkg.a.f", "pkg.a", "function", "Nested."),
    ]


def test_docstrings_of_this_python(tmp_path: Path) -> None:
    paths = docstrings.write(tmp_path, rows=100, files=3)
    table = ds.dataset(paths).to_table()
    assert table.num_rows == 100
    assert table.column_names == ["name", "module", "kind", "doc", "lang"]
    assert set(table["lang"].to_pylist()) == {"en"}


@pytest.mark.parametrize("kind", corpus.KINDS)
def test_a_corpus_is_the_same_rows_however_many_files_and_rows(kind: str, tmp_path: Path) -> None:
    paths = corpus.write(kind, tmp_path / "c.parquet", rows=50, files=3)
    table = ds.dataset(paths).to_table()
    assert table.to_pylist() == corpus.rows_of(kind, 80)[:50]
    assert table.to_pylist() != corpus.rows_of(kind, 50, seed=1)
    assert len(set(table["id"].to_pylist())) == 50
    assert "{" not in str(table.drop_columns(["id"]).to_pylist()).replace("{'", "")


@pytest.mark.parametrize(
    ("first", "second", "score"),
    [
        ("four apples", "Apples: FOUR!", 1.0),
        ("four apples", "four", 2 / 3),
        ("a a b", "a c", 2 / 5),
        ("one", "two", 0.0),
        ("", "", 0.0),
    ],
)
def test_agreement_of_two_answers(first: str, second: str, score: float) -> None:
    found = verifiers.agreement({"pair": {"answer": first}, "again": second})
    assert found == {"agreement": pytest.approx(score)}


def test_novelty_is_the_distance_to_the_nearest_task() -> None:
    shown = ["Add 2 and 3.", "Write 7 in words."]
    of = lambda task: verifiers.novelty({"parsed": {"task": task}, "tasks": shown})["novelty"]  # noqa: E731
    assert of("write 7 in words") == 0.0
    assert of("Multiply four by five") == 1.0
    assert of("Add 2 to it") == pytest.approx(0.5)


def test_numbers_that_are_kept() -> None:
    of = lambda text, made: verifiers.kept_numbers({"text": text, "generated_text": made})["kept_numbers"]  # noqa: E731
    assert of("7 men, 12 boxes, 7 days", "7 days") == 0.5
    assert of("7 men", "17 men") == 0.0
    assert of("no number", "3") == 1.0


def _write_answers(out: Path, texts: list[str | None], errors: list[str | None]) -> None:
    rows: dict[str, Any] = {
        "question": ["a", "b", "c", "d"],
        "answer": ["1", "2", "3", "4"],
        "kind": ["sums", "sums", "words", "words"],
        "generated_text": texts,
        "error_code": pa.array(errors, pa.string()),
    }
    (out / "data").mkdir(parents=True)
    pq.write_table(pa.table(rows), out / "data" / "part-0.parquet")
    (out / "data" / "_SUCCESS").write_text("")


def test_check_answers_all_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write_answers(tmp_path, ["1", "2", "3", "4"], [None] * 4)
    assert check_answers.main([str(tmp_path)]) == 0
    assert "4 of 4 right (100.0 %)" in capsys.readouterr().out


def test_check_answers_counts_wrong_and_failed_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _write_answers(tmp_path, ["1", " 2", "3", None], [None, None, None, "prompt_too_long"])
    assert check_answers.main([str(tmp_path), "--min", "0.75"]) == 1
    printed = capsys.readouterr().out
    assert "2 of 4 right (50.0 %)" in printed
    assert "prompt_too_long" in printed
    assert check_answers.main([str(tmp_path), "--min", "0.5"]) == 0


def test_check_answers_without_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_answers.main([str(tmp_path / "nothing")]) == 2
    assert "cannot read" in capsys.readouterr().err


def test_the_model_folder_is_small_and_complete() -> None:
    folder = EXAMPLES / "tiny-model"
    assert sum(path.stat().st_size for path in folder.iterdir() if path.is_file()) <= 4_500_000
    assert (folder / "model.safetensors").is_file()
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_the_tokenizer_adds_one_bos_and_covers_every_byte() -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(EXAMPLES / "tiny-model" / "tokenizer.json"))
    text = "naïve 日本語 🚚\x00 12345"
    encoded = tokenizer.encode(text)
    assert encoded.tokens[0] == "<s>"
    assert encoded.tokens.count("<s>") == 1
    assert tokenizer.decode(encoded.ids) == text
    assert encoded.tokens[-5:] == list("12345")
