"""Commands for clusters elsewhere: `dray submit`, and `dray logs` of what runs there."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import click
from rich.markup import escape

from jobs.command import command, job_arguments, show, stderr
from pipelines.errors import JobError, SpecError


def address_option(*, required: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`--address`, or Ray's own variable for it."""
    return click.option(
        "--address",
        envvar="RAY_API_SERVER_ADDRESS",
        show_envvar=True,
        required=required,
        metavar="http://HOST:8265",
        help="The Ray cluster's dashboard.",
    )


@command("submit")
@job_arguments
@address_option(required=True)
@click.option("--date", metavar="DATE", help="What ${run.date} and the like are of; default: now.")
@click.option("--resume", is_flag=True, help="Take the plan as it stands: after a driver that died.")
@click.option(
    "--env",
    "names",
    multiple=True,
    metavar="NAME",
    help="Give the run this environment variable; repeatable.",
)
@click.option("-f", "--follow", "watch", is_flag=True, help="Follow its log to the end.")
def submit(
    target: str,
    overrides: tuple[str, ...],
    address: str,
    date: str | None,
    resume: bool,
    names: tuple[str, ...],
    watch: bool,
    as_json: bool,
) -> None:
    """Run a job on a Ray cluster elsewhere, and say by which id. A run that writes its output already is attached to."""
    from jobs.submission import local_places, unset_variables
    from jobs.submission import submit as submit_job
    from jobs.target import job_of

    if resume and date:
        raise SpecError("--date is for a new run; --resume keeps that of the output")
    job = job_of(target, overrides, date)
    if missing := [name for name in names if name not in os.environ]:
        raise SpecError(f"--env {missing[0]}: this environment variable is not set here")
    env = {name: os.environ[name] for name in names}
    for place in local_places(job, address):
        stderr.print(f"note: {escape(place)} is a path of this machine; every node of {address} needs it too")
    if unset := unset_variables(job, env):
        stderr.print(f"note: the cluster has to set {', '.join(unset)} (or give --env {unset[0]})")
    run = submit_job(job, address, resume=resume, env=env)
    how = f"is {run.state.lower()} already, started by {run.user}" if run.attached else "is submitted"
    stderr.print(f"run [bold]{run.run_id}[/] {how}; dray logs {run.run_id} -f --address {address}")
    if watch:
        _follow(address, run.run_id, to_the_end=True)
    else:
        show(asdict(run), run.run_id, as_json=as_json)


@command("logs")
@click.argument("run_id", metavar="RUN")
@address_option(required=True)
@click.option("-f", "--follow", "watch", is_flag=True, help="Go on to the run's end.")
def logs(run_id: str, address: str, watch: bool, as_json: bool) -> None:
    """Show what a submitted run wrote. With -f exit code 1 when it failed."""
    _follow(address, run_id, to_the_end=watch)


def _follow(address: str, run_id: str, *, to_the_end: bool) -> None:
    from jobs.submission import follow

    run = follow(
        address,
        run_id,
        lambda text: click.echo(text, nl=False),
        to_the_end=to_the_end,
        note=lambda line: stderr.print(escape(line)),
    )
    if to_the_end and run.state != "SUCCEEDED":
        raise JobError(f"run {run_id} is {run.state}: {run.message}")
