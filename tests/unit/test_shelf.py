"""Who is at which prompt, and whose answers are there: every key is somebody's until it is answered, and asked once."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from pipelines.shelf import ENTRY_BYTES, STALE_S, Shelf

A, B, C = b"a" * 18, b"b" * 18, b"c" * 18


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_what_one_has_claimed_is_taken_for_others_until_it_tells() -> None:
    shelf = Shelf()
    assert shelf.claim("one", [A, B]) == ({}, [])
    assert shelf.claim("two", [B, C, A]) == ({}, [0, 2])
    shelf.tell("one", {B: b"answer"})
    assert shelf.claim("two", [B, A]) == ({0: b"answer"}, [1])
    assert shelf.claim("one", [A, B, C]) == ({1: b"answer"}, [2])  # its own claim stays its own


def test_a_row_that_failed_is_the_next_ones_to_ask() -> None:
    shelf = Shelf()
    shelf.claim("one", [A])
    shelf.tell("one", {A: None})
    assert shelf.claim("two", [A]) == ({}, [])
    assert shelf.claim("one", [A]) == ({}, [0])
    shelf.tell("one", {A: None})  # no word of its any more
    assert shelf.claim("three", [A]) == ({}, [0])


def test_what_an_owner_releases_is_free_and_what_it_told_stays() -> None:
    shelf = Shelf()
    shelf.claim("one", [A, B])
    shelf.tell("one", {A: b"answer"})
    shelf.release("one")
    shelf.release("one")
    assert shelf.claim("two", [A, B]) == ({0: b"answer"}, [])


def test_an_owner_that_is_not_heard_of_loses_its_claims() -> None:
    clock = Clock()
    shelf = Shelf(now=clock)
    shelf.claim("one", [A, B])
    shelf.claim("alive", [C])
    clock.now = STALE_S
    shelf.heard(["alive"])
    assert shelf.claim("two", [A, C]) == ({}, [0, 1])
    clock.now += 1
    assert shelf.claim("two", [A, C]) == ({}, [1])
    assert shelf.claim("three", [A, B]) == ({}, [0])  # of the dead one's all are free
    shelf.tell("one", {A: b"late"})  # it lived, and its answer is as good
    assert shelf.claim("three", [A]) == ({0: b"late"}, [])


def test_the_least_recently_used_answers_make_room() -> None:
    shelf = Shelf(most_bytes=2 * (ENTRY_BYTES + 100))
    keys = [A, B, C]
    shelf.claim("one", keys)
    shelf.tell("one", {A: bytes(100), B: bytes(100)})
    shelf.claim("two", [A])
    shelf.tell("one", {C: bytes(100)})
    found, taken = shelf.claim("two", keys)
    assert (sorted(found), taken) == ([0, 2], [])
    assert shelf.claim("three", [B]) == ({}, [0])  # asked again, and by one only
    shelf.tell("two", {B: bytes(1000)})  # more than fits
    assert shelf.claim("three", keys) == ({}, [])


@given(st.data())
def test_whatever_the_order_each_key_is_asked_once_and_no_row_is_left(data: st.DataObject) -> None:
    """Owners take turns in any order; without failures, deaths and a bound, no key is asked twice."""
    wanted = data.draw(st.lists(st.lists(st.sampled_from(range(6)), unique=True), min_size=1, max_size=5))
    spoiled = data.draw(st.booleans())
    clock = Clock()
    shelf = Shelf(most_bytes=3 * ENTRY_BYTES if spoiled else 1 << 20, now=clock)
    left = {f"owner {n}": [bytes([k]) for k in keys] for n, keys in enumerate(wanted)}
    own: dict[str, list[bytes]] = {owner: [] for owner in left}
    answered: dict[str, set[bytes]] = {owner: set() for owner in left}
    asked: Counter[bytes] = Counter()
    whole = {owner: set(keys) for owner, keys in left.items()}
    for _ in range(2000):
        busy = [owner for owner in left if left[owner] or own[owner]]
        if not busy:
            break
        owner = data.draw(st.sampled_from(busy))
        if own[owner]:
            key = own[owner].pop()
            asked[key] += 1
            failed = spoiled and data.draw(st.integers(0, 3)) == 0
            shelf.tell(owner, {key: None if failed else key})
            answered[owner].add(key)  # or its row has an error of its own
        else:
            found, taken = shelf.claim(owner, left[owner])
            assert all(blob == left[owner][place] for place, blob in found.items())
            own[owner] = [k for place, k in enumerate(left[owner]) if place not in {*found, *taken}]
            answered[owner] |= set(found.values())
            left[owner] = [left[owner][place] for place in taken]
            if taken and not own[owner]:
                assert any(own[other] for other in own), "all wait"
        if spoiled and data.draw(st.integers(0, 9)) == 0:
            clock.now += STALE_S + 1
    assert answered == whole
    if not spoiled:
        assert asked == dict.fromkeys({key for keys in whole.values() for key in keys}, 1)
