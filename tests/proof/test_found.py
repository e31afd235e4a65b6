"""What the simulation found, each as the shortest story that shows it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from jobs import run
from jobs.lock import LOCK_NAME, OutputLock
from jobs.output import SPEC, check_claim
from pipelines.errors import OutputLocked, TransientStorageError
from pipelines.storage import Storage
from pipelines.storage_backend import ObjectInfo
from tests.proof.in_process import Disk, DiskBackend, Graph, Life, in_process
from tests.proof.test_any_run import FIRST, OUT, File, Round, Story, loaded, plan_on, rows_of, write

PARTS = "bucket/out/data/part-"


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture(autouse=True)
def _on_the_disk(disk: Disk) -> Iterator[None]:
    with in_process(Life(disk), Graph(0, faults=False)):
        yield


@pytest.fixture
def held(disk: Disk) -> Iterator[OutputLock]:
    with OutputLock(Storage(OUT), "run-a", heartbeat_s=3600) as lock:
        yield lock


def test_a_beat_whose_answer_is_lost_is_followed_by_another_version(
    disk: Disk, held: OutputLock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same content again has the same ETag, and looks like a holder that stands still."""
    done = DiskBackend.replace

    def lose(*given: Any) -> bool:
        done(*given)
        raise TransientStorageError("the answer was lost")

    with monkeypatch.context() as lossy:
        lossy.setattr(DiskBackend, "replace", lose)
        with pytest.raises(TransientStorageError):
            held._beat()
    before = disk.objects[f"bucket/out/{LOCK_NAME}"]
    held._beat()
    assert disk.objects[f"bucket/out/{LOCK_NAME}"] != before


def test_a_lock_that_went_away_while_we_slept_is_lost(disk: Disk, held: OutputLock) -> None:
    """Somebody took it, extended the plan, and gave it back."""
    del disk.objects[f"bucket/out/{LOCK_NAME}"]
    held._beat()
    held.check()  # deleted by hand: taken again
    del disk.objects[f"bucket/out/{LOCK_NAME}"]
    held._heard_at -= 31.0
    held._beat()
    with pytest.raises(OutputLocked):
        held.check()
    assert f"bucket/out/{LOCK_NAME}" not in disk.objects


def test_a_sleeper_asks_the_store_before_it_declares_success(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = simple_story(disk)

    def oversleep(*given: Any) -> None:
        """The lock changes hands, and the heartbeat has not seen it yet."""
        disk.objects[f"bucket/out/{LOCK_NAME}"] = OutputLock(Storage(OUT), "run-b")._mine.to_json()

    monkeypatch.setattr("jobs.runner.write_card", oversleep)
    with pytest.raises(OutputLocked, match="run-b"):
        run(told)
    assert "bucket/out/data/_SUCCESS" not in disk.objects


def test_failed_rows_of_another_driver_s_shards_are_left_alone(disk: Disk) -> None:
    """They are written before the part that refers to them."""
    told = simple_story(disk, output={"failed_rows": "separate"})
    run(told)
    of_ours = next(path for path in disk.objects if path.startswith("bucket/out/errors/"))
    of_nobody = of_ours[: -len("00000000.parquet")] + "00000000.parquet"
    of_others = "bucket/out/errors/part-000009-0123456789abcdef-00000000.parquet"
    disk.objects[of_nobody] = disk.objects[of_others] = b""
    del disk.objects["bucket/out/data/_SUCCESS"]
    run(told)
    errors = {path for path in disk.objects if path.startswith("bucket/out/errors/")}
    assert errors == {of_ours, of_others}


def test_a_claim_that_another_driver_makes_meanwhile_is_seen(disk: Disk) -> None:
    storage, life = Storage(OUT), Life(disk)

    class Meanwhile(DiskBackend):
        def list(self, folder: str) -> list[ObjectInfo]:
            record = {"format_version": 1, "fingerprint": "spec", "identity": {}}
            disk.objects[f"bucket/out/{SPEC}"] = json.dumps(record).encode()
            disk.objects[f"{PARTS}0"] = b""
            return super().list(folder)

    storage.__dict__["_backend"] = Meanwhile(life)
    check_claim(storage, "spec", {})


def test_a_superseded_part_that_a_dead_driver_s_worker_put_back_is_cleared(disk: Disk) -> None:
    told = simple_story(disk)
    run(told)
    old = {path: data for path, data in disk.objects.items() if path.startswith(PARTS)}
    write(disk, File(FIRST, ["what else", "why"], 1))
    run(told)
    rows = rows_of(disk)
    disk.objects |= old
    assert rows_of(disk) != rows
    run(told)
    assert rows_of(disk) == rows
    assert plan_on(disk) is not None


def simple_story(disk: Disk, **sections: Any) -> Any:
    settings = {"input": {"on_changed": "replace"}, "shards": {"rows": 8}, "output": {}, **sections}
    first = File(FIRST, ["what", None], 1)
    write(disk, first)
    return loaded(Story(settings, first, [Round([], None, False)], 1, 0))
