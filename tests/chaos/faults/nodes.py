"""Nodes of a cluster of several that go away."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable

from tests.chaos import processes
from tests.chaos.faults.kills import ENGINE_ACTOR
from tests.chaos.faults.registry import fault
from tests.chaos.result import Unexpected
from tests.chaos.trial import Trial
from tests.local.runs import ROOT


@fault("worker node removed", bounded=True)
def node_removed(trial: Trial) -> None:
    """As `ray stop` on it, or a scale-down, does."""
    _lose_a_node(trial, Cluster.remove)


@fault("worker node's raylet SIGKILL", bounded=True)
def node_sigkill(trial: Trial) -> None:
    _lose_a_node(trial, lambda _, raylet: os.kill(raylet, signal.SIGKILL))


@fault("worker node SIGTERM (preemption)", bounded=True)
def node_sigterm(trial: Trial) -> None:
    _lose_a_node(trial, lambda _, raylet: os.kill(raylet, signal.SIGTERM))


class Cluster:
    """A head and worker nodes in a process of their own (`tests.chaos.nodes`)."""

    def __init__(self, trial: Trial, workers: int) -> None:
        log = trial.folder / "nodes.log"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.nodes", str(workers)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("wb"),
            text=True,
        )
        trial.others.append(self.process)
        trial.at_end.append(
            lambda: self.process.communicate(timeout=30)
        )  # closes its stdin, which ends the cluster
        line = self._answer()
        if not line:
            raise Unexpected(f"no cluster: {log.read_text()[-400:]}")
        told = json.loads(line)
        self.address: str = told["address"]
        self.raylets: list[int] = told["raylets"]

    def remove(self, raylet: int) -> None:
        """Take this node out of the cluster, in good order."""
        assert self.process.stdin
        self.process.stdin.write(f"remove {raylet}\n")
        self.process.stdin.flush()
        self._answer()

    def _answer(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline()


def _lose_a_node(trial: Trial, lose: Callable[[Cluster, int], None]) -> None:
    """One worker node more than engines; a node with an engine is lost at a random moment."""
    engines = 2 if trial.engine == "simulated" else 1
    cluster = Cluster(trial, workers=engines + 1)
    trial.prepare(
        cluster={"address": cluster.address, "num_cpus": None},
        pool={"replicas": engines, "cpus_per_engine": 2},
    )
    driver = trial.start()
    if trial.moment(driver):
        trial.find(ENGINE_ACTOR)
        busy = [raylet for raylet in cluster.raylets if processes.matching(ENGINE_ACTOR, raylet)]
        if busy:
            trial.strike()
            lose(cluster, trial.dice.choice(busy))
    trial.wait(driver, 0)
