"""One seeded trial: an input, a job by the command line, a fault at a random moment, and what stood there in the end.

`python -m tests.chaos.trial CONFIG.json RESULT.json` runs one in this process, whose descendants all end with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from tests.chaos import processes
from tests.chaos.reader import Place, check
from tests.chaos.watch import Watch
from tests.local.fault_proxy import FaultProxy
from tests.local.runs import ROOT, job

ROWS = 300
SHARD_ROWS = 25
#: Seconds that one driver may take, and a whole trial: it would hang, not be slow, on a machine that is far too busy.
DRIVER_S = {"simulated": 400.0, "vllm": 900.0}
TRIAL_S = {"simulated": 1200, "vllm": 2400}

ENVIRONMENT = {
    # Many drivers, workers and engines side by side: each computes on one thread.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "ARROW_NUM_THREADS": "2",
    "TOKENIZERS_PARALLELISM": "false",
    "RAYON_NUM_THREADS": "1",
    # Everything stays on loopback.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "VLLM_HOST_IP": "127.0.0.1",
    "NO_PROXY": "127.0.0.1,localhost",
    "no_proxy": "127.0.0.1,localhost",
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    # A dozen clusters share /dev/shm, and as many engines the memory (GiB).
    "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(100 * 2**20),
    "VLLM_CPU_KVCACHE_SPACE": "1",
}
_FOREIGN = ("AWS_", "RAY_", "DRAY_", "CUDA_VISIBLE")


class Unexpected(Exception):
    """A driver did something else than the fault allows."""


class Skip(Exception):
    """This machine cannot do the trial; says why."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """What a trial is told."""

    fault: str
    engine: str
    seed: int
    pool: str
    """JSON file: question → the answer of an undisturbed greedy run."""
    s3: dict[str, str] | None = None
    """`endpoint_url`, `key`, `secret` of the server that all trials share."""
    overrides: list[str] = field(default_factory=list)
    """`key=value` for every run with this engine."""
    keep: bool = False
    """Keep the folder of a sound trial, too."""


@dataclass(kw_only=True)
class Result:
    """One line of the JSON report. Rows unless it says otherwise."""

    fault: str
    engine: str
    seed: int
    store: str = "local"
    outcome: str = "failed"
    """`ok`, `failed` (see `problem`), `skipped` (see `note`)."""
    problem: str = ""
    note: str = ""
    struck: bool = False
    """The fault met a run in progress."""
    rows: int = 0
    lost: int = 0
    doubled: int = 0
    wrong: int = 0
    misjudged: int = 0
    repeated_rows: int | None = None
    """Rows that an engine was given beyond once; None where Dray keeps no record of attempts."""
    in_flight_rows: int | None = None
    """Rows of the shards that were begun and not committed when the fault struck, summed over strikes."""
    allowed_rows: int | None = None
    """What may be repeated: engines × shards each, per strike, or what was in flight, if commits lagged behind and that is
    more. Not for faults that repeat on purpose."""
    recover_s: float | None = None
    """From the strike until all that was in flight then stood committed (or the next part, where nothing was)."""
    seconds: float = 0.0
    drivers: list[int | None] = field(default_factory=list)
    """Exit codes, in order of their start."""
    left_behind: list[str] = field(default_factory=list)
    """Processes that ran on after the last driver, Ray's own agents apart."""
    folder: str = ""


