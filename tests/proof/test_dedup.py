"""A job with `dedup`, whatever it goes through: what stays is what a plain reimplementation keeps of all answers.

Stories as in `test_any_run`, without files that change: runs crash at any request, files arrive between runs, graphs lose
and repeat shards, workers outlive their driver. Crashes fall late more often, into the comparing and rewriting.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st

from jobs import load, run
from jobs.inspect import verify
from pipelines.part import part_of
from pipelines.storage import Storage
from tests.local.runs import job
from tests.proof.in_process import Crashed, Disk, Graph, Life, in_process
from tests.proof.scale import STORIES, TIMES
from tests.proof.test_any_run import IN, OUT, File, plan_on, rows_of, write

DEDUP = {"dedup": {"columns": ["question"]}}
#: What is equal once it is normalised.
QUESTIONS = ["why", "Why ", "how does it work", "How  does it\twork", "ＷＨＹ", "x", "", None]


class Round(NamedTuple):
    """What happens before a run, and where that run ends (None: by itself)."""

    written: list[File]
    crash_at: int | None
    after: bool


class Story(NamedTuple):
    sections: dict[str, Any]
    rounds: list[Round]
    in_flight: int
    seed: int


def files(names: st.SearchStrategy[str], least: int = 0) -> st.SearchStrategy[File]:
    questions = st.lists(st.sampled_from(QUESTIONS), min_size=least, max_size=7).map(
        lambda more: ["what", *more]
    )
    return st.builds(File, name=names, questions=questions, row_group=st.integers(1, 5))


STORY = st.builds(
    Story,
    sections=st.fixed_dictionaries(
        {
            "shards": st.fixed_dictionaries({"rows": st.sampled_from([1, 2, 3, 8])}),
            "output": st.sampled_from([{"failed_rows": "inline"}, {"failed_rows": "separate"}]),
            "sampling": st.sampled_from([{"temperature": 0}, {"temperature": 1, "n": 2}]),
        }
    ),
    rounds=st.lists(
        st.builds(
            Round,
            written=st.lists(files(st.sampled_from(["b.parquet", "c.jsonl", "d.parquet"])), max_size=2),
            crash_at=st.one_of(st.integers(1, 120), st.integers(100, 400), st.none()),
            after=st.booleans(),
        ),
        min_size=1,
        max_size=4,
    ),
    in_flight=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def loaded(sections: dict[str, Any], *steps: dict[str, Any]) -> Any:
    return load(
        job(
            f"{IN}/",
            OUT,
            **sections,
            steps=list(steps),
            errors={"max_error_rate": 1.0},
            model={"simulated": {"tokens_per_s": 1e9}},
        )
    )


@settings(
    max_examples=STORIES,
    deadline=None,
    derandomize=TIMES == 1,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
    database=None,
)
@given(story=STORY, first=files(st.just("a.parquet"), least=3))
@pytest.mark.timeout(0)
def test_what_stays_is_what_a_plain_reimplementation_keeps(story: Story, first: File) -> None:
    disk, graph = Disk(), Graph(story.seed, story.in_flight)
    write(disk, first)
    job_ = loaded(story.sections, DEDUP)
    crashes, lives = 0, []
    for chapter in (*story.rounds, Round([], None, False)):
        for file in chapter.written:
            if f"bucket/in/{file.name}" not in disk.objects:
                write(disk, file)
        # Kept: `in_process` tells processes by their ids, and Python gives those of dead objects out again.
        lives.append(Life(disk, chapter.crash_at, after=chapter.after))
        with in_process(lives[-1], graph):
            try:
                run(job_)
            except Crashed:
                crashes += 1
    event(f"crashes: {crashes}")
    with in_process(Life(disk), graph):
        graph.commit_zombies(all_of_them=True)
        verdict = verify(Storage(OUT), deep=True)
    assert verdict["ok"], verdict["problems"]
    assert verdict["finished"]
    kept, expected = rows_of(disk), expected_of(disk, story.sections)
    event(f"dropped: {len(expected.whole['data']) - len(expected.kept) > 0}")
    failed = [row for row in (*kept["data"], *kept["errors"]) if row["error_code"]]
    assert [row for row in kept["data"] if not row["error_code"]] == expected.kept
    assert sorted(row["row_id"] for row in failed) == expected.failed
    books_balance(disk, expected)


class Expected(NamedTuple):
    whole: dict[str, list[dict[str, Any]]]
    """What the same job writes without its `dedup`."""
    kept: list[dict[str, Any]]
    failed: list[str]


def expected_of(disk: Disk, sections: dict[str, Any]) -> Expected:
    """By a run without `dedup`, and one pass over its records in the order of this output's plan."""
    clean = Disk()
    clean.objects = {path: data for path, data in disk.objects.items() if path.startswith("bucket/in/")}
    with in_process(Life(clean), Graph(0, in_flight=1, faults=False)):
        run(loaded(sections))
    whole = rows_of(clean)
    plan = plan_on(disk)
    assert plan is not None
    spans = [(shard.ordinal, i, span) for shard in plan.shards for i, span in enumerate(shard.spans)]

    def place(row: dict[str, Any]) -> tuple[int, ...]:
        path, _, position = row["row_id"].rpartition("#")
        ordinal, number = next(
            (ordinal, number)
            for ordinal, number, span in spans
            if span.path == path and (span.unit == "file" or span.start <= int(position) < span.stop)
        )
        return ordinal, number, int(position), row["sample_index"]

    seen: set[str | None] = set()
    kept = []
    for row in sorted((row for row in whole["data"] if not row["error_code"]), key=place):
        question = {"Why ": "why", "ＷＨＹ": "why", "How  does it\twork": "how does it work"}.get(
            row["question"], row["question"]
        )
        if question not in seen:
            seen.add(question)
            kept.append(row)
    kept.sort(key=lambda row: (row["row_id"], row["sample_index"]))
    failed = [row["row_id"] for row in (*whole["data"], *whole["errors"]) if row["error_code"]]
    return Expected(whole, kept, sorted(failed))


def books_balance(disk: Disk, expected: Expected) -> None:
    footers = [
        part_of(io.BytesIO(data), path, path).footer
        for path, data in disk.objects.items()
        if path.startswith("bucket/out/data/part-")
    ]
    good = [row for row in expected.whole["data"] if not row["error_code"]]
    counts = [footer.stats.steps["dedup"] for footer in footers]
    assert sum(one["in"] for one in counts) == len(good)
    assert sum(one["out"] for one in counts) == len(expected.kept)
    assert sum(one["dropped"] for one in counts) == len(good) - len(expected.kept)
    rows = len({row["row_id"] for row in good}) - len({row["row_id"] for row in expected.kept})
    assert sum(footer.stats.rows_dropped for footer in footers) == rows
    stats = pq.read_table(io.BytesIO(disk.objects["bucket/out/stats/shards.parquet"]))
    assert sum(stats["rows_dropped"].to_pylist()) == rows
    keys = [path for path in disk.objects if path.startswith("bucket/out/.dray/dedup/keys/")]
    assert len(keys) <= len(footers)
