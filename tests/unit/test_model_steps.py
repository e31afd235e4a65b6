"""`embed`, `classify` and `score` steps, after a prompt and in jobs that have none, against the engine asked by hand."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import load
from jobs.fingerprint import fingerprint
from jobs.inspect import report_of, verify
from jobs.preview import preview
from jobs.proposal import checked_identity, propose
from pipelines.engine import Engine, open_engine
from pipelines.errors import SpecError
from pipelines.generations import pools_of
from pipelines.prompt import PromptBuilder
from pipelines.settings import ModelSettings, PoolSettings, PromptSettings
from pipelines.task import UNSAMPLED, Task
from pipelines.tokenizer import load_tokenizer
from tests.local.runs import TINY, content, job, rows_of, write_questions
from tests.unit.stages import Output, committed, planned, run

OTHER = {"source": str(TINY), "backend": "simulated", "simulated": {"min_tokens": 6}}
TEXT = {"prompt_column": "question"}
EMBED = {"embed": {"column": "vector", "prompt": TEXT}}
CLASSIFY = {"classify": {"column": "topic", "prompt": TEXT, "probabilities": True}}
SCORE = {"score": {"column": "fit", "prompt": {"template": "{{ question }}"}, "answer": "answer"}}


def alone(folder: Path, *steps: dict[str, Any], **sections: Any) -> dict[str, Any]:
    """A job without a prompt of its own."""
    return job(folder / "in", folder / "out", prompt=None, shards={"rows": 4}, steps=[*steps], **sections)


def asked(rows: pa.Table, ask: Callable[[Engine, list[int]], Any], task: Task, chat: bool) -> list[Any]:
    """What the engine says of each row's question (and the expected answer behind it, for a score), asked by hand."""
    model = ModelSettings(source=str(TINY), backend="simulated")
    tokenizer = load_tokenizer(model)
    settings = PromptSettings(prompt_column="question", chat=chat)
    prompts = PromptBuilder(settings, tokenizer).build(rows)["token_ids"].to_pylist()

    async def every() -> list[Any]:
        engine = open_engine(model, UNSAMPLED, PoolSettings(), (), task)
        await engine.start()
        return [(await ask(engine, ids)).samples[0] for ids in prompts]

    return asyncio.run(every())


def footers(output: Output) -> list[Any]:
    from pipelines.part import read_part

    return [read_part(output.storage, shard.part_name).footer for shard in output.plan.shards]


def test_a_corpus_is_embedded_without_a_prompt(tmp_path: Path) -> None:
    questions = write_questions(tmp_path / "in", rows=10)
    found = committed(alone(tmp_path, EMBED))
    rows = rows_of(found.folder)
    assert [*questions.column_names, "row_id", "sample_index", "error_code", "error_message", "run_id", "vector"] == rows.column_names  # fmt: skip
    assert rows.schema.field("vector").type == pa.list_(pa.float32())
    task = Task(name="embed")
    # No chat template: the model's tokenizer has one, but embeds plain text.
    samples = asked(rows, lambda engine, ids: engine.encode("a", ids, task), task, chat=False)
    assert rows["vector"].to_pylist() == [sample.values.tolist() for sample in samples]
    assert all(math.hypot(*vector) == pytest.approx(1, abs=1e-5) for vector in rows["vector"].to_pylist())

    verdict = verify(found.storage, deep=True)
    assert verdict["problems"] == []
    assert (verdict["rows_ok"], verdict["rows_in"]) == (10, 10)
    counted = report_of(found.storage).stats
    assert counted.steps["embed"]["prompt_tokens"] == counted.prompt_tokens > 0
    assert counted.completion_tokens == 0


