"""Jobs on a cluster that is not this machine, through Ray's Job API: ship, follow, stop.

What is shipped is one folder, which Ray copies to every node that needs it:

    jobs/ pipelines/    Dray's own code, first on the import path
    job.yaml            the merged job file with its overrides, references unfilled, `cluster.address: auto`
    user/               the packages of the job's functions, last on the import path; nothing else of the user's folder

The run's id is Ray's submission id. The cluster's Python has Dray's dependencies; Dray itself need not be installed there.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import yaml
from rich.markup import escape

import jobs
import pipelines
from jobs.ledger import new_run_id
from jobs.loading import LoadedJob
from jobs.lock import current_user
from jobs.proposal import own_folders
from jobs.references import MASK
from pipelines import __version__
from pipelines.code import source_of_package
from pipelines.errors import JobError, SpecError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

#: States of Ray's jobs that end nothing.
UNDER_WAY = frozenset({"PENDING", "RUNNING"})
#: Seconds beyond `errors.shutdown_grace_s` that Ray waits before it kills a driver that it told to stop.
STOP_S = 30
#: A platform's settings of its nodes (docs/models.md), which a job could otherwise take away.
_CLUSTERS_OWN = {"DRAY_POLICY", "DRAY_MODELS"}
#: The run variables that follow from a run's time.
_TIME_VARIABLES = {"date", "hour", "datetime", "id"}
#: Seconds between two looks at a job's log.
POLL_S = 2.0
#: Seconds that a cluster may take to be ready for jobs.
PATIENCE_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """A run on a cluster."""

    run_id: str
    job: str
    output: str
    state: str
    """Ray's: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
    attached: bool = False
    """Whether it was there already."""
    message: str = ""
    user: str = ""
    started_at: float | None = None
    """Unix seconds."""
    ended_at: float | None = None


@contextmanager
def client(address: str) -> Iterator[JobSubmissionClient]:
    """A connection to the Job API at `http://host:8265`; a token comes from where Ray looks (`RAY_AUTH_TOKEN` …).

    Raises JobError where nobody answers or the token is refused.
    """
    _use_token()
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        found = JobSubmissionClient(address)
        for name in ("ray", "ray.dashboard.modules.dashboard_sdk"):  # which tell of each upload
            logging.getLogger(name).setLevel(logging.WARNING)
        yield found
    except AuthenticationError as error:
        raise JobError(
            f"{address} wants a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to the cluster's (`ray get-auth-token` there)"
        ) from error
    except (ConnectionError, OSError) as error:
        raise JobError(f"no answer from {address}: {_first_line(error)}") from error
    except RuntimeError as error:  # Ray's class for each refusal of its API
        raise JobError(f"{address}: {_first_line(error)}") from error


def _use_token() -> None:
    """Have Ray send its token where there is one, as its own commands do; before it is imported."""
    given = os.environ.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}
    if given or (Path.home() / ".ray" / "auth_token").exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def submit(
    job: LoadedJob,
    address: str,
    *,
    resume: bool = False,
    env: Mapping[str, str] | None = None,
) -> Submitted:
    """Start a run of the job on the cluster, or find the one that writes its output now.

    The run's date is that of `job`, also where it waits for its turn past midnight. `resume` takes the plan as it
    stands. `env`: variables for the run's processes; anyone who may see the cluster's
    jobs sees their values. Raises SpecError for a job with a secret written out, JobError where the cluster refuses.
    """
    output = job.spec.output.path
    for name in sorted(_CLUSTERS_OWN & (env or {}).keys()):
        raise SpecError(f"--env {name}: the cluster's own to set; no job brings its own")
    for name in sorted(job.variables.keys() - _TIME_VARIABLES):
        raise SpecError(
            f"run variable {name!r}: only those of the time can be submitted; write its value into the job"
        )
    with client(address) as cluster:
        for found in _jobs(cluster):
            if found.output == output and found.state in UNDER_WAY:
                return replace(found, attached=True)
        run_id = new_run_id()
        with tempfile.TemporaryDirectory(prefix="dray-submit-") as folder:
            pack(job, Path(folder))
            stop_s = job.spec.errors.shutdown_grace_s + STOP_S
            _patiently(
                lambda: cluster.submit_job(
                    entrypoint=_entrypoint("resume" if resume else "run", run_id, job.variables["datetime"]),
                    submission_id=run_id,
                    runtime_env={
                        "working_dir": folder,
                        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": f"{stop_s:.0f}", **(env or {})},
                    },
                    metadata={
                        "dray_job": job.spec.name,
                        "dray_output": output,
                        "dray_user": current_user(),
                        "dray_version": __version__,
                    },
                )
            )
    return Submitted(run_id=run_id, job=job.spec.name, output=output, state="PENDING")


