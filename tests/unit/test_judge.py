"""`judge` steps: what votes come to, what the judge is asked, and the whole of it against the same questions as jobs."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, mode
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import load
from jobs.fingerprint import fingerprint
from jobs.inspect import report_of, verify
from jobs.proposal import checked_identity, propose
from pipelines.ask_settings import JudgeStep
from pipelines.errors import SpecError
from pipelines.generations import pools_of
from pipelines.judge import ruling
from pipelines.part import read_part
from pipelines.stage import Parcel
from pipelines.steps import part_schema
from tests.local.runs import content, job, rows_of, write_questions
from tests.unit.stages import Output, committed, generated, planned, run
from tests.unit.test_generations import OTHER, settings

RUBRIC = "Is it an answer to {{ question }}?"


def judge(**keys: Any) -> JudgeStep:
    return JudgeStep.model_validate({"column": "score", "rubric": RUBRIC, **keys})


# ── What votes come to ───────────────────────────────────────────────────────────────────────────────────────────

VOTES = st.lists(st.integers(1, 5), min_size=1, max_size=7)


@given(VOTES, st.lists(st.sampled_from(["", "6", "1 ", "one"]), max_size=3))
def test_scores(votes: list[int], others: list[str]) -> None:
    texts = [[*map(str, votes), *others]]
    assert ruling(judge(votes=9), texts) == (mode(sorted(votes)), votes)
    value, every = ruling(judge(votes=9, verdict="mean"), texts)
    assert (value, every) == (pytest.approx(mean(votes)), votes)


@given(st.lists(st.sampled_from(["poor", "fair", "good"]), min_size=1, max_size=6))
def test_labels(votes: list[str]) -> None:
    most = max(Counter(votes).values())
    first = next(label for label in ("poor", "fair", "good") if votes.count(label) == most)
    assert ruling(judge(choices=["poor", "fair", "good"], votes=9), [votes]) == (first, votes)


PLACES = st.lists(st.sampled_from(["1", "2"]), min_size=1, max_size=5)


@given(PLACES, PLACES)
def test_two_orders(given_ab: list[str], given_ba: list[str]) -> None:
    def winner(places: list[str], names: str) -> str:
        difference = places.count("1") - places.count("2")
        return "tie" if difference == 0 else names[0] if difference > 0 else names[1]

    pair = judge(compare=["one", "other"], votes=9)
    in_both = winner(given_ab, "ab"), winner(given_ba, "ba")
    verdict, votes = ruling(pair, [given_ab, given_ba])
    assert verdict == (in_both[0] if len(set(in_both)) == 1 else "tie")
    assert "".join(map(str, votes)) == "".join(
        {"1": names[0], "2": names[1]}[place]
        for places, names in ((given_ab, "ab"), (given_ba, "ba"))
        for place in places
    )
    assert ruling(pair, [given_ab])[0] == in_both[0]  # swap: false


def test_a_judge_that_prefers_a_place_finds_a_tie_and_one_that_prefers_an_answer_does_not() -> None:
    pair = judge(compare=["one", "other"])
    found = {places: ruling(pair, [[places[0]], [places[1]]])[0] for places in itertools.product("12", "12")}
    assert found == {("1", "1"): "tie", ("2", "2"): "tie", ("1", "2"): "a", ("2", "1"): "b"}


# ── Through the stages ───────────────────────────────────────────────────────────────────────────────────────────


def scored(**keys: Any) -> dict[str, Any]:
    return {"judge": {"column": "score", "rubric": RUBRIC, **keys}}


def again(**keys: Any) -> dict[str, Any]:
    prompt = {"template": "{{ question }} {{ sample_index }}"}
    sampling = {"temperature": 0, "max_tokens": 12}
    return {"generate": {"column": "other", "prompt": prompt, "sampling": sampling, **keys}}


def own_job(
    folder: Path, out: str, prompt: str, before: Output, choice: list[str], more: Sequence[str] = ()
) -> dict[Any, list[str]]:
    """(row, sample) → the answers to the prompt as a job of its own on what `before` has written."""
    asked = committed(
        job(
            before.folder / "data",
            folder / out,
            prompt={"template": prompt},
            sampling={"structured_outputs": {"choice": choice}, "temperature": 0},
            input={"columns": ["question", "generated_text", "row_id", "sample_index", *more]},
            output={"rename": {name: f"{name}_" for name in ("generated_text", "row_id", "sample_index")}},
        )
    )
    found: dict[Any, list[str]] = {}
    for row in rows_of(asked.folder).to_pylist():
        found.setdefault((row["row_id_"], row["sample_index_"]), []).append(row["generated_text"])
    return found


@pytest.mark.parametrize("model", [None, OTHER], ids=["one engine", "two pools"])
def test_a_score_is_what_a_job_of_its_own_is_told(tmp_path: Path, model: dict[str, Any] | None) -> None:
    write_questions(tmp_path / "in", rows=10)
    output = committed(settings(tmp_path, scored(columns=["question", "generated_text"], model=model)))
    assert len(pools_of(output.work("r"))) == (2 if model else 1)
    before = committed(settings(tmp_path, out="before"))
    prompt = (
        "Judge by this rubric:\nIs it an answer to {{ question }}?\n\n"
        "question:\n{{ question }}\n\ngenerated_text:\n{{ generated_text }}\n\n"
        "Say a whole number from 1 (worst) to 5 (best), and nothing else."
    )
    told = own_job(tmp_path, "own", prompt, before, list("12345"))
    rows = content(output.folder)
    assert {(row["row_id"], row["sample_index"]): [str(row["score"])] for row in rows} == told
    assert [row["score_votes"] for row in rows] == [[row["score"]] for row in rows]
    assert len({row["score"] for row in rows}) > 1
    assert verify(output.storage, deep=True)["problems"] == []


def test_each_order_is_a_question_of_its_own(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", rows=12)
    pair = {
        "column": "better",
        "rubric": "Right?",
        "columns": ["question"],
        "compare": ["generated_text", "other"],
    }
    output = committed(settings(tmp_path, again(), {"judge": pair}))
    before = committed(settings(tmp_path, again(), out="before"))

    def told(out: str, first: str, second: str) -> dict[Any, list[str]]:
        prompt = (
            f"Judge by this rubric:\nRight?\n\nquestion:\n{{{{ question }}}}\n\nAnswer 1:\n{{{{ {first} }}}}\n\n"
            f"Answer 2:\n{{{{ {second} }}}}\n\nWhich answer is better by the rubric? Say 1 or 2, and nothing else."
        )
        return own_job(tmp_path, out, prompt, before, ["1", "2"], more=["other"])

    ab, ba = told("ab", "generated_text", "other"), told("ba", "other", "generated_text")
    rows = {(row["row_id"], row["sample_index"]): row for row in content(output.folder)}
    assert {key: row["better_votes"] for key, row in rows.items()} == {
        key: ["ab"[ab[key] == ["2"]], "ba"[ba[key] == ["2"]]] for key in ab
    }
    verdicts = Counter(row["better"] for row in rows.values())
    assert verdicts.keys() == {"a", "b", "tie"}
    for row in rows.values():
        agree = len(set(row["better_votes"])) == 1
        assert row["better"] == (row["better_votes"][0] if agree else "tie")

    alone = committed(settings(tmp_path, again(), {"judge": {**pair, "swap": False}}, out="alone"))
    assert [row["better"] for row in content(alone.folder)] == ["ab"[ab[key] == ["2"]] for key in rows]


def test_equal_questions_have_votes_of_their_own(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", rows=12)
    blind = {"rubric": "Toss a coin.", "columns": ["run_id"], "votes": 9, "seed": 4}
    rows = content(committed(settings(tmp_path, scored(**blind))).folder)
    votes = [tuple(row["score_votes"]) for row in rows]
    assert {len(one) for one in votes} == {9}
    assert len(set(votes)) == len(votes) == 24  # one prompt, of 24 records
    assert all(len(set(one)) > 1 for one in votes)
    assert [row["score"] for row in rows] == [mode(sorted(row["score_votes"])) for row in rows]
    once = content(committed(settings(tmp_path, scored(**blind), out="once")).folder)
    assert [row["score_votes"] for row in once] == [row["score_votes"] for row in rows]


def test_every_request_has_an_id_of_its_own(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", rows=4)
    pair = {"column": "better", "rubric": "Right?", "compare": ["generated_text", "question"], "votes": 2}
    output = planned(settings(tmp_path, {"judge": pair}))
    (parcel,) = (Parcel.from_batch(one) for one in generated(output.work("r"), output.plan.shards))
    assert parcel.prompts is not None
    assert parcel.generations is not None
    ids = parcel.prompts["row_id"].to_pylist()
    assert len(ids) == len(set(ids)) == 4 * 2 * 2
    assert len(parcel.generations) == 2 * len(ids)


def test_the_books_hold_all_votes(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", rows=9)
    pair = {"column": "better", "rubric": "Right?", "compare": ["generated_text", "question"], "votes": 3}
    output = committed(settings(tmp_path, {"filter": {"where": "sample_index == 1"}}, {"judge": pair}))
    stats, rows = report_of(output.storage).stats, content(output.folder)
    counted = stats.steps["judge"]
    assert [counted[name] for name in ("in", "out", "dropped", "failed")] == [9, 9, 0, 0]
    for kind in ("prompt_tokens", "completion_tokens"):
        assert counted[kind] == sum(row[f"better_{kind}"] for row in rows)
    assert {row["better_completion_tokens"] for row in rows} == {6 * 2}  # a digit and the end token
    once = {"judge": {**pair, "votes": 1}}
    alone = content(committed(settings(tmp_path, once, out="once")).folder)
    prompts = {row["row_id"]: row["better_prompt_tokens"] for row in alone if row["sample_index"] == 1}
    assert {row["row_id"]: row["better_prompt_tokens"] for row in rows} == prompts
    assert stats.latency_s.count == 9 + 2 * 9
    assert (
        pa.Table.from_pylist(rows)
        .select(["better_votes"])
        .schema.equals(pa.schema([part_schema(output.work("r")).field("better_votes")]))
    )


def test_a_record_that_cannot_be_judged_fails_and_is_retried(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", rows=6)
    one = {"sampling": {"temperature": 0, "max_tokens": 24}}
    # Too long in the second of the two orders only, and of some rows.
    lame = "{% if first == question and row_id[-1] in '135' %}{{ first * 600 }}{% endif %}{{ first }} {{ second }}"
    pair = {"column": "better", "compare": ["generated_text", "question"]}
    output = committed(settings(tmp_path, {"judge": {**pair, "prompt": {"template": lame}}}, **one))
    rows = content(output.folder)
    for row in rows:
        fails = row["row_id"][-1] in "135"
        assert (row["error_code"] == "prompt_too_long") == fails == (row["better"] is None)
        assert (row["better_votes"] is None) == fails
    steps = [{"judge": {**pair, "prompt": {"template": "{{ first }} {{ second }}"}}}]
    mended = Output({**output.settings, "steps": steps}, output.storage, output.plan)
    run(mended.retry("again"), output.plan.shards)
    clean = committed(settings(tmp_path, *steps, out="clean", **one))
    assert content(output.folder) == content(clean.folder)
    footers = [read_part(output.storage, shard.part_name).footer for shard in output.plan.shards]
    assert sum(footer.stats.steps["judge"]["failed"] for footer in footers) == 3


def test_best_of_n_by_a_judge(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", rows=10)
    judged = committed(settings(tmp_path, scored(verdict="mean", votes=5, seed=2)))
    best = committed(
        settings(tmp_path, scored(verdict="mean", votes=5, seed=2), {"select": {"by": "score"}}, out="best")
    )
    of_row = itertools.groupby(content(judged.folder), key=lambda row: row["row_id"])
    assert content(best.folder) == [max(samples, key=lambda row: row["score"]) for _, samples in of_row]


# ── Before any engine starts ─────────────────────────────────────────────────────────────────────────────────────


def test_what_a_judge_is_asked_is_part_of_what_is_made(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", rows=1)

    def print_of(**keys: Any) -> str:
        return fingerprint(checked_identity(load(settings(tmp_path, scored(**keys)))))

    plain = print_of()
    assert print_of(pool={"replicas": 2}) == plain
    assert print_of(temperature=0.0) != plain != print_of(temperature=1.0)
    others = [{"scale": [1, 6]}, {"votes": 3}, {"rubric": "?"}, {"choices": ["x", "y"]}, {"model": OTHER}]
    assert len({plain, *(print_of(**keys) for keys in others)}) == 6


def test_one_vote_is_greedy_and_several_are_drawn() -> None:
    assert judge().asked_sampling.temperature == 0
    several = judge(votes=3, scale=[0, 100]).asked_sampling
    assert (several.temperature, several.n, several.max_tokens) == (1, 3, 4)
    assert judge(votes=3, temperature=0.3).asked_sampling.temperature == 0.3


def test_the_models_folder_is_looked_for_beside_the_job(tmp_path: Path) -> None:
    own = {"source": "./judge", "tokenizer": "./judge", "backend": "simulated"}
    spec = load(settings(tmp_path, scored(model=own)), directory=tmp_path).spec
    assert spec.models["steps.judge.model"].source == str(tmp_path / "judge")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"votes": 3, "temperature": 0}, "temperature: 3 votes at 0 are the same vote"),
        ({"rubric": None}, "give exactly one of rubric, prompt"),
        ({"prompt": {"template": "x"}}, "give exactly one of rubric, prompt"),
        ({"scale": [1, 5], "choices": ["a", "b"]}, "give one of scale, choices, compare; found scale and choices"),
        ({"scale": [5, 1]}, "scale: [5, 1] is not a scale of 2 to 101 whole numbers"),
        ({"scale": [1, "x"]}, "steps.judge.scale: expected a list of whole numbers"),
        ({"choices": ["a"]}, "steps.judge.choices"),
        ({"swap": True}, "swap: only with compare"),
        ({"verdict": "mean", "choices": ["a", "b"]}, "verdict: the mean of scores only"),
        ({"compare": ["question", "question"]}, "compare: 'question' twice"),
        ({"compare": ["question", "nothing"]}, "steps.judge: compare: there is no column 'nothing' by then"),
        ({"compare": ["question", "prompt_tokens"]}, "steps.judge: compare: 'prompt_tokens' holds int32 values, not text"),
        ({"columns": ["nothing"]}, "steps.judge: columns: there is no column 'nothing' by then"),
        ({"rubric": "{{ nothing }}"}, "steps.judge: rubric: there is no column 'nothing' by then"),
        ({"rubric": "{{ nothing"}, "steps.judge.rubric"),
        ({"rubric": None, "prompt": {"template": "{{ first }}"}, "compare": ["question", "generated_text"]},
         "prompt.template: does not show {{ second }}"),
        ({"rubric": None, "prompt": {"template": "x"}, "columns": ["question"]}, "columns: only with rubric"),
        ({"column": "question"}, "adds the column 'question', which is there already"),
        ({"model": {"source": "org/model"}}, "steps.judge.model.revision: give the commit"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_told_when_planning(tmp_path: Path, keys: dict[str, Any], words: str) -> None:
    write_questions(tmp_path / "in", rows=1)
    with pytest.raises(SpecError) as told:
        propose(load(settings(tmp_path, scored(**keys))))
    assert words in str(told.value)


def test_a_column_that_the_prompt_takes_for_an_answer_is_refused(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", rows=1)
    first = {"parse": {"regex": "(?P<first>.)"}}
    with pytest.raises(SpecError, match="there is a column 'first' already"):
        propose(load(settings(tmp_path, first, scored(compare=["question", "generated_text"]))))
