"""Each row's own sampling parameters: what is read, what is refused, and what of them reaches the engine."""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import load
from jobs.inspect import verify
from jobs.preview import preview
from jobs.reuse import KEPT, kept_in
from jobs.tuned import sample_prompts
from pipelines import generate
from pipelines.engine import Answer
from pipelines.errors import RowError
from pipelines.part import read_part
from pipelines.row_params import Own, RowParams, own_columns
from pipelines.row_settings import RowSettings
from pipelines.seeds import row_seed
from pipelines.settings import ROW_PARAMS, ModelSettings, PoolSettings, SamplingSettings
from pipelines.shard_stats import ShardStats
from pipelines.shelf import Shelf
from pipelines.simulated_engine import SimulatedEngine
from pipelines.vllm_defaults import cpu_defaults
from tests.local.runs import TINY, job, rows_of
from tests.unit.stages import Output, committed, planned, run

JOB = SamplingSettings(params_column="p", temperature=0.7, max_tokens=24, seed=3)


@pytest.fixture(autouse=True)
def _torch_may_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is not the actor's own."""
    monkeypatch.setattr(generate, "do_without_torch", lambda model: None)


def read(values: Any, **sampling: Any) -> list[Own | RowError]:
    column = values if isinstance(values, pa.Array) else pa.array(values)
    return RowParams(JOB.model_copy(update=sampling))(pa.table({"p": column}))


def text(**values: Any) -> str:
    return json.dumps(values)


# ── Reading ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_limit_and_seed_stand_apart_and_what_is_the_jobs_is_left_out() -> None:
    given = [
        None,
        "{}",
        text(temperature=None),
        text(top_p=0.5, temperature=0.2, seed=9, max_tokens=5),
        text(temperature=0.2, top_p=0.5),
        text(temperature=0.7, max_tokens=24),
        text(min_tokens=30, max_tokens=40),
    ]
    both = '{"temperature": 0.2, "top_p": 0.5}'
    assert read(given) == [
        Own(),
        Own(),
        Own(),
        Own(5, 9, both),
        Own(None, None, both),
        Own(),
        Own(40, None, '{"min_tokens": 30}'),
    ]


def test_structs_are_read_as_text_is() -> None:
    rows = [
        {"temperature": 0.0, "max_tokens": 6.0, "stop": ["a", "b"], "seed": 2.0, "top_p": None},
        {"temperature": None, "max_tokens": None, "stop": None, "seed": None, "top_p": Decimal("0.25")},
        None,
    ]
    assert read(rows) == [
        Own(6, 2, '{"stop": ["a", "b"], "temperature": 0.0}'),  # as pandas writes whole numbers beside nulls
        Own(params='{"top_p": 0.25}'),
        Own(),
    ]
    assert RowParams(JOB)(pa.table({"other": [1]})) == [Own()]  # a column that a later file lacks


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("{", "'{' is not JSON; it must be an object of these keys: temperature, "),
        ("[" * 100_000, "is not JSON"),
        ("[0.5]", "'[0.5]' is no object; it must be one of these keys: temperature, "),
        (text(n=2), "'n' is no key that a row may set; there are temperature, top_p"),
        (text(logprobs=1, temperature=1), "'logprobs' is no key"),
        (text(skip_special_tokens=False), "'skip_special_tokens' is no key"),
        (text(temperature=-1), "temperature is -1; it must be greater than or equal to 0"),
        ('{"temperature": NaN}', "temperature is nan; it must be a finite number"),
        (text(temperature="hot"), "temperature is 'hot'; it must be a valid number"),
        (text(temperature=True), "temperature is True; true and false are not allowed here"),
        (text(top_p=0), "top_p is 0; it must be greater than 0"),
        (text(max_tokens=0), "max_tokens is 0; it must be greater than 0"),
        (text(max_tokens=2.5), "max_tokens is 2.5; it must be a valid integer"),
        (text(max_tokens=1e12), "max_tokens is 1000000000000.0; it must be less than or equal to 2147483647"),
        (text(top_k=10**30), "top_k is 1" + "0" * 30 + "; it must be less than or equal to 2147483647"),
        (text(stop_token_ids=[1, 2**40]), "it must be less than or equal to 2147483647"),
        (text(stop_token_ids=[1, -2]), "stop_token_ids[1] is -2; it must be greater than or equal to 0"),
        (text(min_tokens=25), "min_tokens 25 is above max_tokens 24"),
        (text(max_tokens=9, min_tokens=10), "min_tokens 10 is above max_tokens 9"),
        (text(stop=7), "stop is 7; it must be a valid string or a valid list"),
        (text(stop=["a", ""]), "stop[1] is ''; String should have at least 1 character"),
        (text(stop="\ud800"), r"stop is '\ud800'; it must be a valid string"),
        (text(bad_words="a"), "bad_words is 'a'; it must be a valid list"),
        (text(seed=-1), "seed is -1; it must be a whole number from 0 to 9223372036853727232"),
        (text(seed=2**63), "seed is 9223372036854775808; it must be"),
        (text(seed=1.5), "seed is 1.5; it must be a whole number"),
        (text(seed=True), "seed is True; it must be a whole number"),
        (text(stop="x" * 500 + "\ud800"), "…; it must be"),
    ],
)  # fmt: skip
def test_what_will_not_do_is_the_rows_error(given: str, words: str) -> None:
    fine, bad, more = read([text(top_p=0.5), given, text(top_p=0.5)])
    assert fine == more == Own(params='{"top_p": 0.5}')
    assert isinstance(bad, RowError)
    assert bad.code == "invalid_request"
    assert str(bad).startswith("params_column 'p': ")
    assert words in str(bad)
    assert len(str(bad)) < 450


