"""When an engine may start: one at a time on a shared GPU, and one at a time while vLLM's compile cache is cold."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from pipelines.settings import PoolSettings


@contextmanager
def start_turn(
    pool: PoolSettings,
    args: Mapping[str, Any],
    compiles: str | None,
    compiled: Callable[[], bool] = lambda: False,
) -> Iterator[None]:
    """Wait until an engine with these arguments may start.

    `compiles`: what `compile_key` says; None where nothing is compiled. `compiled`: whether that is done, where it can
    be told before the engine has started.
    """
    with _gpu_to_itself(pool, args), _first_compile(compiles, compiled):
        yield


@contextmanager
def _gpu_to_itself(pool: PoolSettings, args: Mapping[str, Any]) -> Iterator[None]:
    """Engines that share a GPU load one after the other: vLLM measures free memory while it loads.

    Not with `kv_cache_memory_bytes`, where it measures nothing (`Worker.determine_available_memory`).
    """
    if pool.engines_per_gpu in ("auto", 1) or args.get("kv_cache_memory_bytes"):
        yield
        return
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "all").replace(",", "-")
    with (Path(tempfile.gettempdir()) / f"dray-engine-start-{gpus}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


_NOT_COMPILED = {"gpu_memory_utilization", "kv_cache_memory_bytes"}


def compile_key(version: str, device: str, args: Mapping[str, Any]) -> str | None:
    """Names what vLLM compiles for these engine arguments; None where it compiles nothing, or keeps nothing.

    An engine's share of its GPU is not among what vLLM compiles for (`CacheConfig.compute_hash`).
    """
    if args.get("enforce_eager") or os.environ.get("VLLM_DISABLE_COMPILE_CACHE", "0") not in ("", "0"):
        return None
    compiled = {name: value for name, value in args.items() if name not in _NOT_COMPILED}
    text = json.dumps([version, device, compiled], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextmanager
def _first_compile(key: str | None, compiled: Callable[[], bool]) -> Iterator[None]:
    """The first engine that compiles something does it alone, those that wait for it find it in vLLM's cache.

    vLLM keeps what it compiles by version, device and configuration below `VLLM_CACHE_ROOT`, for all engines of the
    user. It puts the compiled model there atomically, but writes its index (`vllm_compile_cache.py`) in place: an engine
    that starts meanwhile compiles all of it again, or reads half an index. Once it is `compiled`, or an engine has
    started, the marker is not empty, and nobody waits any more. Without a folder that can be written nobody waits either.
    """
    root = Path(os.environ.get("VLLM_CACHE_ROOT") or Path.home() / ".cache" / "vllm") / "torch_compile_cache"
    try:
        root.mkdir(parents=True, exist_ok=True)
        marker = (root / f"dray-{key}.started").open("a+") if key else None
    except OSError:
        marker = None
    if marker is None:
        yield
        return
    with marker:
        if _is_empty(marker.fileno()):
            fcntl.flock(marker, fcntl.LOCK_EX)
        if not _is_empty(marker.fileno()):
            fcntl.flock(marker, fcntl.LOCK_UN)
            yield
            return
        over = threading.Event()
        watch = threading.Thread(target=_let_others_in, args=(marker, compiled, over), daemon=True)
        watch.start()
        try:
            yield
        finally:
            over.set()
            watch.join()
        if _is_empty(marker.fileno()):
            _mark(marker)


def _let_others_in(marker: TextIO, compiled: Callable[[], bool], over: threading.Event) -> None:
    """Give the lock back when the model is compiled: weights, graphs and warm-up of the others go beside ours."""
    while not over.wait(0.2):
        if compiled():
            _mark(marker)
            fcntl.flock(marker, fcntl.LOCK_UN)
            return


def _mark(marker: TextIO) -> None:
    marker.write("an engine has compiled this configuration\n")
    marker.flush()


def _is_empty(descriptor: int) -> bool:
    return os.fstat(descriptor).st_size == 0
