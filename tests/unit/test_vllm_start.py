"""What vLLM tells of a start, and that engines wait for each other only where they must."""

from __future__ import annotations

import fcntl
import multiprocessing as mp
import os
import tempfile
import threading
import time
from pathlib import Path

import pytest

from pipelines import vllm_log
from pipelines.settings import PoolSettings
from pipelines.vllm_start import compile_key, start_turn

pytestmark = pytest.mark.slow


#: Lines of vLLM 0.32 on a GPU, as the `starts` handler writes them; two ranks.
V32 = """\
1795572800.100 Resolved architecture: Qwen2ForCausalLM
1795572812.500 Initializing a V1 LLM engine (v0.32.0) with config: model='x', dtype=torch.bfloat16
1795572815.000 Loading weights took 1.25 seconds
1795572815.100 Model loading took 7.1 GiB memory and 2.500000 seconds
1795572815.200 Model loading took 7.1 GiB memory and 2.750000 seconds
1795572830.000 torch.compile took 12.34 s in total
1795572841.000 Graph capturing finished in 9 secs, took 0.61 GiB
1795572841.500 init engine (profile, create kv cache, warmup model) took 26.10 s (compilation: 12.34 s)
"""


def test_the_parts_of_a_start_are_read_from_vllms_log(tmp_path: Path) -> None:
    log = tmp_path / "starts.log"
    earlier = V32.replace("12.34", "99.99")
    log.write_text(earlier + V32)
    assert vllm_log.told_since(log, len(earlier)) == {
        "engine_imported_at": 1795572812.5,
        "weights_s": 2.75,
        "compile_s": 12.34,
        "graphs_s": 9.0,
    }


def test_a_process_keeps_a_log_of_its_own_but_for_what_the_user_configures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("VLLM_CONFIGURE_LOGGING", "VLLM_LOGGING_CONFIG_PATH"):
        monkeypatch.setenv(name, "")  # so that its absence is restored
        monkeypatch.delenv(name)
    own = vllm_log.error_log.__wrapped__
    parents = own()
    assert parents is not None
    inherited = own()
    assert inherited is not None
    assert inherited != parents
    assert os.environ["VLLM_LOGGING_CONFIG_PATH"] == str(inherited.with_name("logging.json"))
    monkeypatch.setenv("VLLM_LOGGING_CONFIG_PATH", "/etc/logging.json")
    assert own() is None


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("torch.compile takes 30.20 s in total", {"compile_s": 30.2}),  # 0.26
        ("[backbone] torch.compile took 3.00 s in total", {"compile_s": 3.0}),
        ("torch.compile and initial profiling/warmup run together took 4.50 s in total", {"compile_s": 4.5}),
        ("Loading weights took 0.50 seconds", {"weights_s": 0.5}),  # the CPU worker has no other line
        ("something that a later vLLM says", {}),
    ],
)
def test_other_versions_words(tmp_path: Path, line: str, told: dict[str, float]) -> None:
    (tmp_path / "starts.log").write_text(f"1795572800.100 {line}\n")
    assert vllm_log.told_since(tmp_path / "starts.log", 0) == told


def test_what_is_not_logged_is_not_told(tmp_path: Path) -> None:
    assert vllm_log.told_since(None, 0) == {}
    assert vllm_log.told_since(tmp_path / "none.log", 0) == {}


def test_the_key_tells_configurations_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    args = {"model": "m", "max_num_seqs": 512}
    key = compile_key("0.32.0", "H200", args)
    assert key == compile_key("0.32.0", "H200", dict(reversed(args.items())))
    others = [
        ("0.31.0", "H200", args),
        ("0.32.0", "H100", args),
        ("0.32.0", "H200", {**args, "max_num_seqs": 8}),
    ]
    assert len({key, *(compile_key(*other) for other in others)}) == 4
    assert key == compile_key(
        "0.32.0", "H200", {**args, "gpu_memory_utilization": 0.3, "kv_cache_memory_bytes": 1}
    )
    assert compile_key("0.32.0", "H200", {**args, "enforce_eager": True}) is None
    monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", "1")
    assert compile_key("0.32.0", "H200", args) is None


def _start(name: str, seconds: float, queue: mp.Queue[tuple[str, float]]) -> None:
    with start_turn(PoolSettings(), {}, "key"):
        queue.put((f"{name} begins", time.monotonic()))
        time.sleep(seconds)
        queue.put((f"{name} ends", time.monotonic()))


def _both() -> list[str]:
    """Two processes, the second some time after the first has begun; what happened, in order."""
    context = mp.get_context("spawn")
    queue: mp.Queue[tuple[str, float]] = context.Queue()
    first = context.Process(target=_start, args=("first", 3.0, queue))
    first.start()
    events = [queue.get(timeout=100)]
    second = context.Process(target=_start, args=("second", 0.0, queue))
    second.start()
    events += [queue.get(timeout=100) for _ in range(3)]
    first.join()
    second.join()
    return [name for name, _ in sorted(events, key=lambda event: event[1])]


def test_the_first_compile_is_alone_and_later_starts_wait_for_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    assert _both() == ["first begins", "first ends", "second begins", "second ends"]
    with start_turn(PoolSettings(), {}, "key"), start_turn(PoolSettings(), {}, "key"):  # warm: side by side
        pass


def test_the_next_engine_starts_as_soon_as_the_first_has_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    compiled, began, go_on = threading.Event(), threading.Event(), threading.Event()

    def second() -> None:
        with start_turn(PoolSettings(), {}, "key"):
            began.set()

    def first() -> None:
        with start_turn(PoolSettings(), {}, "key", compiled.is_set):
            threading.Thread(target=second).start()
            assert not began.wait(1)
            compiled.set()
            assert began.wait(10)
            go_on.set()

    threading.Thread(target=first).start()
    assert go_on.wait(15)


def test_a_start_that_fails_lets_the_next_one_compile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    with pytest.raises(RuntimeError), start_turn(PoolSettings(), {}, "key"):
        raise RuntimeError
    assert [file.stat().st_size for file in (tmp_path / "torch_compile_cache").iterdir()] == [0]
    with start_turn(PoolSettings(), {}, "key"):
        pass
    assert [file.stat().st_size > 0 for file in (tmp_path / "torch_compile_cache").iterdir()] == [True]


def test_no_cache_folder_is_no_reason_not_to_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "file"))
    with start_turn(PoolSettings(), {}, "key"):
        pass


def test_engines_on_one_gpu_load_in_turn_unless_they_measure_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    shared = PoolSettings(engines_per_gpu=2)

    def free() -> bool:
        with next(tmp_path.glob("dray-engine-start-*")).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

    with start_turn(shared, {}, None):
        assert not free()
        with start_turn(shared, {"kv_cache_memory_bytes": 2**30}, None):  # does not wait for the other
            pass
    assert free()
