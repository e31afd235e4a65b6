"""What surrounds a run: its disk, other drivers, clocks, and the files that it reads."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from pathlib import Path

from tests.chaos import processes
from tests.chaos.driver import Driver
from tests.chaos.faults.registry import fault
from tests.chaos.result import Skip, Unexpected
from tests.chaos.trial import Trial


@fault("disk full on a local output")
def disk_full(trial: Trial) -> None:
    """A file system of its own (tmpfs), filled to the last byte; then room again, and the run goes on."""
    disk = trial.folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if (done := subprocess.run(mount, capture_output=True, text=True)).returncode:
        raise Skip(f"cannot mount a tmpfs: {done.stderr.strip()}")
    trial.at_end.append(lambda: subprocess.run(["umount", "-l", str(disk)], capture_output=True))
    trial.prepare(output=disk / "out")
    driver = trial.start()
    filler = disk / "filler"
    if trial.moment(driver):
        trial.strike()
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            for size in (1 << 20, 1 << 12, 1):
                with contextlib.suppress(OSError):
                    while file.write(bytes(size)):
                        pass
        if trial.wait(driver, 0, 1) == 1 and "no space left on the device" not in driver.words:
            raise Unexpected(f"{driver.log.name}: does not say that the disk is full")
    else:
        trial.wait(driver, 0)
    filler.unlink(missing_ok=True)
    trial.finish()


@fault("two drivers started at once")
def two_drivers(trial: Trial) -> None:
    """On local disk or, with every second seed, on S3: one writes, the other says so, or finds nothing left to do."""
    trial.prepare(s3=trial.config.s3 is not None and trial.config.seed % 2 == 1)
    first = trial.start()
    trial.wait_until(
        lambda: False, trial.dice.choice([0.0, trial.dice.uniform(0, 4)]), "", or_else=lambda: None
    )
    second = trial.start()
    trial.strike()
    codes = [trial.wait(driver, 0, 1) for driver in (first, second)]
    refused = [d for d, code in zip((first, second), codes, strict=True) if code == 1]
    if len(refused) == 2:
        raise Unexpected(f"both drivers stopped: {refused[0].words[-300:]}")
    if refused and "is being written by" not in refused[0].words:
        raise Unexpected(f"{refused[0].log.name}: does not say who writes this output")


@fault("clock skew on the lock (±1 h, another host name)")
def clock_skew(trial: Trial) -> None:
    """The holder's clock is an hour off, on a machine of another name: a living holder keeps its lock, a dead one loses
    it after its heartbeat stood still."""
    trial.prepare()
    skew = trial.dice.choice([-3600, 3600])
    holder = _elsewhere(trial, skew)
    if trial.moment(holder):
        rival = trial.start()
        trial.strike()
        trial.wait(rival, 0, 1)
        # A holder that has done all its work may still be ending when its rival comes.
        met = "is being written by" in rival.words or "nothing to do" in rival.words
        if holder.running and not met:
            raise Unexpected(f"{rival.log.name}: did not meet the holder of the lock")
    if holder.running and trial.dice.random() < 0.7:
        trial.strike()
        holder.kill()
    else:
        trial.wait(holder, 0)
    trial.finish()


@fault("driver paused until another took over, then woken")
def driver_paused(trial: Trial) -> None:
    """SIGSTOP for longer than the lock's patience: the sleeper finds its lock gone and stops; its rows are not doubled."""
    trial.prepare()
    sleeper = _elsewhere(trial, 0)
    if trial.moment(sleeper):
        trial.strike()
        sleeper.process.send_signal(signal.SIGSTOP)
        rival = trial.start()
        lock = Path(trial.output.path) / ".dray" / "lock.json"
        held = lock.read_bytes() if lock.exists() else b""
        token = json.loads(held)["token"] if held else None

        def taken() -> bool:
            with contextlib.suppress(OSError, ValueError):
                return bool(json.loads(lock.read_bytes())["token"] != token)
            return not rival.running

        trial.wait_until(taken, 90.0, "the lock of a sleeping driver was not taken over")
        trial.wait_until(lambda: not rival.running, trial.dice.uniform(0, 12), "", or_else=lambda: None)
        sleeper.process.send_signal(signal.SIGCONT)
        trial.wait(rival, 0)
        if trial.wait(sleeper, 0, 1) == 1 and "was taken over" not in sleeper.words:
            raise Unexpected(f"{sleeper.log.name}: does not say that its lock was taken over")
    else:
        trial.wait(sleeper, 0)


def _elsewhere(trial: Trial, skew_s: int) -> Driver:
    """A driver whose host has another name, and whose clock is `skew_s` off."""
    if os.geteuid():
        raise Skip("needs root: a host name of its own for one driver")
    patch = trial.folder / "clock"
    patch.mkdir()
    # Imported by every Python at its start, so by the driver and all its workers. A function of a module, since Ray
    # sends `time.time` from process to process by name.
    (patch / "sitecustomize.py").write_text(
        "import time\n"
        "def skewed():\n"
        f"    return time.clock_gettime(time.CLOCK_REALTIME) + {skew_s}\n"
        "time.time = skewed\n"
    )
    path = os.pathsep.join([str(patch), os.environ["PYTHONPATH"]])
    return trial.start(
        env={"PYTHONPATH": path},
        preexec_fn=lambda: processes.on_another_host(f"other-{trial.config.seed}"),
    )


@fault("input file replaced between plan and run")
def input_replaced(trial: Trial) -> None:
    """After the plan is saved, in mid-run, or when all is done: Dray refuses, and with `replace` reads the new content."""
    trial.prepare(files=3)
    pool = sorted(trial.answers)
    driver = trial.start()
    when = trial.dice.choice(["planned", "running", "running", "done"])
    if when == "planned":
        plan = Path(trial.output.path) / ".dray" / "plan" / "000000.arrow"
        trial.wait_until(lambda: plan.exists() or not driver.running, 60, "no plan")
        driver.kill()
    elif when == "running":
        trial.moment(driver)
    else:
        trial.wait(driver, 0)
    trial.strike()
    number = trial.dice.randrange(3)
    trial.write(
        f"q{number:03d}.parquet", trial.dice.sample(pool, trial.dice.randrange(1, 2 * trial.per_file))
    )
    if when == "running":
        code = trial.wait(driver, 0, 1, 2)  # 2: seen while planning; 1: by the shards that read it
        if code and "changed since it was planned" not in driver.words:
            raise Unexpected(f"{driver.log.name}: does not say that a file changed")
    refusing = trial.start()
    trial.wait(refusing, 2)
    if "changed since it was planned" not in refusing.words:
        raise Unexpected(f"{refusing.log.name}: does not say that a file changed")
    trial.wait(trial.start("input.on_changed=replace"), 0)
