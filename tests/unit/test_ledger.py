"""The ledger of an output and a team's: what they tell of runs that ended, run, or are lost."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from jobs import shared_ledger
from jobs.cli import main
from jobs.ledger import Ledger, new_run_id, read_runs
from jobs.loading import load
from jobs.lock import LOCK_NAME, OutputLock
from jobs.metering import Meter, Usage, gpu_seconds_of_runs
from jobs.output import SPEC
from jobs.shared_ledger import Announcer, announcer, record_name
from jobs.team_runs import parse_since, team_runs
from pipelines.errors import EngineStartError, Interrupted, LimitReached, SpecError
from pipelines.shard_stats import Provenance
from pipelines.storage import Storage
from tests.unit.test_retry import settings, write_rows

USED = Usage(rows=10, failed=1, prompt_tokens=100, output_tokens=50, gpu_s=7200.0, cost_usd=6.0)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "out"))


# ── Beside the output ────────────────────────────────────────────────────────────────────────────────────────────


def test_the_end_has_the_totals(storage: Storage) -> None:
    with Ledger(storage, "run-1").recorded("run") as ended:
        ended.usage = lambda: USED
    (run,) = read_runs(storage)
    assert (run.state, run.usage) == ("succeeded", USED)


@pytest.mark.parametrize(
    ("error", "raised", "state"),
    [
        (LimitReached("enough"), LimitReached, "interrupted"),
        (EngineStartError("no"), EngineStartError, "failed"),
        (KeyboardInterrupt(), Interrupted, "interrupted"),
    ],
)
def test_how_a_run_ended(
    storage: Storage, error: BaseException, raised: type[BaseException], state: str
) -> None:
    def fails() -> None:
        with Ledger(storage, "run-1").recorded("run") as ended:
            ended.usage = lambda: USED
            raise error

    with pytest.raises(raised):
        fails()
    (run,) = read_runs(storage)
    assert (run.state, run.usage) == (state, USED)


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff\xfe", b'{"event": "ended"}', b'"text"', b"null"])
def test_a_damaged_record_is_named_and_left_out(
    storage: Storage, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("run-1", "run-2"):
        with Ledger(storage, name).recorded("run"):
            pass
    storage.write(".dray/runs/run-1/000001.json", damage)
    with caplog.at_level(logging.WARNING, logger="dray"):
        runs = read_runs(storage)
    assert [(run.run_id, run.state) for run in runs] == [("run-1", "running"), ("run-2", "succeeded")]
    assert ".dray/runs/run-1/000001.json" in caplog.text
    storage.write(".dray/runs/run-1/000000.json", damage)
    assert [run.run_id for run in read_runs(storage)] == ["run-2"]


# ── GPU seconds ──────────────────────────────────────────────────────────────────────────────────────────────────


def part(replica: str, *, ready: float, start_s: float, committed: float, run: str = "r") -> Provenance:
    return Provenance(
        run_id=run,
        job="j",
        replica=replica,
        device="H100",
        engine_ready_at=ready,
        engine_start_s=start_s,
        committed_at=committed,
    )


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_fixed_pool_holds_its_gpus_from_the_first_start_to_the_end() -> None:
    clock = Clock()
    meter = Meter("r", clock)
    meter.begin(gpus_per_engine=0.5, least=4, most=4)
    clock.now = 1200.0
    assert meter.gpu_s == 0.5 * 4 * 200  # nothing committed yet
    meter.take(part("a", ready=1060, start_s=50, committed=1150))  # started at 1010
    meter.take(part("b", ready=1070, start_s=50, committed=1190))
    meter.take(part("z", ready=500, start_s=50, committed=600, run="an earlier one"))
    assert meter.gpu_s == 0.5 * 4 * 190
    clock.now = 1300.0
    meter.end()
    clock.now = 5000.0
    assert meter.gpu_s == 0.5 * 4 * 290
    meter.begin(gpus_per_engine=0.5, least=4, most=4)
    clock.now = 5010.0
    meter.end()
    assert meter.gpu_s == 0.5 * 4 * 300


def test_an_elastic_pool_counts_each_engine_until_its_last_commit() -> None:
    clock = Clock()
    meter = Meter("r", clock)
    meter.begin(gpus_per_engine=2, least=1, most=8)
    for replica, last in (("a", 1100.0), ("b", 1150.0), ("c", 1200.0)):
        meter.take(part(replica, ready=1000.0, start_s=0, committed=last - 20))
        meter.take(part(replica, ready=1000.0, start_s=0, committed=last))
    clock.now = 1210.0
    meter.end()
    assert meter.gpu_s == 2 * (100 + 150 + 200)


def test_a_cpu_costs_no_gpu_time() -> None:
    meter = Meter("r")
    meter.begin(gpus_per_engine=0, least=3, most=3)
    meter.end()
    assert meter.gpu_s == 0
    assert (
        gpu_seconds_of_runs({}, [replace(part("a", ready=1, start_s=0, committed=9), device="cpu")], 1.0) == 0
    )
    assert gpu_seconds_of_runs({}, [part("a", ready=5, start_s=4, committed=9)], 0.5) == 4


# ── A team's ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    monkeypatch.setenv(shared_ledger.LEDGER_VARIABLE, str(tmp_path / "ledger"))
    return Storage(str(tmp_path / "ledger"))


def job_in(tmp_path: Path, **sections: Any) -> Any:
    write_rows(tmp_path / "in")
    return load({**settings(tmp_path), **sections})


def test_both_records_tell_who_what_and_at_what_price(tmp_path: Path, ledger: Storage) -> None:
    job = job_in(tmp_path, prompt={"system": "the secret", "template": "{{ text }}"})
    storage, run_id = Storage(job.spec.output.path), new_run_id()
    with Ledger(storage, run_id, announcer(job, storage)).recorded("run", fingerprint="f00d") as ended:
        ended.usage = lambda: USED
    names = [item.name for item in ledger.list()]
    assert names == [f"v1/{run_id[:8]}/{run_id}.end.json", f"v1/{run_id[:8]}/{run_id}.start.json"]
    end = json.loads(ledger.read(names[0]))
    assert end["usage"]["gpu_s"] == 7200.0
    assert (end["state"], end["command"], end["fingerprint"]) == ("succeeded", "run", "f00d")
    assert (end["job"], end["output"]) == (job.spec.name, storage.url())
    assert end["model"] == job.spec.model.source
    assert end["user"]
    assert end["host"]
    assert b"the secret" not in ledger.read(names[0]) + ledger.read(names[1])
    (run,) = team_runs(ledger)
    assert (run.run_id, run.state, run.usage) == (run_id, "succeeded", USED)


def test_no_variable_no_ledger(tmp_path: Path) -> None:
    job = job_in(tmp_path)
    assert announcer(job, Storage(job.spec.output.path)) is None


def test_passwords_in_urls_are_left_out(tmp_path: Path, ledger: Storage) -> None:
    assert shared_ledger.without_password("ftp://me:pw@host/x@y") == "ftp://host/x@y"


def test_a_ledger_that_cannot_be_written_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv(shared_ledger.LEDGER_VARIABLE, str(tmp_path / "file"))
    job = job_in(tmp_path)
    storage = Storage(job.spec.output.path)
    ledger = Ledger(storage, "20260101T000000-aaaaaa", announcer(job, storage))
    with caplog.at_level(logging.WARNING, logger="dray"), ledger.recorded("run"):
        pass
    assert "shared ledger" in caplog.text
    assert read_runs(storage)[0].state == "succeeded"


def test_a_ledger_that_hangs_costs_its_patience_only(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answer = threading.Event()
    create = Storage.create

    def slow(self: Storage, name: str, data: bytes) -> bool:
        if name.startswith("v1/"):
            answer.wait(30)
        return create(self, name, data)

    monkeypatch.setattr(Storage, "create", slow)
    hanging = Announcer(str(tmp_path / "ledger"), {"job": "j", "output": storage.url()}, close_s=0.2)
    began = time.monotonic()
    ledger = Ledger(storage, "20260101T000000-aaaaaa", hanging)
    with caplog.at_level(logging.WARNING, logger="dray"), ledger.recorded("run"):
        pass
    took = time.monotonic() - began
    answer.set()
    assert took < 5
    assert "does not answer" in caplog.text


@pytest.mark.slow
def test_a_run_without_an_end_is_running_lost_or_unknown(tmp_path: Path, ledger: Storage) -> None:
    outputs = {
        name: Storage(str(tmp_path / name)) for name in ("held", "free", "other", "dead", "far", "gone")
    }
    record = {"user": "u", "command": "run", "started_at": 1.0, "job": "j"}
    for number, (name, output) in enumerate(outputs.items()):
        run_id = f"20260101T00000{number}-{name}"
        url = "nosuch://x" if name == "gone" else output.url()
        content = {**record, "run_id": run_id, "output": url, "job": name}
        ledger.create(record_name(run_id, "start", 1.0), json.dumps(content).encode())
    mine = OutputLock(outputs["held"], "20260101T000000-held")
    far = replace(mine._mine, machine="elsewhere", host="far", heartbeat_s=0.2, run_id="20260101T000004-far")
    outputs["far"].write(LOCK_NAME, far.to_json())
    outputs["dead"].write(
        LOCK_NAME, replace(mine._mine, pid_started="1", run_id="20260101T000003-dead").to_json()
    )
    outputs["other"].write(LOCK_NAME, replace(mine._mine, run_id="another").to_json())
    with mine:
        states = {run.job: run.state for run in team_runs(ledger)}
    assert states == {
        "held": "running",
        "free": "lost",
        "other": "lost",
        "dead": "lost",
        "far": "lost",
        "gone": "unknown",
    }

    beating = threading.Event()

    def beat() -> None:
        number = 0
        while not beating.wait(0.1):
            number += 1
            outputs["far"].write(LOCK_NAME, replace(far, beat=number).to_json())

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        (run,) = team_runs(ledger, name="far")
    finally:
        beating.set()
        thread.join()
    assert run.state == "running"


@pytest.mark.parametrize(
    ("host", "claimed", "state"),
    [
        ("far", False, "unknown"),
        ("far", True, "lost"),
        (socket.gethostname(), False, "lost"),
        (None, False, "lost"),
    ],
)
def test_a_folder_of_another_host_that_is_not_here_tells_nothing(
    tmp_path: Path, ledger: Storage, host: str | None, claimed: bool, state: str
) -> None:
    run_id, output = "20260101T000000-aaaaaa", Storage(str(tmp_path / "out"))
    record = {
        "run_id": run_id,
        "job": "j",
        "output": output.url(),
        "user": "u",
        "command": "run",
        "started_at": 1.0,
    }
    ledger.create(record_name(run_id, "start", 1.0), json.dumps({**record, "host": host}).encode())
    if claimed:
        output.write(SPEC, b"{}")
    (run,) = team_runs(ledger)
    assert run.state == state


def fill(ledger: Storage) -> None:
    for day, job, state in (
        (20, "nightly-a", "failed"),
        (21, "adhoc", "succeeded"),
        (22, "nightly-b", "succeeded"),
    ):
        run_id = f"202611{day}T120000-abcdef"
        at = parse_since(f"2026-11-{day}T12:00:00+00:00")
        record = {
            "run_id": run_id,
            "job": job,
            "output": "/nowhere",
            "user": "u",
            "command": "run",
            "started_at": at,
            "usage": {**vars(USED)},
        }
        ledger.create(record_name(run_id, "start", 1.0), json.dumps(record).encode())
        ledger.create(
            record_name(run_id, "end", 1.0),
            json.dumps({**record, "state": state, "ended_at": at + 60}).encode(),
        )


def test_the_newest_first_and_what_is_asked_for(ledger: Storage) -> None:
    fill(ledger)

    def names(**how: Any) -> list[str]:
        return [run.job for run in team_runs(ledger, **how)]

    assert names() == ["nightly-b", "adhoc", "nightly-a"]
    assert names(name="nightly-*") == ["nightly-b", "nightly-a"]
    assert names(state="failed") == ["nightly-a"]
    assert names(since=parse_since("2026-11-21")) == ["nightly-b", "adhoc"]
    assert names(since=parse_since("2026-11-21T13:00:00Z")) == ["nightly-b"]
    assert parse_since("7d", now=10 * 86_400.0) == 3 * 86_400.0
    with pytest.raises(SpecError, match=r"--since.*yesterday"):
        parse_since("yesterday")


def test_a_run_that_waited_in_a_queue_is_found_by_its_start(ledger: Storage) -> None:
    run_id, at = "20261120T120000-abcdef", parse_since("2026-11-29T12:00:00Z")
    record = {"run_id": run_id, "job": "j", "output": "/x", "user": "u", "command": "run", "started_at": at}
    ledger.create(record_name(run_id, "start", at), json.dumps(record).encode())
    assert [run.run_id for run in team_runs(ledger, since=parse_since("2026-11-28"))] == [run_id]
    assert team_runs(ledger, since=parse_since("2026-11-30")) == []


@pytest.mark.parametrize("run_id", ["nightly-2026", "team/a b.end.json", "99999999", "../%2e"])
def test_a_run_id_of_somebody_elses_is_found(tmp_path: Path, ledger: Storage, run_id: str) -> None:
    job = job_in(tmp_path)
    storage = Storage(job.spec.output.path)
    announced = announcer(job, storage)
    assert announced is not None
    announced.started(run_id, "run", "f00d")
    announced.ended("succeeded", None)
    announced.close()
    today = f"{datetime.now(UTC):%Y%m%d}"
    assert all(item.name.startswith(f"v1/{today}/") for item in ledger.list())
    for since in (None, parse_since("1h")):
        (run,) = team_runs(ledger, since=since)
        assert (run.run_id, run.state) == (run_id, "succeeded")


def test_the_command_shows_them_and_names_what_is_damaged(ledger: Storage) -> None:
    fill(ledger)
    ledger.create("v1/20261123/20261123T000000-bad.start.json", b"{")
    ledger.create("v1/20261123/note.txt", b"")
    done = CliRunner().invoke(main, ["list", "--json"])
    assert done.exit_code == 0
    assert [run["job"] for run in json.loads(done.stdout)["runs"]] == ["nightly-b", "adhoc", "nightly-a"]
    assert "20261123T000000-bad.start.json is damaged" in done.stderr
    assert "note.txt is no record" in done.stderr
    table = CliRunner().invoke(main, ["list", str(ledger.root), "--state", "failed"]).stdout
    assert "nightly-a" in table
    assert "$6.00" in table
    assert "adhoc" not in table


def test_without_a_ledger_the_command_says_how_to_name_one() -> None:
    done = CliRunner().invoke(main, ["list"])
    assert done.exit_code == 2
    assert "DRAY_LEDGER" in done.stderr


def test_runs_of_one_second_stand_in_their_order(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    for at, run_id in ((1.0, "20261130T000000-ff"), (1.5, "20261130T000000-aa")):
        record = {"run_id": run_id, "event": "started", "at": at}
        storage.write(f".dray/runs/{run_id}/000000.json", json.dumps(record).encode())
    assert [run.run_id[-2:] for run in read_runs(storage)] == ["ff", "aa"]