def test_bytes_are_no_parameter() -> None:
    [bad] = read(pa.array([{"stop": b"\xff"}], pa.struct([("stop", pa.binary())])))
    assert "has no form in JSON" in str(bad)


def test_several_equal_greedy_samples_are_refused() -> None:
    fine, bad = read([text(temperature=0.1), text(temperature=0)], n=2)
    assert isinstance(fine, Own)
    assert str(bad) == (
        "params_column 'p': n > 1 with temperature 0 gives n equal answers; raise the temperature"
    )


def test_each_distinct_set_is_checked_once_and_travels_once() -> None:
    reader = RowParams(JOB)
    rows = [text(temperature=k % 3 / 10, seed=k, stop=["x"]) for k in range(3000)]
    found = [*reader(pa.table({"p": rows})), *reader(pa.table({"p": rows}))]
    assert reader._checked.cache_info().misses == 3
    few = [text(temperature=0.5)] * 50
    reader(pa.table({"p": few}))
    assert reader._of_text.cache_info().hits >= 49
    for cache in (reader._checked, reader._of_text):
        assert cache.cache_info().maxsize == 1024
    *_, params = own_columns(found)
    assert len(params) == 6000
    assert len(params.dictionary) == 3


def test_equal_parameters_are_one_object_for_the_engine_and_few_are_remembered() -> None:
    settings = RowSettings(JOB)
    own = settings.of('{"min_tokens": 30}')
    assert settings.of("".join(['{"min_', 'tokens": 30}'])) is own
    assert settings.again('{"min_tokens": 30}', True) is settings.again('{"min_tokens": 30}', True)
    assert own.max_tokens == 30  # vLLM refuses less; the row's own limit comes with its request
    for k in range(5000):
        settings.of(text(top_k=k))
    assert settings.of.cache_info().currsize <= 1024


# ── In a job ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Asked(list[tuple[int | None, int | None, SamplingSettings | None]]):
    """(seed, limit, settings) of each request to a simulated engine."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    answer, found = SimulatedEngine.generate, Asked()

    async def recorded(
        self: SimulatedEngine,
        request_id: str,
        token_ids: Any,
        seed: int | None,
        max_tokens: int | None = None,
        sampling: SamplingSettings | None = None,
        *more: Any,
        **others: Any,
    ) -> Answer:
        found.append((seed, max_tokens, sampling))
        return await answer(self, request_id, token_ids, seed, max_tokens, sampling, *more, **others)

    monkeypatch.setattr(SimulatedEngine, "generate", recorded)
    return found


def settings_of(
    folder: Path, params: list[Any], name: str = "out", questions: list[str] | None = None, **sections: Any
) -> dict[str, Any]:
    source = folder / "in"
    source.mkdir(exist_ok=True)
    texts = questions or [f"What is {k}?" for k in range(len(params))]
    pq.write_table(pa.table({"question": texts, "p": params}), source / "x.parquet")
    sampling = {"temperature": 0.7, "max_tokens": 24, "params_column": "p", **sections.pop("sampling", {})}
    return job(source, folder / name, **{"sampling": sampling, "shards": {"rows": 4}, **sections})


def answered(folder: Path, params: list[Any], name: str = "out", **sections: Any) -> Output:
    return committed(settings_of(folder, params, name, **sections))


def stats_of(output: Output) -> ShardStats:
    stats = (read_part(output.storage, shard.part_name).footer.stats for shard in output.plan.shards)
    return sum(stats, ShardStats(shards=0))


def in_order(output: Output) -> list[Mapping[str, Any]]:
    """The records in the input's order."""
    rows = rows_of(output.folder).to_pylist()
    return sorted(rows, key=lambda row: (row["question"], row["sample_index"]))


