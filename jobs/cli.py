"""The command line. Every command takes a job file or an output path; `--json` prints one JSON document to stdout."""

from __future__ import annotations

import functools
import shlex
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.live import Live
from rich.markup import escape

from jobs.cli_submit import address_option
from jobs.command import command, followed, job_arguments, main, show, stderr, stdout
from pipelines.errors import DrayError, OutputError, SpecError

if TYPE_CHECKING:
    from jobs.loading import LoadedJob
    from jobs.report import Report
    from jobs.report_html import Facts


@command("validate")
@job_arguments
def validate(target: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Check a job file: keys, types, engine arguments. Reads no data."""
    from jobs.output_schemas import json_columns
    from jobs.proposal import check_images
    from jobs.target import job_of

    job = job_of(target, overrides)
    check_images(job.spec, at_hand=True)
    notes = json_columns(job.spec)
    show(
        {"valid": True, "name": job.spec.name, "notes": notes},
        "\n".join([f"{target}: valid job [bold]{job.spec.name}[/]", *map(escape, notes)]),
        as_json=as_json,
    )


@command("plan")
@job_arguments
def plan(target: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show what would run: shards, rows, bytes, what is committed already. Writes nothing."""
    from jobs.proposal import propose
    from jobs.target import job_of

    proposal = propose(job_of(target, overrides))
    show(proposal.summary, proposal.render(), as_json=as_json)


@command("preview")
@job_arguments
@click.option("-n", "rows", type=click.IntRange(min=1), default=5, show_default=True, help="How many rows.")
@click.option("--generate", is_flag=True, help="Answer them too, with the job's model.")
def preview(target: str, overrides: tuple[str, ...], rows: int, generate: bool, as_json: bool) -> None:
    """Show the first rendered prompts. Writes nothing."""
    from jobs.preview import preview as preview_rows
    from jobs.preview import render
    from jobs.target import job_of

    seen = preview_rows(job_of(target, overrides), rows=rows, generate=generate)
    show({"rows": seen}, render(seen), as_json=as_json)


def to_the_end(work: Callable[..., Report], *, quiet: bool, as_json: bool, run_id: str | None = None) -> None:
    """Do the work of a run, and show its summary on stdout."""
    from jobs.report import render

    report = followed(work, quiet=quiet, as_json=as_json, run_id=run_id)
    show(report.to_dict(), render(report), as_json=as_json)


def run_job(job: LoadedJob, **how: Any) -> Report:
    """`jobs.run`, imported when it is called."""
    from jobs.runner import run

    return run(job, **how)


@command("run")
@job_arguments
@click.option("--date", metavar="DATE", help="What ${run.date} and the like are of; default: now.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@click.option("--run-id", hidden=True)
def run(
    target: str,
    overrides: tuple[str, ...],
    date: str | None,
    quiet: bool,
    run_id: str | None,
    as_json: bool,
) -> None:
    """Run a job, or what is left of it. New input files are taken up."""
    from jobs.target import job_of

    job = job_of(target, overrides, date)
    to_the_end(functools.partial(run_job, job), quiet=quiet, as_json=as_json, run_id=run_id)


@command("resume")
@job_arguments
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@click.option("--run-id", hidden=True)
@click.option("--date", hidden=True)
def resume(
    target: str,
    overrides: tuple[str, ...],
    quiet: bool,
    run_id: str | None,
    date: str | None,
    as_json: bool,
) -> None:
    """Run what is left of the plan as it stands; the input is not listed again."""
    from jobs.target import job_of

    job = job_of(target, overrides, date)
    to_the_end(functools.partial(run_job, job, relist=False), quiet=quiet, as_json=as_json, run_id=run_id)


@command("retry-failed")
@job_arguments
@click.option(
    "--where",
    multiple=True,
    metavar="error_code=CODE[,CODE…]",
    help="Only rows that failed with one of these codes.",
)
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def retry_failed(
    target: str, overrides: tuple[str, ...], where: tuple[str, ...], quiet: bool, as_json: bool
) -> None:
    """Run the failed rows again, by other settings if given, and merge their answers into the same dataset."""
    from jobs.retry import parse_where
    from jobs.retry import retry_failed as retry
    from jobs.target import is_job_file, job_of
    from pipelines.storage import Storage

    error_codes, job = parse_where(where), job_of(target, overrides)
    if not is_job_file(target) and Storage(job.spec.output.path) != Storage(target):
        raise SpecError(f"override: output.path: a retry merges into the output that it is given, {target}")
    work = functools.partial(retry, job, error_codes=error_codes)
    to_the_end(work, quiet=quiet, as_json=as_json)


@command("tune")
@job_arguments
@click.option(
    "--seconds", type=click.FloatRange(min=5), default=180, show_default=True, help="Time for all of it."
)
@click.option(
    "--prompts", type=click.IntRange(min=1), default=512, show_default=True, help="How many to sample."
)
@click.option(
    "--tensor-parallel", type=click.IntRange(min=1), multiple=True, help="Try this size too; repeatable."
)
@click.option(
    "--window", type=click.FloatRange(min=0.5), help="Seconds of one measurement; default: a thirtieth."
)
@click.option("--ngram", is_flag=True, help="Try n-gram speculative decoding too.")
@click.option("--out", metavar="FILE", help="Where to write; default: conf/tuned/<model>@<gpu>.yaml.")
def tune(
    target: str,
    overrides: tuple[str, ...],
    seconds: float,
    window: float | None,
    prompts: int,
    tensor_parallel: tuple[int, ...],
    ngram: bool,
    out: str | None,
    as_json: bool,
) -> None:
    """Measure engine settings on the job's prompts; write the fastest to a file for `extends`."""
    from jobs.console import chatter_to, log_folder
    from jobs.ledger import new_run_id
    from jobs.stopping import StopRequest
    from jobs.target import job_of
    from jobs.tuned import line_of
    from jobs.tuned import tune as tune_job

    job = job_of(target, overrides)
    log = log_folder() / f"tune-{new_run_id()}.log"
    try:
        with StopRequest().on_signals(), chatter_to(log) as terminal:
            tuned = tune_job(
                job,
                seconds=seconds,
                window_s=window or 0.0,
                prompts=prompts,
                tensor_parallel=tensor_parallel,
                ngram=ngram,
                out=out,
                command=shlex.join(["dray", *sys.argv[1:]]),
                observer=lambda trial: print(line_of(trial), file=terminal),
            )
    except DrayError:
        stderr.print(f"log: {log}")
        raise
    show(tuned.to_dict(), tuned.render(), as_json=as_json)


@command("status")
@click.argument("target", metavar="JOB|RUN")
@address_option(required=False)
def status(target: str, address: str | None, as_json: bool) -> None:
    """Show how far a job is: shards, rows, runs, and who is at it. With --address a submitted run, by its id."""
    from jobs.ledger import is_run_id

    if address and is_run_id(target):
        from jobs.submission import render_runs, run_on

        run = run_on(address, target)
        show(asdict(run), render_runs([run]), as_json=as_json)
        return
    from jobs.inspect import render_status
    from jobs.inspect import status as status_of
    from jobs.target import output_of

    found = status_of(output_of(target))
    show(found, render_status(found), as_json=as_json)


@command("cancel")
@click.argument("target", metavar="JOB|RUN")
@address_option(required=False)
def cancel(target: str, address: str | None, as_json: bool) -> None:
    """Ask the run that writes this output to stop: shards in flight may finish, the rest waits for `dray resume`.

    With --address a submitted run, by its id.
    """
    from jobs.ledger import is_run_id

    if address and is_run_id(target):
        from jobs.submission import stop

        run = stop(address, target)
        show(asdict(run), f"asked run {target} of {run.job} to stop", as_json=as_json)
        return
    from jobs.lock import cancel as cancel_run
    from jobs.target import output_of

    storage = output_of(target)
    holder = cancel_run(storage)
    if holder is None:
        raise OutputError(f"{storage.url()}: no run writes this output now")
    wait = f"it looks every {holder.heartbeat_s:g} s, and gives its shards errors.shutdown_grace_s to finish"
    show(
        {"run_id": holder.run_id, "host": holder.host, "pid": holder.pid},
        f"asked {holder} to stop; {wait}",
        as_json=as_json,
    )


@command("report")
@click.argument("target", metavar="JOB")
@click.option("--html", metavar="FILE", help="Write one self-contained page to this file; - is stdout.")
@click.option(
    "--against", metavar="JOB", help="Compare with this job file's output, or this output (--html)."
)
def report(target: str, html: str | None, against: str | None, as_json: bool) -> None:
    """Show a job's figures, folded from its parts' footers."""
    from jobs.inspect import report_of
    from jobs.report import render
    from jobs.target import is_job_file, job_of, output_of

    if html is None:
        if against is not None:
            raise SpecError("--against: the comparison is a part of the page; add --html FILE")
        found = report_of(output_of(target))
        show(found.to_dict(), render(found), as_json=as_json)
        return
    if html == "-" and as_json:
        raise SpecError("--html -: the page and --json would both go to stdout; name a file")
    from jobs.report_html import facts_of, render_html, write_html

    def facts(place: str) -> Facts:
        return facts_of(output_of(place), job_of(place).spec if is_job_file(place) else None)

    ours = facts(target)
    write_html(html, render_html(ours, facts(against) if against is not None else None))
    if html != "-":
        show(ours.report.to_dict(), render(ours.report), as_json=as_json)


@command("verify")
@click.argument("target", metavar="JOB")
@click.option("--deep", is_flag=True, help="Read every row and compare digests, not only the footers.")
@click.option(
    "--repair",
    "mend",
    is_flag=True,
    help="Move damaged parts away, so that `dray resume` makes them anew; rebuild stats and card.",
)
def verify(target: str, deep: bool, mend: bool, as_json: bool) -> None:
    """Check that every planned row stands in the output exactly once. Exit code 1 when not."""
    from jobs.inspect import render_verdict
    from jobs.inspect import verify as verify_output
    from jobs.repair import repair
    from jobs.target import output_of

    storage = output_of(target)
    verdict = (
        repair(storage, deep=deep, notify=lambda line: stderr.print(escape(line)))
        if mend
        else verify_output(storage, deep=deep)
    )
    show(verdict, render_verdict(verdict), as_json=as_json)
    if not verdict["ok"]:
        sys.exit(1)


@command("doctor")
@click.argument("target", metavar="[JOB]", required=False)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def doctor(target: str | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Check this machine, and what a job needs: versions, driver, memory, storage, model."""
    from jobs.doctor import Finding, diagnose, render, to_dict

    job = None
    if target:
        from jobs.target import job_of

        job = job_of(target, overrides)
    findings: list[Finding] = []
    with (
        Live(console=stdout, refresh_per_second=4)
        if stdout.is_terminal and not as_json
        else nullcontext() as live
    ):
        for finding in diagnose(job):
            findings.append(finding)
            if live:
                live.update(render(findings))
    if as_json or not stdout.is_terminal:  # the live table stands already
        show(to_dict(findings), render(findings), as_json=as_json)
    if any(finding.verdict == "problem" for finding in findings):
        sys.exit(1)


from jobs import cli_batch, cli_costs, cli_export, cli_models, cli_schedule, cli_serve  # noqa: E402,F401

if __name__ == "__main__":
    main(prog_name=Path(sys.argv[0]).name)
