"""An object store that answers late, badly, or not at all."""

from __future__ import annotations

import random
import threading

from tests.chaos.faults.registry import fault
from tests.chaos.trial import Trial
from tests.local import fault_proxy


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
