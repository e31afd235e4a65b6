"""Ways to ask a run to stop, and what it does about it.

The first SIGINT or SIGTERM, or `dray cancel`, lets the shards in flight finish for `errors.shutdown_grace_s` seconds
while no new ones begin; a second signal ends the run where it stands. Before anything is in flight the first one does.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from pipelines.errors import Interrupted


class StopRequest:
    """Says whether the user or the system wants this run to end. One per run."""

    def __init__(self) -> None:
        self.reason = ""
        """Who asked; empty while nobody has."""
        self._graceful = False

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[StopRequest]:
        """Take SIGINT and SIGTERM; only in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in before:
            signal.signal(number, self._heard)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def graceful(self) -> Iterator[None]:
        """Within it the first signal only sets `reason`; the run looks at that and winds up."""
        self._graceful = True
        try:
            yield
        finally:
            self._graceful = False

    def ask(self, reason: str) -> None:
        """Ask from within the program; the first reason stays."""
        self.reason = self.reason or reason

    def _heard(self, number: int, frame: Any) -> None:
        reason = f"stopped by {signal.Signals(number).name}"
        if self.reason or not self._graceful:
            raise Interrupted(reason)
        self.ask(reason)
