"""`dray submit` and its kin against a Ray cluster of several nodes with a dashboard, as a user of another machine has it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import yaml

from jobs.lock import held_by
from pipelines.storage import Storage
from tests.chaos.stage import ENVIRONMENT
from tests.local.runs import DRAY, ROOT, TINY, rows_of, write_questions
from tests.processes import still_runs

pytestmark = [pytest.mark.long, pytest.mark.timeout(400)]

IN_FLIGHT = 3


@dataclass
class Nodes:
    """A cluster's head, its worker nodes, and the process that holds them: `tests.chaos.nodes`."""

    dashboard: str
    raylets: list[int]
    process: subprocess.Popen[str]

    def remove(self, raylet: int) -> None:
        assert self.process.stdin
        assert self.process.stdout
        print(f"remove {raylet}", file=self.process.stdin, flush=True)
        assert self.process.stdout.readline() == "done\n"


@contextmanager
def started(workers: int, head_cpus: int = 1) -> Iterator[Nodes]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # `python` on the nodes is this one.
    env = {**os.environ, **ENVIRONMENT, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with subprocess.Popen(
        [sys.executable, "-m", "tests.chaos.nodes", str(workers), str(port), str(head_cpus)],
        cwd=ROOT,
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        told = json.loads(process.stdout.readline())
        try:
            yield Nodes(told["dashboard"], told["raylets"], process)
        finally:
            assert process.stdin
            process.stdin.close()


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The dashboard's address."""
    with started(workers=1) as nodes:
        yield nodes.dashboard


def home(folder: Path, tokens_per_s: float) -> Path:
    """A user's folder: a job file, the package of its prompt, and packages with Dray's own names."""
    write_questions(folder / "in", rows=300)
    user = folder / "home"
    for name, text in {
        "prompts/ask.py": "def ask(row):\n    return [{'role': 'user', 'content': row['question']}]\n",
        "prompts/__init__.py": "",
        "jobs/__init__.py": "raise RuntimeError('the wrong jobs package')\n",
        "json.py": "raise RuntimeError('the wrong json module')\n",
        "secret.txt": "not to be shipped",
    }.items():
        (user / name).parent.mkdir(parents=True, exist_ok=True)
        (user / name).write_text(text)
    spec = {
        "name": "submitted",
        "input": {"path": str(folder / "in")},
        "prompt": {"function": "prompts.ask:ask"},
        "model": {
            "source": str(TINY),
            "backend": "simulated",
            "simulated": {"tokens_per_s": tokens_per_s},
        },
        "output": {"path": str(folder / "out")},
        "pool": {"shards_in_flight": IN_FLIGHT},
        "shards": {"rows": 20},
        "errors": {"shutdown_grace_s": 3},
    }
    (user / "job.yaml").write_text(yaml.safe_dump(spec))
    return user


def dray(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*DRAY, *args], cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


def dray_json(*args: str, cwd: Path) -> dict[str, Any]:
    done = dray(*args, "--json", cwd=cwd)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def parts(folder: Path) -> int:
    return len(list((folder / "out" / "data").glob("*.parquet")))


def test_a_job_is_shipped_with_its_package_and_nothing_else(cluster: str, tmp_path: Path) -> None:
    user = home(tmp_path, tokens_per_s=1500)
    first = dray_json("submit", "job.yaml", "--address", cluster, cwd=user)
    again = dray_json("submit", "job.yaml", "--address", cluster, cwd=user)
    assert not first["attached"]
    assert (again["attached"], again["run_id"]) == (True, first["run_id"])
    followed = dray("logs", first["run_id"], "-f", "--address", cluster, cwd=user)
    assert followed.returncode == 0, followed.stdout + followed.stderr
    assert "300 ok, 0 failed of 300" in followed.stdout
    rows = rows_of(tmp_path / "out")
    assert len(set(rows["row_id"].to_pylist())) == len(rows) == 300
    assert set(rows["run_id"].to_pylist()) == {first["run_id"]}
    state = dray_json("status", first["run_id"], "--address", cluster, cwd=user)["state"]
    assert state == "SUCCEEDED"


def test_a_run_that_was_stopped_and_one_whose_driver_died_are_resumed(cluster: str, tmp_path: Path) -> None:
    user = home(tmp_path, tokens_per_s=400)
    storage = Storage(str(tmp_path / "out"))

    def submit(*how: str) -> str:
        return str(dray_json("submit", "job.yaml", *how, "--address", cluster, cwd=user)["run_id"])

    def state(run_id: str) -> str:
        return str(dray_json("status", run_id, "--address", cluster, cwd=user)["state"])

    stopped = submit()
    wait_for(lambda: parts(tmp_path) >= 2)
    dray_json("cancel", stopped, "--address", cluster, cwd=user)
    wait_for(lambda: state(stopped) not in ("PENDING", "RUNNING"))
    log = dray("logs", stopped, "--address", cluster, cwd=user).stdout
    assert "committed shards are kept" in log
    before = parts(tmp_path)
    assert 2 <= before < 15

    killed = submit("--resume")
    wait_for(lambda: parts(tmp_path) >= before + 2)
    holder = held_by(storage)
    assert holder is not None
    assert holder.run_id == killed
    os.kill(holder.pid, signal.SIGKILL)
    wait_for(lambda: state(killed) == "FAILED")
    failed = dray("logs", killed, "-f", "--address", cluster, cwd=user)
    assert failed.returncode == 1

    last = submit("--resume", "model.simulated.tokens_per_s=5000")
    followed = dray("logs", last, "-f", "--address", cluster, cwd=user)
    assert followed.returncode == 0, followed.stdout + followed.stderr
    rows = rows_of(tmp_path / "out")
    assert len(set(rows["row_id"].to_pylist())) == len(rows) == 300
    assert set(rows["run_id"].to_pylist()) == {stopped, killed, last}


def test_a_node_that_is_removed_costs_a_run_its_shards_in_flight_only(tmp_path: Path) -> None:
    user = home(tmp_path, tokens_per_s=400)
    # No room on the head: the node that is left has the other stages already, and takes the engine as well.
    with started(workers=2, head_cpus=0) as nodes:
        run = dray_json("submit", "job.yaml", "--address", nodes.dashboard, cwd=user)["run_id"]
        wait_for(lambda: parts(tmp_path) >= 2)
        (first,) = {provenance["replica"] for provenance in provenances(tmp_path).values()}
        engine = psutil.Process(int(first.rpartition(":")[2]))
        raylet = engine.ppid()  # a worker's parent is its node's raylet
        assert raylet in nodes.raylets
        nodes.remove(raylet)
        psutil.wait_procs([engine], timeout=30)
        assert not still_runs(engine)
        before = provenances(tmp_path)
        assert 2 <= len(before) < 12

        followed = dray("logs", run, "-f", "--address", nodes.dashboard, cwd=user)

    assert followed.returncode == 0, followed.stdout + followed.stderr
    rows = rows_of(tmp_path / "out")
    assert len(set(rows["row_id"].to_pylist())) == len(rows) == 300
    assert set(rows["run_id"].to_pylist()) == {run}
    after = provenances(tmp_path)
    assert {name: after[name] for name in before} == before
    assert len({provenance["replica"] for provenance in after.values()}) == 2
    again = sum(provenance["attempt"] > 1 for provenance in after.values())
    assert 1 <= again <= IN_FLIGHT + 1  # and one whose answers were on their way to be committed


def provenances(folder: Path) -> dict[str, dict[str, Any]]:
    """Who made each part, by its name: of all attempts the one that counts, and its engine's process."""
    found = {}
    for part in (folder / "out" / "data").glob("*.parquet"):
        footer = json.loads(pq.read_metadata(part).metadata[b"dray"])
        found[part.name] = footer["provenance"]
    return found


def test_an_unknown_run_and_a_cluster_that_is_not_there_are_said(cluster: str, tmp_path: Path) -> None:
    unknown = dray("logs", "20261125T000000-abcdef", "--address", cluster, cwd=tmp_path)
    assert unknown.returncode == 1
    assert "knows no run '20261125T000000-abcdef'" in unknown.stderr
    nobody = dray("logs", "20261125T000000-abcdef", "--address", "http://127.0.0.1:9", cwd=tmp_path)
    assert nobody.returncode == 1
    assert "no answer from http://127.0.0.1:9" in nobody.stderr
