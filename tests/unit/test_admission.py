"""The gate lets in what the policy allows, in the order of the shards, and never loses a place."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.admission import Continuous, Gate, Wave, admission_policy
from pipelines.settings import AdmissionSettings


def test_wave_fills_to_high_and_waits_for_low() -> None:
    wave = Wave(high=8, low=4)
    assert wave.room(0) == 8
    assert wave.room(7) == 1
    assert wave.room(8) == 0
    assert [wave.room(n) for n in (7, 6, 5)] == [0, 0, 0]
    assert wave.room(4) == 4


def test_continuous_refills_each_slot() -> None:
    assert [Continuous(high=8).room(n) for n in (8, 7, 0)] == [0, 1, 8]


def test_defaults_follow_the_engine() -> None:
    assert admission_policy(AdmissionSettings(), 512) == Wave(high=512, low=384)
    assert admission_policy(AdmissionSettings(high=100, low=10), 512) == Wave(high=100, low=10)
    assert admission_policy(AdmissionSettings(policy="continuous"), 64) == Continuous(high=64)


@given(
    shards=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    high=st.integers(1, 12),
    low=st.integers(0, 12),
    seed=st.integers(0, 2**16),
)
def test_every_request_runs_once_and_never_more_than_high_at_once(
    shards: list[int], high: int, low: int, seed: int
) -> None:
    """Any shards, any watermarks, requests of any length: all get through, none above the high watermark."""
    gate = Gate(Wave(high=high, low=min(low, high)))
    dice = random.Random(seed)
    ran: list[tuple[int, int]] = []
    most = 0

    async def request(shard: int, number: int) -> None:
        nonlocal most
        most = max(most, gate.in_flight)
        for _ in range(dice.randrange(4)):
            await asyncio.sleep(0)
        ran.append((shard, number))

    async def shard(index: int, requests: int) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(requests):
                await gate.enter(index)
                group.create_task(request(index, number)).add_done_callback(lambda _: gate.leave())

    async def job() -> None:
        async with asyncio.timeout(10), asyncio.TaskGroup() as group:
            for index, requests in enumerate(shards):
                group.create_task(shard(index, requests))

    asyncio.run(job())
    assert sorted(ran) == [(i, n) for i, requests in enumerate(shards) for n in range(requests)]
    assert most <= high
    assert gate.in_flight == 0


@pytest.mark.parametrize("when", ["waiting", "admitted"])
def test_a_cancelled_shard_gives_its_place_back(when: str) -> None:
    async def scenario() -> None:
        gate = Gate(Continuous(high=1))
        await gate.enter(0)
        waiter = asyncio.create_task(gate.enter(1))
        await asyncio.sleep(0)
        if when == "admitted":
            gate.leave()  # the place is the waiter's, though it has not run yet
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter
        if when == "waiting":
            gate.leave()
        async with asyncio.timeout(1):
            await gate.enter(2)
        assert gate.in_flight == 1

    asyncio.run(scenario())


def test_the_oldest_shard_goes_first() -> None:
    async def scenario() -> list[int]:
        gate = Gate(Continuous(high=1))
        await gate.enter(0)
        order: list[int] = []

        async def one(priority: int) -> None:
            await gate.enter(priority)
            order.append(priority)
            gate.leave()

        tasks = [asyncio.create_task(one(priority)) for priority in (3, 1, 2)]
        await asyncio.sleep(0)
        gate.leave()
        await asyncio.gather(*tasks)
        return order

    assert asyncio.run(scenario()) == [1, 2, 3]
