"""What Prometheus sees of a run, through Ray's exporter on each node (Ray puts `ray_` before each name).

    an engine's actor, every two seconds     what is in flight, tokens/s, the KV cache and its prefixes, restarts
    a commit actor, after each part          rows, tokens, errors, preemptions; histograms of what the part's requests took
    the driver, after each shard             shards by state

Rows and tokens are those of parts that this run has put, so a counter's end is what the output holds. Nothing is measured
for a metric's sake: an engine's process spends no time per request or token here. Outside of Ray nothing happens.
"""

from __future__ import annotations

import time
from functools import cache

import ray
from ray.util.metrics import Counter, Gauge, Histogram

from pipelines import histogram
from pipelines.engine import Engine
from pipelines.shard_stats import Provenance, ShardStats

#: Seconds between two looks at an engine.
INTERVAL_S = 2.0
#: Upper bounds in seconds.
_SECONDS = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0]

_REPLICA = ("job", "replica")


@cache
def _counter(name: str, what: str, *tags: str) -> Counter:
    return Counter(f"dray_{name}", what, tag_keys=("job", *tags))


@cache
def _gauge(name: str, what: str, *tags: str) -> Gauge:
    return Gauge(f"dray_{name}", what, tag_keys=("job", *tags))


@cache
def _histogram(name: str, what: str) -> Histogram:
    return Histogram(f"dray_{name}", what, boundaries=_SECONDS, tag_keys=_REPLICA)


def tell_shards(job: str, *, planned: int, committed: int, failed: int) -> None:
    """From the driver. `failed`: shards whose latest attempt in this run failed; they are tried again."""
    if not ray.is_initialized():
        return
    shards = _gauge("shards", "Shards of the job by state: planned (all), committed, failed.", "state")
    for state, count in (("planned", planned), ("committed", committed), ("failed", failed)):
        shards.set(count, {"job": job, "state": state})


def tell_committed(stats: ShardStats, provenance: Provenance) -> None:
    """From a commit actor that has put a part."""
    if not ray.is_initialized():
        return
    job = {"job": provenance.job}
    where = {**job, "replica": provenance.replica}
    rows = _counter("rows", "Rows committed, by state: ok, failed.", "replica", "state")
    for state, count in (("ok", stats.rows_ok), ("failed", stats.rows_failed)):
        _add(rows, count, {**where, "state": state})
    _add(_counter("prompt_tokens", "Prompt tokens of committed rows.", "replica"), stats.prompt_tokens, where)
    _add(
        _counter("output_tokens", "Output tokens of committed rows.", "replica"),
        stats.completion_tokens,
        where,
    )
    _add(
        _counter("preemptions", "Requests that the KV cache had no room for.", "replica"),
        stats.preemptions,
        where,
    )
    errors = _counter("errors", "Failed rows by error_code.", "code")
    for code, count in stats.error_codes.items():
        _add(errors, count, {**job, "code": code})
    _histogram(
        "queue_wait_seconds", "From a shard's being prepared to its first request's admission."
    ).observe(stats.queue_s, where)
    _observe("request_latency_seconds", "From admission to the whole answer.", stats.latency_s, where)
    _observe("ttft_seconds", "From admission to the first token.", stats.ttft_s, where)


def _add(counter: Counter, count: int, tags: dict[str, str]) -> None:
    if count:  # Ray refuses to add nothing
        counter.inc(count, tags)


def _observe(name: str, what: str, values: histogram.Histogram, tags: dict[str, str]) -> None:
    seconds = _histogram(name, what)
    for middle, count in values.middles():
        for _ in range(count):  # 5 µs each; Ray takes no counts
            seconds.observe(middle, tags)


class EngineMetrics:
    """One engine's gauges; `tell` is called every `INTERVAL_S`."""

    def __init__(self, job: str, replica: str) -> None:
        self._tags = {"job": job, "replica": replica}
        self._tokens, self._at = 0, time.monotonic()
        self._queries = self._hits = 0

    def restarted(self) -> None:
        """An engine that replaces one that died."""
        if ray.is_initialized():
            _counter("engine_restarts", "Engines that were replaced.").inc(1, {"job": self._tags["job"]})

    def tell(self, engine: Engine, in_flight: int) -> None:
        if not ray.is_initialized():
            return
        now, tokens, cache_use = time.monotonic(), engine.output_tokens, engine.cache_use
        rate = (tokens - self._tokens) / max(1e-3, now - self._at)
        self._tokens, self._at = tokens, now
        _gauge("requests_in_flight", "Requests that the engine has.", "replica").set(in_flight, self._tags)
        _gauge("output_tokens_per_second", "Output tokens/s over two seconds.", "replica").set(
            rate, self._tags
        )
        _gauge("kv_cache_usage", "Share of the KV cache in use, 0 to 1.", "replica").set(
            cache_use.kv_cache_usage, self._tags
        )
        queries = _counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", "replica")
        hits = _counter("prefix_cache_hits", "Prompt tokens found there.", "replica")
        _add(queries, cache_use.prefix_queries - self._queries, self._tags)
        _add(hits, cache_use.prefix_hits - self._hits, self._tags)
        self._queries, self._hits = cache_use.prefix_queries, cache_use.prefix_hits
