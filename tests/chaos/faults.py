"""The faults: how each strikes, and what Dray may say to it. One function per fault; `FAULTS` has them all by name.

A fault sets its stage (`prepare`), starts drivers, strikes at a random moment and sees the run to its end. It raises
`Unexpected` when a driver ends in a way that is not allowed; the rows are judged afterwards, by the reader.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tests.chaos import processes
from tests.chaos.trial import ROWS, SHARD_ROWS, Driver, Skip, Trial, Unexpected
from tests.local import fault_proxy
from tests.local.runs import ROOT, TINY

Engine = Literal["simulated", "vllm"]

#: How Ray 2.60 titles its workers, and vLLM its engine.
ENGINE_ACTOR = r"^ray::\S*Generate"
OTHER_ACTOR = r"^ray::\S*(Prepare|Commit)"
ENGINE_CORE = r"^VLLM::EngineCore"
RAYLET = r"raylet/raylet "


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault with its name in reports."""

    name: str
    title: str
    play: Callable[[Trial], None]
    engines: tuple[Engine, ...]
    bounded: bool
    """Whether the work repeated may not exceed the shards in flight. Not where an engine dies again and again."""
    s3: bool


FAULTS: dict[str, Fault] = {}


def fault(
    title: str,
    *,
    engines: tuple[Engine, ...] = ("simulated", "vllm"),
    bounded: bool = False,
    s3: bool = False,
) -> Callable[[Callable[[Trial], None]], Callable[[Trial], None]]:
    """Put a function among the `FAULTS`, by its name."""

    def wrap(play: Callable[[Trial], None]) -> Callable[[Trial], None]:
        name = play.__name__
        FAULTS[name] = Fault(name=name, title=title, play=play, engines=engines, bounded=bounded, s3=s3)
        return play

    return wrap


# ── Processes ────────────────────────────────────────────────────────────────────────────────────────────────────


@fault("driver SIGKILL", bounded=True)
def driver_sigkill(trial: Trial) -> None:
    """Run again at once, while the orphaned workers still commit, or when they are gone."""
    trial.prepare()
    driver = trial.start()
    if trial.moment(driver, early=True):
        trial.strike()
        driver.kill()
        if trial.dice.random() < 0.5:
            processes.left_behind(30.0, trial.own())
    trial.finish()


@fault("driver SIGTERM", bounded=True)
def driver_sigterm(trial: Trial) -> None:
    """Ends with 130 and is taken up."""
    trial.prepare(errors={"shutdown_grace_s": trial.dice.choice([0, 1, 20])})
    driver = trial.start()
    if trial.moment(driver):
        trial.strike()
        driver.process.send_signal(signal.SIGTERM)
        trial.wait(driver, 0, 130)
    trial.finish()


@fault("engine actor SIGKILL", bounded=True)
def actor_sigkill(trial: Trial) -> None:
    """Ray replaces the actor; the driver notices nothing."""
    _kill_one(trial, ENGINE_ACTOR)


@fault("prepare or commit actor SIGKILL", bounded=True)
def stage_actor_sigkill(trial: Trial) -> None:
    _kill_one(trial, OTHER_ACTOR)


@fault("EngineCore SIGKILL", engines=("vllm",), bounded=True)
def engine_core_sigkill(trial: Trial) -> None:
    _kill_one(trial, ENGINE_CORE)


def _kill_one(trial: Trial, pattern: str) -> None:
    trial.prepare()
    driver = trial.start()
    if trial.moment(driver) and (found := trial.find(pattern, driver)):
        trial.strike()
        with contextlib.suppress(ProcessLookupError):
            os.kill(trial.dice.choice(found), signal.SIGKILL)
    trial.wait(driver, 0)


@fault("engine hang (SIGSTOP of EngineCore)", engines=("vllm",), bounded=True)
def engine_core_sigstop(trial: Trial) -> None:
    trial.prepare(errors={"engine_stall_s": 5})
    driver = trial.start()
    if trial.moment(driver) and (found := trial.find(ENGINE_CORE, driver)):
        trial.strike()
        with contextlib.suppress(ProcessLookupError):
            os.kill(trial.dice.choice(found), signal.SIGSTOP)
    trial.wait(driver, 0)


