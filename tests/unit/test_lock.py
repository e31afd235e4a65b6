"""The output's lock, on a local folder with real processes; tests/local/test_storage_s3.py has threads on S3."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from jobs import lock as lock_module
from jobs.lock import LOCK_NAME, Holder, OutputLock
from pipelines.errors import OutputLocked, TransientStorageError
from pipelines.storage import Storage

pytestmark = pytest.mark.slow


FAST = {"heartbeat_s": 0.05, "stale_s": 0.5}
#: For several processes on few, busy cores: a beat may be late by more than FAST allows.
CROWDED = {"heartbeat_s": 0.1, "stale_s": 2.0}


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "out"))


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert [t for t in threading.enumerate() if t.name == "dray-lock"] == []


def record(storage: Storage) -> dict[str, Any]:
    return dict(json.loads(storage.read(LOCK_NAME)))


def leave_behind(storage: Storage, **changes: Any) -> None:
    """A lock whose holder says nothing any more."""
    mine = OutputLock(storage, "run-old", **FAST)._mine
    storage.write(LOCK_NAME, json.dumps({**asdict(mine), **changes}).encode())


def test_held_inside_the_block_and_gone_after(storage: Storage) -> None:
    with OutputLock(storage, "run-1", **FAST) as lock:
        lock.check()
        held = record(storage)
        assert (held["run_id"], held["pid"]) == ("run-1", os.getpid())
        assert held["host"]
        assert held["user"]
    assert not storage.exists(LOCK_NAME)


def test_released_when_the_block_fails(storage: Storage) -> None:
    with pytest.raises(ZeroDivisionError), OutputLock(storage, "run-1", **FAST):
        raise ZeroDivisionError
    assert not storage.exists(LOCK_NAME)


def test_the_heartbeat_counts(storage: Storage) -> None:
    with OutputLock(storage, "run-1", **FAST):
        first = record(storage)["beat"]
        time.sleep(0.5)
        assert record(storage)["beat"] > first + 2


def test_a_second_driver_stops_at_the_first_sign_of_life(storage: Storage, said: list[str]) -> None:
    with OutputLock(storage, "run-1", **FAST) as first:
        began = time.monotonic()
        with (
            pytest.raises(OutputLocked) as refused,
            OutputLock(storage, "run-2", heartbeat_s=0.05, stale_s=30, notify=said.append),
        ):
            pass
        assert time.monotonic() - began < 3, "one change is enough"
        message = str(refused.value)
        assert "\n" not in message
        for part in ("run-1", str(os.getpid()), first._mine.host, storage.root, LOCK_NAME, "wait", "UTC"):
            assert part in message
        assert len(said) == 1
        assert "run-1" in said[0]
        assert "30 s" in said[0]
        first.check()
    assert not storage.exists(LOCK_NAME)


def test_another_host_that_is_silent_is_taken_over_after_stale_s(storage: Storage, said: list[str]) -> None:
    leave_behind(storage, host="elsewhere", since=time.time() + 10**6)  # its clock is wrong: no matter
    began = time.monotonic()
    with OutputLock(storage, "run-2", **FAST, notify=said.append):
        assert time.monotonic() - began >= 0.5
        assert record(storage)["run_id"] == "run-2"
    assert "watching" in said[0]
    assert "taking over" in said[1]


def test_the_holder_s_own_rhythm_counts(storage: Storage) -> None:
    leave_behind(storage, host="elsewhere", heartbeat_s=0.4)
    began = time.monotonic()
    with OutputLock(storage, "run-2", heartbeat_s=0.05, stale_s=0.1):
        assert time.monotonic() - began >= 1.2, "three of its beats"


def test_a_dead_process_of_this_machine_is_taken_over_at_once(storage: Storage) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    leave_behind(storage, pid=gone.pid)
    began = time.monotonic()
    with OutputLock(storage, "run-2", heartbeat_s=0.05, stale_s=60):
        assert time.monotonic() - began < 2


def test_a_pid_that_another_process_has_now_is_dead(storage: Storage) -> None:
    leave_behind(storage, pid_started="1")
    began = time.monotonic()
    with OutputLock(storage, "run-2", heartbeat_s=0.05, stale_s=60):
        assert time.monotonic() - began < 2


@pytest.mark.parametrize("changes", [{"host": "elsewhere"}, {"machine": "other boot"}, {"machine": ""}])
def test_a_pid_of_another_machine_or_container_says_nothing(
    storage: Storage, changes: dict[str, str]
) -> None:
    leave_behind(storage, pid=2**22 + 1, **changes)
    holder = Holder.from_json(storage.read(LOCK_NAME))
    assert holder is not None
    assert not holder.is_dead()


def test_zombies_are_dead_and_hidden_processes_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    zombie = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
    assert lock_module._process_started(zombie.pid) == ""
    zombie.wait()
    assert lock_module._process_started(os.getpid()).isdigit()

    def hidden(path: Path) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(lock_module.Path, "read_text", hidden)
    assert lock_module._process_started(os.getpid()) == "hidden"


@pytest.mark.parametrize("content", [b"", b'{"run_id": "x"}', b"\xff"])
def test_an_unreadable_lock_is_watched_like_any_other(storage: Storage, content: bytes) -> None:
    storage.write(LOCK_NAME, content)
    began = time.monotonic()
    with OutputLock(storage, "run-2", **FAST):
        assert time.monotonic() - began >= 0.5


def test_a_lock_that_is_taken_from_us_is_lost(storage: Storage) -> None:
    with OutputLock(storage, "run-1", **FAST) as lock:
        leave_behind(storage, run_id="thief", token="other")
        assert lock.lost.wait(5)
        with pytest.raises(OutputLocked, match="thief"):
            lock.check()
    assert record(storage)["run_id"] == "thief", "another's lock is left alone"


def test_a_lock_that_was_deleted_by_hand_is_taken_again(storage: Storage) -> None:
    with OutputLock(storage, "run-1", **FAST) as lock:
        storage.delete(LOCK_NAME)
        deadline = time.monotonic() + 5
        while not storage.exists(LOCK_NAME) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert record(storage)["run_id"] == "run-1"
        lock.check()


def test_released_while_somebody_watches(storage: Storage) -> None:
    leave_behind(storage, host="elsewhere")
    threading.Timer(0.3, storage.delete, [LOCK_NAME]).start()
    began = time.monotonic()
    with OutputLock(storage, "run-2", heartbeat_s=0.05, stale_s=5):
        assert time.monotonic() - began < 3


def test_a_store_that_fails_for_a_while_loses_nothing(
    storage: Storage, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with OutputLock(storage, "run-1", **FAST, notify=said.append) as lock:
        with monkeypatch.context() as broken:

            def fail(name: str) -> None:
                raise TransientStorageError("503")

            broken.setattr(storage, "read_versioned", fail)
            time.sleep(0.3)
        beat = record(storage)["beat"]
        time.sleep(0.3)
        lock.check()
        assert record(storage)["beat"] > beat
    assert "cannot renew" in said[0]


def test_release_survives_a_store_that_is_gone(
    storage: Storage, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = OutputLock(storage, "run-1", heartbeat_s=60, notify=said.append)
    lock.acquire()

    def fail(name: str) -> None:
        raise TransientStorageError("503")

    monkeypatch.setattr(storage, "read_versioned", fail)
    lock.release()
    assert "cannot remove" in said[0]


def _take(root: str, start: Any, results: Any, done: Any) -> None:
    start.wait()
    try:
        with OutputLock(Storage(root), f"run-{os.getpid()}", **CROWDED, notify=lambda line: None) as lock:
            results.put(True)
            done.wait(30)
            lock.check()
    except OutputLocked:
        results.put(False)


@pytest.mark.parametrize("before", ["free", "dead", "silent"])
def test_of_many_processes_one_wins(storage: Storage, before: str) -> None:
    if before == "dead":
        leave_behind(storage, pid_started="1")
    if before == "silent":
        leave_behind(storage, host="elsewhere")
    context = multiprocessing.get_context("fork")
    start, results, done = context.Barrier(6), context.Queue(), context.Event()
    children = [context.Process(target=_take, args=(storage.root, start, results, done)) for _ in range(6)]
    for child in children:
        child.start()
    try:
        assert sorted(results.get(timeout=30) for _ in children) == [False] * 5 + [True]
    finally:
        done.set()
        for child in children:
            child.join()
    assert [child.exitcode for child in children] == [0] * 6
    assert not storage.exists(LOCK_NAME)


def test_a_killed_driver_s_lock_is_free_at_once(storage: Storage) -> None:
    context = multiprocessing.get_context("fork")
    start, results, done = context.Barrier(1), context.Queue(), context.Event()
    child = context.Process(target=_take, args=(storage.root, start, results, done))
    child.start()
    assert results.get(timeout=20)
    os.kill(child.pid or 0, signal.SIGKILL)
    child.join()
    began = time.monotonic()
    with OutputLock(storage, "run-2", heartbeat_s=0.05, stale_s=60):
        assert time.monotonic() - began < 2


def test_a_stopped_driver_finds_its_lock_lost(storage: Storage) -> None:
    """SIGSTOP is a suspended machine: silent, taken over, and it notices when it wakes."""
    context = multiprocessing.get_context("fork")
    start, results, done = context.Barrier(1), context.Queue(), context.Event()
    child = context.Process(target=_take, args=(storage.root, start, results, done))
    child.start()
    assert results.get(timeout=20)
    os.kill(child.pid or 0, signal.SIGSTOP)
    with OutputLock(storage, "run-2", **FAST):
        os.kill(child.pid or 0, signal.SIGCONT)
        time.sleep(1)
        done.set()
        assert results.get(timeout=20) is False
        child.join()
        assert record(storage)["run_id"] == "run-2"


def test_on_a_store_without_conditions(said: list[str]) -> None:
    storage = Storage("memory://lock-test")
    with OutputLock(storage, "run-1", **FAST) as lock:
        with pytest.raises(OutputLocked), OutputLock(storage, "run-2", **FAST, notify=said.append):
            pass
        time.sleep(0.2)
        lock.check()
    assert not storage.exists(LOCK_NAME)


def test_of_many_threads_one_wins(storage: Storage) -> None:
    locks = [OutputLock(storage, f"run-{i}", **CROWDED, notify=lambda line: None) for i in range(8)]

    def take(lock: OutputLock) -> bool:
        try:
            lock.acquire()
        except OutputLocked:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(take, locks))
    assert won.count(True) == 1
    locks[won.index(True)].release()