def test_vectors_have_the_dimensions_and_the_length_that_the_step_says(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", rows=3)
    step = {"embed": {"column": "vector", "prompt": TEXT, "dimensions": 8, "normalize": False}}
    vectors = rows_of(committed(alone(tmp_path, step)).folder)["vector"].to_pylist()
    assert {len(vector) for vector in vectors} == {8}
    assert all(math.hypot(*vector) > 10 for vector in vectors)


def test_a_vector_may_come_with_the_length_of_its_text(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", rows=3)
    step = {"embed": {"column": "vector", "prompt": TEXT, "prompt_tokens": True}}
    found = committed(alone(tmp_path, step))
    rows = rows_of(found.folder)
    assert rows.column_names[-2:] == ["vector", "vector_prompt_tokens"]
    tokenizer = load_tokenizer(ModelSettings(source=str(TINY)))
    lengths = [len(ids) for ids in tokenizer(rows["question"].to_pylist())["input_ids"]]
    assert rows["vector_prompt_tokens"].to_pylist() == lengths
    assert verify(found.storage, deep=True)["problems"] == []


def test_a_label_comes_with_its_probability_and_all_others(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", rows=12)
    rows = rows_of(committed(alone(tmp_path, CLASSIFY)).folder)
    task = Task(name="classify")
    samples = asked(rows, lambda engine, ids: engine.encode("a", ids, task), task, chat=False)
    assert rows["topic"].to_pylist() == [sample.text for sample in samples]
    assert len(set(rows["topic"].to_pylist())) > 1
    for row in rows.to_pylist():
        likeliest = int(row["topic"].removeprefix("LABEL_"))
        assert row["topic_probabilities"][likeliest] == row["topic_probability"]
        assert row["topic_probability"] == max(row["topic_probabilities"])
        assert sum(row["topic_probabilities"]) == pytest.approx(1)


def test_a_score_is_that_of_the_answers_own_tokens(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", rows=9)
    rows = rows_of(committed(alone(tmp_path, SCORE)).folder)
    tokenizer = load_tokenizer(ModelSettings(source=str(TINY)))
    answers = tokenizer(rows["answer"].to_pylist(), add_special_tokens=False)["input_ids"]
    ids = iter(answers)
    task = Task(name="score")
    samples = asked(rows, lambda engine, prompt: engine.score("a", [*prompt, *next(ids)]), task, chat=True)
    for row, answer, sample in zip(rows.to_pylist(), answers, samples, strict=True):
        assert row["fit_tokens"] == len(answer)
        assert row["fit_logprob"] == pytest.approx(sum(sample.values[-len(answer) :].tolist()))
        assert row["fit_perplexity"] == pytest.approx(math.exp(-row["fit_logprob"] / len(answer)))


def test_steps_follow_a_prompt_and_each_other(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", rows=7)
    about = {"prompt_column": "generated_text"}
    steps = [
        {"embed": {"column": "vector", "prompt": about}},
        {"classify": {"column": "topic", "prompt": about, "model": OTHER}},
        {"filter": {"where": "topic != 'LABEL_0'"}},
        {"name": "self", "score": {"column": "own", "prompt": TEXT, "answer": "generated_text"}},
        {
            "generate": {
                "column": "again",
                "prompt": TEXT,
                "sampling": {"temperature": 0, "max_tokens": 12},
            }
        },
    ]
    sampling = {"temperature": 0.5, "max_tokens": 24, "n": 2, "seed": 1}
    settings = job(tmp_path / "in", tmp_path / "out", sampling=sampling, shards={"rows": 4}, steps=steps)
    found = committed(settings)
    # The last two share an engine, which generates.
    assert [len(pool) for pool in pools_of(found.work("r"))] == [1, 1, 1, 2]
    rows = rows_of(found.folder).to_pylist()
    assert 0 < len(rows) < 14
    assert all(len(row["vector"]) == 16 and row["own_tokens"] > 0 and row["again"] for row in rows)
    assert verify(found.storage, deep=True)["problems"] == []


def test_steps_before_the_first_model_spare_it_their_work(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", rows=10)
    keep = {"filter": {"where": "kind == 'digits'"}}
    found = committed(alone(tmp_path, keep, EMBED))
    kept = rows_of(found.folder).to_pylist()
    assert 0 < len(kept) < 10
    assert all(row["kind"] == "digits" and row["vector"] for row in kept)
    stats = report_of(found.storage).stats
    assert stats.steps["filter"]["in"] == 10
    assert stats.steps["embed"]["in"] == len(kept)
    assert (stats.rows_ok, stats.rows_dropped) == (len(kept), 10 - len(kept))


def test_rows_that_cannot_be_asked_fail_by_name_and_can_be_tried_again(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    texts = ["fine", None, "", "long " * 600, "also fine"]
    pq.write_table(pa.table({"question": texts, "answer": ["a", "b", "c", "d", None]}), folder / "q.parquet")
    budget = {"errors": {"max_error_rate": 1.0}}
    embedded = committed(alone(tmp_path, EMBED, **budget))
    codes = rows_of(embedded.folder)["error_code"].to_pylist()
    assert codes == [None, "missing_value", "empty_prompt", "prompt_too_long", None]
    assert verify(embedded.storage, deep=True)["problems"] == []

    shorter = {
        "embed": {"column": "vector", "prompt": {"template": "{{ (question or 'none')[:9] or 'none' }}"}}
    }
    mended = replace(embedded, settings=alone(tmp_path, shorter, **budget))
    run(mended.retry("again"), embedded.plan.shards)
    assert rows_of(embedded.folder)["error_code"].to_pylist() == [None] * 5
    clean = committed({**alone(tmp_path, shorter), "output": {"path": str(tmp_path / "clean")}})
    found, expected = content(embedded.folder), content(clean.folder)
    assert [row for row in found if row["question"] not in ("fine", "also fine")] == [
        row for row in expected if row["question"] not in ("fine", "also fine")
    ]

    scored = committed({**alone(tmp_path, SCORE, **budget), "output": {"path": str(tmp_path / "scored")}})
    rows = rows_of(scored.folder).to_pylist()
    assert [row["error_code"] for row in rows] == [None, "missing_value", "empty_prompt", "prompt_too_long", "missing_value"]  # fmt: skip
    assert [row["fit_logprob"] is None for row in rows] == [False, True, True, True, True]
    assert [row["fit_tokens"] is None for row in rows] == [False, True, True, True, True]


def test_equal_texts_are_asked_once(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"question": ["a b", "c d", "a b", "a b"]}), tmp_path / "in" / "q.parquet")
    found = committed(alone(tmp_path, EMBED))
    assert [footer.stats.rows_reused for footer in footers(found)] == [2]
    vectors = rows_of(found.folder)["vector"].to_pylist()
    assert vectors[0] == vectors[2] == vectors[3] != vectors[1]


def test_the_elements_of_a_documents_list_are_embedded_each(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    lists = pa.table({"passages": [["a b", "c"], [], ["d", "e " * 600, "f"]]})
    pq.write_table(lists, tmp_path / "in" / "q.parquet")
    apart = {"explode": {"column": "passages", "into": "passage"}}
    embed = {"embed": {"column": "vector", "prompt": {"prompt_column": "passage"}}}
    settings = alone(tmp_path, apart, embed, errors={"max_error_rate": 1.0})
    found = committed(settings)
    rows = rows_of(found.folder).to_pylist()
    assert [row["row_id"].partition("#")[2] for row in rows] == ["0/0", "0/1", "2/0", "2/1", "2/2"]
    assert [row["error_code"] for row in rows] == [None, None, None, "prompt_too_long", None]
    assert [row["vector"] is None for row in rows] == [False, False, False, True, False]
    assert verify(found.storage, deep=True)["problems"] == []
    seen = preview(load(settings), rows=3, generate=True)
    assert [len(row["answers"]) for row in seen] == [2, 2, 1]

    shorter = {"embed": {"column": "vector", "prompt": {"template": "{{ passage[:20] }}"}}}
    mended = replace(found, settings=alone(tmp_path, apart, shorter, errors={"max_error_rate": 1.0}))
    run(mended.retry("again"), found.plan.shards)
    again = rows_of(found.folder).to_pylist()
    assert [row["row_id"] for row in again] == [row["row_id"] for row in rows]
    assert all(row["vector"] for row in again)
    assert verify(found.storage, deep=True)["problems"] == []


def test_a_chained_job_may_read_what_an_answer_is_called(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"generated_text": ["a", "b"]}), tmp_path / "in" / "q.parquet")
    step = {"embed": {"column": "vector", "prompt": {"prompt_column": "generated_text"}}}
    assert rows_of(committed(alone(tmp_path, step)).folder)["generated_text"].to_pylist() == ["a", "b"]


def test_a_preview_shows_the_first_models_prompts_and_what_the_steps_add(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", rows=6)
    settings = alone(tmp_path, {"filter": {"where": "kind == 'digits'"}}, EMBED)
    seen = preview(load(settings), rows=2, generate=True)
    committed(settings)
    rows = rows_of(tmp_path / "out").to_pylist()[:2]
    assert [row["row_id"] for row in seen] == [row["row_id"] for row in rows]
    assert [row["prompt"] for row in seen] == [f"<s>{row['question']}" for row in rows]
    assert [row["answers"][0]["steps"]["vector"] for row in seen] == [row["vector"] for row in rows]


def test_where_a_step_runs_is_no_part_of_what_is_made(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", rows=1)

    def print_of(**more: Any) -> str:
        step = {"embed": {"column": "vector", "prompt": TEXT, **more}}
        return fingerprint(checked_identity(load(alone(tmp_path, step))))

    plain = print_of()
    assert print_of(pool={"replicas": 2}) == plain
    assert print_of(dimensions=8) != plain
    assert print_of(normalize=False) != plain
    assert print_of(model=OTHER) != plain


def step(kind: str, **more: Any) -> dict[str, Any]:
    answer = {"answer": "answer"} if kind == "score" else {}
    return {kind: {"column": "a", "prompt": TEXT, **answer, **more}}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": []}, "prompt: missing; say how a row becomes a prompt, or give steps of which one asks a model"),
        ({"steps": [{"filter": {"where": "true"}}]}, "prompt: missing"),
        ({"steps": [step("embed", sampling={"temperature": 0})]}, "steps.embed.sampling: unknown key"),
        ({"steps": [step("classify", output_schema={})]}, "steps.classify.output_schema: unknown key"),
        ({"steps": [step("score", sampling={})]}, "steps.score.sampling: unknown key"),
        ({"steps": [{"score": {"column": "a", "prompt": TEXT}}]}, "steps.score.answer: missing"),
        ({"steps": [step("embed")], "sampling": {"n": 2, "temperature": 1}}, "sampling.n: the job has no prompt that it could be for"),
        ({"steps": [step("embed")], "sampling": {"params_column": "p"}}, "sampling.params_column: the job has no prompt that it could be for"),
        ({"steps": [step("embed")], "sampling": {"output_schema": {"type": "string"}}}, "sampling.output_schema: the job has no prompt"),
        ({"steps": [step("embed")], "output": {"provenance": True}}, "output.provenance: it is the job's own prompt's"),
        ({"steps": [step("embed")], "model": {"lora": {"source": "org/adapter", "revision": "1"}}}, "model.lora: embed takes no adapter"),
        ({"steps": [step("embed", model={**OTHER, "lora": {"source": "org/adapter"}})]}, "steps.embed.model.lora: embed takes no adapter"),
        ({"steps": [step("embed")], "model": {"engine": {"runner": "generate"}}}, "model.engine.runner: embed needs 'pooling'"),
        ({"steps": [step("score")], "model": {"engine": {"runner": "pooling"}}}, "model.engine.runner: score needs 'generate'"),
        ({"steps": [step("embed", prompt={"template": "{{ nothing }}"})]}, "steps.embed: prompt.template: there is no column 'nothing' by then"),
        ({"steps": [step("embed", prompt={"template": "{{ generated_text }}"})]}, "there is no column 'generated_text' by then"),
        ({"steps": [step("classify", column="question")]}, "adds the column 'question', which is there already"),
        ({"steps": [{"judge": {"column": "a", "rubric": "good?"}}]}, "there is no column 'generated_text' by then"),
        ({"steps": [step("score", answer="nothing")]}, "steps.score: answer: there is no column 'nothing' by then"),
        ({"steps": [step("embed", model={"source": "org/model"})]}, "steps.embed.model.revision: give the commit"),
        ({"steps": [step("embed", dimensions=0)]}, "steps.embed.dimensions"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_told_when_planning(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    write_questions(tmp_path / "in", rows=1)
    whole = job(tmp_path / "in", tmp_path / "out", prompt=None, **settings)
    with pytest.raises(SpecError) as told:
        propose(load(whole))
    assert words in str(told.value)


def test_a_plan_names_the_pools_in_their_order(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", rows=2)
    output = planned(
        alone(tmp_path, EMBED, {"classify": {"column": "topic", "prompt": TEXT, "model": OTHER}})
    )
    spec = load(output.settings).spec
    assert [one.model.simulated.min_tokens for one in spec.pools] == [4, 6]
    assert [pool[0].work.model for pool in pools_of(output.work("r"))] == [one.model for one in spec.pools]
