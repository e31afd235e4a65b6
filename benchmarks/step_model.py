"""SIMULATED engines in virtual time, behind the real gate: what admission and order bring, without a GPU and in milliseconds.

An engine takes steps, each of which gives every running request one token. A step that only decodes and fits a captured
CUDA graph is quick; one that also prefills prompts, or holds more requests than the graphs, pays for its launches. KV cache
that runs out preempts the latest request, which is computed again. Nothing here says how fast a real model is: the curves
below are fitted to a few measured points, and show which policy suits which shape.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from pipelines.admission import Candidate, Gate
from pipelines.lengths import HELD, Lengths, Rows
from pipelines.settings import SamplingSettings
from pipelines.waves import AdmissionPolicy


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Seconds of a step, and the engine's limits."""

    graph_s: float
    """A step that replays a captured graph, beside `request_s`."""
    launch_s: float
    """More for each request in one that does not: prefill in it, or more than `graphs` requests."""
    request_s: float
    """More for each request in the batch."""
    prefill_s: float
    """More for each prompt token in the batch."""
    graphs: int = 512
    max_num_seqs: int = 512
    batched_tokens: int = 16_384
    kv_tokens: int = 10**9

    def step_s(self, requests: int, prompt_tokens: int) -> float:
        launched = prompt_tokens > 0 or requests > self.graphs
        return (
            self.graph_s
            + self.launch_s * launched * requests
            + self.request_s * requests
            + self.prefill_s * prompt_tokens
        )

    def shrunk(self, by: int) -> Curve:
        """The same seconds per step and per turnover with fewer requests, which are what a simulation costs."""
        return replace(
            self,
            launch_s=self.launch_s * by,
            request_s=self.request_s * by,
            prefill_s=self.prefill_s * by,
            graphs=self.graphs // by,
            max_num_seqs=self.max_num_seqs // by,
        )


#: Fitted to design §5, one H200, 256 prompt tokens, 64–256 new ones. 0.5B: 25.2 k tokens/s continuously, 51.2 k in waves.
SMALL = Curve(graph_s=0.0055, launch_s=2.3e-5, request_s=4e-6, prefill_s=1e-6)
#: The same with 1,024 in flight, beyond the graphs: 28.1 k and 23.9 k.
BEYOND_GRAPHS = replace(SMALL, max_num_seqs=1024)
#: 7B at TP 2: 19.1 k and 22.7 k.
MEDIUM = Curve(graph_s=0.009, launch_s=1e-5, request_s=9e-6, prefill_s=9e-6)
#: 7B at TP 1: 14.5 k and 14.6 k.
LARGE = Curve(graph_s=0.009, launch_s=1.6e-6, request_s=1.4e-5, prefill_s=2.2e-5)
#: Nothing measured: leaving the graphs costs nothing, so each wave's gap only loses.
TRICKLE = Curve(graph_s=0.02, launch_s=0.0, request_s=1e-6, prefill_s=1e-6)
CURVES = {"small": SMALL, "beyond": BEYOND_GRAPHS, "medium": MEDIUM, "large": LARGE, "trickle": TRICKLE}


@dataclass(frozen=True, slots=True)
class Request:
    prompt: int
    answer: int
    kv_tokens: int
    """What the gate is told: of prompt and expected answer."""
    max_tokens: int | None = None
    """Of its own, where the row says so."""


class SimulatedLine:
    """`pipelines.admission.Line` of one shard; with `lengths`, the longest predicted answer first when little is left."""

    def __init__(
        self,
        engine: StepEngine,
        requests: Sequence[Request],
        lengths: Lengths | None,
        when_done: Callable[[], None],
    ) -> None:
        self._engine, self._requests = engine, requests
        self._lengths, self._when_done = lengths, when_done
        self._left, self._first = len(requests), -1
        rows = range(len(requests))
        if lengths:
            self._waiting = Rows(rows, self._prompt_tokens, lengths, self._max_tokens)
        else:  # all are of one class, which goes in its own order
            self._waiting = Rows(rows, lambda _: 1, _ALL_ALIKE)

    def __len__(self) -> int:
        return len(self._waiting)

    def peek(self, longest: bool) -> Candidate:
        row = self._first = self._waiting.first(longest)
        lengths = self._lengths
        expected = lengths.predict(self._prompt_tokens(row), self._max_tokens(row)) if lengths else 0.0
        return Candidate(expected, self._requests[row].kv_tokens)

    def start(self, kv_tokens: int) -> None:
        row = self._first
        self._waiting.take(row)
        self._engine.submit(self._requests[row], self)

    def fail(self, error: Exception) -> None:
        raise error

    def ended(self, request: Request) -> None:
        self._left -= 1
        if self._lengths:
            self._lengths.learn(request.prompt, request.answer, request.max_tokens)
        self._engine.gate.leave(request.kv_tokens)
        if not self._left:
            self._when_done()

    def _prompt_tokens(self, row: int) -> int:
        return self._requests[row].prompt

    def _max_tokens(self, row: int) -> int | None:
        return self._requests[row].max_tokens


_ALL_ALIKE = Lengths(SamplingSettings(), 4096)


@dataclass(order=True)
class _Running:
    ends: int
    """The step at whose end it has all its tokens."""
    order: int
    began: int = field(compare=False)
    """The step that prefilled it."""
    held: int = field(compare=False)
    """Tokens in the KV cache at that step's end."""
    request: Request = field(compare=False)
    line: SimulatedLine = field(compare=False)
    gone: bool = field(compare=False, default=False)


