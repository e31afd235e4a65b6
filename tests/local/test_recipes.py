"""Three recipes with real Ray and vLLM, against what the test computes itself of the records before their last steps."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from jobs import load, run
from tests.local.bare_vllm import bare_vllm
from tests.local.runs import CONF, ROOT, TINY, dray, rows_of, write_questions
from tests.local.witness import told

sys.path.append(str(ROOT / "examples"))
import corpus

pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.usefixtures("ray_cluster"),
    pytest.mark.timeout(400),
]

ROWS = 60
Steps = list[dict[str, Any]]


def finished(name: str, folder: Path, asked: pa.Table, change: Callable[[Steps], Steps]) -> dict[str, Any]:
    """Run the recipe on `asked` with its steps changed; returns what `dray verify --deep` says.

    Its rows are in `folder/out`, and what a witness among the steps has seen in `folder/notes`.
    """
    (folder / "in").mkdir()
    (folder / "notes").mkdir()
    notes = pa.array([str(folder / "notes")] * len(asked))
    pq.write_table(asked.append_column("notes", notes), folder / "in" / "rows.parquet")
    recipe = CONF / "recipes" / f"{name}.yaml"
    settings = {
        "steps": change(yaml.safe_load(recipe.read_text())["steps"]),
        "input.path": str(folder / "in"),
        "input.id_column": None,
        "output.path": str(folder / "out"),
        "shards.rows": 20,
        "pool.cpus_per_engine": 1,
    }
    assert run(load(recipe, settings, directory=ROOT)).state == "complete"
    done = dray("verify", str(folder / "out"), "--deep", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def with_witness(steps: Steps, before: str) -> Steps:
    """The steps with one that notes all records in front of the first step of the kind `before`."""
    place = next(place for place, step in enumerate(steps) if before in step)
    witness = {"map": {"function": "tests.local.witness:seen", "adds": {"witnessed": "bool"}}}
    return [*steps[:place], {"name": "witness", **witness}, *steps[place:]]


def test_the_judges_best_answer_of_each_row_is_kept(tmp_path: Path) -> None:
    asked = write_questions(tmp_path / "asked", rows=ROWS)
    books = finished("judged-best-of-n", tmp_path, asked, lambda steps: with_witness(steps, before="select"))
    assert (books["problems"], books["rows_ok"], books["rows_in"]) == ([], ROWS, ROWS)

    judged = told(tmp_path / "notes")
    assert len(judged) == 4 * ROWS
    assert {vote for record in judged for vote in record["score_votes"]} <= {1, 2, 3, 4, 5}
    assert all(record["score"] == pytest.approx(mean(record["score_votes"])) for record in judged)
    assert all(len(record["score_votes"]) == 3 for record in judged)
    assert any(len(set(record["score_votes"])) > 1 for record in judged)
    best = []
    for _, samples in groupby(judged, key=lambda record: record["row_id"]):
        # By the votes; of equal ones Python's `max` takes the first.
        best.append(max(samples, key=lambda record: sum(record["score_votes"])))
    kept = rows_of(tmp_path / "out").to_pylist()
    same = ("row_id", "sample_index", "question", "generated_text", "score", "score_votes")
    assert [[row[name] for name in same] for row in kept] == [[row[name] for name in same] for row in best]
    assert sorted(row["question"] for row in kept) == sorted(asked["question"].to_pylist())
    # Else the first sample of each row would do.
    assert any(row["sample_index"] > 0 for row in kept)


def test_a_second_reading_of_documents_is_compared_with_the_first(tmp_path: Path) -> None:
    # The tiny model fills every question nearly up to its limit, so that the recipe's own condition drops none.
    where = "len(pair.question) >= 38 and len(pair.answer) >= 2"

    def stricter(steps: Steps) -> Steps:
        place = next(place for place, step in enumerate(steps) if "filter" in step)
        return with_witness(
            [*steps[:place], {**steps[place], "filter": {"where": where}}, *steps[place + 1 :]], "filter"
        )

    asked = pa.Table.from_pylist(corpus.rows_of("documents", ROWS))
    books = finished("qa-from-documents", tmp_path, asked, stricter)
    assert books["problems"] == []
    assert books["rows_in"] == ROWS

    made = told(tmp_path / "notes")
    texts = {record["row_id"].rpartition("/")[0]: record["generated_text"] for record in made}
    assert len(texts) == ROWS
    assert {record["row_id"]: record["pair"] for record in made} == {
        f"{row}/{k}": pair for row, text in texts.items() for k, pair in enumerate(json.loads(text))
    }
    assert ROWS < len(made) == books["rows_ok"] + books["rows_dropped"] == ROWS + books["rows_added"]
    long = [record for record in made if len(record["pair"]["question"]) >= 38]
    long = [record for record in long if len(record["pair"]["answer"]) >= 2]
    kept = rows_of(tmp_path / "out").to_pylist()
    assert [(row["row_id"], row["pair"]) for row in kept] == [(row["row_id"], row["pair"]) for row in long]
    assert 0 < len(kept) < len(made)

    prompts = [
        f"{row['text']}\n\nAnswer from this text, in a few words: {row['pair']['question']}" for row in kept
    ]
    engine = yaml.safe_load((CONF / "models" / "tiny.yaml").read_text())["model"]["engine"]
    bare = bare_vllm(
        {"model": str(TINY), **engine},
        {"temperature": 0, "max_tokens": 40},
        [[{"role": "user", "content": prompt}] for prompt in prompts],
    )
    assert [row["again"] for row in kept] == [answer["samples"][0]["text"] for answer in bare]
    assert [row["agreement"] for row in kept] == [
        pytest.approx(f1(row["pair"]["answer"], row["again"])) for row in kept
    ]


def test_each_turn_is_what_bare_vllm_says_to_the_conversation_before_it(tmp_path: Path) -> None:
    asked = write_questions(tmp_path / "asked", rows=ROWS)
    books = finished("multi-turn", tmp_path, asked, lambda steps: steps)
    assert (books["problems"], books["rows_in"]) == ([], ROWS)
    rows = rows_of(tmp_path / "out").to_pylist()
    assert ROWS / 2 < len(rows) == books["rows_ok"]
    for row in rows:
        assert row["messages"] == [
            {"role": "system", "content": "You are a patient teacher of numbers and weekdays."},
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": row["generated_text"]},
            {"role": "user", "content": row["follow_up_parsed"]["question"]},
            {"role": "assistant", "content": row["second_answer"]},
        ]
        assert row["first_turn"] == row["messages"][:3]
    # vLLM applies the chat template itself.
    engine = yaml.safe_load((CONF / "models" / "tiny.yaml").read_text())["model"]["engine"]
    turns = [row["messages"][:2] for row in rows] + [row["messages"][:4] for row in rows]
    bare = bare_vllm({"model": str(TINY), **engine}, {"temperature": 0, "max_tokens": 48}, turns)
    texts = [answer["samples"][0]["text"] for answer in bare]
    assert [row["generated_text"] for row in rows] + [row["second_answer"] for row in rows] == texts
    assert [row["second_answer_prompt_tokens"] for row in rows] == [
        one["prompt_tokens"] for one in bare[len(rows) :]
    ]


def f1(first: str, second: str) -> float:
    """Of the words of two texts: the harmonic mean of the share of the one's and of the other's that are common."""
    one, other = ("".join(c if c.isalnum() or c == "_" else " " for c in text.lower()).split() for text in (first, second))  # fmt: skip
    rest, common = list(other), 0
    for word in one:
        if word in rest:
            rest.remove(word)
            common += 1
    if not common:
        return 0.0
    precision, recall = common / len(one), common / len(other)
    return 2 * precision * recall / (precision + recall)