def _patiently(call: Callable[[], object]) -> None:
    """A cluster that has just started has no agent to take jobs for some seconds."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            call()
            return
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(POLL_S)


def runs_on(
    address: str, *, state: str | None = None, name: str | None = None, since: float | None = None
) -> list[Submitted]:
    """Dray's runs that the cluster knows of, the newest first.

    `state` as in a ledger: running, succeeded, failed or interrupted. `name`: a glob. `since`: Unix seconds.
    """
    with client(address) as cluster:
        found = sorted(_jobs(cluster), key=lambda run: run.started_at or 0.0, reverse=True)
    return [
        run
        for run in found
        if (state is None or _LEDGER_STATES.get(run.state) == state)
        and (name is None or fnmatch(run.job, name))
        and (since is None or (run.started_at or time.time()) >= since)
    ]


#: Ray's states of jobs in the ledger's words.
_LEDGER_STATES = {
    "PENDING": "running",
    "RUNNING": "running",
    "SUCCEEDED": "succeeded",
    "FAILED": "failed",
    "STOPPED": "interrupted",
}


def run_on(address: str, run_id: str) -> Submitted:
    """One of them. Raises JobError for an id that the cluster does not know."""
    for found in runs_on(address):
        if found.run_id == run_id:
            return found
    raise JobError(f"{address} knows no run {run_id!r}; `dray list --address {address}` shows what it knows")


def stop(address: str, run_id: str) -> Submitted:
    """Ask a run to stop as Ctrl-C would: shards in flight get `errors.shutdown_grace_s`. Returns at once."""
    found = run_on(address, run_id)
    if found.state not in UNDER_WAY:
        raise JobError(f"run {run_id} is {found.state} already")
    with client(address) as cluster:
        cluster.stop_job(run_id)
    return found


def follow(
    address: str, run_id: str, write: Callable[[str], None], *, to_the_end: bool, note: Callable[[str], None]
) -> Submitted:
    """Write the run's log as it grows, `to_the_end` of the run or what is there now.

    A connection that is lost is taken up again for as long as it takes: the job runs on without it.
    """
    written, quiet = 0, False
    while True:
        try:
            found = run_on(address, run_id)
            with client(address) as cluster:
                log = cluster.get_job_logs(run_id)
        except JobError as error:
            if not to_the_end or "knows no run" in str(error):
                raise
            if not quiet:
                note(f"{error}; the run goes on without this connection, trying again")
            quiet = True
            time.sleep(POLL_S)
            continue
        quiet = False
        write(log[written:])
        written = len(log)
        if not to_the_end or found.state not in UNDER_WAY:
            return found
        time.sleep(POLL_S)


def unset_variables(job: LoadedJob, env: Mapping[str, str]) -> list[str]:
    """Environment variables that the job file mentions and `env` does not carry: the cluster has to have them."""
    text = json.dumps(list(job.referenced.values()))
    return sorted(set(re.findall(r"\$\{env:([A-Za-z_]\w*)", text)) - env.keys())


def local_places(job: LoadedJob, address: str) -> list[str]:
    """Paths of the job that only this machine may have, where the cluster is elsewhere."""
    if urlsplit(address).hostname in ("127.0.0.1", "localhost", "::1"):
        return []
    spec = job.spec
    inputs = [spec.input.path] if isinstance(spec.input.path, str) else list(spec.input.path)
    models = [model.source for model in spec.models.values()]
    return [place for place in (*inputs, spec.output.path, *models) if os.path.isabs(place)]


def render_runs(runs: Sequence[Submitted]) -> str:
    """For people, a line each; what a failed one says stands below it."""
    rows = [("run", "state", "started (UTC)", "by", "job", "output")]
    for run in runs:
        started = (
            "" if run.started_at is None else f"{datetime.fromtimestamp(run.started_at, UTC):%Y-%m-%d %H:%M}"
        )
        rows.append((run.run_id, run.state, started, run.user, run.job, run.output))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    for line, run in zip(range(len(runs), 0, -1), reversed(runs), strict=True):
        if run.state == "FAILED" and run.message:
            lines.insert(line + 1, f"    {run.message}")
    return escape("\n".join(lines))


# ── Packing ──────────────────────────────────────────────────────────────────────────────────────────────────────


def pack(job: LoadedJob, folder: Path) -> None:
    raw = json.loads(json.dumps(job.raw, default=str))
    if masked := [".".join(key) for key, value in _leaves(raw) if value == MASK]:
        raise SpecError(
            f"{masked[0]}: a secret written out is not shipped; give it as ${{env:NAME}} and --env NAME"
        )
    raw["cluster"] = {"address": "auto"}
    (folder / "job.yaml").write_text(yaml.safe_dump(raw, sort_keys=False, allow_unicode=True))
    for package in (jobs, pipelines):
        _copy(Path(package.__path__[0]), folder / package.__name__)
    user = folder / "user"
    user.mkdir()
    (user / ".keep").touch()  # Ray leaves empty folders out
    packages = (
        source_of_package(function.partition(":")[0], own_folders())
        for function in job.spec.functions.values()
    )
    for source in {package for package in packages if package is not None}:
        _copy(source, user / source.name)


def _copy(source: Path, target: Path) -> None:
    if source.is_file():
        shutil.copy(source, target)
    else:
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.pyc", ".*"))


def _entrypoint(command: str, run_id: str, date: str) -> str:
    options = ["--run-id", run_id, "--date", date]
    # -P: the folder `user` does not go to the front of the import path, where Python would put it.
    return f'cd user && PYTHONPATH="$OLDPWD" exec python -P -m jobs.cli {command} ../job.yaml {shlex.join(options)}'


def _leaves(tree: Any, key: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from _leaves(value, (*key, str(name)))
    else:
        yield key, tree


# ── What the cluster knows ───────────────────────────────────────────────────────────────────────────────────────


def _jobs(cluster: JobSubmissionClient) -> Sequence[Submitted]:
    found = []
    for details in cluster.list_jobs():
        metadata = details.metadata or {}
        if "dray_job" not in metadata or details.submission_id is None:
            continue
        found.append(
            Submitted(
                run_id=details.submission_id,
                job=metadata["dray_job"],
                output=metadata.get("dray_output", ""),
                state=str(getattr(details.status, "value", details.status)),
                message=_first_line(details.message or ""),
                user=metadata.get("dray_user", ""),
                started_at=None if details.start_time is None else details.start_time / 1000,
                ended_at=None if not details.end_time else details.end_time / 1000,
            )
        )
    return found


def _first_line(error: object) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
