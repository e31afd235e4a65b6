"""Ways to ask a run to stop: signals to this process, and a word in the output's lock."""

from __future__ import annotations

import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.lock import LOCK_NAME, OutputLock, cancel, held_by
from jobs.stopping import StopRequest
from pipelines.errors import Interrupted
from pipelines.storage import Storage

FAST = {"heartbeat_s": 0.05, "stale_s": 0.5}
SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_asks_and_the_second_ends(number: signal.Signals) -> None:
    with StopRequest().on_signals() as stop, stop.graceful():
        signal.raise_signal(number)
        assert stop.reason == f"stopped by {number.name}"
        with pytest.raises(Interrupted, match=f"stopped by {number.name}"):
            signal.raise_signal(number)


@pytest.mark.parametrize("number", SIGNALS)
def test_before_anything_is_in_flight_the_first_signal_ends(number: signal.Signals) -> None:
    with StopRequest().on_signals() as stop:
        with pytest.raises(Interrupted, match=number.name):
            signal.raise_signal(number)
        with stop.graceful():
            pass
        with pytest.raises(Interrupted):
            signal.raise_signal(number)


def test_a_signal_after_another_request_ends_at_once() -> None:
    with StopRequest().on_signals() as stop, stop.graceful():
        stop.ask("cancelled by somebody")
        stop.ask("cancelled by another")
        assert stop.reason == "cancelled by somebody"
        with pytest.raises(Interrupted, match="SIGINT"):
            signal.raise_signal(signal.SIGINT)


def test_handlers_are_put_back_also_after_an_error() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(ZeroDivisionError), StopRequest().on_signals() as stop, stop.graceful():
        raise ZeroDivisionError if [signal.getsignal(n) for n in SIGNALS] != before else AssertionError
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_thread_has_no_signals_to_take() -> None:
    said: list[str] = []

    def work() -> None:
        with StopRequest().on_signals() as stop, stop.graceful():
            stop.ask("enough")
            said.append(stop.reason)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert said == ["enough"]


# ── `dray cancel` ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "out"))


def test_the_holder_hears_of_it_and_keeps_its_lock(storage: Storage) -> None:
    with OutputLock(storage, "run-1", **FAST) as lock:
        assert lock.cancelled_by == ""
        asked = cancel(storage)
        assert asked is not None
        assert asked.run_id == "run-1"
        deadline = time.monotonic() + 30
        while not lock.cancelled_by:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        beat = getattr(held_by(storage), "beat", 0)
        while getattr(held_by(storage), "beat", 0) < beat + 3:  # beats on, and does not forget
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert getattr(held_by(storage), "cancelled_by", "") == lock.cancelled_by != ""
        lock.check()
    assert not storage.exists(LOCK_NAME)


def test_the_next_run_is_not_cancelled(storage: Storage) -> None:
    with OutputLock(storage, "run-1", **FAST):
        cancel(storage)
    with OutputLock(storage, "run-2", **FAST) as lock:
        time.sleep(0.2)
        assert lock.cancelled_by == ""


def test_where_nobody_writes_there_is_nobody_to_ask(storage: Storage) -> None:
    assert cancel(storage) is None
    gone = OutputLock(storage, "run-1", **FAST)._mine
    storage.write(LOCK_NAME, replace(gone, pid_started="1").to_json())  # its process has ended
    before = storage.read(LOCK_NAME)
    assert cancel(storage) is None
    assert storage.read(LOCK_NAME) == before
    storage.write(LOCK_NAME, b"no lock of ours")
    assert cancel(storage) is None


def test_a_request_meets_the_holder_between_two_beats(storage: Storage) -> None:
    """A beat that comes between reading and writing is not overwritten: the request is made again."""
    with OutputLock(storage, "run-1", heartbeat_s=60.0, stale_s=600.0) as lock:

        class Late(Storage):
            beats = 3

            def replace(self, name: str, data: bytes, version: str) -> bool:
                if self.beats:
                    self.beats -= 1
                    lock._beat()
                return super().replace(name, data, version)

        asked = cancel(Late(storage.root))
        assert asked is not None
        assert asked.beat == 3
        lock._beat()
        assert lock.cancelled_by
        lock.check()
