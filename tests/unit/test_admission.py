"""The gate lets in what the policy and the KV cache allow, the oldest shard first, and never loses a place."""

from __future__ import annotations

import random
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.adaptive import Adaptive
from pipelines.admission import Candidate, Gate, admission_policy
from pipelines.settings import AdmissionSettings
from pipelines.waves import AdmissionPolicy, Continuous, Load, Wave


class Requests:
    """A line of requests with these KV-cache tokens; `running` is what it has in the engine."""

    def __init__(self, sizes: list[int]) -> None:
        self.waiting = deque(sizes)
        self.running: list[int] = []

    def __len__(self) -> int:
        return len(self.waiting)

    def peek(self, longest: bool) -> Candidate:
        if longest:
            at = self.waiting.index(max(self.waiting))
            self.waiting.rotate(-at)
        return Candidate(self.waiting[0], self.waiting[0])

    def start(self, kv_tokens: int) -> None:
        assert self.waiting.popleft() == kv_tokens
        self.running.append(kv_tokens)

    def fail(self, error: Exception) -> None:
        raise error


def room(policy: AdmissionPolicy, in_flight: int) -> int:
    """How many it lets in, with a crowd waiting."""
    load = Load(in_flight=in_flight, waiting=1_000)
    while policy.admits(load, fits=True):
        load.in_flight += 1
    return load.in_flight - in_flight


def test_wave_fills_to_high_and_waits_for_low() -> None:
    wave = Wave(high=8, low=4)
    assert room(wave, 0) == 8
    assert [room(wave, n) for n in (7, 6, 5)] == [0, 0, 0]
    assert room(wave, 4) == 4


def test_continuous_refills_each_slot() -> None:
    assert [room(Continuous(high=8), n) for n in (8, 7, 0)] == [0, 1, 8]


def test_the_last_requests_wait_for_no_watermark() -> None:
    wave = Wave(high=8, low=4)
    assert room(wave, 0) == 8
    assert not wave.admits(Load(in_flight=7, waiting=2), fits=True)
    assert wave.admits(Load(in_flight=7, waiting=1), fits=True)


def test_a_wave_that_the_kv_cache_ends_refills_at_its_own_share() -> None:
    wave = Wave(high=100, low=75)
    assert wave.admits(Load(in_flight=39, waiting=900), fits=True)
    assert not wave.admits(Load(in_flight=40, waiting=900), fits=False)
    assert not wave.admits(Load(in_flight=31, waiting=900), fits=True)
    assert wave.admits(Load(in_flight=30, waiting=900), fits=True)


def test_defaults_follow_the_engine() -> None:
    def policy(max_num_seqs: int, **settings: object) -> AdmissionPolicy:
        return admission_policy(AdmissionSettings.model_validate(settings), max_num_seqs, lambda: 0)

    assert policy(512) == Wave(high=512, low=384)
    assert policy(512, high=100, low=10) == Wave(high=100, low=10)
    assert policy(64, policy="continuous") == Continuous(high=64)
    adaptive = policy(64, policy="adaptive", high=32)
    assert isinstance(adaptive, Adaptive)
    assert adaptive.high == 32


def policies() -> st.SearchStrategy[AdmissionPolicy]:
    highs = st.integers(1, 12)
    return st.one_of(
        highs.map(Continuous),
        highs.map(lambda high: Adaptive(high, lambda: 0, lambda: 0.0)),
        highs.flatmap(lambda high: st.integers(0, high).map(lambda low: Wave(high=high, low=low))),
    )


