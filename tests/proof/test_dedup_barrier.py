"""The comparing and rewriting of `dedup`, by single stories: a crash after each change, retries, lost keys, later files."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import jobs.dedup
import jobs.runner
from jobs import load, retry_failed, run
from jobs.inspect import report_of, verify
from jobs.repair import repair
from jobs.report import figures
from pipelines.errors import SpecError
from pipelines.part import part_of
from pipelines.storage import Storage
from tests.local.runs import job
from tests.proof.in_process import Crashed, Disk, Graph, Life, in_process
from tests.proof.test_any_run import IN, OUT, plan_on, rows_of

T = TypeVar("T")
DATA, KEYS, ROUNDS = (f"bucket/out/{name}/" for name in ("data", ".dray/dedup/keys", ".dray/dedup/rounds"))
SUCCESS = f"{DATA}_SUCCESS"
#: All processes so far: `in_process` tells them by their ids, and Python gives those of dead objects out again.
LIVES: list[Life] = []
#: Longer than what the first run takes.
LONG = "why " * 300


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def loaded(max_model_len: int = 4000, **sections: Any) -> Any:
    dedup = sections.pop("dedup", {"columns": ["topic"]})
    made = {
        "shards": {"rows": 2},
        "errors": {"max_error_rate": 1.0},
        "steps": [{"dedup": dedup}],
        "model": {"simulated": {"tokens_per_s": 1e9}, "engine": {"max_model_len": max_model_len}},
        **sections,
    }
    return load(job(f"{IN}/", OUT, **made))


def write(disk: Disk, name: str, rows: list[tuple[str, str]]) -> None:
    """(topic, question) of each row."""
    sink = io.BytesIO()
    table = pa.table({"topic": [row[0] for row in rows], "question": [row[1] for row in rows]})
    pq.write_table(table, sink, row_group_size=2)
    disk.objects[f"bucket/in/{name}"] = sink.getvalue()


def live(disk: Disk, act: Callable[[], Any], life: Life | None = None) -> bool:
    """Whether the process came to its end."""
    LIVES.append(life or Life(disk))
    with in_process(LIVES[-1], Graph(0, faults=False)):
        try:
            act()
        except Crashed:
            return False
    return True


def copy(disk: Disk) -> Disk:
    other = Disk()
    other.objects = dict(disk.objects)
    return other


def topics(disk: Disk) -> list[tuple[str, str, str | None]]:
    """(file and row, topic, error) of what stands."""
    rows = rows_of(disk)
    found = [*rows["data"], *rows["errors"]]
    return sorted((row["row_id"].rpartition("/")[2], row["topic"], row["error_code"]) for row in found)


def told(disk: Disk) -> dict[str, Any]:
    with in_process(Life(disk), Graph(0)):
        return verify(Storage(OUT), deep=True)


def sound(disk: Disk) -> bool:
    verdict = told(disk)
    assert verdict["ok"], verdict["problems"]
    assert verdict["finished"]
    return True


def counts(disk: Disk) -> list[tuple[Any, ...]]:
    found = []
    for path in sorted(disk.objects):
        if path.startswith(f"{DATA}part-"):
            stats = part_of(io.BytesIO(disk.objects[path]), path, path).footer.stats
            assert stats.balanced
            found.append((stats.rows_in, stats.rows_ok, stats.rows_failed, stats.rows_dropped, stats.steps))
    return found


def without_barrier(disk: Disk, act: Callable[[], Any]) -> None:
    """Until all that a run answers stands, and not a request further."""
    with mock.patch.object(jobs.runner, "drop_duplicates", side_effect=Crashed):
        assert not live(disk, act)


class Writing(Life):
    """A process that ends after so many changes of the disk. What it had read by then is gone with it."""

    def __init__(self, disk: Disk, changes: int) -> None:
        super().__init__(disk)
        self.left = changes

    def request(self, effect: Callable[[], T]) -> T:
        with self.disk.lock:
            if self.crashed:
                raise Crashed
            before = dict(self.disk.objects)
            done = effect()
            self.left -= self.disk.objects != before
            if not self.left:
                self.crashed = True
                raise Crashed
            return done


def crash_everywhere(disk: Disk, act: Callable[[], Any], again: Callable[[], Any]) -> int:
    """From this disk, `act` crashes after its first, second … change of it, and `again` makes of what it leaves what
    `act` makes undisturbed. Returns how many changes there were."""
    clean = copy(disk)
    assert live(clean, act)
    assert sound(clean)
    changes = 0
    while True:
        changes += 1
        trial = copy(disk)
        ended = live(trial, act, Writing(trial, changes))
        assert live(trial, again)
        assert topics(trial) == topics(clean)
        assert counts(trial) == counts(clean)
        assert keys_of(trial) == keys_of(clean)
        assert sound(trial)
        if ended:
            return changes - 1


def keys_of(disk: Disk) -> set[str]:
    return {path.removeprefix(KEYS)[:28] for path in disk.objects if path.startswith(KEYS)}


FILES = {
    "b.parquet": [("a", "q1"), ("A ", "q2"), ("b", "q3"), ("a", "q4")],
    "c.parquet": [("b", "q5"), ("c", "q6"), ("c", "q7"), ("d", "q8")],
}
KEPT = [("b.parquet#0", "a"), ("b.parquet#2", "b"), ("c.parquet#1", "c"), ("c.parquet#3", "d")]


@pytest.fixture
def disk() -> Disk:
    made = Disk()
    for name, rows in FILES.items():
        write(made, name, rows)
    return made


def test_the_first_of_each_topic_stays_and_the_report_says_so(disk: Disk) -> None:
    assert live(disk, lambda: run(loaded()))
    assert topics(disk) == [(*kept, None) for kept in KEPT]
    assert sound(disk)
    assert [(one[0], one[1], one[3]) for one in counts(disk)] == [(2, 1, 1), (2, 1, 1), (2, 1, 1), (2, 1, 1)]
    with in_process(Life(disk), Graph(0)):
        said = figures(report_of(Storage(OUT)))
    assert said["step dedup"] == "8 records: 4 out, 4 dropped"
    assert said["rows"] == "4 ok, 0 failed, 4 dropped of 8"


@pytest.mark.parametrize("failed_rows", ["inline", "separate"])
@pytest.mark.timeout(0)
def test_a_crash_after_each_change(disk: Disk, failed_rows: str) -> None:
    write(disk, "d.parquet", [("d", LONG), ("d", "q10"), ("e", "q11")])
    made = loaded(100, output={"failed_rows": failed_rows})
    without_barrier(disk, lambda: run(made))
    assert SUCCESS not in disk.objects
    assert len(topics(disk)) == 11
    assert crash_everywhere(disk, lambda: run(made), lambda: run(made, relist=False)) > 30


@pytest.mark.timeout(0)
def test_near_duplicates_of_what_goes_stay_whatever_crashes(disk: Disk) -> None:
    """a ~ b ~ c, a unlike c: c stays because b goes, also once b is gone."""
    disk.objects.clear()
    write(disk, "a.parquet", [("1 2 3 4 5 6 7 8", "q0"), ("3 4 5 6 7 8 9 10", "q1")])
    write(disk, "b.parquet", [("5 6 7 8 9 10 11 12", "q2"), ("5 6 7 8 9 10 11 12", "q3")])
    made = loaded(
        dedup={"columns": ["topic"], "method": "minhash", "threshold": 0.5, "ngram": 1}, shards={"rows": 1}
    )
    without_barrier(disk, lambda: run(made))
    crash_everywhere(disk, lambda: run(made), lambda: run(made))
    assert live(disk, lambda: run(made))
    assert [row[0] for row in topics(disk)] == ["a.parquet#0", "b.parquet#0"]


@pytest.mark.timeout(0)
def test_a_retry_behind_a_crash_leaves_nothing_without_one_that_stays(disk: Disk) -> None:
    """z ~ a ~ b, z unlike b: b went for a, so a must not go for z, which a retry puts before it."""
    disk.objects.clear()
    texts = {"z": "1 2 3 4 5 6 7 8", "a": "3 4 5 6 7 8 9 10", "b": "5 6 7 8 9 10 11 12"}
    write(disk, "a.parquet", [(texts["z"], LONG), (texts["a"], "q1")])
    write(disk, "b.parquet", [(texts["b"], "q2")])
    similar = {"columns": ["topic"], "method": "minhash", "threshold": 0.5, "ngram": 1}
    made = [loaded(length, dedup=similar, shards={"rows": 1}) for length in (100, 4000)]
    without_barrier(disk, lambda: run(made[0]))
    outcomes, changes, ended = set(), 0, False
    while not ended:
        changes += 1
        trial = copy(disk)
        ended = live(trial, lambda: run(made[0]), Writing(trial, changes))
        assert live(trial, lambda: retry_failed(made[1]))
        assert sound(trial)
        outcomes.add(tuple(text for _, text, _ in topics(trial)))
    # Before the round is written z is the first, and then b resembles nothing that stays.
    assert outcomes == {(texts["z"], texts["b"]), (texts["a"],)}


@pytest.mark.timeout(0)
def test_what_an_earlier_run_kept_stays(disk: Disk) -> None:
    assert live(disk, lambda: run(loaded()))
    before = {path: data for path, data in disk.objects.items() if path.startswith(f"{DATA}part-")}
    write(disk, "a.parquet", [("d", "q20"), ("e", "q21"), ("a", "q22"), ("E", "q23")])
    crash_everywhere(disk, lambda: run(loaded()), lambda: run(loaded()))
    assert live(disk, lambda: run(loaded()))
    assert topics(disk) == [("a.parquet#1", "e", None), *((*kept, None) for kept in KEPT)]
    assert before.items() <= disk.objects.items()
    assert len([path for path in disk.objects if path.startswith(ROUNDS)]) == 2
    whole = dict(disk.objects)
    assert live(disk, lambda: run(loaded()))  # nothing to do
    assert {path for path in whole if whole[path] != disk.objects.get(path)} <= {"bucket/out/.dray/lock.json"}


# ── Retries ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(params=["inline", "separate"])
def failed(request: pytest.FixtureRequest, disk: Disk) -> Any:
    """A finished output with failed rows, and its settings; what they would answer stands further behind."""
    write(disk, "a.parquet", [("a", LONG), ("f", LONG), ("g", "q30"), ("f", LONG)])
    output = {"failed_rows": request.param}
    assert live(disk, lambda: run(loaded(100, output=output)))
    assert sound(disk)
    return output


@pytest.mark.timeout(0)
def test_answers_of_a_retry_give_way_to_those_that_stand(disk: Disk, failed: Any) -> None:
    def retry() -> None:
        retry_failed(loaded(output=failed))

    crash_everywhere(disk, retry, retry)
    assert live(disk, retry)
    # Not row 0 of the first file, though it comes before the one that stands.
    assert topics(disk) == [
        ("a.parquet#1", "f", None),
        ("a.parquet#2", "g", None),
        *((*kept, None) for kept in KEPT),
    ]


def test_answers_that_a_dead_retry_has_left_are_told_and_compared(disk: Disk, failed: Any) -> None:
    success = disk.objects[SUCCESS]
    without_barrier(disk, lambda: retry_failed(loaded(output=failed)))
    assert SUCCESS not in disk.objects
    disk.objects[SUCCESS] = success  # its worker came after the next driver's end
    verdict = told(disk)
    assert not verdict["ok"]
    assert "not compared with the others yet: `dray resume` does that" in verdict["problems"][0]
    assert live(disk, lambda: run(loaded(100, output=failed), relist=False))
    assert sound(disk)
    assert len(topics(disk)) == 6


@pytest.mark.parametrize("failed_rows", ["inline", "separate"])
def test_a_part_that_changes_under_the_verdict_is_compared_again(disk: Disk, failed_rows: str) -> None:
    """The worker of a dead retry merges its answers after the keys were read."""
    write(disk, "a.parquet", [("g", "q30"), ("h", "q31"), ("f", LONG), ("g", "q32"), ("f", "q33")])
    output = {"failed_rows": failed_rows}
    without_barrier(disk, lambda: run(loaded(100, output=output)))
    other = copy(disk)
    without_barrier(other, lambda: retry_failed(loaded(output=output)))
    apply, seen = jobs.dedup._apply, []

    def apply_late(*given: Any) -> bool:
        if not seen:
            merged = {path for path in other.objects if path.startswith((DATA, "bucket/out/errors/"))}
            disk.objects.update({path: other.objects[path] for path in merged})
        seen.append(apply(*given))
        return seen[-1]

    with mock.patch.object(jobs.dedup, "_apply", apply_late):
        assert live(disk, lambda: run(loaded(100, output=output)))
    assert seen[0] is False
    assert sound(disk)
    assert topics(disk) == [
        ("a.parquet#0", "g", None),
        ("a.parquet#1", "h", None),
        ("a.parquet#4", "f", None),
        *((*kept, None) for kept in KEPT),
    ]


def test_a_retry_may_not_change_what_duplicates_are(disk: Disk, failed: Any) -> None:
    with in_process(Life(disk), Graph(0)), pytest.raises(SpecError, match=r"steps\.dedup"):
        retry_failed(loaded(output=failed, dedup={"columns": ["question"]}))


def test_an_accepted_output_stays_accepted_by_a_retry(disk: Disk, failed: Any) -> None:
    strict = loaded(100, output=failed, errors={"max_error_rate": 0.0})
    assert live(disk, lambda: retry_failed(strict))
    assert SUCCESS in disk.objects


# ── What may be lost ─────────────────────────────────────────────────────────────────────────────────────────────


def test_keys_that_are_lost_or_damaged_are_made_anew(disk: Disk) -> None:
    without_barrier(disk, lambda: run(loaded()))
    names = sorted(path for path in disk.objects if path.startswith(KEYS))
    assert len(names) == 4
    del disk.objects[names[0]]
    disk.objects[names[1]] = b"nonsense"
    swapped = disk.objects[names[2]]
    at = swapped.rindex(pq_key(disk, names[2]))
    disk.objects[names[2]] = swapped[:at] + bytes(16) + swapped[at + 16 :]
    disk.objects[names[3][:-11] + "00000.arrow"] = b"of an attempt that came second"
    assert live(disk, lambda: run(loaded()))
    assert topics(disk) == [(*kept, None) for kept in KEPT]
    assert len(keys_of(disk)) == 4
    assert not any(disk.objects[path].startswith(b"of an") for path in disk.objects)


def pq_key(disk: Disk, name: str) -> bytes:
    with pa.ipc.open_file(pa.BufferReader(disk.objects[name])) as reader:
        return bytes(reader.read_all()["key"][1].as_py())


def test_duplicates_that_come_back_are_found_and_dropped(disk: Disk) -> None:
    without_barrier(disk, lambda: run(loaded()))
    part = next(path for path in sorted(disk.objects) if path.startswith(f"{DATA}part-000002"))
    whole = disk.objects[part]
    assert live(disk, lambda: run(loaded()))
    disk.objects[part] = whole
    problems = told(disk)["problems"]
    assert len(problems) == 1
    assert (
        "1 records are duplicates (step dedup), the first is row sim://bucket/in/c.parquet#0" in problems[0]
    )
    with in_process(Life(disk), Graph(0)):
        repair(Storage(OUT), deep=True)
    assert SUCCESS not in disk.objects
    assert live(disk, lambda: run(loaded(), relist=False))
    assert sound(disk)
    assert topics(disk) == [(*kept, None) for kept in KEPT]


def test_a_part_that_is_run_anew_is_compared_again(disk: Disk) -> None:
    assert live(disk, lambda: run(loaded()))
    plan = plan_on(disk)
    assert plan is not None
    del disk.objects[f"{DATA}{plan.shards[2].part_name}"]
    assert live(disk, lambda: run(loaded()))
    assert topics(disk) == [(*kept, None) for kept in KEPT]
    assert sound(disk)


def test_samples_are_records(disk: Disk) -> None:
    """Of four samples of one row the first stays."""
    made = loaded(sampling={"temperature": 1.0, "n": 4})
    assert live(disk, lambda: run(made))
    rows = rows_of(disk)["data"]
    assert [(row["row_id"].rpartition("/")[2], row["sample_index"]) for row in rows] == [
        (row, 0) for row, _ in KEPT
    ]
    assert sound(disk)