def test_the_engine_is_asked_as_each_row_says(tmp_path: Path, asked: Asked) -> None:
    params = [
        None,
        text(temperature=0.2, stop=["."], seed=11),
        text(seed=12),
        text(max_tokens=3),
        text(temperature=-1),
        text(temperature=0.2, stop=["."]),
        text(min_tokens=50, max_tokens=60),
    ]
    output = answered(tmp_path, params, sampling={"seed": 5}, errors={"max_error_rate": 1})
    rows = in_order(output)
    ids = [row["row_id"] for row in rows]
    hashed = [row_seed(5, row_id) for row_id in ids]
    by_seed = {seed: (limit, own) for seed, limit, own in asked}
    assert set(by_seed) == {hashed[0], 11, 12, hashed[3], hashed[5], hashed[6]}
    assert by_seed[hashed[0]] == by_seed[12] == (None, None)
    assert by_seed[hashed[3]] == (3, None)
    limit, own = by_seed[11]
    assert own is not None
    assert (limit, own.temperature, own.stop, own.top_p) == (None, 0.2, ["."], 1.0)
    assert by_seed[hashed[5]][1] is own  # in another shard
    limit, own = by_seed[hashed[6]]
    assert own is not None
    assert (limit, own.min_tokens) == (60, 50)
    assert [row["error_code"] for row in rows] == [None] * 4 + ["invalid_request"] + [None] * 2
    assert "temperature is -1" in rows[4]["error_message"]
    assert rows[3]["completion_tokens"] == 3
    assert rows[6]["completion_tokens"] == 50
    assert verify(output.storage, deep=True)["problems"] == []


def test_a_struct_column_does_the_same(tmp_path: Path, asked: Asked) -> None:
    output = answered(tmp_path, [{"max_tokens": 2, "seed": None}, {"max_tokens": None, "seed": 4}, None])
    assert asked == [(None, 2, None), (4, None, None), (None, None, None)]
    assert in_order(output)[0]["completion_tokens"] == 2


def test_a_rows_seed_is_told_where_rows_say_what_made_them(tmp_path: Path) -> None:
    sections = {"output": {"path": str(tmp_path / "out"), "provenance": True}, "sampling": {"seed": 5}}
    own, hashed = in_order(answered(tmp_path, [text(seed=7), None], **sections))
    assert (own["seed"], hashed["seed"]) == (7, row_seed(5, hashed["row_id"]))


SAME = ["the same", "the same", "the same", "the same", "the same", "the same"]


@pytest.mark.parametrize(
    ("job_temperature", "equal_prompts", "requests"),
    [(0.7, "greedy", 4), (0, "greedy", 4), (0.7, "all", 3), (0, "all", 3), (0.7, "none", 6)],
)
def test_greedy_rows_share_an_answer_and_sampled_ones_have_their_own(
    tmp_path: Path, asked: Asked, job_temperature: float, equal_prompts: str, requests: int
) -> None:
    greedy, warm = text(temperature=0), text(temperature=0.5)
    params = [greedy, warm, text(temperature=0, seed=1), text(temperature=0, top_k=4), greedy, warm]
    output = answered(
        tmp_path,
        params,
        sampling={"temperature": job_temperature},
        questions=SAME,
        reuse={"equal_prompts": equal_prompts},
    )
    # Four greedy rows of two kinds, whatever their seeds, and two sampled ones.
    assert (len(asked), stats_of(output).rows_reused) == (requests, 6 - requests)


def test_an_own_seed_keeps_answers_apart_that_rows_would_share(tmp_path: Path, asked: Asked) -> None:
    params = [text(seed=1), text(seed=2), text(seed=1), None]
    answered(tmp_path, params, questions=SAME[:4], reuse={"equal_prompts": "all"})
    assert sorted(asked, key=str) == [(1, None, None), (2, None, None), (None, None, None)]


def test_sampled_rows_leave_the_shelf_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claimed: list[bytes] = []
    claim = Shelf.claim

    def noted(self: Shelf, owner: str, keys: Any) -> Any:
        claimed.extend(keys)
        return claim(self, owner, keys)

    monkeypatch.setattr(Shelf, "claim", noted)
    output = answered(tmp_path, [None, text(temperature=0), None, None, None, None, None, None])
    assert len(claimed) == 1
    assert stats_of(output).rows_ok == 8