@settings(deadline=None)
@given(
    shards=st.lists(st.lists(st.integers(1, 60), max_size=30), min_size=1, max_size=4),
    policy=policies(),
    kv_tokens=st.one_of(st.none(), st.integers(10, 200)),
    seed=st.integers(0, 2**16),
)
def test_every_request_runs_once_within_the_bounds(
    shards: list[list[int]], policy: AdmissionPolicy, kv_tokens: int | None, seed: int
) -> None:
    """Any shards, policies and sizes, requests that end in any order, shards that come late or give up."""
    gate = Gate(policy, kv_tokens)
    dice = random.Random(seed)
    lines = [Requests(sizes) for sizes in shards]
    late = list(enumerate(lines))
    given_up: list[Requests] = []
    ended = 0
    high = policy.high  # type: ignore[attr-defined]
    while True:
        running = [line for line in lines if line.running]
        assert gate.in_flight == sum(len(line.running) for line in lines) <= high
        assert gate.load.kv_tokens == sum(sum(line.running) for line in lines)
        assert kv_tokens is None or gate.in_flight <= 1 or gate.load.kv_tokens <= kv_tokens
        if late and (not running or dice.random() < 0.2):
            gate.enter(*late.pop(0))
        elif running and dice.random() < 0.02:
            line = dice.choice(running)
            gate.withdraw(line)
            line.waiting.clear()
            given_up.append(line)
        elif running:
            line = dice.choice(running)
            gate.leave(line.running.pop(dice.randrange(len(line.running))))
            ended += 1
        else:  # nothing in flight, nothing to come: nobody may be waiting
            break
    assert gate.load == Load()
    assert not any(line.waiting for line in lines)
    assert given_up or ended == sum(map(len, shards))


@settings(deadline=None)
@given(policy=policies(), waiting=st.integers(1, 40), seed=st.integers(0, 2**16))
def test_at_the_end_of_a_job_nothing_is_held_back(policy: AdmissionPolicy, waiting: int, seed: int) -> None:
    high = policy.high  # type: ignore[attr-defined]
    gate, line, dice = Gate(policy), Requests([1] * waiting), random.Random(seed)
    gate.enter(0, line)
    while gate.in_flight:
        now_high = policy.watermarks.high if isinstance(policy, Adaptive) else high
        if gate.in_flight + len(line) <= now_high:
            assert not len(line)
        gate.leave(line.running.pop(dice.randrange(len(line.running))))
    assert not len(line)


def test_the_oldest_shard_goes_first() -> None:
    gate = Gate(Continuous(high=2))
    lines = {priority: Requests([1, 1]) for priority in (3, 1, 2)}
    blocker = Requests([1, 1])
    gate.enter(0, blocker)
    for priority, line in lines.items():
        gate.enter(priority, line)
    order = []
    for line in (blocker, blocker, lines[1], lines[1], lines[2], lines[2]):
        gate.leave(line.running.pop())
        order.append([priority for priority, other in sorted(lines.items()) if other.running])
    assert order == [[1], [1], [1, 2], [2], [2, 3], [3]]


def test_when_little_is_left_the_longest_of_all_shards_goes_first() -> None:
    gate = Gate(Continuous(high=4))
    first, old, young = Requests([9] * 4), Requests([1, 2, 1, 1]), Requests([5, 1, 1])
    for priority, line in enumerate((first, old, young)):
        gate.enter(priority, line)
    order = []
    for _ in range(8):  # seven wait beside three in flight, then six, which is little
        before = len(old), len(young)
        ending = next(line for line in (first, old, young) if line.running)
        gate.leave(ending.running.pop())
        order.append("old" if len(old) < before[0] else "young" if len(young) < before[1] else None)
    assert order == ["old", "young", "old", "old", "old", "young", "young", None]


def test_a_request_larger_than_the_kv_cache_runs_alone_and_nobody_overtakes_it() -> None:
    gate = Gate(Continuous(high=8), kv_tokens=10)
    line = Requests([4, 4, 50, 1])
    gate.enter(0, line)
    assert line.running == [4, 4]
    gate.leave(line.running.pop())
    assert line.running == [4]
    gate.leave(line.running.pop())
    assert line.running == [50]
    gate.leave(line.running.pop())
    assert line.running == [1]


def test_a_line_that_is_withdrawn_gives_its_turn_to_the_next() -> None:
    gate = Gate(Wave(high=2, low=1), kv_tokens=10)
    first, second = Requests([6, 6]), Requests([3])
    gate.enter(0, first)
    gate.enter(1, second)
    assert not second.running
    gate.withdraw(first)
    assert second.running == [3]
    assert gate.load.waiting == 0
    gate.withdraw(first)
    assert gate.load.waiting == 0


def test_low_belongs_to_waves() -> None:
    with pytest.raises(ValueError, match="low is the wave policy's; adaptive has none"):
        AdmissionSettings(policy="adaptive", low=3)
