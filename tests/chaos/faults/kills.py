"""Processes that are killed, or stand still."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import Any

from tests.chaos import processes
from tests.chaos.faults.registry import fault
from tests.chaos.trial import Trial

#: How Ray 2.60 titles its workers, and vLLM its engine.
ENGINE_ACTOR = r"^ray::\S*Generate"
OTHER_ACTOR = r"^ray::\S*(Prepare|Commit)"
ENGINE_CORE = r"^VLLM::EngineCore"
RAYLET = r"raylet/raylet "


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


@fault("engine hang (SIGSTOP of EngineCore)", engines=("vllm",), bounded=True)
def engine_core_sigstop(trial: Trial) -> None:
    _kill_one(trial, ENGINE_CORE, signal.SIGSTOP, errors={"engine_stall_s": 5})


def _kill_one(trial: Trial, pattern: str, kind: signal.Signals = signal.SIGKILL, **sections: Any) -> None:
    trial.prepare(**sections)
    driver = trial.start()
    if trial.moment(driver) and (found := trial.find(pattern, driver)):
        trial.strike()
        with contextlib.suppress(ProcessLookupError):
            os.kill(trial.dice.choice(found), kind)
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