class Driver:
    """One `dray run` as a subprocess, with what it says in a file."""

    def __init__(self, command: Sequence[str], log: Path, **popen: Any) -> None:
        self.log = log
        self.began = time.monotonic()
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=file, **popen
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    @property
    def words(self) -> str:
        return self.log.read_text(errors="replace")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Trial:
    """The stage on which a fault of `tests.chaos.faults` plays."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.engine = config.engine
        self.dice = random.Random(f"{config.fault} {config.engine} {config.seed}")
        self.result = Result(fault=config.fault, engine=config.engine, seed=config.seed, folder=str(folder))
        self.answers: dict[str, str] = json.loads(Path(config.pool).read_text())
        self.errors: dict[str, frozenset[str]] = {}
        self.drivers: list[Driver] = []
        self.others: list[subprocess.Popen[Any]] = []
        self.at_end: list[Callable[[], Any]] = []
        self.proxy: FaultProxy | None = None
        self.watch: Watch | None = None
        self.strikes: list[float] = []
        self.settings: dict[str, Any] = {}

    # ── Setting the stage ────────────────────────────────────────────────────────────────────────────────────────

    def prepare(
        self,
        *,
        s3: bool = False,
        output: Path | None = None,
        edit: Callable[[list[str | None]], None] | None = None,
        files: int = 2,
        **sections: Any,
    ) -> None:
        """Write the input and the job file. `edit` may change the questions in place; `sections` go into the job."""
        pool = sorted(self.answers)
        questions: list[str | None] = [*self.dice.sample(pool, ROWS)]
        if edit:
            edit(questions)
        if s3:
            self._in_a_bucket()
        else:
            self.source = Place(fs.LocalFileSystem(), f"{self.folder}/in", f"{self.folder}/in")
            target = str(output or self.folder / "out")
            self.output = Place(fs.LocalFileSystem(), target, target)
            self.source.files.create_dir(self.source.path)
        step = -(-ROWS // files)
        self.per_file = step
        for number in range(files):
            self.write(f"q{number:03d}.parquet", questions[number * step : (number + 1) * step])
        self.settings = self._settings(sections)
        self.job_file = self.folder / "job.yaml"
        self.job_file.write_text(json.dumps(self.settings))
        self.watch = Watch(self.output, every_s=0.3 if s3 else 0.05)
        self.watch.start()

    def row_name(self, number: int) -> str:
        """Row `number` of the input as the reader calls it."""
        return f"q{number // self.per_file:03d}.parquet#{number % self.per_file}"

    def write(self, name: str, questions: Sequence[str | None]) -> None:
        """Put one input file, whole."""
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"question": pa.array(questions, pa.string())}), sink)
        if self.source.url.startswith("s3://"):
            with self.source.files.open_output_stream(f"{self.source.path}/{name}") as file:
                file.write(sink.getvalue())
            return
        fresh = self.folder / "fresh"
        fresh.write_bytes(sink.getvalue().to_pybytes())
        fresh.rename(Path(self.source.path) / name)

    def _in_a_bucket(self) -> None:
        assert self.config.s3 is not None
        server = self.config.s3
        files = fs.S3FileSystem(
            endpoint_override=server["endpoint_url"].removeprefix("http://"),
            scheme="http",
            access_key=server["key"],
            secret_key=server["secret"],
            region="us-east-1",
            allow_bucket_creation=True,
        )
        bucket = f"chaos-{self.config.engine}-{self.config.fault}-{self.config.seed}".replace("_", "-")
        files.create_dir(bucket)
        self.result.store = "s3"
        self.source = Place(files, f"{bucket}/in", f"s3://{bucket}/in")
        self.output = Place(files, f"{bucket}/out", f"s3://{bucket}/out")
        stack = contextlib.ExitStack()
        self.proxy = stack.enter_context(FaultProxy(server["endpoint_url"]))
        self.at_end.append(stack.close)
        os.environ |= {
            "AWS_ENDPOINT_URL": self.proxy.url,
            "AWS_ACCESS_KEY_ID": server["key"],
            "AWS_SECRET_ACCESS_KEY": server["secret"],
            "AWS_REGION": "us-east-1",
        }

    def _settings(self, sections: Mapping[str, Any]) -> dict[str, Any]:
        if self.engine == "simulated":
            # Two engines, 300 answers of 18 tokens on average: about seven seconds of work.
            base: dict[str, dict[str, Any]] = {
                "model": {"simulated": {"tokens_per_s": 400}},
                "pool": {"replicas": 2, "shards_in_flight": 2},
            }
        else:
            # One engine, few answers at a time: some ten seconds of work.
            base = {
                "model": {"backend": "vllm", "engine": {"max_num_seqs": 8}},
                "pool": {"replicas": 1, "shards_in_flight": 2, "admission": {"policy": "continuous"}},
            }
        base["shards"] = {"rows": SHARD_ROWS}
        base["errors"] = {"max_error_rate": 0.1}
        base["cluster"] = {"num_cpus": 4}
        for name, section in sections.items():
            base[name] = _merged(base.get(name, {}), section)
        self.engines = int(base["pool"]["replicas"])
        self.shards_each = int(base["pool"]["shards_in_flight"])
        return job(self.source.url, self.output.url, **base)

    # ── Drivers ──────────────────────────────────────────────────────────────────────────────────────────────────

    def command(self, verb: str, *overrides: str) -> list[str]:
        """`dray VERB JOB …` with this Python."""
        dray = [sys.executable, "-m", "jobs.cli", verb, str(self.job_file)]
        return [*dray, *self.config.overrides, *overrides]

    def start(self, *overrides: str, env: Mapping[str, str] | None = None, **popen: Any) -> Driver:
        """`dray run` in the background."""
        log = self.folder / f"driver-{len(self.drivers)}.log"
        driver = Driver(self.command("run", *overrides), log, env={**os.environ, **(env or {})}, **popen)
        self.drivers.append(driver)
        return driver

    def wait(self, driver: Driver, *codes: int) -> int:
        """Wait for a driver's end. Raises Unexpected when it takes too long, ends otherwise, or shows a traceback."""
        limit = DRIVER_S[self.engine]
        try:
            code = driver.process.wait(limit)
        except subprocess.TimeoutExpired:
            raise Unexpected(f"{driver.log.name}: still running after {limit:.0f} s") from None
        if code not in codes:
            raise Unexpected(
                f"{driver.log.name}: exit code {code}, not one of {codes}: {_last_line(driver.words)}"
            )
        if "Traceback (most recent call last)" in driver.words:
            raise Unexpected(f"{driver.log.name}: shows a traceback")
        return code

    def finish(self, driver: Driver | None = None) -> None:
        """To the end: `driver` first, which may end with an error, and then once more, which may not."""
        if driver is not None and self.wait(driver, 0, 1) == 0:
            return
        self.wait(self.start(), 0)

    # ── The moment ───────────────────────────────────────────────────────────────────────────────────────────────

    def committed(self) -> int:
        assert self.watch is not None
        return len(self.watch.parts)

    def moment(self, driver: Driver, *, early: bool = False) -> bool:
        """Wait for a random moment of the run: so many parts and a little more; or, with `early`, at times its start-up.

        False when the run ended before it.
        """
        if early and self.dice.random() < 0.2:
            self.wait_until(
                lambda: not driver.running, self.dice.uniform(0.3, 10.0), "", or_else=lambda: None
            )
            return driver.running
        parts = self.dice.randrange(0, ROWS // SHARD_ROWS - 4)
        self.wait_until(
            lambda: not driver.running or (self.begun() if parts == 0 else self.committed() >= parts),
            DRIVER_S[self.engine],
            f"no {parts} parts",
        )
        self.wait_until(lambda: not driver.running, self.dice.uniform(0, 0.7), "", or_else=lambda: None)
        return driver.running

    def begun(self) -> bool:
        """An engine has begun to work."""
        assert self.watch is not None
        return bool(self.watch.begun or self.watch.parts)

    def wait_until(
        self,
        ready: Callable[[], bool],
        limit_s: float,
        why: str,
        or_else: Callable[[], None] | None = None,
    ) -> None:
        """Poll `ready`. After `limit_s` raises Unexpected(why), or calls `or_else`."""
        deadline = time.monotonic() + limit_s
        while not ready():
            if time.monotonic() > deadline:
                if or_else is None:
                    raise Unexpected(f"{why} after {limit_s:.0f} s")
                or_else()
                return
            time.sleep(0.02)

    def strike(self) -> None:
        """Note that the fault strikes now."""
        assert self.watch is not None
        with contextlib.suppress(OSError, ValueError):
            self.watch.look()
        self.strikes.append(time.monotonic())
        self.result.struck = True

    def find(self, pattern: str, driver: Driver | None = None, limit_s: float = 120.0) -> list[int]:
        """Pids of the driver's (or all) descendants whose command line matches, once there are any."""
        root = driver.pid if driver else None
        self.wait_until(
            lambda: bool(processes.matching(pattern, root)) or bool(driver and not driver.running),
            limit_s,
            f"no process {pattern}",
        )
        return processes.matching(pattern, root)

    # ── The verdict ──────────────────────────────────────────────────────────────────────────────────────────────

    def settle(self, *, bounded: bool) -> None:
        """Read what stands there, and count what it cost."""
        result, watch = self.result, self.watch
        assert watch is not None
        watch.stop()
        watch.look()
        found = check(self.source, self.output, self.answers, self.errors)
        for name in ("rows", "lost", "doubled", "wrong", "misjudged"):
            setattr(result, name, getattr(found, name))
        if not found.sound:
            result.problem = found.example or "no _SUCCESS"
        if watch.begun:
            sizes = dict.fromkeys(watch.parts, SHARD_ROWS)
            given = {
                shard: sum(SHARD_ROWS if rows is None else rows for _, rows in watch.begun.get(shard, []))
                for shard in sizes
            }
            result.repeated_rows = sum(max(0, given[shard] - rows) for shard, rows in sizes.items())
            result.in_flight_rows = sum(len(watch.in_flight(at)) for at in self.strikes) * SHARD_ROWS
            if bounded:
                by_settings = len(self.strikes) * self.engines * self.shards_each * SHARD_ROWS
                result.allowed_rows = max(by_settings, result.in_flight_rows)
                if result.repeated_rows > result.allowed_rows and not result.problem:
                    result.problem = (
                        f"{result.repeated_rows} rows were run again, {result.allowed_rows} may be"
                    )
        result.recover_s = max(
            (took for at in self.strikes if (took := self._recovered(at)) is not None), default=None
        )

    def _recovered(self, at: float) -> float | None:
        assert self.watch is not None
        parts = self.watch.parts
        waited_for = [parts[shard] for shard in self.watch.in_flight(at) if shard in parts]
        later = [when for when in parts.values() if when > at]
        if waited_for:
            return max(waited_for) - at
        return min(later) - at if later else None

    def own(self) -> set[int]:
        return {driver.pid for driver in self.drivers} | {other.pid for other in self.others}

    def leave(self) -> None:
        """Take down what stood around the drivers: proxy, mounts, clusters."""
        while self.at_end:
            with contextlib.suppress(Exception):
                self.at_end.pop()()

    def close(self) -> None:
        """End everything that the trial started."""
        self.leave()
        if self.watch is not None:
            self.watch.stop()
        for driver in self.drivers:
            if driver.running:
                driver.kill()
        self.result.drivers = [driver.process.poll() for driver in self.drivers]
        processes.end_all(self.own())


def run(config: Config) -> Result:
    """One trial in this process, which adopts whatever descends from it."""
    from tests.chaos.faults import FAULTS

    processes.adopt_orphans()
    for name in [name for name in os.environ if name.startswith(_FOREIGN)]:
        del os.environ[name]
    folder = Path(tempfile.mkdtemp(prefix="c", dir="/tmp"))  # short: Ray's sockets may have 107 characters
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ |= {
        **ENVIRONMENT,
        "RAY_TMPDIR": str(folder),
        "DRAY_LOGS": str(folder / "logs"),
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
    }
    fault = FAULTS[config.fault]
    trial = Trial(config, folder)
    result = trial.result
    began = time.monotonic()
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(TRIAL_S[config.engine])
    try:
        fault.play(trial)
        trial.settle(bounded=fault.bounded)
        trial.leave()
        result.left_behind = processes.left_behind(60.0, trial.own())
        if result.left_behind and not result.problem:
            result.problem = f"left behind: {result.left_behind[0][:120]}"
        result.outcome = "failed" if result.problem else "ok"
    except Skip as why:
        result.outcome, result.note = "skipped", str(why)
    except Unexpected as error:
        result.problem = str(error)
        # What stands there tells a delay from a loss.
        with contextlib.suppress(Exception):
            trial.settle(bounded=False)
            result.problem = str(error)
    except Exception as error:  # noqa: BLE001 - whatever broke, the table says so
        result.problem = f"{type(error).__name__}: {error}"
        (folder / "trial.log").write_text(traceback.format_exc())
    finally:
        signal.alarm(0)
        trial.close()
        result.seconds = round(time.monotonic() - began, 1)
        if result.outcome != "failed" and not config.keep:
            shutil.rmtree(folder, ignore_errors=True)
            result.folder = ""
    return result


def _too_long(signum: int, frame: Any) -> None:
    raise Unexpected("the trial took too long")


def _merged(base: Mapping[str, Any], over: Any) -> Any:
    if not isinstance(over, Mapping):
        return over
    merged = dict(base)
    for key, value in over.items():
        merged[key] = _merged(base.get(key, {}), value) if isinstance(base.get(key), Mapping) else value
    return merged


def _last_line(words: str) -> str:
    lines = [line for line in words.splitlines() if line.startswith("error")] or words.splitlines()
    return lines[-1][:400] if lines else "(no words)"


def spread(values: Sequence[float]) -> str:
    """`median (most)`, for the table."""
    return f"{statistics.median(values):.1f} ({max(values):.1f})" if values else "–"


if __name__ == "__main__":
    told = Config(**json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(asdict(run(told)), indent=1))
