"""What Prometheus would scrape from Ray's exporter during and after a run, against what the run wrote."""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
import ray

from jobs import load, run
from tests.local.runs import job, write_questions

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(180)]

_SAMPLE = re.compile(r"^(ray_dray_\w+)\{(.*)\} (\S+)$", re.MULTILINE)


def scrape(name: str) -> dict[tuple[str, str], float]:
    """(metric, labels of ours) → value, summed over processes, of the job called `name`."""
    node = ray.nodes()[0]
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(address, timeout=10) as answer:
        text = answer.read().decode()
    found: dict[tuple[str, str], float] = {}
    for metric, labels, value in _SAMPLE.findall(text):
        tags = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        if tags.get("job") == name:
            own = ",".join(f"{key}={tags[key]}" for key in ("state", "code", "le") if key in tags)
            found[metric, own] = found.get((metric, own), 0.0) + float(value)
    return found


def scrape_until(
    name: str, done: Callable[[dict[tuple[str, str], float]], bool]
) -> dict[tuple[str, str], float]:
    """What was told last of each metric: Ray's processes report every few seconds, each when it likes, and of those that have
    ended nothing is told after a while."""
    deadline, found = time.monotonic() + 60, scrape(name)
    while not done(found) and time.monotonic() < deadline:
        time.sleep(1)
        found |= scrape(name)
    return found


def test_the_counters_end_at_what_the_run_wrote(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", rows=300)
    spec = job(
        tmp_path / "in",
        tmp_path / "out",
        name="metrics-test",
        prompt={"template": "{{ '' if question | length is divisibleby(7) else question }}"},
        shards={"rows": 50},
        errors={"max_error_rate": 1.0},
        model={
            "backend": "simulated",
            "simulated": {"tokens_per_s": 400.0},
        },  # long enough for gauges to be told
    )
    stats = run(load(spec)).stats
    assert 0 < stats.rows_failed < 300
    expected: dict[tuple[str, str], float] = {
        ("ray_dray_rows_total", "state=ok"): stats.rows_ok,
        ("ray_dray_rows_total", "state=failed"): stats.rows_failed,
        ("ray_dray_output_tokens_total", ""): stats.completion_tokens,
        ("ray_dray_prompt_tokens_total", ""): stats.prompt_tokens,
        ("ray_dray_queue_wait_seconds_count", ""): 6,
        ("ray_dray_shards", "state=planned"): 6,
    }
    for code, count in stats.error_codes.items():
        expected["ray_dray_errors_total", f"code={code}"] = count
    # Not their sums: Ray tells its exporter each bucket's middle.
    for name, histogram in (("request_latency", stats.latency_s), ("ttft", stats.ttft_s)):
        expected[f"ray_dray_{name}_seconds_count", ""] = histogram.count
        below = sum(count for middle, count in histogram.middles() if middle <= 0.5)
        expected[f"ray_dray_{name}_seconds_bucket", "le=0.5"] = below
    gauges = {("ray_dray_requests_in_flight", ""), ("ray_dray_output_tokens_per_second", "")}
    found = scrape_until(
        "metrics-test", lambda found: expected.items() <= found.items() and gauges <= found.keys()
    )
    assert {key: found.get(key) for key in expected} == expected
    assert gauges <= found.keys()
    assert found["ray_dray_output_tokens_per_second", ""] > 0
