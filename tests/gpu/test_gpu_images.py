"""Prompts with images on an NVIDIA GPU, beside bare vLLM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.local.runs import dray
from tests.local.test_images import ENGINE, check_images

pytestmark = pytest.mark.timeout(400)


def test_images_are_answered_as_bare_vllm_answers_them(tmp_path: Path) -> None:
    def start(settings: dict[str, Any]) -> None:
        (tmp_path / "job.yaml").write_text(json.dumps(settings))
        done = dray("run", str(tmp_path / "job.yaml"), "--json", timeout=360)
        assert done.returncode == 0, done.stderr + done.stdout

    engine = {key: value for key, value in ENGINE.items() if key != "kv_cache_memory_bytes"}
    check_images(tmp_path, start, {**engine, "gpu_memory_utilization": 0.2}, {"device": "gpu"})
