"""Equal prompts of a job are asked once, in whichever shards they are; and what a row gets is what it would have got alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.inspect import verify
from pipelines import generate
from pipelines.answer_keys import answer_keys
from pipelines.contracts import PROMPT_SCHEMA
from pipelines.engine import Answer
from pipelines.errors import RowError
from pipelines.part import read_part
from pipelines.shard_stats import ShardStats
from pipelines.simulated_engine import SimulatedEngine
from tests.local.runs import TINY, job, rows_of
from tests.unit.stages import Output, committed, planned

GREEDY = {"temperature": 0, "max_tokens": 24}
SAMPLED = {"temperature": 0.8, "max_tokens": 24, "n": 2, "seed": 5}
OTHER = {"source": str(TINY), "backend": "simulated", "simulated": {"min_tokens": 6}}
#: Six questions in shards of five: each is in several, and some stand twice in one.
ASKED = [f"What is {k % 6}?" for k in [0, 1, 2, 0, 3, 3, 4, 0, 5, 1, 2, 2, 4, 5, 0]]


@pytest.fixture(autouse=True)
def _torch_may_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is not the actor's own."""
    monkeypatch.setattr(generate, "do_without_torch", lambda model: None)


def answered(
    folder: Path, equal_prompts: str | None = None, asked: list[str] = ASKED, **sections: Any
) -> Output:
    source = folder / "in"
    source.mkdir(exist_ok=True)
    pq.write_table(pa.table({"question": asked}), source / "x.parquet")
    if equal_prompts:
        sections["reuse"] = {**sections.get("reuse", {}), "equal_prompts": equal_prompts}
    return committed(
        job(
            source, folder / f"out-{equal_prompts}", **{"sampling": GREEDY, "shards": {"rows": 5}, **sections}
        )
    )


def stats_of(output: Output) -> ShardStats:
    stats = (read_part(output.storage, shard.part_name).footer.stats for shard in output.plan.shards)
    return sum(stats, ShardStats(shards=0))


def counts(output: Output) -> tuple[int, int]:
    """(requests, answers that were not asked for)"""
    stats = stats_of(output)
    return stats.latency_s.count, stats.rows_reused


def content(output: Output) -> list[Mapping[str, Any]]:
    return [{k: v for k, v in row.items() if k != "run_id"} for row in rows_of(output.folder).to_pylist()]


def test_equal_greedy_prompts_of_all_shards_are_asked_once(tmp_path: Path) -> None:
    shared, alone = answered(tmp_path), answered(tmp_path, "none")
    assert counts(shared) == (6, 9)
    assert counts(alone) == (15, 0)
    assert content(shared) == content(alone)
    stats = stats_of(shared)
    assert stats.completion_tokens == stats_of(alone).completion_tokens
    assert stats.ttft_s.count == 6
    texts = {row["question"]: row["completion_tokens"] for row in content(shared)}
    assert stats.completion_tokens - stats.tokens_reused == sum(texts.values())
    assert verify(shared.storage, deep=True)["problems"] == []


def test_sampled_prompts_are_asked_once_where_the_job_says_so(tmp_path: Path) -> None:
    default, together = answered(tmp_path, sampling=SAMPLED), answered(tmp_path, "all", sampling=SAMPLED)
    assert counts(default) == (15, 0)
    assert counts(together) == (6, 9)
    by_question: dict[str, set[tuple[Any, ...]]] = {}
    for row in content(together):
        found = by_question.setdefault(row["question"], set())
        found.add((row["sample_index"], row["generated_text"]))
    assert [len(found) for found in by_question.values()] == [2] * 6
    assert len({row["generated_text"] for row in content(default)}) > 12


def test_generations_and_pools_share_by_themselves(tmp_path: Path) -> None:
    same = {"generate": {"column": "again", "prompt": {"template": "{{ question }}"}, "sampling": GREEDY}}
    other = {"generate": {**same["generate"], "column": "other", "model": OTHER}}
    steps = [{"name": "again", **same}, {"name": "other", **other}]
    shared, alone = answered(tmp_path, steps=steps), answered(tmp_path, "none", steps=steps)
    # The second generation asks what the first did, and has its own requests for it.
    assert counts(shared) == (18, 27)
    assert content(shared) == content(alone)


def test_numbers_are_shared_as_texts_are(tmp_path: Path) -> None:
    text = {"prompt_column": "question"}
    steps = [
        {"embed": {"column": "vector", "prompt": text}},
        {"classify": {"column": "topic", "prompt": text}},
        {"score": {"column": "fit", "prompt": text, "answer": "question"}},
    ]
    job_ = {"prompt": None, "sampling": {"temperature": 1.0, "max_tokens": 512}, "steps": steps}
    shared, alone = answered(tmp_path, **job_), answered(tmp_path, "none", **job_)
    assert counts(shared) == (18, 27)
    assert content(shared) == content(alone)


def test_each_rows_answer_is_kept_whoever_asked_for_it(tmp_path: Path) -> None:
    output = answered(tmp_path, reuse={"keep": True})
    kept = [pq.read_table(file) for file in (output.folder / ".dray" / "answers").glob("*/part-*")]
    assert sum(len(table) for table in kept) == 15
    assert counts(output) == (6, 9)


def test_a_row_that_failed_is_asked_for_by_the_next_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate_ = SimulatedEngine.generate
    calls = []

    async def once_refused(
        self: SimulatedEngine, request: str, ids: Any, *more: Any, **others: Any
    ) -> Answer:
        calls.append(ids.tobytes())
        if calls.count(ids.tobytes()) == 1:
            raise RowError("invalid_request", "not the first time")
        return await generate_(self, request, ids, *more, **others)

    monkeypatch.setattr(SimulatedEngine, "generate", once_refused)
    output = answered(
        tmp_path, asked=["a", "b", "a", "b", "b", "b"], shards={"rows": 2}, errors={"max_error_rate": 1}
    )
    codes = [row["error_code"] for row in content(output)]
    assert codes == ["invalid_request", "invalid_request", None, None, None, None]
    assert len(calls) == 4
    assert counts(output) == (2, 2)


#: What earlier outputs have on their storage: other bytes would disown their kept answers.
@pytest.mark.parametrize(
    ("sampling", "keys"),
    [
        ({"temperature": 0}, ["ade96d0705d09c9b3b0665ebc69e61dd", "763502f854741cc7b33e9a8a4bccc9b9"]),
        ({"temperature": 1}, ["0db08798758f410cdb1219e6fe3a61b1", "c5db874d2dcbe0ab582e21edd281de1f"]),
    ],
)
def test_keys_are_pinned(tmp_path: Path, sampling: dict[str, Any], keys: list[str]) -> None:
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"question": ["a"]}), tmp_path / "in" / "x.parquet")
    work = planned(job(tmp_path / "in", tmp_path / "out", sampling=sampling)).work("r")
    picture = [{"sha256": b"s" * 32, "data": None}]
    rows = [
        {"row_id": "f#0", "token_ids": [1, 2, 3], "images": picture},
        {"row_id": "f#1", "token_ids": None},
        {"row_id": "f#2", "token_ids": [4], "max_tokens": 7},
    ]
    made = answer_keys(pa.Table.from_pylist(rows, PROMPT_SCHEMA), work)
    assert {row: key.hex() for row, key in made.items()} == dict(zip((0, 2), keys, strict=True))
