"""What every command of the command line shares: options, exit codes, how errors and results are shown.

Exit codes: 0 ok, 1 the job failed, 2 bad input, 130 interrupted. Errors are one line on stderr; `--debug` shows the
traceback.
"""

from __future__ import annotations

import functools
import json
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import click
from rich.console import Console
from rich.markup import escape

from pipelines import __version__
from pipelines.errors import DrayError, Interrupted, JobError

if TYPE_CHECKING:
    from jobs.report import Report

stdout = Console(highlight=False, soft_wrap=True)
stderr = Console(stderr=True, highlight=False, soft_wrap=True)


_HELP = {"help_option_names": ["-h", "--help"]}


@click.group(context_settings=_HELP)
@click.version_option(__version__, prog_name="dray")
def main() -> None:
    """Run one prompt job over a whole dataset."""


def command(name: str, group: click.Group = main) -> Callable[[Callable[..., Any]], click.Command]:
    """A command (of a `group` of its own, such as `dray models`) with the options that all share, and with Dray's errors
    and exit codes."""

    def wrap(function: Callable[..., Any]) -> click.Command:
        @click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
        @click.option("--debug", is_flag=True, help="Show tracebacks.")
        @functools.wraps(function)
        def guarded(*args: Any, debug: bool, as_json: bool, **kwargs: Any) -> None:
            try:
                function(*args, as_json=as_json, **kwargs)
            except DrayError as error:
                fail(error, as_json=as_json, debug=debug)
            except KeyboardInterrupt:
                fail(Interrupted("stopped"), as_json=as_json, debug=debug)
            except Exception as error:  # noqa: BLE001 - a bug of ours; the user gets one line all the same
                unexpected = JobError(f"unexpected {type(error).__name__}: {error} (--debug shows where)")
                fail(unexpected.with_traceback(error.__traceback__), as_json=as_json, debug=debug)

        return group.command(name, context_settings=_HELP)(guarded)

    return wrap


def job_arguments(function: Callable[..., Any]) -> Callable[..., Any]:
    """A job file (or output path) and `key=value` overrides."""
    overrides = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
    return click.argument("target", metavar="JOB")(overrides(function))


def fail(error: DrayError, *, as_json: bool, debug: bool) -> NoReturn:
    """Print the error and leave with its exit code."""
    if debug:
        traceback.print_exception(error)
    if as_json:
        click.echo(
            json.dumps({"error": type(error).__name__, "message": str(error), "exit_code": error.exit_code})
        )
    stderr.print(f"[bold red]error:[/] {escape(str(error))}")
    sys.exit(error.exit_code)


def show(value: dict[str, Any], text: Any, *, as_json: bool) -> None:
    """The result: JSON for machines, text for people."""
    if as_json:
        click.echo(json.dumps(value, indent=1, default=str))
    else:
        stdout.print(text)


def followed(work: Callable[..., Report], *, quiet: bool, as_json: bool, run_id: str | None = None) -> Report:
    """Do the work of a run (`run_id`, `observer` and `stop` given), with its progress on stderr."""
    from jobs.console import Display, chatter_to, log_folder
    from jobs.ledger import new_run_id
    from jobs.stopping import StopRequest

    run_id = run_id or new_run_id()
    log = log_folder() / f"{run_id}.log"
    try:
        with (
            StopRequest().on_signals() as stop,
            chatter_to(log) as terminal,
            Display(terminal, quiet=quiet or as_json) as display,
        ):
            return work(run_id=run_id, observer=display, stop=stop)
    except DrayError:
        if not quiet:
            stderr.print(f"log: {log}")
        raise
