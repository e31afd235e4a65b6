"""`dray run-batch`: a file of OpenAI's Batch API, or of `vllm run-batch`, as it is."""

from __future__ import annotations

import functools
from dataclasses import asdict

import click
from rich.console import Group
from rich.markup import escape

from jobs.command import command, followed, show
from pipelines.errors import SpecError
from pipelines.storage import locate


@command("run-batch")
@click.argument("given", nargs=-1, metavar="[JOB] [KEY=VALUE]...")
@click.option(
    "-i", "--input-file", "source", metavar="FILE", required=True, help="The requests, a line each."
)
@click.option("-o", "--output-file", "results", metavar="FILE", required=True, help="Where the answers go.")
@click.option(
    "--model", metavar="MODEL", help="What answers: a hub id, folder or URL; default: the job file's."
)
@click.option(
    "--error-file", "errors", metavar="FILE", help="Where failed requests go; default: <output>.errors.jsonl."
)
@click.option("--work", metavar="FOLDER", help="The job and its dataset; default: <output>.dray.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def run_batch(
    given: tuple[str, ...],
    source: str,
    results: str,
    model: str | None,
    errors: str | None,
    work: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Answer a batch file of OpenAI's or vLLM's, or what is left of it: docs/openai-batch.md.

    JOB is a job file with what the batch file does not say: engine, pool, cluster. Files are local paths or URLs.
    """
    from jobs.openai_batch import convert
    from jobs.openai_results import write_results
    from jobs.report import render
    from jobs.runner import run
    from jobs.target import is_job_file

    stem = results.removesuffix(".jsonl")
    errors, work = errors or f"{stem}.errors.jsonl", work or f"{stem}.dray"
    _check_apart({"--input-file": source, "--output-file": results, "--error-file": errors})
    extends = given[0] if given and "=" not in given[0] and is_job_file(given[0]) else None
    batch = convert(source, work, extends=extends, model=model, overrides=given[1 if extends else 0 :])
    job = batch.load()
    report = followed(functools.partial(run, job), quiet=quiet, as_json=as_json)
    counts = write_results(
        batch.out,
        results,
        errors,
        endpoint=batch.endpoint,
        encoding_format=batch.encoding_format,
        storage_options=job.spec.output.storage_options,
    )
    lines = [f"{results}: {counts.completed:,} completed"]
    if counts.failed:
        lines.append(f"{errors}: {counts.failed:,} failed")
    told = {
        "endpoint": batch.endpoint,
        "requests": batch.requests,
        **asdict(counts),
        "output_file": results,
        "error_file": errors if counts.failed else None,
    }
    show(report.to_dict() | {"batch": told}, Group(render(report), *map(escape, lines)), as_json=as_json)


def _check_apart(files: dict[str, str]) -> None:
    """Raises SpecError where one file would be written over another."""
    found: dict[str, str] = {}
    for option, path in files.items():
        storage, name = locate(path)
        if other := found.get(storage.url(name)):
            raise SpecError(f"{option} {path}: is the same file as {other}; name another")
        found[storage.url(name)] = option
