"""Exported schedules: what they hand to `dray`, found out by running them with a program that writes its arguments down."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import jinja2
import pytest
import yaml
from cronsim import CronSim

from jobs.export import EXPORTS, Call
from jobs.loading import LoadedJob, load
from pipelines.errors import SpecError

#: Names that a shell, Jinja, cron or YAML would take apart.
AWKWARD = "my job's 100% {{ x }} $HOME `id`.yaml"
OVERRIDE = "prompt.template=Say \"{{ x }}\" {% if y %}'ü'{% endif %} 50% # \\ !"


def job(**schedule: Any) -> LoadedJob:
    return load(
        {
            "name": "Daily.job_1",
            "input": {"path": "s3://b/in/date=${run.date}/"},
            "prompt": {"template": "First line.\n{{ x }}", "system": "${env:SYSTEM:-none}"},
            "model": {"source": "org/model"},
            "pool": {"replicas": 4},
            "output": {"path": "s3://b/out/"},
            "schedule": {"cron": "30 0 * * *", "timezone": "Europe/Berlin", **schedule},
        }
    )


@pytest.fixture
def call(tmp_path: Path) -> Call:
    folder = tmp_path / "a folder's % {{ name"
    folder.mkdir()
    program = tmp_path / "dray it.py"
    program.write_text(
        f"#!{sys.executable}\nimport json, os, sys\njson.dump([os.getcwd(), *sys.argv[1:]], open({str(tmp_path / 'said')!r}, 'w'))\n"
    )
    program.chmod(0o755)
    return Call(
        target=AWKWARD,
        overrides=(OVERRIDE,),
        dray=str(program),
        folder=str(folder),
        image="registry/dray:1",
        today=datetime(2026, 11, 25, tzinfo=UTC),
    )


def said(call: Call) -> list[str]:
    """The working directory and the arguments of the last call."""
    found: list[str] = json.loads((Path(call.dray).parent / "said").read_text())
    return found


class Pendulum(datetime):
    """What Airflow's times can do more than datetime's, as far as the DAG needs it."""

    def in_timezone(self, name: str) -> datetime:
        return self.astimezone(ZoneInfo(name))


ADDRESSES = pytest.mark.parametrize(
    ("address", "verb"),
    [
        (None, ["run", "--quiet"]),
        ("http://head:8265", ["submit", "--follow", "--address", "http://head:8265"]),
    ],
)


@ADDRESSES
def test_the_airflow_dag_compiles_and_its_command_keeps_every_word_whole(
    call: Call, address: str | None, verb: list[str]
) -> None:
    call = replace(call, address=address)
    text = EXPORTS["airflow"](job(), call)
    compile(text, "dag.py", "exec")
    given = {
        keyword.arg: ast.literal_eval(keyword.value)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "BashOperator"
        for keyword in node.keywords
    }
    assert not given["bash_command"].endswith((".sh", ".bash", ".yaml"))  # Airflow would look for such a file
    time = Pendulum(2026, 11, 21, 23, 30, tzinfo=UTC)
    command = jinja2.Environment().from_string(given["bash_command"]).render(logical_date=time)
    subprocess.run(["bash", "-c", command], cwd=given["cwd"], check=True)
    arguments = [*verb, "--date=2026-11-22T00:30:00+01:00", "--", AWKWARD, OVERRIDE]
    assert said(call) == [call.folder, *arguments]


@pytest.mark.parametrize(("missed", "catchup"), [("run_all", True), ("run_once", False), ("skip", False)])
def test_airflow_catches_up_where_all_missed_times_are_to_run(call: Call, missed: str, catchup: bool) -> None:
    assert f"catchup={catchup}," in EXPORTS["airflow"](job(missed=missed), call)


@pytest.mark.parametrize("overlap", ["skip", "queue"])
def test_the_crontab_line_keeps_every_word_whole(call: Call, overlap: str, tmp_path: Path) -> None:
    *comments, zone, line = EXPORTS["cron"](job(overlap=overlap), call).splitlines()
    assert all(comment.startswith("# ") for comment in comments)
    assert zone == "CRON_TZ=Europe/Berlin"
    minute, hour, day, month, weekday, command = line.split(" ", 5)
    assert [minute, hour, day, month, weekday] == ["30", "0", "*", "*", "*"]
    assert "%" not in command.replace(r"\%", "")  # cron would cut the line there
    command = command.replace(r"\%", "%").replace("/tmp/dray-", f"{tmp_path}/lock-")
    subprocess.run(["sh", "-c", command], check=True)
    assert said(call) == [call.folder, "run", "--quiet", "--", AWKWARD, OVERRIDE]
    assert ("flock -n " in command) == (overlap == "skip")


@ADDRESSES
def test_the_kubernetes_cronjob_carries_the_whole_job(
    call: Call, tmp_path: Path, address: str | None, verb: list[str]
) -> None:
    call = replace(call, address=address)
    config, cron = yaml.safe_load_all(EXPORTS["kubernetes"](job(cron="30 0 * * 1,7"), call))
    assert (config["kind"], cron["kind"]) == ("ConfigMap", "CronJob")
    inside = tmp_path / "job.yaml"
    inside.write_text(config["data"]["job.yaml"])
    assert load(inside, date="2026-11-22").spec == load(job(cron="30 0 * * 1,7").raw, date="2026-11-22").spec
    assert "${env:SYSTEM:-none}" in inside.read_text()  # what it stands for is not written down
    spec = cron["spec"]
    assert (spec["schedule"], spec["timeZone"]) == ("30 0 * * 1,0", "Europe/Berlin")
    container = spec["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]
    assert container["command"] == [call.dray, *verb, "/etc/dray/job.yaml"]
    if address is None:
        assert container["resources"]["limits"] == {"nvidia.com/gpu": 4}
    else:
        assert "resources" not in container  # the GPUs are the cluster's
    assert cron["metadata"]["name"] == "dray-daily-job-1"


@pytest.mark.parametrize(
    ("weekdays", "expected"),
    [
        ("5-7", "5,6,0"),
        ("fri-7", "5,6,0"),
        ("0-2,5-7,7", "0,1,2,5,6"),
        ("1-7/2", "1,3,5,0"),
        ("5/2", "5,0"),  # of Kubernetes' weekdays, 0 to 6, only the 5th
        ("0-7", "0,1,2,3,4,5,6"),
        ("mon-fri", "mon-fri"),
        ("*/2", "*/2"),
    ],
)
def test_the_weekdays_of_a_cronjob_end_with_six(call: Call, weekdays: str, expected: str) -> None:
    _, cron = yaml.safe_load_all(EXPORTS["kubernetes"](job(cron=f"30 0 * * {weekdays}"), call))
    assert cron["spec"]["schedule"] == f"30 0 * * {expected}"
    ours, theirs = (CronSim(f"30 0 * * {days}", datetime(2026, 1, 1)) for days in (weekdays, expected))
    assert [next(ours) for _ in range(20)] == [next(theirs) for _ in range(20)]


def test_what_a_scheduler_cannot_do_is_refused(call: Call) -> None:
    with pytest.raises(SpecError, match="a CronJob cannot queue"):
        EXPORTS["kubernetes"](job(overlap="queue"), call)
    for scheduler in ("cron", "kubernetes"):
        with pytest.raises(SpecError, match="L in '0 0 L JUL \\*' is known to Dray"):
            EXPORTS[scheduler](job(cron="0 0 L JUL *"), call)
    with pytest.raises(SpecError, match="schedule: missing"):
        EXPORTS["airflow"](load({**job().raw, "schedule": None}), call)


@pytest.mark.parametrize("overlap", ["skip", "queue"])
def test_the_dagster_definition_compiles(call: Call, overlap: str) -> None:
    compile(EXPORTS["dagster"](job(overlap=overlap), call), "definitions.py", "exec")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Dagster's own
@pytest.mark.parametrize("overlap", ["skip", "queue"])
def test_dagster_loads_and_runs_the_definition(call: Call, overlap: str, tmp_path: Path) -> None:
    import dagster

    path = tmp_path / "definitions.py"
    path.write_text(EXPORTS["dagster"](job(overlap=overlap), call))
    spec = importlib.util.spec_from_file_location("exported", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    dagster.Definitions.validate_loadable(module.defs)
    schedule = module.defs.get_schedule_def("dray_Daily_job_1_schedule")
    assert schedule.execution_timezone == "Europe/Berlin"
    with dagster.instance_for_test() as instance:
        time = datetime(2026, 11, 22, 0, 30, tzinfo=ZoneInfo("Europe/Berlin"))
        context = dagster.build_schedule_context(instance=instance, scheduled_execution_time=time)
        (request,) = schedule.evaluate_tick(context).run_requests
        result = module.defs.get_job_def("dray_Daily_job_1_job").execute_in_process(
            run_config=request.run_config, instance=instance
        )
        assert result.success
        arguments = ["run", "--quiet", "--date=2026-11-22T00:30:00+01:00", "--", AWKWARD, OVERRIDE]
        assert said(call) == [call.folder, *arguments]
        busy = instance.create_run_for_job(
            module.dray_job, run_config=request.run_config, status=dagster.DagsterRunStatus.STARTED
        )
        tick = schedule.evaluate_tick(context)
        assert busy.job_name == "dray_Daily_job_1_job"
        assert bool(tick.run_requests) == (overlap == "queue")
        Path(call.dray).write_text(f"#!{sys.executable}\nraise SystemExit(2)\n")
        failed = module.dray_job.execute_in_process(
            run_config=request.run_config, instance=instance, raise_on_error=False
        )
        assert not failed.success