class StepEngine:
    """One engine and its gate; `advance` goes on to the next event."""

    def __init__(
        self,
        curve: Curve,
        policy: Callable[[StepEngine], AdmissionPolicy],
        *,
        kv_bound: bool = True,
        noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.curve = curve
        self.now = 0.0
        self.output_tokens = 0
        self.preemptions = 0
        self.most_in_flight = self.most_kv_tokens = 0
        self.gate = Gate(policy(self), curve.kv_tokens if kv_bound else None, lambda: self.now)
        self._noise, self._dice = noise, random.Random(seed)
        self._slow, self._slow_until = 1.0, 0.0
        self._step = 0
        self._order = itertools.count()
        self._prefill: deque[tuple[Request, SimulatedLine, int]] = deque()
        """What waits for its prompt to be computed, with the tokens that it had before it was preempted."""
        self._ends: list[_Running] = []
        self._latest: list[_Running] = []
        self._running = 0
        self._held = 0

    @property
    def idle(self) -> bool:
        return not self._running and not self._prefill

    def submit(self, request: Request, line: SimulatedLine) -> None:
        self._prefill.append((request, line, 0))
        self.most_in_flight = max(self.most_in_flight, self.gate.in_flight)
        self.most_kv_tokens = max(self.most_kv_tokens, self.gate.load.kv_tokens)

    def advance(self) -> None:
        """One step with prefill, or all steps up to the next end."""
        prompt_tokens, entering = self._take()
        steps = 1
        if not entering:
            steps = max(1, self._next_end() - self._step)
            if self._running:
                steps = max(1, min(steps, (self.curve.kv_tokens - self._held) // self._running))
        while self._held + steps * self._running > self.curve.kv_tokens and self._running > 1:
            self._preempt()
        batch = self._running + len(entering)
        self.now += steps * self.curve.step_s(batch, prompt_tokens) * self._slowness()
        self._step += steps
        self._held += steps * self._running
        self.output_tokens += steps * self._running
        for request, line, had in entering:
            held = request.prompt + had + 1
            running = _Running(
                self._step + request.answer - had - 1, next(self._order), self._step, held, request, line
            )
            heapq.heappush(self._ends, running)
            self._latest.append(running)
            self._running += 1
            self._held += held
            self.output_tokens += 1
        self._finish()

    def _take(self) -> tuple[int, list[tuple[Request, SimulatedLine, int]]]:
        tokens, taken, held = 0, [], self._held + self._running
        while self._prefill and self._running + len(taken) < self.curve.max_num_seqs:
            request, _, had = self._prefill[0]
            size = request.prompt + had
            if tokens and tokens + size > self.curve.batched_tokens:
                break
            if held + size + 1 > self.curve.kv_tokens and (self._running or taken):
                break
            taken.append(self._prefill.popleft())
            tokens, held = tokens + size, held + size + 1
        return tokens, taken

    def _next_end(self) -> int:
        while self._ends and self._ends[0].gone:
            heapq.heappop(self._ends)
        return self._ends[0].ends if self._ends else self._step + 1

    def _finish(self) -> None:
        while self._ends and (self._ends[0].gone or self._ends[0].ends <= self._step):
            running = heapq.heappop(self._ends)
            if running.gone:
                continue
            running.gone = True
            self._drop(running)
            running.line.ended(running.request)

    def _preempt(self) -> None:
        while self._latest[-1].gone:
            self._latest.pop()
        running = self._latest.pop()
        running.gone = True
        self._drop(running)
        self.preemptions += 1
        had = running.held - running.request.prompt + self._step - running.began
        self._prefill.appendleft((running.request, running.line, had))

    def _drop(self, running: _Running) -> None:
        self._running -= 1
        self._held -= running.held + self._step - running.began

    def _slowness(self) -> float:
        if self._noise and self.now >= self._slow_until:
            self._slow = self._dice.lognormvariate(0.0, self._noise)
            self._slow_until = self.now + 5.0
        return self._slow


def run_shards(
    engines: Sequence[StepEngine],
    shards: Iterable[Sequence[Request]],
    *,
    shards_in_flight: int = 3,
    learn: bool = False,
    until: Callable[[float], bool] = lambda _: False,
) -> float:
    """Hand `shards` out in order, as `pipelines.run` does; the virtual second at which the last engine is done.

    `learn`: when little is left, the longest predicted answers go first. `until`: stops early when true of the present second.
    """
    waiting = iter(shards)
    arrivals = itertools.count()
    lengths = {engine: Lengths(SamplingSettings(max_tokens=1024), 8192) for engine in engines if learn}

    def hand_out(engine: StepEngine) -> None:
        shard = next(waiting, None)
        if shard is not None:
            line = SimulatedLine(engine, shard, lengths.get(engine), lambda: hand_out(engine))
            engine.gate.enter(next(arrivals), line)

    for _ in range(shards_in_flight):
        for engine in engines:
            hand_out(engine)
    while True:
        busy = [engine for engine in engines if not engine.idle]
        if not busy:
            return max(engine.now for engine in engines)
        engine = min(busy, key=lambda engine: engine.now)
        if until(engine.now):
            return engine.now
        engine.advance()


def uniform(
    dice: random.Random, rows: int, prompt: int = 256, shortest: int = 64, longest: int = 256
) -> list[Request]:
    """Rows of workload W1: prompts of one length, answers uniform."""
    expected = prompt + round(HELD * (shortest + longest) / 2)
    return [Request(prompt, dice.randint(shortest, longest), expected) for _ in range(rows)]