@fault("raylet killed (the driver's own)", bounded=True)
def raylet_sigkill(trial: Trial) -> None:
    """The driver's cluster is gone: it has to end, in bounded time, and the next run takes up the rest."""
    trial.prepare()
    driver = trial.start()
    if trial.moment(driver) and (found := trial.find(RAYLET, driver)):
        trial.strike()
        os.kill(found[0], signal.SIGKILL)
    trial.finish(driver)


# ── Nodes ────────────────────────────────────────────────────────────────────────────────────────────────────────


@fault("worker node removed", bounded=True)
def node_removed(trial: Trial) -> None:
    with _several_nodes(trial) as (driver, raylet, remove):
        if raylet:
            trial.strike()
            remove(raylet)
    trial.wait(driver, 0)


@fault("worker node's raylet SIGKILL", bounded=True)
def node_sigkill(trial: Trial) -> None:
    with _several_nodes(trial) as (driver, raylet, _):
        if raylet:
            trial.strike()
            os.kill(raylet, signal.SIGKILL)
    trial.wait(driver, 0)


@fault("worker node SIGTERM (preemption)", bounded=True)
def node_sigterm(trial: Trial) -> None:
    with _several_nodes(trial) as (driver, raylet, _):
        if raylet:
            trial.strike()
            os.kill(raylet, signal.SIGTERM)
    trial.wait(driver, 0)


