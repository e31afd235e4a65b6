"""Whatever a job goes through, its rows are those of one clean run over its final input.

Hypothesis makes up a story: files of all formats and sizes, new and replaced ones between runs, runs that crash at any
request before or after its effect, graphs that lose, repeat and delay shards, workers that outlive their driver.
`PROOF=50` tells thousands of them.
"""

from __future__ import annotations

import gzip
import io
import json
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st

from jobs import load, run
from jobs.books import SUCCESS
from jobs.inspect import verify
from jobs.planning import Plan, load_plan
from pipelines.storage import Storage
from tests.local.runs import job
from tests.proof.in_process import Crashed, Disk, Graph, Life, in_process
from tests.proof.scale import STORIES, TIMES

IN, OUT = "sim://bucket/in", "sim://bucket/out"
SCHEMA = pa.schema([("id", pa.string()), ("question", pa.string())])
NONSENSE = "{nonsense"
#: What questions may hold besides words: lists for `EXPLODE`, whose empty elements fail.
LISTS = [{"parts": ["a", "", "b"]}, {"parts": []}, {"parts": ["c"] * 11}]
EXPLODE = [
    {"parse": {"column": "question", "json": {"parts": "list<string>"}, "on_error": "null"}},
    {"explode": {"column": "parts", "into": "part"}},
    {"parse": {"column": "part", "regex": "(?P<letter>[a-z])"}},
]
GATHER = [*EXPLODE, {"gather": {"columns": {"part": "every", "letter": "letters"}}}]
#: Another turn, about what is there by then; a row's is too long.
TURN = {
    "generate": {
        "column": "again",
        "conversation": "chat_2",
        "prompt": {
            "messages_column": "chat",
            "template": "{% if question == 'x' %}{{ question * 2000 }}{% endif %}Sure?",
        },
        "sampling": {"temperature": 0, "max_tokens": 8},
    }
}
#: Always there and never empty: a job without rows is refused.
FIRST = "a.parquet"


class File(NamedTuple):
    name: str
    questions: list[str | None]
    row_group: int

    def encode(self) -> bytes:
        rows = [{"id": f"r{i}", "question": question} for i, question in enumerate(self.questions)]
        if self.name.endswith(".parquet"):
            sink = io.BytesIO()
            pq.write_table(pa.Table.from_pylist(rows, SCHEMA), sink, row_group_size=self.row_group)
            return sink.getvalue()
        if ".jsonl" in self.name:
            lines = [json.dumps(row) if row["question"] != NONSENSE else NONSENSE for row in rows]
        else:
            lines = ["id,question", *(f"{row['id']},{quoted(row['question'] or '')}" for row in rows)]
        text = "".join(f"{line}\n" for line in lines).encode()
        return gzip.compress(text, mtime=0) if self.name.endswith(".gz") else text


def quoted(text: str) -> str:
    """A field of a CSV file."""
    return '"' + text.replace('"', '""') + '"' if '"' in text else text


class Round(NamedTuple):
    """What happens before a run, and where that run ends (None: by itself)."""

    written: list[File]
    crash_at: int | None
    after: bool


class Story(NamedTuple):
    settings: dict[str, Any]
    first: File
    rounds: list[Round]
    in_flight: int
    seed: int


def files(names: st.SearchStrategy[str]) -> st.SearchStrategy[File]:
    question = st.sampled_from(
        ["why", "how does it work", "skip", "x", NONSENSE, "", None, *map(json.dumps, LISTS)]
    )
    # A first row with a text: what a column's type is must not depend on which files came first.
    rows = st.lists(question, max_size=8).map(lambda more: ["what", *more])
    questions = st.one_of(rows, rows, st.just([]))
    some = st.builds(File, name=names, questions=questions, row_group=st.integers(1, 5))
    return some.filter(lambda file: file.questions or file.name != FIRST)


