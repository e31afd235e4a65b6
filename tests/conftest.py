"""What holds for every test: the environment of the process, and markers by folder.

The environment is set here, before any test module is imported, because Ray, vLLM, torch and the tokenizers read it once
when they load. Worker processes inherit it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest
from hypothesis import settings

HERE = Path(__file__).parent

# Drivers, Ray workers and engines run side by side on few cores: each computes on one thread.
_THREADS = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "ARROW_NUM_THREADS": "2",
    "TOKENIZERS_PARALLELISM": "false",
    "RAYON_NUM_THREADS": "1",
}

# Everything listens on and talks to loopback; nothing asks a hub, a metadata service or a statistics server.
_LOOPBACK = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "VLLM_HOST_IP": "127.0.0.1",
    "NO_PROXY": "127.0.0.1,localhost",
    "no_proxy": "127.0.0.1,localhost",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}

_ENGINE = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the default takes a share of the host's memory for each engine
    "VLLM_LOGGING_LEVEL": "WARNING",
}

# A developer's own settings must not reach the tests, least of all the credentials of a real bucket.
_FOREIGN = ("AWS_", "RAY_ADDRESS", "RAY_NAMESPACE", "DRAY_")

# No test depends on speed: an example may take its time on a busy machine.
settings.register_profile("dray", deadline=None)
settings.load_profile("dray")

for name in [name for name in os.environ if name.startswith(_FOREIGN)]:
    del os.environ[name]
os.environ.update(_THREADS | _LOOPBACK | _ENGINE)


def _no_fsync(file: Any) -> None:
    """Nothing that a test can see: what has been written is there for everybody but a machine that lost its power.

    Each small file that a job in this process writes would wait for the disk twice. Other processes do wait.
    """


os.fsync = _no_fsync


@cache
def no_gpu() -> str | None:
    """Why GPU tests cannot run here; None where they can."""
    if not shutil.which("nvidia-smi"):
        return "needs an NVIDIA GPU: nvidia-smi is not on PATH"
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    if listed.returncode or "GPU 0" not in listed.stdout:
        return f"needs an NVIDIA GPU: nvidia-smi -L says {(listed.stdout + listed.stderr).strip()!r}"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by their folder, skip what this machine cannot run, with the reason, and put the long ones first."""
    for item in items:
        folder = item.path.relative_to(HERE).parts[0]
        if folder in ("local", "gpu"):
            item.add_marker(folder)
            # A machine may be half as fast as another, and another engine beside a test's own.
            if not item.get_closest_marker("timeout"):
                item.add_marker(pytest.mark.timeout(300))
        if item.get_closest_marker("long") and not os.environ.get("CI"):
            item.add_marker(pytest.mark.skip(reason="takes a minute or more: CI runs it, and CI=1 make test"))
        if item.get_closest_marker("gpu") and (reason := no_gpu()):
            item.add_marker(pytest.mark.skip(reason=reason))
    if not any(item.get_closest_marker("local") or item.get_closest_marker("gpu") for item in items):
        # As in the stages that only tokenise (`pipelines.tokenizer.do_without_torch`): transformers would import it for 4 s.
        sys.modules.setdefault("torch", cast("ModuleType", None))
    # Two processes that share the tests end together if the last of them are short.
    places = {"gpu": 0, "local": 1, "proof": 2}
    items.sort(key=lambda item: places.get(item.path.parent.name, 3))


def scope_of(nodeid: str) -> str:
    """What one process runs from beginning to end: all that use a GPU, a file whose tests share engines, or one test."""
    file = nodeid.partition("::")[0]
    if file.startswith("tests/gpu/"):
        return "gpu"
    return file if file.startswith("tests/local/") else nodeid


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist=loadscope`: each of the processes takes the next scope when it has done one."""
    if config.getvalue("dist") != "loadscope":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByScope(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return scope_of(nodeid)

    return ByScope(config, log)
