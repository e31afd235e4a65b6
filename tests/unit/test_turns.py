"""Turns at one engine: sharers together, a suspect alone, whoever is cancelled in between."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress

import pytest

from pipelines.turns import Turns


async def settle() -> None:
    """Let everything run that can."""
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.mark.parametrize("seed", range(30))
async def test_a_suspect_is_alone_and_everyone_has_a_turn(seed: int) -> None:
    """Arrivals, stays and cancellations at random: never a suspect with company, and nobody waits for ever."""
    dice, turns = random.Random(seed), Turns()
    inside = {"shared": 0, "alone": 0}
    together = 0
    had: set[int] = set()

    async def visit(number: int, side: str) -> None:
        nonlocal together
        for _ in range(dice.randrange(6)):
            await asyncio.sleep(0)
        async with turns.alone() if side == "alone" else turns.shared():
            inside[side] += 1
            try:
                assert inside["alone"] <= 1
                assert not (inside["alone"] and inside["shared"])
                together = max(together, inside["shared"])
                for _ in range(dice.randrange(8)):
                    await asyncio.sleep(0)
                    assert not (inside["alone"] and inside["shared"])
            finally:
                inside[side] -= 1
        had.add(number)

    visits = [
        asyncio.create_task(visit(number, dice.choice(["shared", "shared", "alone"]))) for number in range(40)
    ]
    cancelled = set()
    for number in dice.sample(range(40), 10):
        for _ in range(dice.randrange(4)):
            await asyncio.sleep(0)
        if visits[number].cancel():
            cancelled.add(number)
    async with asyncio.timeout(30):
        done = await asyncio.gather(*visits, return_exceptions=True)
    assert [error for error in done if isinstance(error, AssertionError)] == []
    assert had | cancelled == set(range(40))
    assert together > 1


async def test_sharers_go_first_and_a_suspect_goes_when_they_are_done() -> None:
    turns, order = Turns(), []

    async def alone() -> None:
        async with turns.alone():
            order.append("alone")

    async with turns.shared():
        suspect = asyncio.create_task(alone())
        await settle()
        async with turns.shared():  # does not wait behind the one that waits
            order.append("shared")
        await settle()
        assert order == ["shared"]
    await asyncio.wait_for(suspect, 10)
    assert order == ["shared", "alone"]


async def test_whoever_comes_while_a_suspect_runs_waits_for_it() -> None:
    turns, order = Turns(), []

    async def come(name: str, side: str) -> None:
        async with turns.alone() if side == "alone" else turns.shared():
            order.append(name)

    async with turns.alone():
        waiting = [
            asyncio.create_task(come(*who)) for who in (("b", "shared"), ("c", "alone"), ("d", "shared"))
        ]
        await settle()
        assert order == []
    await asyncio.wait_for(asyncio.gather(*waiting), 10)
    assert sorted(order) == ["b", "c", "d"]


@pytest.mark.parametrize("side", ["shared", "alone"])
async def test_a_turn_ends_with_its_error_or_cancellation(side: str) -> None:
    turns = Turns()

    async def fail() -> None:
        async with turns.alone() if side == "alone" else turns.shared():
            raise ZeroDivisionError

    async def stay() -> None:
        async with turns.alone() if side == "alone" else turns.shared():
            await asyncio.Event().wait()

    with pytest.raises(ZeroDivisionError):
        await fail()
    staying = asyncio.create_task(stay())
    await settle()
    staying.cancel()
    with suppress(asyncio.CancelledError):
        await staying
    async with asyncio.timeout(10), turns.alone():
        pass


async def test_a_suspect_that_gives_up_waiting_holds_nobody_up() -> None:
    turns = Turns()

    async def alone() -> None:
        async with turns.alone():
            pass

    async with turns.shared():
        waiting = [asyncio.create_task(alone()) for _ in range(2)]
        await settle()
        waiting[0].cancel()
        await settle()
    await asyncio.wait_for(waiting[1], 10)
    async with asyncio.timeout(10), turns.shared():
        pass