def kept(folder: Path, params: list[Any], name: str, before: str | None = None, **sections: Any) -> Output:
    """A job that keeps its answers and looks into an earlier one's, whose input had the same name."""
    reuse = {"keep": True, "outputs": [str(folder / before)] if before else []}
    output = planned(settings_of(folder, params, name, reuse=reuse, **sections))
    output.storage.create(KEPT, b"")
    work = output.work(name)
    run(work, output.plan.shards, kept_in=kept_in(work, output.plan, output.plan.shards))
    return output


@pytest.mark.parametrize(
    ("job_sampling", "now", "reused"),
    [
        ({}, [None, text(temperature=0), text(seed=4)], 3),
        ({}, [text(top_p=0.5), text(temperature=0), text(seed=5)], 1),
        ({}, [None, text(temperature=0, top_k=2), text(seed=4, max_tokens=4)], 1),
        ({"seed": 9}, [None, text(temperature=0), text(seed=4)], 0),
        ({"params_column": None}, [None, None, None], 1),
    ],
)
def test_only_equal_parameters_are_answered_by_an_earlier_job(
    tmp_path: Path, job_sampling: dict[str, Any], now: list[Any], reused: int
) -> None:
    kept(tmp_path, [None, text(temperature=0), text(seed=4)], "first")
    again = kept(tmp_path, now, "again", "first", sampling=job_sampling)
    assert stats_of(again).rows_reused == reused


def test_a_greedy_jobs_seed_counts_where_rows_may_be_sampled_by_it(tmp_path: Path) -> None:
    warm = [text(temperature=0.9), None]
    kept(tmp_path, warm, "first", sampling={"temperature": 0, "seed": 1})
    again = kept(tmp_path, warm, "again", "first", sampling={"temperature": 0, "seed": 2})
    assert stats_of(again).rows_reused == 0


def test_another_try_is_the_rows_own_but_for_its_heat(
    tmp_path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer, seen = SimulatedEngine.generate, set()

    async def first_bad(
        self: SimulatedEngine, request_id: str, token_ids: Any, *more: Any, **others: Any
    ) -> Answer:
        found = await answer(self, request_id, token_ids, *more, **others)
        if token_ids.tobytes() in seen:
            return found
        seen.add(token_ids.tobytes())
        sample = replace(found.samples[0], text="?", finish_reason="length", token_ids=array("i", [1]))
        return replace(found, samples=[sample])

    monkeypatch.setattr(SimulatedEngine, "generate", first_bad)
    params = [text(temperature=0, top_k=5, seed=20, max_tokens=3), text(temperature=0.9), None]
    sampling = {"structured_outputs": {"choice": ["yes", "no"]}, "temperature": 0.6}
    output = answered(tmp_path, params, sampling=sampling)
    rows = in_order(output)
    assert {row["generated_text"] for row in rows} <= {"yes", "no"}
    assert stats_of(output).repairs == 3
    again = [(seed, limit, own) for seed, limit, own in asked if own is not None and own.max_tokens == 48]
    told = {(own.temperature, own.top_k): (seed, limit) for seed, limit, own in again if own is not None}
    assert told == {
        (0.5, 5): (21, 6),
        (0.9, 0): (row_seed(0, rows[1]["row_id"]) + 1, None),
        (0.6, 0): (row_seed(0, rows[2]["row_id"]) + 1, None),
    }


def test_preview_and_tune_take_the_rows_parameters(tmp_path: Path, asked: Asked) -> None:
    params = [text(temperature=0.2, max_tokens=2, seed=6), text(zeal=1), None]
    loaded = load(settings_of(tmp_path, params))
    shown = preview(loaded, rows=3, generate=True)
    assert [row["error_code"] for row in shown] == [None, "invalid_request", None]
    [(seed, limit, own), plain] = asked
    assert (seed, limit, own and own.temperature) == (6, 2, 0.2)
    assert plain == (None, None, None)
    found = {one[1:] for one in sample_prompts(loaded, 3)}
    assert found == {(2, 6, '{"temperature": 0.2}'), (None, None, None)}


def test_a_cpu_engine_is_ready_for_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM 0.32 dies of a seeded request whose prompt it reads in chunks on a CPU."""
    for name in ("VLLM_CPU_OMP_THREADS_BIND", "OMP_NUM_THREADS", "VLLM_ENABLE_V1_MULTIPROCESSING"):
        monkeypatch.setenv(name, "1")
    model = ModelSettings(source=str(TINY))
    chunked = [
        cpu_defaults(model, SamplingSettings(params_column=name), PoolSettings()).get(
            "enable_chunked_prefill"
        )
        for name in (None, "p")
    ]
    assert chunked == [None, False]


def test_the_keys_of_a_row_are_keys_of_the_settings() -> None:
    assert set(ROW_PARAMS) < set(SamplingSettings.model_fields)