NAMES = st.sampled_from([FIRST, "b.parquet", "c.jsonl", "d.jsonl", "e.jsonl.gz", "f.csv"])
SETTINGS = st.fixed_dictionaries(
    {
        "input": st.sampled_from(
            [{"on_changed": "replace"}, {"on_changed": "replace", "filter": "question != 'skip'"}]
        ),
        "shards": st.fixed_dictionaries({"rows": st.sampled_from([1, 2, 3, 5, 8, "auto"])}),
        "output": st.sampled_from(
            [{"failed_rows": where, "conversation": "chat"} for where in ("inline", "separate")]
        ),
        "sampling": st.sampled_from([{"temperature": 0}, {"temperature": 1, "n": 2}]),
        "steps": st.sampled_from(
            [[], EXPLODE, GATHER, [TURN], [TURN, *GATHER], [*GATHER, TURN], [*EXPLODE, TURN, *GATHER[-1:]]]
        ),
    }
)
STORY = st.builds(
    Story,
    settings=SETTINGS,
    first=files(st.just(FIRST)),
    rounds=st.lists(
        st.builds(
            Round,
            written=st.lists(files(NAMES), max_size=3),
            crash_at=st.one_of(st.integers(1, 180), st.none()),
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


@settings(
    max_examples=STORIES,
    deadline=None,
    derandomize=TIMES == 1,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
    database=None,
)
@given(story=STORY)
@pytest.mark.timeout(0)
def test_the_rows_of_one_clean_run(story: Story) -> None:
    told = tell(story)
    clean = Disk()
    clean.objects = {path: data for path, data in told.objects.items() if path.startswith("bucket/in/")}
    with in_process(Life(clean), Graph(0, in_flight=1, faults=False)):
        run(loaded(story))
    with in_process(Life(told), Graph(0)):
        assert verify(Storage(OUT), deep=True)["problems"] == []
    rows, expected = rows_of(told), rows_of(clean)
    assert rows == expected
    for folder in ("data", "errors"):
        keys = [(row["row_id"], row["sample_index"]) for row in rows[folder]]
        assert len(keys) == len(set(keys))


def loaded(story: Story) -> Any:
    return load(
        job(
            f"{IN}/",
            OUT,
            **story.settings,
            errors={"max_error_rate": 1.0},
            model={"simulated": {"tokens_per_s": 1e9}},
        )
    )


def tell(story: Story) -> Disk:
    """The disk after the whole story and one more run; work is repeated for crashes only."""
    disk, graph = Disk(), Graph(story.seed, story.in_flight)
    job_ = loaded(story)
    write(disk, story.first)
    crashes = 0
    for chapter in (*story.rounds, Round([], None, False)):
        for file in chapter.written:
            write(disk, file)
        life = Life(disk, chapter.crash_at, after=chapter.after)
        with in_process(life, graph):
            try:
                run(job_)
            except Crashed:
                crashes += 1
        plan = plan_on(disk)
        if f"bucket/out/{SUCCESS}" in disk.objects:
            assert plan is not None
            assert all(f"bucket/out/data/{shard.part_name}" in disk.objects for shard in plan.shards)
    event(f"crashes: {crashes}")
    with in_process(Life(disk), graph):
        graph.commit_zombies(all_of_them=True)
    assert plan is not None
    planned = sum(len(segment.shards) for segment in plan.segments)
    assert graph.generated.total() <= planned + crashes * story.in_flight + graph.repeats
    return disk


def write(disk: Disk, file: File) -> None:
    disk.objects[f"{IN.removeprefix('sim://')}/{file.name}"] = file.encode()


def plan_on(disk: Disk) -> Plan | None:
    with in_process(Life(disk), Graph(0)):
        return load_plan(Storage(OUT))


def rows_of(disk: Disk) -> dict[str, list[dict[str, Any]]]:
    """All rows of an output by key, without what differs between two equal runs; read without Dray."""
    found: dict[str, list[dict[str, Any]]] = {"data": [], "errors": []}
    for path, data in disk.objects.items():
        folder = path.removeprefix("bucket/out/").partition("/")[0]
        if folder in found and path.endswith(".parquet"):
            found[folder] += pq.read_table(io.BytesIO(data)).drop_columns(["run_id"]).to_pylist()
    return {
        folder: sorted(rows, key=lambda row: (row["row_id"], row["sample_index"]))
        for folder, rows in found.items()
    }
