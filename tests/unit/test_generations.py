"""`generate` steps: against the same generations as jobs of their own, one after the other; their books; what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs import load
from jobs.fingerprint import fingerprint
from jobs.inspect import report_of, verify
from jobs.preview import preview
from jobs.proposal import checked_identity, propose
from pipelines.errors import SpecError
from pipelines.generations import pools_of
from tests.local.runs import TINY, content, job, rows_of, write_questions
from tests.unit.stages import committed, run

COMMENT = {"template": "Comment on {{ generated_text }} about {{ question }}"}
GREEDY = {"temperature": 0, "max_tokens": 12}
#: Another model than the job's, as far as pools go; its answers are longer.
OTHER = {"source": str(TINY), "backend": "simulated", "simulated": {"min_tokens": 6}}


def settings(folder: Path, *steps: dict[str, Any], out: str = "out", **sections: Any) -> dict[str, Any]:
    sampling = {"temperature": 0.5, "max_tokens": 24, "n": 2, "seed": 1}
    return job(
        folder / "in",
        folder / out,
        **{"sampling": sampling, "shards": {"rows": 4}, "steps": [*steps], **sections},
    )


def comment(**more: Any) -> dict[str, Any]:
    return {"generate": {"column": "comment", "prompt": COMMENT, "sampling": GREEDY, **more}}


@pytest.mark.parametrize("model", [None, OTHER], ids=["one engine", "two pools"])
def test_a_generation_answers_as_a_job_of_its_own_on_the_answers_before(
    tmp_path: Path, model: dict[str, Any] | None
) -> None:
    asked = write_questions(tmp_path / "in", rows=10)
    keep = {"filter": {"where": "completion_tokens > 12"}}  # of 4 to 24, at random: not of all, nor of none
    found = committed(settings(tmp_path, keep, comment(**({"model": model} if model else {}))))
    assert len(pools_of(found.work("r"))) == (2 if model else 1)
    first = committed(settings(tmp_path, keep, out="first"))
    second = committed(
        job(
            first.folder / "data",
            tmp_path / "second",
            prompt=COMMENT,
            sampling=GREEDY,
            model=model or {},
            input={"columns": ["question", "generated_text", "completion_tokens", "row_id", "sample_index"]},
            output={
                "rename": {
                    "generated_text": "before",
                    "completion_tokens": "tokens",
                    "row_id": "row",
                    "sample_index": "sample",
                }
            },
        )
    )
    expected = {
        (row["row"], row["sample"]): (row["generated_text"], row["finish_reason"], row["completion_tokens"])
        for row in rows_of(second.folder).to_pylist()
    }
    rows = rows_of(found.folder).to_pylist()
    assert {
        (row["row_id"], row["sample_index"]): (
            row["comment"],
            row["comment_finish_reason"],
            row["comment_completion_tokens"],
        )
        for row in rows
    } == expected
    assert 0 < len(expected) < 2 * len(asked)

    verdict = verify(found.storage, deep=True)
    assert verdict["problems"] == []
    told = verdict["rows_ok"] + verdict["rows_dropped"]
    assert (told, verdict["rows_failed"], verdict["rows_in"]) == (10, 0, 10)


def test_the_books_hold_the_tokens_of_every_generation(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", rows=9)
    shorten = {"generate": {"column": "short", "prompt": {"template": "{{ comment }}"}, "sampling": GREEDY}}
    found = committed(settings(tmp_path, comment(model=OTHER), shorten))
    rows = rows_of(found.folder).to_pylist()
    stats = [part.stats for part in _footers(found)]
    total = sum(row[name] for row in rows for name in rows[0] if name.endswith("completion_tokens"))
    assert sum(one.completion_tokens for one in stats) == total
    assert sum(one.steps["generate"]["completion_tokens"] for one in stats) == sum(
        row["comment_completion_tokens"] for row in rows
    )
    assert sum(one.steps["generate-2"]["in"] for one in stats) == len(rows) == 18
    assert sum(one.latency_s.count for one in stats) == 9 + 18 + 18


def test_the_footer_tells_which_engine_had_the_shard_when(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", rows=9)
    found = committed(settings(tmp_path, comment(model=OTHER)))
    for footer in _footers(found):
        first, second = footer.provenance.turns
        assert (first.generation, second.generation) == ("", "generate")
        assert first.began_at <= first.ended_at <= second.began_at <= second.ended_at
        assert second.ended_at <= footer.provenance.committed_at
        assert second.replica == footer.provenance.replica
        origin = footer.provenance
        assert second.engine_began_at == pytest.approx(origin.engine_ready_at - origin.engine_start_s)
        assert 0 < first.engine_began_at <= first.began_at
        assert first.gpus == second.gpus == 0
    (used,) = report_of(found.storage).engine_use  # both engines are in this process
    assert used.generations == ("", "generate")
    assert 0 < used.busy <= 1


def test_the_report_has_the_steps_in_the_jobs_order(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", rows=3)
    keep = {"name": "a-last", "filter": {"where": "comment_completion_tokens > 0"}}
    found = committed(settings(tmp_path, {"name": "z-first", **comment()}, keep))
    assert list(report_of(found.storage).stats.steps) == ["z-first", "a-last"]


def test_a_record_that_cannot_be_asked_fails_alone(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", rows=8)
    long = {
        "template": "{% if sample_index == 1 %}{{ generated_text * 400 }}{% else %}{{ question }}{% endif %}"
    }
    found = committed(settings(tmp_path, comment(prompt=long)))
    rows = rows_of(found.folder).to_pylist()
    # A row with one good record is a good row; its failed record is not kept.
    assert [(row["sample_index"], row["error_code"]) for row in rows] == [(0, None)] * 8
    counted = [part.stats.steps["generate"] for part in _footers(found)]
    assert sum(one["failed"] for one in counted) == 8
    assert verify(found.storage, deep=True)["problems"] == []


def test_a_retry_goes_through_all_generations(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", rows=6)
    one = {"sampling": {"temperature": 0, "max_tokens": 24}}
    failed = committed(settings(tmp_path, comment(prompt={"template": "{{ question * 600 }}"}), **one))
    assert set(rows_of(failed.folder)["error_code"].to_pylist()) == {"prompt_too_long"}
    mended = replace(failed, settings=settings(tmp_path, comment(), **one))
    run(mended.retry("again"), failed.plan.shards)
    clean = committed(settings(tmp_path, comment(), out="clean", **one))
    assert content(failed.folder) == content(clean.folder)
    stats = [part.stats for part in _footers(failed)]
    assert [sum(one.rows_ok for one in stats), sum(one.rows_failed for one in stats)] == [6, 0]
    assert sum(one.steps["generate"]["in"] for one in stats) == 12  # both times


def test_a_preview_goes_through_all_generations(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", rows=3)
    whole = settings(tmp_path, comment(model=OTHER))
    seen = preview(load(whole), rows=2, generate=True)
    committed(whole)
    rows = rows_of(tmp_path / "out").to_pylist()
    shown = {(row["row_id"], i): a["steps"]["comment"] for row in seen for i, a in enumerate(row["answers"])}
    assert shown == {
        (row["row_id"], row["sample_index"]): row["comment"]
        for row in rows
        if row["row_id"] in {s["row_id"] for s in seen}
    }


def test_where_and_how_a_step_runs_is_no_part_of_what_is_made(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", rows=1)

    def print_of(*steps: dict[str, Any]) -> str:
        return fingerprint(checked_identity(load(settings(tmp_path, *steps))))

    plain = print_of(comment())
    assert print_of(comment(pool={"replicas": 2})) == plain
    assert print_of(comment(sampling={**GREEDY, "max_tokens": 13})) != plain
    assert print_of(comment(model=OTHER)) != plain
    assert print_of(comment(prompt={"template": "{{ question }}"})) != plain


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (comment(prompt={"template": "{{ nothing }}"}), "steps.generate: prompt.template: there is no column 'nothing' by then"),
        (comment(prompt={"prompt_column": "prompt_tokens"}), "steps.generate: prompt.prompt_column: 'prompt_tokens' holds int32"),
        (comment(column="question"), "adds the column 'question', which is there already"),
        (comment(sampling={"n": 2}), "a generate step makes one answer for each record"),
        (comment(sampling={"logprobs": 1}), "sampling.logprobs: only for the job's own prompt"),
        (comment(sampling={"params_column": "question"}), "sampling.params_column: only for the job's own prompt"),
        (comment(prompt={"template": "{{ question"}), "steps.generate.prompt.template"),
        (comment(model={"source": "org/model"}), "steps.generate.model.revision: give the commit"),
        (comment(model={**OTHER, "engine": {"no_such": 1}}), "steps.generate.model: "),
        (comment(model=OTHER, pool={"replicas": "auto"}), "a number for each pool"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_told_when_planning(tmp_path: Path, step: dict[str, Any], words: str) -> None:
    write_questions(tmp_path / "in", rows=1)
    with pytest.raises(SpecError) as told:
        propose(load(settings(tmp_path, step)))
    assert words in str(told.value)


def _footers(output: Any) -> list[Any]:
    from pipelines.part import read_part

    return [read_part(output.storage, shard.part_name).footer for shard in output.plan.shards]


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"model": {"lora": {}}}, "model.lora.source: missing"),
        ({"steps": [{"generate": {"column": "a"}}]}, "steps.generate.prompt: missing"),
        (
            {"steps": [{"generate": {"column": "a", "prompt": {"template": "x"}, "samplin": {}}}]},
            "steps.generate.samplin: unknown key; did you mean 'sampling'?",
        ),
        ({"steps": [{"frob": 1}]}, "steps.frob: unknown key; known are name, parse"),
    ],
)
def test_mistakes_inside_steps_and_optional_sections_are_named(
    tmp_path: Path, sections: dict[str, Any], words: str
) -> None:
    with pytest.raises(SpecError) as told:
        load(job(tmp_path / "in", tmp_path / "out", **sections))
    assert words in str(told.value)
