"""Answers kept by one job and taken over by another: exactly those to equal requests, wherever their rows lie now."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import load
from jobs.inspect import report_of
from jobs.reuse import KEPT, kept_in, reuse_of
from pipelines.contracts import Retry
from pipelines.errors import SpecError
from pipelines.generate import Generate
from pipelines.part import read_part
from pipelines.prepare import Prepare
from pipelines.shard_stats import ShardStats
from pipelines.stage import Parcel
from tests.local.runs import TINY, job, rows_of
from tests.unit.stages import Output, merge, planned, run

GREEDY = {"temperature": 0, "max_tokens": 24}
SAMPLED = {"temperature": 0.8, "max_tokens": 24, "n": 2}
OTHER = {"source": str(TINY), "backend": "simulated", "simulated": {"min_tokens": 6}}
NOT_RUN = {"run_id"}


def questions(folder: Path, texts: list[str], name: str = "x.parquet") -> None:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table({"question": texts}), folder / name)


def judge(rubric: str, **more: Any) -> dict[str, Any]:
    prompt = {"template": f"{rubric}: {{{{ generated_text }}}}"}
    return {
        "generate": {"column": "score", "prompt": prompt, "sampling": {**GREEDY, "max_tokens": 6}, **more}
    }


def answered(folder: Path, name: str, *before: str, **sections: Any) -> Output:
    """A job that keeps its answers and looks into these earlier ones, run as the driver would."""
    reuse = {"keep": True, "outputs": [str(folder / one) for one in before]}
    settings = job(folder / "in", folder / name, **{"reuse": reuse, "shards": {"rows": 5}, **sections})
    output = planned(settings)
    output.storage.create(KEPT, b"")
    work = output.work(name)
    run(work, output.plan.shards, kept_in=kept_in(work, output.plan, output.plan.shards))
    return output


def stats_of(output: Output) -> ShardStats:
    stats = (read_part(output.storage, shard.part_name).footer.stats for shard in output.plan.shards)
    return sum(stats, ShardStats(shards=0))


def content(output: Output) -> dict[tuple[str, int], Mapping[str, Any]]:
    return {
        (row["row_id"], row["sample_index"]): {k: v for k, v in row.items() if k not in NOT_RUN}
        for row in rows_of(output.folder).to_pylist()
    }


@pytest.mark.parametrize(
    "sampling", [GREEDY, SAMPLED, {**SAMPLED, "seed": 5}], ids=["greedy", "sampled", "seeded"]
)
def test_the_same_job_elsewhere_asks_nothing(tmp_path: Path, sampling: dict[str, Any]) -> None:
    questions(tmp_path / "in", [f"What is {k}?" for k in range(12)])
    first = answered(tmp_path, "first", sampling=sampling)
    again = answered(tmp_path, "again", "first", sampling=sampling, shards={"rows": 4})
    stats = stats_of(again)
    assert stats.rows_reused == 12
    assert stats.tokens_reused == stats.completion_tokens > 0
    assert stats.latency_s.count == 0
    assert content(again) == content(first)
    third = answered(tmp_path, "third", "again", sampling=sampling)  # what was taken over is kept as well
    assert stats_of(third).rows_reused == 12


@pytest.mark.parametrize("steps", [[], [judge("Rate")]], ids=["one generation", "two"])
def test_an_engine_starts_with_the_first_row_that_is_to_be_asked(
    tmp_path: Path, steps: list[dict[str, Any]]
) -> None:
    questions(tmp_path / "in", [f"What is {k}?" for k in range(12)])
    first = answered(tmp_path, "first", sampling=SAMPLED, steps=steps)
    long = [*steps, {"filter": {"where": "completion_tokens >= 4"}}]
    again = answered(tmp_path, "again", "first", sampling=SAMPLED, steps=long)
    assert stats_of(again).latency_s.count == 0
    for shard in again.plan.shards:
        made = read_part(again.storage, shard.part_name).footer.provenance
        assert (made.turns, made.engine_ready_at, made.device) == ((), 0.0, "")
        # Nobody is to take a simulated engine's answers for a model's.
        assert made.engine == "simulated"
    report = report_of(again.storage)
    assert (report.engines, report.simulated, report.engine_use) == (("simulated",), True, ())

    questions(tmp_path / "in", ["What is new?", "And what else?"], "y.parquet")
    output = planned(job(tmp_path / "in", tmp_path / "grown", **again_with(sampling=SAMPLED, steps=long)))
    work = output.work("grown", f"reuse.outputs=[{tmp_path}/first]")
    found = kept_in(work, output.plan, output.plan.shards)
    prepare, actor = Prepare(work), Generate(work)

    async def through() -> list[bool]:
        started = []
        for shard in output.plan.shards:
            row = Parcel.row(shard, **{"pass": 0, "kept_in": found.get(shard.id, ())})
            merge(work, await actor(prepare(pa.Table.from_pylist([row]))))
            started.append(actor._start is not None)
        return started

    assert asyncio.run(through()) == [False, False, True]
    assert {key: row for key, row in content(output).items() if key in content(again)} == content(again)
    made = [read_part(output.storage, shard.part_name).footer.provenance for shard in output.plan.shards]
    turns = [[turn.generation for turn in one.turns] for one in made]
    assert turns == [[], [], ["", *(["generate"] if steps else [])]]
    # The engine's start, before which two shards are done, is not in the time of generating.
    report = report_of(output.storage)
    assert report.generating_s == pytest.approx(made[2].committed_at - made[2].engine_ready_at)
    assert report.engines == ("simulated on cpu",)
    assert stats_of(first).latency_s.count == (12 if not steps else 36)

    # Else with the actor, beside the first shard's reading; and in a retry, which takes no kept answers.
    for other in (first.work("r"), replace(work, retry=Retry(error_codes=None, fingerprint=""))):
        assert Generate(other)._start is not None


def again_with(**sections: Any) -> dict[str, Any]:
    """A job like those of `answered` that shards its files apart."""
    return {"shards": {"rows": 6}, "reuse": {"keep": True}, **sections}


def test_equal_prompts_beside_each_other_have_one_answer_each(tmp_path: Path) -> None:
    questions(tmp_path / "in", ["Same?", "Same?", "Same?", "Other?"])
    first = answered(tmp_path, "first", sampling=GREEDY)
    again = answered(tmp_path, "again", "first", sampling=GREEDY)
    assert content(again) == content(first)
    assert len(content(again)) == 4


@pytest.mark.parametrize("model", [{}, {"model": OTHER}], ids=["one pool", "two pools"])
def test_an_edited_rubric_asks_the_judge_only(tmp_path: Path, model: dict[str, Any]) -> None:
    questions(tmp_path / "in", [f"What is {k}?" for k in range(12)])
    best = {"select": {"by": "score_completion_tokens"}}
    first = answered(tmp_path, "first", sampling=SAMPLED, steps=[judge("Rate", **model), best])
    edited = answered(tmp_path, "edited", "first", sampling=SAMPLED, steps=[judge("Mark", **model), best])
    stats = stats_of(edited)
    assert stats.rows_reused == 12  # all samples, also those that were not selected
    assert stats.latency_s.count == stats.steps["generate"]["in"] == 24
    spent = stats.completion_tokens - stats.tokens_reused
    assert spent == stats.steps["generate"]["completion_tokens"]
    assert stats_of(first).rows_reused == 0


@pytest.mark.slow
def test_a_grown_input_asks_for_what_is_new(tmp_path: Path) -> None:
    texts = [f"What is {k}?" for k in range(40)]
    questions(tmp_path / "in", texts)
    answered(tmp_path, "first", sampling=GREEDY)
    questions(
        tmp_path / "in", [*texts[:7], "new 1", *texts[7:30], "new 2", *texts[30:]]
    )  # moves what follows
    questions(tmp_path / "in", ["new 3"], "y.parquet")
    stats = stats_of(answered(tmp_path, "grown", "first", sampling=GREEDY))
    assert (stats.rows_reused, stats.latency_s.count) == (40, 3)
    # Sampled answers belong to their rows, and rows that follow have other ones now.
    answered(tmp_path, "sampled", sampling=SAMPLED)
    questions(tmp_path / "in", [*texts[:7], "new 1", *texts[7:30], "new 2", *texts[30:], "newer"])
    stats = stats_of(answered(tmp_path, "sampled-2", "sampled", sampling=SAMPLED))
    assert (stats.rows_reused, stats.latency_s.count) == (43, 1)


@pytest.mark.parametrize(
    ("sections", "fits"),
    [
        ({"sampling": {**GREEDY, "seed": 3}}, True),
        ({"sampling": {**GREEDY, "max_tokens": 23}}, False),
        ({"sampling": {**GREEDY, "top_p": 0.5}}, False),
        ({"model": {"simulated": {"min_tokens": 2}}}, False),
        ({"prompt": {"template": "Say: {{ question }}"}}, False),
        ({"pool": {"shards_in_flight": 1}}, True),
    ],
)
def test_only_equal_requests_are_answered_so(tmp_path: Path, sections: dict[str, Any], fits: bool) -> None:
    questions(tmp_path / "in", [f"What is {k}?" for k in range(6)])
    answered(tmp_path, "first", sampling=GREEDY)
    again = answered(tmp_path, "again", "first", **{"sampling": GREEDY, **sections})
    assert stats_of(again).rows_reused == (6 if fits else 0)


def test_rows_with_one_prompt_keep_their_own_answers(tmp_path: Path) -> None:
    questions(tmp_path / "in", ["the same"] * 10)
    first = answered(tmp_path, "first", sampling=SAMPLED)
    again = answered(tmp_path, "again", "first", sampling=SAMPLED, shards={"rows": 3})
    assert stats_of(again).rows_reused == 10
    assert content(again) == content(first)


def test_answers_that_rows_share_are_taken_over_by_jobs_whose_rows_share_them(tmp_path: Path) -> None:
    questions(tmp_path / "in", ["the same", "another"] * 5)
    reuse: dict[str, Any] = {"keep": True, "equal_prompts": "all"}
    first = answered(tmp_path, "first", sampling=SAMPLED, reuse=reuse)
    reuse["outputs"] = [str(tmp_path / "first")]
    again = answered(tmp_path, "again", sampling=SAMPLED, reuse=reuse)
    assert (stats_of(first).latency_s.count, stats_of(again).latency_s.count) == (2, 0)
    assert content(again) == content(first)
    own = answered(tmp_path, "own", "first", sampling=SAMPLED)
    assert stats_of(own).latency_s.count == 10


def test_a_rows_own_limit_is_part_of_its_request(tmp_path: Path) -> None:
    source, sampling = tmp_path / "in", {**GREEDY, "max_tokens_column": "limit"}
    source.mkdir()
    for name, limits in (("first", [3, 9, 9]), ("again", [3, 9, 4])):
        pq.write_table(pa.table({"question": ["a", "b", "c"], "limit": limits}), source / "x.parquet")
        output = answered(tmp_path, name, *(["first"] if name == "again" else []), sampling=sampling)
    assert stats_of(output).rows_reused == 2


def test_two_generations_that_ask_in_the_same_way_are_kept_apart(tmp_path: Path) -> None:
    questions(tmp_path / "in", [f"What is {k}?" for k in range(6)])
    step = {
        "generate": {"column": "again", "prompt": {"template": "{{ question }} again"}, "sampling": GREEDY}
    }
    answered(tmp_path, "first", sampling=GREEDY, steps=[step])
    work = load(job(tmp_path / "in", tmp_path / "o", sampling=GREEDY, steps=[step], reuse={"keep": True}))
    reuse = reuse_of(work)
    assert reuse is not None
    assert len(set(reuse.digests)) == 1
    other = answered(tmp_path, "other", "first", sampling=GREEDY, prompt={"template": "{{ question }} again"})
    assert stats_of(other).rows_reused == 6  # the second generation of the one is the first of the other
    assert stats_of(answered(tmp_path, "plain", "first", sampling=GREEDY)).rows_reused == 6


def test_numbers_are_kept_as_texts_are(tmp_path: Path) -> None:
    questions(tmp_path / "in", [f"What is {k}?" for k in range(12)])
    text = {"prompt_column": "question"}
    steps = [
        {"embed": {"column": "vector", "prompt": text}},
        {"classify": {"column": "topic", "prompt": text}},
        {"score": {"column": "fit", "prompt": text, "answer": "question"}},
        {"generate": {"column": "text", "prompt": text}},  # sampled as a job without a prompt is by default
    ]
    alone: dict[str, Any] = {"prompt": None, "sampling": {"temperature": 1.0, "max_tokens": 512}}
    first = answered(tmp_path, "first", **alone, steps=steps)
    again = answered(tmp_path, "again", "first", **alone, steps=steps)
    assert stats_of(again).rows_reused == 48
    assert content(again) == content(first)
    # Fewer dimensions of the same model are another request, which the other steps do not mind.
    smaller = [{"embed": {**steps[0]["embed"], "dimensions": 4}}, *steps[1:]]
    other = answered(tmp_path, "other", "first", **alone, steps=smaller)
    assert stats_of(other).rows_reused == 36
    assert {len(row["vector"]) for row in content(other).values()} == {4}


def test_a_lost_shard_finds_what_its_earlier_attempt_asked(tmp_path: Path) -> None:
    questions(tmp_path / "in", [f"What is {k}?" for k in range(5)])
    output = answered(tmp_path, "out", sampling=SAMPLED)
    before = content(output)
    (shard,) = output.plan.shards
    (output.folder / "data" / shard.part_name).unlink()
    run(output.work("later"), output.plan.shards)
    assert stats_of(output).rows_reused == 5
    assert content(output) == before


def test_a_damaged_file_is_asked_anew(tmp_path: Path) -> None:
    questions(tmp_path / "in", [f"What is {k}?" for k in range(5)])
    output = answered(tmp_path, "out", sampling=GREEDY)
    (kept,) = (output.folder / ".dray" / "answers").glob("*/part-*")
    kept.write_bytes(kept.read_bytes()[:-9])
    assert stats_of(answered(tmp_path, "again", "out", sampling=GREEDY)).rows_reused == 0


def test_sources_without_answers_are_named(tmp_path: Path) -> None:
    questions(tmp_path / "in", ["a"])
    with pytest.raises(SpecError, match=r"reuse\.outputs\[0\]: .*nowhere is no output of a Dray job"):
        answered(tmp_path, "out", "nowhere")
    plain = planned(job(tmp_path / "in", tmp_path / "plain"))
    run(plain.work("r"), plain.plan.shards)
    assert not (plain.folder / ".dray" / "answers").exists()
    with pytest.raises(SpecError, match=r"reuse\.outputs\[0\]: .*plain has no kept answers"):
        answered(tmp_path, "other", "plain")


def test_where_answers_come_from_is_no_part_of_what_is_made(tmp_path: Path) -> None:
    questions(tmp_path / "in", ["a"])
    plain, reusing = (
        planned(job(tmp_path / "in", tmp_path / name, sampling=GREEDY, **more)).plan.fingerprint
        for name, more in (("a", {}), ("b", {"reuse": {"keep": True}}))
    )
    assert plain == reusing


@pytest.mark.parametrize("sampling", [GREEDY, {"temperature": 1, "seed": 2, "max_tokens": 24}])
def test_a_judges_votes_on_elements_are_taken_over(tmp_path: Path, sampling: dict[str, Any]) -> None:
    (tmp_path / "in").mkdir()
    lists = [["same", "same", f"{k}"] for k in range(6)]
    questions_and_lists = {"question": ["What is it?"] * 6, "parts": lists}
    pq.write_table(pa.table(questions_and_lists), tmp_path / "in" / "x.parquet")
    pair = {"column": "better", "rubric": "Right?", "compare": ["part", "generated_text"]}
    votes = {"votes": 3, "seed": 1} if sampling is not GREEDY else {}
    steps = [
        {"explode": {"column": "parts", "into": "part"}},
        {"judge": {**pair, **votes}},
        {"judge": {"column": "score", "rubric": "Good?", "columns": ["part"], **votes}},
    ]
    first = answered(tmp_path, "first", sampling=sampling, steps=steps)
    again = answered(tmp_path, "again", "first", sampling=sampling, steps=steps)
    assert content(again) == content(first)
    assert stats_of(again).latency_s.count == 0
    fewer = [*steps, {"filter": {"where": "better != 'tie'"}}]
    kept = {key: row for key, row in content(first).items() if row["better"] != "tie"}
    assert content(answered(tmp_path, "fewer", "first", sampling=sampling, steps=fewer)) == kept


@pytest.mark.slow
def test_another_process_finds_them_under_the_same_name(tmp_path: Path) -> None:
    questions(tmp_path / "in", ["a"])
    settings = job(
        tmp_path / "in", tmp_path / "out", reuse={"keep": True}, model={"engine": {"max_model_len": 256}}
    )
    code = (
        "import json, sys; from jobs import load; from jobs.reuse import reuse_of; "
        "print(reuse_of(load(json.loads(sys.argv[1]))).digests)"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", code, json.dumps(settings)],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},  # in which order a set of names comes
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout
        for seed in (1, 2, 3)
    }
    assert len(told) == 1
