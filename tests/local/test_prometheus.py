"""A real Prometheus scrapes a real run with the shipped configuration: every query of the dashboard has an answer."""

from __future__ import annotations

import json
import math
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray

from jobs import load, run
from tests.local.runs import job, write_questions

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(180)]

FOLDER = Path(__file__).resolve().parents[2] / "conf" / "observability"
SERVICE_DISCOVERY = "/tmp/ray/prom_metrics_service_discovery.json"
NAME = "prometheus-test"


class Prometheus:
    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def get(self, path: str, **parameters: str | float) -> Any:
        query = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(query, timeout=10) as answer:
            return json.load(answer)["data"]

    def values(self, query: str, start: float, end: float) -> list[float]:
        """All finite values of a query between two moments, of all series."""
        result = self.get("query_range", query=query, start=start, end=end, step=2)["result"]
        values = [float(value) for series in result for _, value in series["values"]]
        return [value for value in values if math.isfinite(value)]


@contextmanager
def prometheus(folder: Path) -> Iterator[Prometheus]:
    """One with the shipped files, that asks each second and finds this test's Ray instead of the host's."""
    program = shutil.which("prometheus")
    if not program:
        pytest.skip("prometheus is not installed (Debian: apt-get install prometheus)")
    node = ray.nodes()[0]
    found = [{"labels": {"job": "ray"}, "targets": [f"127.0.0.1:{node['MetricsExportPort']}"]}]
    (folder / "discovered.json").write_text(json.dumps(found))  # as Ray's dashboard writes it
    text = (FOLDER / "prometheus.yml").read_text()
    for shipped, here in (
        (SERVICE_DISCOVERY, str(folder / "discovered.json")),
        ("scrape_interval: 10s", "scrape_interval: 1s"),
        ("scrape_timeout: 10s", "scrape_timeout: 1s"),
    ):
        assert shipped in text
        text = text.replace(shipped, here)
    (folder / "prometheus.yml").write_text(text)
    shutil.copy(FOLDER / "alerts.yml", folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(
            [
                program,
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'tsdb'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )
        try:
            yield Prometheus(port)
        finally:
            process.terminate()
            process.wait(30)


def test_every_query_of_the_dashboard_has_an_answer(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", rows=360)
    spec = job(
        tmp_path / "in",
        tmp_path / "out",
        name=NAME,
        prompt={"template": "{{ '' if question | length is divisibleby(7) else question }}"},
        shards={"rows": 30},
        errors={"max_error_rate": 1.0},
        # Ray reports every ten seconds, and a rate needs two reports.
        model={"backend": "simulated", "simulated": {"tokens_per_s": 300.0}},
    )
    (tmp_path / "prometheus").mkdir()
    with prometheus(tmp_path / "prometheus") as server:
        began = time.time()
        stats = run(load(spec)).stats
        rows = f'sum(ray_dray_rows_total{{job="{NAME}"}})'
        deadline = time.monotonic() + 40
        while time.monotonic() < deadline:
            if max(server.values(rows, began, time.time()), default=0) == stats.rows_in:
                break
            time.sleep(1)
        ended = time.time()

        [target] = server.get("targets")["activeTargets"]
        assert target["health"] == "up", target["lastError"]
        assert max(server.values(rows, began, ended)) == stats.rows_in
        empty = []
        for panel in json.loads((FOLDER / "dashboard.json").read_text())["panels"]:
            for one in panel.get("targets", []):
                query = one["expr"].replace("$job", NAME).replace("$replica", ".*")
                if not server.values(query, began, ended):
                    empty.append(panel["title"])
        gpus = [] if ray.cluster_resources().get("GPU") else ["GPU busy", "GPU memory in use"]
        assert empty == gpus
        # The dashboard's variables, which come from labels; and the rules, which Prometheus runs without an error.
        assert NAME in server.get("label/job/values")
        assert server.get("label/replica/values")
        [group] = server.get("rules")["groups"]
        assert {rule["health"] for rule in group["rules"]} <= {"ok", "unknown"}
