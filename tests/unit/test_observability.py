"""conf/observability: the alerts with promtool, and both alerts and dashboard against the metrics that Dray has."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "conf" / "observability"
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text())
RULES = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"][0]["rules"]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]


def metrics() -> dict[str, str]:
    """Name in Prometheus to kind, of every metric that pipelines/metrics.py makes."""
    source = (ROOT / "pipelines/metrics.py").read_text()
    found: dict[str, str] = {}
    for kind, name in re.findall(r"_(counter|gauge|histogram|observe)\(\s*\"(\w+)\"", source):
        suffix = {"counter": "_total", "gauge": ""}.get(kind, "_bucket")
        found[f"ray_dray_{name}{suffix}"] = kind
    assert len(found) > 10
    return found


def named(queries: list[str]) -> set[str]:
    return {name for query in queries for name in re.findall(r"\bray_dray_\w+", query)}


def promtool(*arguments: str | Path, cwd: Path = ROOT) -> None:
    found = shutil.which("promtool")
    if not found:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    done = subprocess.run([found, *arguments], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_accepts_the_configuration_and_the_rules() -> None:
    promtool("check", "config", FOLDER / "prometheus.yml")  # follows rule_files


def test_promtool_runs_the_alerts_unit_tests() -> None:
    promtool("test", "rules", FOLDER / "tests/alerts_test.yml")


def test_promtool_accepts_every_panels_query(tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:{number}", "expr": query.replace("$job", ".*").replace("$replica", ".*")}
        for number, (_, query) in enumerate(QUERIES)
    ]
    (tmp_path / "panels.yml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    promtool("check", "rules", tmp_path / "panels.yml")


def test_alerts_and_panels_name_metrics_that_exist_and_every_metric_has_a_panel() -> None:
    known = set(metrics())
    tests = (FOLDER / "tests/alerts_test.yml").read_text()
    assert named([rule["expr"] for rule in RULES]) <= known
    assert set(re.findall(r"series: '(ray_dray_\w+)", tests)) <= known
    assert named([query for _, query in QUERIES]) == known


def test_every_alert_is_seen_firing_and_silent() -> None:
    fires, silent = set(), set()
    for test in yaml.safe_load((FOLDER / "tests/alerts_test.yml").read_text())["tests"]:
        for case in test["alert_rule_test"]:
            (fires if case.get("exp_alerts") else silent).add(case["alertname"])
    assert fires == silent == {rule["alert"] for rule in RULES}


def test_drays_label_job_survives_the_scrape() -> None:
    [scrape] = yaml.safe_load((FOLDER / "prometheus.yml").read_text())["scrape_configs"]
    assert scrape["honor_labels"] is True
    [monitor] = yaml.safe_load_all((ROOT / "deploy/kubernetes/monitoring.yaml").read_text())
    [rays] = [end for end in monitor["spec"]["podMetricsEndpoints"] if end["port"] == "metrics"]
    assert rays["honorLabels"] is True


def test_panels_are_named_explained_and_do_not_overlap() -> None:
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    taken: dict[tuple[int, int], str] = {}
    for panel in DASHBOARD["panels"]:
        place: dict[str, Any] = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, f"{panel['title']} lies on {taken[x, y]}"
                taken[x, y] = panel["title"]
    assert all(panel["title"] and panel["description"] for panel in PANELS)
    chosen = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD["panels"])))
    assert used == chosen == {"datasource", "job", "replica"}
