"""Who is at which prompt of a job, and the latest answers: bookkeeping without a clock, a network or threads of its own.

    claim ──► found    its answer is here
          ├─► taken    another owner is at it; claim it again later
          └─► else     it is the claimer's now, until it tells or releases

So a key is asked once, unless its row fails, its owner is not heard of any more, or its answer had to make room.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence

#: Bytes of answers on a shelf, with what Python takes to hold them.
MOST_BYTES = 256 << 20
#: Of an entry besides its answer: the key, and places in the mapping.
ENTRY_BYTES = 250
#: Seconds after which an owner that was not heard of has nothing claimed: its process may be dead.
STALE_S = 30.0


class Shelf:
    """For one caller at a time. Owners are named by their callers; a key is any bytes; so is an answer."""

    def __init__(
        self,
        most_bytes: int = MOST_BYTES,
        stale_s: float = STALE_S,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._most_bytes, self._stale_s, self._now = most_bytes, stale_s, now
        self._answers: OrderedDict[bytes, bytes] = OrderedDict()
        """The least recently used first."""
        self._bytes = 0
        self._owner_of: dict[bytes, str] = {}
        self._claims: dict[str, set[bytes]] = {}
        self._heard: dict[str, float] = {}

    def claim(self, owner: str, keys: Sequence[bytes]) -> tuple[dict[int, bytes], list[int]]:
        """(answers that are here, by position in `keys`; positions that another owner is at). The rest is `owner`'s."""
        self.heard([owner])
        found: dict[int, bytes] = {}
        taken: list[int] = []
        for place, key in enumerate(keys):
            if (answer := self._answers.get(key)) is not None:
                self._answers.move_to_end(key)
                found[place] = answer
            elif self._is_others(key, owner):
                taken.append(place)
            else:
                self._owner_of[key] = owner
                self._claims.setdefault(owner, set()).add(key)
        return found, taken

    def tell(self, owner: str, told: Mapping[bytes, bytes | None]) -> None:
        """What came of keys: an answer, or None where there is none that others could have. Their claims are over."""
        self.heard([owner])
        for key, answer in told.items():
            self._drop(owner, key)
            if answer is not None and key not in self._answers:
                self._answers[key] = answer
                self._bytes += len(answer) + ENTRY_BYTES
        while self._bytes > self._most_bytes:
            _, answer = self._answers.popitem(last=False)
            self._bytes -= len(answer) + ENTRY_BYTES

    def heard(self, owners: Iterable[str]) -> None:
        """These are alive."""
        self._heard.update(dict.fromkeys(owners, self._now()))

    def release(self, owner: str) -> None:
        """Drop what the owner still claims."""
        self._heard.pop(owner, None)
        for key in self._claims.pop(owner, ()):
            del self._owner_of[key]

    def _is_others(self, key: bytes, owner: str) -> bool:
        other = self._owner_of.get(key, owner)
        if other == owner:
            return False
        if self._now() - self._heard[other] > self._stale_s:
            self.release(other)
            return False
        return True

    def _drop(self, owner: str, key: bytes) -> None:
        if self._owner_of.get(key) == owner:
            del self._owner_of[key]
            self._claims[owner].discard(key)
