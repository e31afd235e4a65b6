"""How long answers will be, learned from those that are there, and which request of a shard goes first for it.

What is learned is the share of its limit, `max_tokens`, that an answer takes. Requests fall into classes by the length of their
prompts, and by their limit where each row has its own, one for each doubling; the prediction is the mean share of the class,
drawn towards that of all while it has few answers, times the limit. So a row that may be long is known before any long answer has
ended: short ones end first. When little is left the longest go first: what an engine begins last then ends soon, and so does
the job. Before that the input's order: long answers together fill the KV cache with few requests, short ones leave it empty
(SIMULATED: up to 3 % slower), and prefixes that prompts share lie together.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from pipelines.settings import SamplingSettings

#: Answers that a guess counts for: of half the limit for all, of the mean of all for a class.
PRIOR = 32
#: Answers of a class after which older ones count half.
MEMORY = 2048
#: Classes whose predictions differ by no more than this keep the input's order.
ALIKE = 0.1
#: Little is left when so many wait for each one in flight.
LITTLE = 2
#: Share of the expected answers that the KV cache has to hold: those in flight are in different places. SIMULATED, prompts of
#: 100 tokens, answers of 200–1,000, waves: 13.4 k tokens/s with all of it, 16.2 k with three quarters, no preemption with
#: either; 3,330 preemptions of 4,000 requests with half, 10,000 with no bound (tests/unit/test_adaptive.py).
HELD = 0.75


#: What an image is expected to add to a prompt before any is known; then it is the most that one has added.
IMAGE_TOKENS = 1024

#: Doublings of the prompt's tokens, and of the request's own `max_tokens` (0: the job's).
Kind = tuple[int, int]


class Lengths:
    """Tokens of the answers to one request, all samples together; shared by the shards of one engine."""

    def __init__(self, sampling: SamplingSettings, max_model_len: int) -> None:
        self._samples = sampling.n
        self._limit = sampling.max_tokens or max_model_len
        self._max_model_len = max_model_len
        self._all = _Mean()
        self._all.add(min(self._limit, max_model_len) / 2 / self._limit, PRIOR)
        self._classes: dict[Kind, _Mean] = {}
        self._image_tokens: int | None = None

    @property
    def image_tokens(self) -> int:
        """Tokens that an image adds to a prompt: how much of the KV cache it takes is known to its processor only."""
        return IMAGE_TOKENS if self._image_tokens is None else self._image_tokens

    def learn_images(self, images: int, added: int) -> None:
        """One answered request, to whose prompt `images` images have added so many tokens."""
        self._image_tokens = max(self._image_tokens or 0, -(-added // images))

    def learn(self, prompt_tokens: int, answer_tokens: int, max_tokens: int | None = None) -> None:
        """One answered request; `answer_tokens` of all its samples, `max_tokens` its own where it has one."""
        share = answer_tokens / self._samples / (max_tokens or self._limit)
        self._all.add(share, 1)
        kind = kind_of(prompt_tokens, max_tokens)
        if kind not in self._classes:
            self._classes[kind] = _Mean()
        self._classes[kind].add(share, 1)

    def predict(self, prompt_tokens: int, max_tokens: int | None = None) -> float:
        """Expected tokens of all samples, never more than the request may have."""
        of_class = self._classes.get(kind_of(prompt_tokens, max_tokens), _NONE)
        share = (of_class.total + PRIOR * self._all.value) / (of_class.count + PRIOR)
        limit = max_tokens or self._limit
        expected, most = share * limit, min(limit, self._max_model_len - prompt_tokens)
        return self._samples * max(1.0, min(expected, most))


def kind_of(prompt_tokens: int, max_tokens: int | None) -> Kind:
    """The class of a request."""
    return prompt_tokens.bit_length(), (max_tokens or 0).bit_length()


class _Mean:
    """A mean that forgets."""

    def __init__(self) -> None:
        self.total = self.count = 0.0

    @property
    def value(self) -> float:
        return self.total / self.count

    def add(self, value: float, count: float) -> None:
        self.total += value * count
        self.count += count
        if self.count >= MEMORY:
            self.total, self.count = self.total / 2, self.count / 2


_NONE = _Mean()


class Rows:
    """Rows of one shard that wait; the prediction may change meanwhile. O(classes) per row, a dozen at most."""

    def __init__(
        self,
        rows: Iterable[int],
        prompt_tokens: Callable[[int], int],
        lengths: Lengths,
        max_tokens: Callable[[int], int | None] = lambda row: None,
    ) -> None:
        """`rows`: positions in the shard, in order; `prompt_tokens` and own `max_tokens` of the row at a position."""
        self._prompt_tokens, self._max_tokens, self._lengths = prompt_tokens, max_tokens, lengths
        self._classes: dict[Kind, deque[int]] = {}
        """By the class that each row had when it came."""
        self._count = 0
        for row in rows:
            kind = kind_of(prompt_tokens(row), max_tokens(row))
            self._classes.setdefault(kind, deque()).append(row)
            self._count += 1

    def __len__(self) -> int:
        return self._count

    def first(self, longest: bool) -> int:
        """The row that goes next, still in line; there is one. `longest`: by prediction, else by place."""
        if len(self._classes) == 1:
            return next(iter(self._classes.values()))[0]
        heads = [rows[0] for rows in self._classes.values()]
        if not longest:
            return min(heads)
        expected = [self._lengths.predict(self._prompt_tokens(row), self._max_tokens(row)) for row in heads]
        enough = max(expected) * (1 - ALIKE)
        return min(row for row, tokens in zip(heads, expected, strict=True) if tokens >= enough)

    def take(self, row: int) -> None:
        """`row`, which `first` gave, is no longer in line."""
        # Not by what its class would be now: images may have turned out longer or shorter than expected.
        kind, rows = next((kind, rows) for kind, rows in self._classes.items() if rows[0] == row)
        rows.popleft()
        if not rows:
            del self._classes[kind]
        self._count -= 1
