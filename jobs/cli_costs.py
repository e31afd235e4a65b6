"""`dray list` and `dray estimate`: what jobs cost, before and after."""

from __future__ import annotations

import os
from dataclasses import asdict

import click
from rich.markup import escape

from jobs.cli_submit import address_option
from jobs.command import command, job_arguments, show, stderr
from pipelines.errors import SpecError


@command("list")
@click.argument("location", metavar="[LOCATION]", required=False)
@click.option(
    "--state",
    type=click.Choice(["running", "succeeded", "failed", "interrupted", "lost", "unknown"]),
    help="Only runs in this state.",
)
@click.option("--name", metavar="GLOB", help="Only jobs of this name, for example 'nightly-*'.")
@click.option("--since", metavar="7d|DATE", help="Only runs that started since then.")
@address_option(required=False)
def list_runs(
    location: str | None,
    state: str | None,
    name: str | None,
    since: str | None,
    address: str | None,
    as_json: bool,
) -> None:
    """Show a team's runs, the newest first, from the shared ledger at LOCATION or $DRAY_LEDGER.

    With --address (and no LOCATION) those that a Ray cluster knows of.
    """
    from jobs.shared_ledger import LEDGER_VARIABLE
    from jobs.team_runs import parse_since, render, team_runs, to_dict
    from pipelines.storage import Storage

    if address and location is None:
        from jobs.submission import render_runs, runs_on

        submitted = runs_on(address, state=state, name=name, since=parse_since(since) if since else None)
        show({"runs": [asdict(run) for run in submitted]}, render_runs(submitted), as_json=as_json)
        return
    place = location or os.environ.get(LEDGER_VARIABLE)
    if not place:
        raise SpecError(
            f"no shared ledger is named: give its location, or set {LEDGER_VARIABLE} (a folder or a URL like s3://…)"
        )
    runs = team_runs(
        Storage(place),
        state=state,
        name=name,
        since=parse_since(since) if since else None,
        warn=lambda line: stderr.print(f"[yellow]warning:[/] {escape(line)}"),
    )
    show(to_dict(runs), render(runs), as_json=as_json)


@command("estimate")
@job_arguments
@click.option(
    "--rows", type=click.IntRange(min=1), default=200, show_default=True, help="How many to sample."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Which rows are drawn.")
def estimate(target: str, overrides: tuple[str, ...], rows: int, seed: int, as_json: bool) -> None:
    """Answer a random sample, and say what the whole job will take: tokens, time, GPU hours, cost. Writes nothing."""
    from jobs.console import chatter_to, log_folder
    from jobs.estimate import estimate as estimate_job
    from jobs.ledger import new_run_id
    from jobs.stopping import StopRequest
    from jobs.target import job_of
    from pipelines.errors import DrayError

    job = job_of(target, overrides)
    log = log_folder() / f"estimate-{new_run_id()}.log"
    try:
        with StopRequest().on_signals(), chatter_to(log):
            found = estimate_job(job, rows=rows, seed=seed)
    except DrayError:
        stderr.print(f"log: {log}")
        raise
    show(found.to_dict(), found.render(), as_json=as_json)