@contextlib.contextmanager
def _several_nodes(trial: Trial) -> Iterator[tuple[Driver, int | None, Callable[[int], None]]]:
    """A head and worker nodes, one more than engines; the raylet of a node with an engine, at a random moment."""
    engines = 2 if trial.engine == "simulated" else 1
    helper = subprocess.Popen(
        [sys.executable, "-m", "tests.chaos.nodes", str(engines + 1)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=(trial.folder / "nodes.log").open("wb"),
        text=True,
    )
    trial.others.append(helper)
    trial.at_end.append(lambda: helper.communicate(timeout=30))  # closes its stdin, which ends the cluster
    assert helper.stdin
    assert helper.stdout
    line = helper.stdout.readline()
    if not line:
        raise Unexpected(f"no cluster: {(trial.folder / 'nodes.log').read_text()[-400:]}")
    told = json.loads(line)
    trial.prepare(
        cluster={"address": told["address"], "num_cpus": None},
        pool={"replicas": engines, "cpus_per_engine": 2},
    )
    driver = trial.start()

    def tell(pid: int) -> None:
        assert helper.stdin
        assert helper.stdout
        helper.stdin.write(f"remove {pid}\n")
        helper.stdin.flush()
        helper.stdout.readline()

    raylet = None
    if trial.moment(driver):
        trial.find(ENGINE_ACTOR)
        busy = [pid for pid in told["raylets"] if processes.matching(ENGINE_ACTOR, pid)]
        raylet = trial.dice.choice(busy) if busy else None
    yield driver, raylet, tell


# ── Object storage ───────────────────────────────────────────────────────────────────────────────────────────────


@fault("S3: bursts of 503 SlowDown", s3=True)
def s3_slow_down(trial: Trial) -> None:
    _storms(trial, "slow_down", share=trial.dice.choice([0.5, 0.9, 1.0]))


@fault("S3: connection reset in mid-PUT", s3=True)
def s3_reset_within_put(trial: Trial) -> None:
    _storms(trial, "reset_within", share=trial.dice.choice([0.3, 0.6, 1.0]), method="PUT")


@fault("S3: connection reset after PUT, its answer lost", s3=True)
def s3_reset_after_put(trial: Trial) -> None:
    _storms(trial, "reset_after", share=trial.dice.choice([0.3, 0.6, 1.0]), method="PUT")


@fault("S3: slow (answers 3 s late)", s3=True)
def s3_slow(trial: Trial) -> None:
    _storms(trial, "stall", share=trial.dice.choice([0.2, 0.5, 0.8]))


def _storms(trial: Trial, kind: fault_proxy.Fault, share: float, method: str = "") -> None:
    """Three storms of up to four seconds, the first at a random moment; the run gets through them by itself."""
    trial.prepare(s3=True)
    proxy, dice = trial.proxy, trial.dice
    assert proxy is not None
    over = threading.Event()
    driver = trial.start()

    def weather() -> None:
        for _ in range(3):
            proxy.storm(kind, random.Random(dice.random()), share, method)
            if over.wait(dice.uniform(0.5, 4.0)):
                break
            proxy.calm()
            trial.strike()
            if over.wait(dice.uniform(0.2, 3.0)):
                break
        proxy.calm()

    blowing = threading.Thread(target=weather, daemon=True)
    if trial.moment(driver, early=True):
        blowing.start()
    try:
        trial.wait(driver, 0)
    finally:
        over.set()
        if blowing.ident:
            blowing.join()
    trial.result.struck = proxy.struck > 0
    trial.result.note = f"{proxy.struck} requests struck"


# ── The local machine ────────────────────────────────────────────────────────────────────────────────────────────


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


# ── Rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────


#: Contains tokens that no question has.
POISON = "\u2620\u2622 Say nothing."


@fault("a prompt that crashes the engine")
def poison_crashes(trial: Trial) -> None:
    """One or two rows get `engine_crash`, all others are answered."""
    if trial.engine == "simulated":
        _poisoned(trial, POISON, model={"simulated": {"dies_of": poison_token(trial.answers)}})
        return
    # On a CPU, vLLM 0.32 turns a seeded request's generator back after each chunk of a prefill, and dies of it. Seven
    # questions of 40 tokens fit into one step beside their answers; a prompt of 400 never does.
    _poisoned(
        trial,
        "Please think about this. " * 60,
        model={
            "engine": {
                "max_num_seqs": 7,
                "max_num_batched_tokens": 300,
                "enable_chunked_prefill": True,
                "enable_prefix_caching": False,
            }
        },
        # The most likely token each time, through the path that draws random numbers.
        sampling={"temperature": 0.5, "top_k": 1, "seed": 7},
    )


@fault("engine hang (a prompt that stalls the engine)", engines=("simulated",))
def poison_stalls(trial: Trial) -> None:
    """No token from any request: the watchdog ends the engine; the row gets `engine_crash` in the end."""
    _poisoned(
        trial,
        POISON,
        model={"simulated": {"stalls_of": poison_token(trial.answers)}},
        errors={"engine_stall_s": 3},
    )


def _poisoned(trial: Trial, poison: str, **sections: Any) -> None:
    rows = trial.dice.sample(range(ROWS), trial.dice.choice([1, 1, 2]))

    def edit(questions: list[str | None]) -> None:
        for row in rows:
            questions[row] = poison

    trial.prepare(edit=edit, **sections)
    trial.errors = {trial.row_name(row): frozenset({"engine_crash"}) for row in rows}
    driver = trial.start()
    trial.wait_until(lambda: trial.begun() or not driver.running, 120, "nothing began")
    trial.strike()
    trial.wait(driver, 0)
    trial.result.note = f"{len(rows)} poisonous rows"


@fault("5 % random row errors", bounded=True)
def row_errors(trial: Trial) -> None:
    """Null values, prompts that are too long, and a template that divides by zero; each row keeps its own error."""
    kinds: dict[str, tuple[str | None, str]] = {
        "null": (None, "missing_value"),
        "long": ("too long " * 600, "prompt_too_long"),
        "template": ("BOOM", "prompt_error"),
    }
    chosen = {
        row: kinds[trial.dice.choice(sorted(kinds))] for row in trial.dice.sample(range(ROWS), ROWS // 20)
    }

    def edit(questions: list[str | None]) -> None:
        for row, (question, _) in chosen.items():
            questions[row] = question

    template = "{% if question == 'BOOM' %}{{ 1 // 0 }}{% endif %}{{ question }}"
    trial.prepare(edit=edit, prompt={"template": template})
    trial.errors = {trial.row_name(row): frozenset({code}) for row, (_, code) in chosen.items()}
    driver = trial.start()
    if trial.dice.random() < 0.5 and trial.moment(driver):  # and half of the drivers are killed
        trial.strike()
        driver.kill()
        trial.finish()
    else:
        trial.wait(driver, 0)
        trial.result.struck = True


def poison_token(questions: dict[str, str]) -> int:
    """A token of `POISON` that no question has."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    known = {token for question in questions for token in tokenizer.encode(question).ids}
    strange = [token for token in tokenizer.encode(POISON).ids if token not in known]
    if not strange:
        raise ValueError("the tokenizer has no token for the poison alone")
    return int(strange[0])


assert SHARD_ROWS * 4 < ROWS  # `Trial.moment` leaves the last shards out
