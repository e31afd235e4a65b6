"""One seeded trial: an input, a job by the command line, a fault at a random moment, and what stood there in the end.

`python -m tests.chaos.trial CONFIG.json RESULT.json` runs one in this process, whose descendants all end with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.chaos import processes
from tests.chaos.driver import Driver
from tests.chaos.result import Config, Result, Skip, Unexpected
from tests.chaos.stage import ENVIRONMENT, ROWS, SHARD_ROWS, Stage
from tests.chaos.verdict import settle
from tests.local.runs import ROOT

#: Seconds that one driver may take, and a whole trial: it would hang, not be slow, on a machine that is far too busy.
DRIVER_S = {"simulated": 400.0, "vllm": 900.0}
TRIAL_S = {"simulated": 1200, "vllm": 2400}
_FOREIGN = ("AWS_", "RAY_", "DRAY_", "CUDA_VISIBLE")


class Trial(Stage):
    """Drivers on their stage, and the moment at which a fault of `tests.chaos.faults` strikes."""

    def __init__(self, config: Config, folder: Path) -> None:
        super().__init__(config, folder)
        self.drivers: list[Driver] = []
        self.others: list[subprocess.Popen[Any]] = []
        self.strikes: list[float] = []

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
            raise Unexpected(f"{driver.log.name}: exit code {code}, not one of {codes}: {driver.last_words}")
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

    # ── The end ──────────────────────────────────────────────────────────────────────────────────────────────────

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
        settle(trial, bounded=fault.bounded)
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
            settle(trial, bounded=False)
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


if __name__ == "__main__":
    told = Config(**json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(asdict(run(told)), indent=1))
