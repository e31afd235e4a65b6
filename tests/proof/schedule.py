"""Threads that take turns: one seeded scheduler releases one of them at a time, in virtual time.

    schedule = Schedule(seed=7)
    schedule.spawn(Process("driver"), "main", work)     # `work` calls schedule.sleep, and whatever calls that
    schedule.run()

Only one thread runs at any moment, and only `sleep` (and the waiting of `Event`, `Queue` and `Thread`) hands over to
another, so a schedule is fully determined by its seed. Processes may be killed and frozen: a killed one's threads end
at their next step without having any further effect; a frozen one's threads take no step until it thaws.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import math
import queue
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from types import SimpleNamespace
from typing import Any

#: Steps after which a schedule counts as endless.
MOST_STEPS = 50_000


class Killed(BaseException):
    """The process of this thread is gone."""


@dataclass(eq=False)
class Process:
    """What is killed and frozen together."""

    name: str
    machine: str = "a"
    pid: int = 0
    alive: bool = True
    thaws_at: float = 0.0
    """Until then none of its threads takes a step."""


@dataclass(eq=False)
class Task:
    """One thread under the scheduler."""

    name: str
    process: Process
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    turns: int = 0
    finished: bool = False
    error: BaseException | None = None
    thread: threading.Thread | None = None


class Schedule:
    """See the module's docstring. `now` is virtual seconds since the start."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.now = 0.0
        self.tasks: list[Task] = []
        self.trace: list[str] = []
        self._current: Task | None = None
        self._due: list[tuple[float, float, int, int, Task]] = []
        self._order = itertools.count()
        self._yielded = threading.Semaphore(0)

    @property
    def process(self) -> Process | None:
        """Whose thread is running; None outside of the schedule."""
        return self._current.process if self._current else None

    def note(self, text: str) -> None:
        """A line for the trace, under the running thread's name."""
        who = f"{self._current.process.name}/{self._current.name}" if self._current else "-"
        self.trace.append(f"{self.now:9.3f} {who:24} {text}")

    def spawn(self, process: Process, name: str, target: Callable[[], object], after: float = 0.0) -> Task:
        """A thread of `process` that begins `after` seconds from now."""
        task = Task(name, process)

        def body() -> None:
            task.turn.acquire()
            try:
                if process.alive:
                    target()
            except Killed:
                pass
            except BaseException as error:  # noqa: BLE001 - raised again by `run`
                task.error = error
            finally:
                task.finished = True
                self._yielded.release()

        task.thread = threading.Thread(target=body, name=f"proof-{process.name}-{name}", daemon=True)
        task.thread.start()
        self.tasks.append(task)
        self._wake(task, self.now + after)
        return task

    def sleep(self, seconds: float) -> None:
        """Let others run; come back after so many virtual seconds. Outside of the schedule: no pause at all."""
        if self._current is not None:
            self._pause(self.now + seconds)

    def kill(self, process: Process) -> None:
        """SIGKILL."""
        self.note(f"kill {process.name}")
        process.alive = False
        process.thaws_at = 0.0
        for task in self.tasks:
            if task.process is process and not task.finished and task is not self._current:
                self._wake(task, self.now)

    def freeze(self, process: Process, seconds: float) -> None:
        """SIGSTOP, or a suspended machine."""
        self.note(f"freeze {process.name} for {seconds:.0f} s")
        process.thaws_at = max(process.thaws_at, self.now + seconds)

    def run(self) -> None:
        """Until no thread has anything left to do. Raises the first error of a thread."""
        for _ in range(MOST_STEPS):
            task = self._next()
            if task is None:
                break
            self._step(task)
            if task.error is not None:
                self.close()
                raise task.error
        else:
            self.close()
            raise AssertionError(f"no end after {MOST_STEPS} steps, at {self.now:.0f} s")

    def close(self) -> None:
        """End every thread that still waits."""
        for task in self.tasks:
            task.process.alive = False
        for task in self.tasks:
            while not task.finished:
                self._step(task)

    # ── turns ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _next(self) -> Task | None:
        while self._due:
            due, _, _, turns, task = heapq.heappop(self._due)
            if task.finished or turns != task.turns:
                continue
            if task.process.thaws_at > due:
                self._wake(task, task.process.thaws_at)
                continue
            self.now = max(self.now, due)
            return task
        return None

    def _step(self, task: Task) -> None:
        task.turns += 1
        self._current = task
        task.turn.release()
        self._yielded.acquire()
        self._current = None

    def _wake(self, task: Task, at: float) -> None:
        # Equal times in random order: otherwise who was first would stay so in every schedule.
        if at < math.inf:
            heapq.heappush(self._due, (at, self.random.random(), next(self._order), task.turns, task))

    def _pause(self, until: float) -> None:
        task = self._current
        assert task is not None
        if task.process.alive:
            self._wake(task, until)
            self._yielded.release()
            task.turn.acquire()
        if not task.process.alive:
            raise Killed(task.process.name)

    # ── the standard library's names, for modules under test ────────────────────────────────────────────────────

    @property
    def time(self) -> Any:
        return SimpleNamespace(monotonic=lambda: self.now, time=lambda: self.now, sleep=self.sleep)

    @property
    def threading(self) -> Any:
        schedule = self

        class Event:
            def __init__(self) -> None:
                self._set = False
                self._waiting: list[Task] = []

            def is_set(self) -> bool:
                return self._set

            def set(self) -> None:
                self._set = True
                for task in self._waiting:
                    schedule._wake(task, schedule.now)

            def wait(self, timeout: float | None = None) -> bool:
                task = schedule._current
                if not self._set and task is not None:
                    self._waiting.append(task)
                    with contextlib.ExitStack() as after:
                        after.callback(self._waiting.remove, task)
                        schedule._pause(math.inf if timeout is None else schedule.now + timeout)
                return self._set

        class Thread:
            def __init__(
                self, *, target: Callable[[], object], name: str = "thread", daemon: bool = True
            ) -> None:
                self._target, self._name = target, name
                self._ended = Event()
                self.task: Task | None = None

            def start(self) -> None:
                assert schedule.process is not None

                def body() -> None:
                    try:
                        self._target()
                    finally:
                        self._ended.set()

                self.task = schedule.spawn(schedule.process, self._name, body)

            def join(self, timeout: float | None = None) -> None:
                self._ended.wait(timeout)

            def is_alive(self) -> bool:
                return not self._ended.is_set()

        def current_thread() -> Any:
            return SimpleNamespace(task=schedule._current)

        return SimpleNamespace(Event=Event, Thread=Thread, current_thread=current_thread)

    @property
    def queue(self) -> Any:
        event = self.threading.Event

        class SimpleQueue:
            def __class_getitem__(cls, item: Any) -> Any:
                return cls

            def __init__(self) -> None:
                self._items: deque[Any] = deque()
                self._arrived = event()

            def put(self, item: Any) -> None:
                self._items.append(item)
                self._arrived.set()

            def empty(self) -> bool:
                return not self._items

            def get(self, timeout: float | None = None) -> Any:
                if not self._items:
                    self._arrived = event()
                    self._arrived.wait(timeout)
                if not self._items:
                    raise queue.Empty
                return self._items.popleft()

        return SimpleNamespace(SimpleQueue=SimpleQueue, Empty=queue.Empty)
