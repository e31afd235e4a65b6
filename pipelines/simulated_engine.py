"""An engine without a model: answers from a hash of the prompt, in simulated time. For tests, demos and dry runs."""

from __future__ import annotations

import asyncio
import hashlib
import heapq
import itertools
import struct
import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.engine import Answer, CacheUse, EngineInfo, Sample, TokenIds, check_prompt
from pipelines.errors import EngineDied, EngineStartError, ModelError, RowError
from pipelines.images import Image
from pipelines.settings import ModelSettings, SamplingSettings
from pipelines.task import Task
from pipelines.tokenizer import load_tokenizer

#: Ids that may appear in an answer are looked for among the first so many of the vocabulary (0.1 s for 20,000).
_VOCABULARY_SCANNED = 20_000
#: What simulated models pool to: dimensions of a vector, and the classes, by transformers' own default names.
_DIMENSIONS = 16
_LABELS = ("LABEL_0", "LABEL_1", "LABEL_2")


class SimulatedEngine:
    """`pipelines.engine.Engine` in simulated time.

    The tokens of an answer depend on (prompt, seed, sample index) only, so runs repeat exactly, also without a seed.
    Vectors, probabilities and log-probabilities of prompts depend on the prompt only.
    `tokens_per_s` is shared equally by all requests in flight, like a real engine's decode steps. A `choice` is one of its
    texts, behind the `prefix`; stop strings, bad words and penalties are ignored.
    """

    def __init__(
        self, model: ModelSettings, sampling: SamplingSettings, others: Sequence[SamplingSettings] = ()
    ) -> None:
        self._constrained = any(one.is_structured and not _choices(one) for one in (sampling, *others))
        self._model = model
        self._sampling = sampling
        self._settings = model.simulated
        self._max_model_len = int(model.engine.get("max_model_len") or 4096)
        self._ready = False
        self._last_token_at = 0.0
        self._clock: _SharedClock | None = None
        self._ids: npt.NDArray[np.int64] = np.empty(0, np.int64)
        self._tokenizer: Any = None
        self._vocab_size = 0
        self._prefix: list[int] = []
        self._stop_id: int | None = None

    async def start(self) -> EngineInfo:
        if self._constrained:
            raise EngineStartError(
                "the simulated engine cannot constrain its answers to more than a choice: leave out sampling.output_schema "
                "and the regex or grammar of sampling.structured_outputs, or take model.backend: vllm"
            )
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            tokenizer = await asyncio.to_thread(load_tokenizer, self._model)
        except ModelError as error:
            raise EngineStartError(str(error)) from error
        self._ids = await asyncio.to_thread(_printable_ids, tokenizer)
        self._tokenizer = tokenizer
        self._prefix = self._ids_of(self._settings.prefix)
        self._vocab_size = len(tokenizer)
        stop_ids = self._sampling.stop_token_ids
        self._stop_id = tokenizer.eos_token_id if not stop_ids else stop_ids[0]
        await asyncio.sleep(max(0.0, self._settings.start_s - (loop.time() - began)))
        self._ready = True
        self._last_token_at = time.monotonic()
        return EngineInfo(
            name="simulated",
            device="cpu",
            max_model_len=self._max_model_len,
            max_num_seqs=max(1, int(self._model.engine.get("max_num_seqs") or 256) // self._sampling.n),
            start_s=loop.time() - began,
            ready_at=time.time(),
        )

    async def generate(
        self,
        request_id: str,
        token_ids: TokenIds,
        seed: int | None,
        max_tokens: int | None = None,
        sampling: SamplingSettings | None = None,
        variables: Mapping[str, Any] | None = None,
        *,
        images: Sequence[Image] = (),
    ) -> Answer:
        sampling = sampling or self._sampling
        prompt, clock = self._admitted(_seen(token_ids, images))
        limit = max_tokens or sampling.max_tokens
        samples = [self._sample(prompt, seed, index, limit, sampling) for index in range(sampling.n)]
        tokens = sum(len(sample.token_ids) for sample in samples)
        elapsed_s = await clock.spend(tokens)
        return Answer(
            samples=samples,
            cached_tokens=0,
            ttft_s=elapsed_s * len(samples) / tokens,
            image_tokens=len(prompt) - len(token_ids),
        )

    async def encode(
        self, request_id: str, token_ids: TokenIds, task: Task, *, images: Sequence[Image] = ()
    ) -> Answer:
        prompt, clock = self._admitted(_seen(token_ids, images), answered=False)
        await clock.spend(len(prompt))
        added = len(prompt) - len(token_ids)
        key = hashlib.shake_128(task.name.encode() + np.asarray(prompt, np.int64).tobytes())
        if task.name == "classify":
            weights = np.frombuffer(key.digest(len(_LABELS)), np.uint8).astype(np.float32) + 1
            shares = (weights / weights.sum()).astype(np.float32)
            return Answer.of_values(shares, _LABELS[int(shares.argmax())], image_tokens=added)
        size = task.dimensions or _DIMENSIONS
        vector = np.frombuffer(key.digest(size), np.uint8).astype(np.float32) - 127.5
        length = 1.0 if task.use_activation is False else np.linalg.norm(vector)
        return Answer.of_values((vector / length).astype(np.float32), image_tokens=added)

    async def score(self, request_id: str, token_ids: TokenIds, *, images: Sequence[Image] = ()) -> Answer:
        prompt, clock = self._admitted(_seen(token_ids, images))
        await clock.spend(1)
        ids = np.asarray(prompt, np.int64)
        logprobs = (-0.01 * ((ids[:-1] * 31 + ids[1:]) % 997)).astype(np.float32)
        return Answer.of_values(logprobs, image_tokens=len(prompt) - len(token_ids))

    def _admitted(self, token_ids: TokenIds, *, answered: bool = True) -> tuple[list[int], _SharedClock]:
        """A prompt that the engine takes, and the time that it will take."""
        if not self._ready:
            raise EngineDied("the simulated engine is not running")
        if self._clock is None:  # belongs to the loop of the first request, which may not be that of `start`
            self._clock = _SharedClock(self._settings.tokens_per_s)
        prompt = check_prompt(token_ids, self._max_model_len, answered=answered)
        if max(prompt) >= self._vocab_size:
            raise RowError("invalid_request", f"Token id {max(prompt)} is out of vocabulary")
        if self._settings.dies_of in prompt:
            self._end()
            raise EngineDied("the simulated engine died of a prompt that holds `dies_of`")
        if self._settings.stalls_of in prompt:
            self._clock.stall()
        return prompt, self._clock

    @property
    def last_token_at(self) -> float:
        if self._clock is not None:
            self._last_token_at = max(self._last_token_at, self._clock.last_token_at)
        return self._last_token_at

    @property
    def output_tokens(self) -> int:
        return int(self._clock.served) if self._clock is not None else 0

    @property
    def cache_use(self) -> CacheUse:
        return CacheUse()

    def kill(self) -> None:
        self._ready = False

    async def stop(self) -> None:
        self._end()

    def _end(self) -> None:
        self._ready = False
        if self._clock is not None:
            self._clock.stop()
            self._clock = None

    def _sample(
        self,
        prompt: list[int],
        seed: int | None,
        index: int,
        max_tokens: int | None,
        sampling: SamplingSettings,
    ) -> Sample:
        key = hashlib.sha256(np.asarray(prompt, np.int64).tobytes())
        key.update(struct.pack("<?Qq", seed is not None, (seed or 0) % 2**64, index))
        if choices := _choices(sampling):
            return self._chosen(choices[int.from_bytes(key.digest()[:8], "little") % len(choices)])
        low, high = self._settings.min_tokens, max(self._settings.min_tokens, self._settings.max_tokens)
        wanted = low + int.from_bytes(key.digest()[:8], "little") % (high - low + 1)
        wanted = max(wanted, sampling.min_tokens)
        room = self._max_model_len - len(prompt)
        limit = min(room, max_tokens or room)
        random = np.frombuffer(hashlib.shake_128(key.digest()).digest(4 * wanted), "<u4")
        ids = self._prefix + self._ids[random % len(self._ids)].tolist()
        if len(ids) > limit or sampling.ignore_eos or self._stop_id is None:
            ids, finish_reason = ids[:limit], "length"
        else:  # like vLLM, the tokens of an answer end in the stop token
            ids[-1], finish_reason = self._stop_id, "stop"
        return Sample(
            token_ids=array("i", ids),
            text=None,
            finish_reason=finish_reason,
            logprobs=self._logprobs(ids, random, sampling.logprobs),
        )

    def _ids_of(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _chosen(self, choice: str) -> Sample:
        text = self._settings.prefix + choice
        ids = self._ids_of(text)
        ended = [] if self._stop_id is None else [self._stop_id]
        return Sample(token_ids=array("i", [*ids, *ended]), text=text, finish_reason="stop", logprobs=None)

    def _logprobs(
        self, ids: list[int], random: npt.NDArray[np.uint32], count: int | None
    ) -> list[dict[str, Any]] | None:
        if count is None:
            return None
        values = (-(random[: len(ids)] % 1000).astype(np.float32) / 250).tolist()
        return [
            {
                "token_id": token_id,
                "logprob": value,
                "top": [
                    {"token_id": int(self._ids[(token_id + rank) % len(self._ids)]), "logprob": value - rank}
                    for rank in range(count)
                ],
            }
            for token_id, value in zip(ids, values, strict=True)
        ]


def _seen(token_ids: TokenIds, images: Sequence[Image]) -> TokenIds:
    """The prompt, and before it a token for each byte of the images' digests: another image is another prompt."""
    return [*b"".join(image.sha256 for image in images), *token_ids] if images else token_ids


def _choices(sampling: SamplingSettings) -> list[str]:
    return (sampling.structured_outputs and sampling.structured_outputs.choice) or []


@dataclass(order=True)
class _Request:
    done_at: float
    """Tokens per request served so far (the clock's own time) at which this one is finished."""
    order: int
    future: asyncio.Future[None] = field(compare=False)


class _SharedClock:
    """Processor sharing with one timer: a rate of tokens per second divided equally among the requests in flight.

    Virtual time counts tokens that each request in flight has received; a request for k tokens ends k later. Costs
    O(log n) per request: 20,000 at once take 0.5 s of CPU.
    """

    def __init__(self, tokens_per_s: float) -> None:
        self._rate = tokens_per_s
        self._loop = asyncio.get_running_loop()
        self._queue: list[_Request] = []
        self._order = itertools.count()
        self._active = 0
        self._virtual = 0.0
        self._served = 0.0
        self._updated = self._served_at = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._stopped = False

    async def spend(self, tokens: int) -> float:
        """Wait until `tokens` are served; the seconds that took. Raises EngineDied when the clock is stopped."""
        self._advance()
        began = self._loop.time()
        request = _Request(self._virtual + tokens, next(self._order), self._loop.create_future())
        heapq.heappush(self._queue, request)
        self._active += 1
        if self._timer is None or self._queue[0] is request:
            self._set_timer()
        try:
            await request.future
        except asyncio.CancelledError:
            self._advance()
            if not request.future.done() or request.future.cancelled():
                self._active -= 1  # its place in the queue is skipped when its time comes
                self._set_timer()
            raise
        return self._loop.time() - began

    @property
    def last_token_at(self) -> float:
        """Up to when tokens were served, in the loop's time, which is `time.monotonic()`."""
        self._advance()
        return self._served_at

    @property
    def served(self) -> float:
        """Tokens so far, over all requests."""
        self._advance()
        return self._served

    def stall(self) -> None:
        """Serve nothing any more."""
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def stop(self) -> None:
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for request in self._queue:
            if not request.future.done():
                request.future.set_exception(EngineDied("the simulated engine was stopped"))
        self._queue.clear()
        self._active = 0

    def _advance(self) -> None:
        now = self._loop.time()
        if self._active:
            self._served_at = self._served_at if self._stopped else now
            self._virtual += (now - self._updated) * self._rate / self._active
            self._served += (now - self._updated) * self._rate
        self._updated = now

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._queue and self._queue[0].future.done():
            heapq.heappop(self._queue)
        if self._queue and not self._stopped:
            wait_s = max(0.0, self._queue[0].done_at - self._virtual) * self._active / self._rate
            self._timer = self._loop.call_later(wait_s, self._fire)

    def _fire(self) -> None:
        self._timer = None
        self._advance()
        # A late timer may have passed several ends; a tolerance keeps rounding from adding empty turns of the loop.
        while self._queue and (
            self._queue[0].future.done() or self._queue[0].done_at <= self._virtual + 1e-6
        ):
            request = heapq.heappop(self._queue)
            if not request.future.done():
                request.future.set_result(None)
                self._active -= 1
        self._set_timer()


def _printable_ids(tokenizer: Any) -> npt.NDArray[np.int64]:
    """Ordinary ids whose text is printable ASCII with something in it: answers that any reader can show."""
    special = set(tokenizer.all_special_ids)
    candidates = [i for i in range(min(len(tokenizer), _VOCABULARY_SCANNED)) if i not in special]
    texts = tokenizer.batch_decode([[i] for i in candidates])
    ids = [
        i
        for i, text in zip(candidates, texts, strict=True)
        if text.strip() and text.isascii() and text.isprintable() and not text.startswith("<")
    ]
    if not ids:
        raise EngineStartError("the tokenizer has no printable tokens to simulate answers with")
    return np.asarray(ids, np.int64)
