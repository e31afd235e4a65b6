"""`dray doctor` as a whole, on this machine: it must find it fit, soon, and leave nothing behind."""

from __future__ import annotations

import time
from pathlib import Path

from jobs.doctor import diagnose
from jobs.loading import load


def test_this_machine_is_fit(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"q": "a"}\n{"q": "b"}\n')
    job = load(
        {
            "name": "checkup",
            "input": {"path": str(tmp_path / "in.jsonl")},
            "prompt": {"template": "{{ q }}"},
            "model": {"source": "none", "backend": "simulated"},
            "output": {"path": str(tmp_path / "deep" / "out")},
        }
    )
    began = time.monotonic()
    first_s, findings = 0.0, []
    for finding in diagnose(job):
        first_s = first_s or time.monotonic() - began
        findings.append(finding)
    assert [finding for finding in findings if finding.verdict == "problem"] == []
    found = {finding.name: finding.detail for finding in findings}
    assert found.keys() >= {
        "python",
        "ray",
        "torch",
        "vllm version",
        "vllm build",
        "import vllm",
        "output",
        "model",
    }
    assert found["input"].endswith("2 rows")
    assert not (tmp_path / "deep").exists()
    assert first_s < 0.5 * (time.monotonic() - began)  # streams: an import of vLLM alone takes 7 s
