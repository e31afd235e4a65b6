"""`dray export`: a job's schedule for those who have a scheduler already, and an output as a dataset."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial as partial_
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape

from jobs.cli_schedule import job_file_of
from jobs.cli_submit import address_option
from jobs.command import command, job_arguments, main, show
from pipelines import __version__
from pipelines.errors import SpecError
from pipelines.storage import Storage, locate

if TYPE_CHECKING:
    from jobs.books import Books
    from jobs.dataset import Exported
    from jobs.report import Report


@main.group("export")
def export() -> None:
    """Hand on an output as a dataset, or a job's schedule to another scheduler."""


# ── Schedules ────────────────────────────────────────────────────────────────────────────────────────────────────

_SCHEDULERS = {
    "airflow": "Write a job's schedule as an Airflow DAG.",
    "dagster": "Write a job's schedule as a Dagster definition.",
    "cron": "Write a job's schedule as crontab lines.",
    "kubernetes": "Write a job's schedule as a Kubernetes CronJob.",
}


def _scheduler(name: str, what: str) -> None:
    @command(name, export)
    @job_arguments
    @click.option("-o", "--out", metavar="FILE", help="Where to write; default: stdout.")
    @click.option(
        "--dray", metavar="PROGRAM", help="How to call Dray there; default: dray, for cron its full path."
    )
    @address_option(required=False)
    @click.option("--folder", metavar="FOLDER", help="Where to run it there; default: this one.")
    @click.option("--image", metavar="IMAGE", help="For kubernetes; default: dray with this version's tag.")
    def write(
        target: str,
        overrides: tuple[str, ...],
        out: str | None,
        dray: str | None,
        address: str | None,
        folder: str | None,
        image: str | None,
        as_json: bool,
    ) -> None:
        from jobs.export import EXPORTS, Call

        call = Call(
            target=target,
            overrides=overrides,
            dray=dray or (_program() if name == "cron" else "dray"),
            address=address,
            folder=folder or os.getcwd(),
            image=image or f"dray:{__version__}",
            today=datetime.now(UTC),
        )
        text = EXPORTS[name](job_file_of(target, overrides), call)
        if out is None and not as_json:
            click.echo(text, nl=False)
            return
        if out is not None:
            storage, file = locate(out)
            storage.write(file, text.encode())
        show({"scheduler": name, "file": out, "text": text}, f"{out}: written", as_json=as_json)

    write.help = f"{what}\n\nWith --address each run is submitted to that cluster, and followed."


for _name, _what in _SCHEDULERS.items():
    _scheduler(_name, _what)


def _program() -> str:
    """The path of `dray`; cron's PATH is short."""
    return shutil.which(sys.argv[0]) or shutil.which("dray") or "dray"


# ── Datasets ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _dataset_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(
        [
            click.option(
                "--split",
                "split",
                multiple=True,
                metavar="NAME=SHARE",
                help="For example train=0.9, and again validation=0.1; default: all is train.",
            ),
            click.option(
                "--split-by", metavar="COLUMN", help="Rows of one value stay in one split; default: row_id."
            ),
            click.option(
                "--file-size", default="256MB", show_default=True, help="About how large a file gets."
            ),
            click.option("--partial", is_flag=True, help="Also of an output that is not finished."),
        ]
    ):
        function = option(function)
    return function


def _to_folder(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.argument("target", metavar="OUT")(click.argument("to", metavar="FOLDER")(function))


_columns = click.option("--columns", metavar="A,B", help="Only these columns, in this order.")


@command("huggingface", export)
@_to_folder
@_dataset_options
@_columns
def huggingface(columns: str | None, as_json: bool, **options: Any) -> None:
    """Write the good records as a dataset folder (Parquet and a card) that `datasets.load_dataset` reads."""
    _tell(_with_card(columns, **options), as_json=as_json)


@command("hub", export)
@click.argument("target", metavar="OUT")
@click.argument("repo", metavar="OWNER/NAME")
@click.option("--private", is_flag=True, help="Create the dataset for its owner only.")
@_dataset_options
@_columns
def hub(repo: str, private: bool, columns: str | None, as_json: bool, **options: Any) -> None:
    """Put the good records on the Hugging Face hub, as `export huggingface` writes them.

    One commit takes the place of what the dataset has held so far; the files are made in a temporary folder first. HF_TOKEN
    has to be a token that may write there.
    """
    from jobs.hub import push

    with tempfile.TemporaryDirectory(prefix="dray-hub-") as folder:
        to = os.path.join(folder, "dataset")
        done = replace(_with_card(columns, to=to, **options), to=repo)
        message = f"{sum(done.records.values()):,} records, by Dray {__version__}"
        url = push(to, repo, private=private, message=message)
    _tell(done, as_json=as_json, commit=url)


def _with_card(columns: str | None, **options: Any) -> Exported:
    """A Hugging Face folder."""
    from jobs.card import dataset_card
    from jobs.dataset_formats import ParquetSink, with_columns

    names = _listed(columns)

    def card(
        storage: Storage, record: dict[str, Any], books: Books, report: Report
    ) -> Callable[[Exported], str]:
        return partial_(dataset_card, storage, record, books, report, names)

    return _exported("parquet", ParquetSink, lambda record: with_columns(names), card=card, **options)


@command("jsonl", export)
@_to_folder
@_dataset_options
@_columns
def jsonl(columns: str | None, as_json: bool, **options: Any) -> None:
    """Write the good records as JSON lines."""
    from jobs.dataset_formats import JsonSink, with_columns

    done = _exported("jsonl", JsonSink, lambda record: with_columns(_listed(columns)), **options)
    _tell(done, as_json=as_json)


@command("openai", export)
@_to_folder
@_dataset_options
def openai(as_json: bool, **options: Any) -> None:
    """Write prompts and answers as OpenAI's lines for chat fine-tuning."""
    from jobs.dataset_formats import LineSink, as_chats
    from jobs.loading import load
    from jobs.proposal import own_folders
    from jobs.spec_columns import prompt_columns

    def chats(record: dict[str, Any]) -> Any:
        # The job as it was run, not as its file is by now.
        spec = load(record["spec"], [], record.get("variables") or {}).spec
        if spec.prompt is None:
            raise SpecError(
                "prompt: the job has none, so there is no chat to write; `dray export jsonl` writes its columns"
            )
        lists = [name for name, step in spec.named_steps.items() if step.explode or step.gather]
        if lists and spec.named_steps[lists[-1]].explode:
            raise SpecError(
                f"steps.{lists[-1]}: the elements of a list share the job's own prompt and answer, which would be "
                "written once for each: take the columns that belong together, `dray export jsonl OUT FOLDER --columns …`"
            )
        calls = spec.sampling.tool_call_parser is not None
        return as_chats(
            spec.prompt, prompt_columns(spec), spec.output.rename, own_folders(), calls_tools=calls
        )

    _tell(_exported("jsonl", LineSink, chats, **options), as_json=as_json)


def _exported(
    suffix: str,
    sink: Any,
    prepare: Callable[[dict[str, Any]], Any],
    *,
    target: str,
    to: str,
    split: tuple[str, ...],
    split_by: str | None,
    file_size: str,
    partial: bool,
    card: Callable[[Storage, dict[str, Any], Books, Report], Callable[[Exported], str]] | None = None,
) -> Exported:
    """`prepare`: from the output's stored record, as for `export_dataset`; `card`: from what `dataset_card` takes of an output."""
    from jobs.books import fold
    from jobs.dataset import Splits, export_dataset
    from jobs.inspect import opened, stored_report
    from jobs.target import output_of

    splits, file_bytes = Splits.of(split, split_by), _bytes(file_size)
    storage = output_of(target)
    record, plan = opened(storage)
    books = fold(storage, plan)
    return export_dataset(
        storage,
        books,
        to,
        suffix=suffix,
        sink=sink,
        prepare=prepare(record),
        splits=splits,
        file_bytes=file_bytes,
        card=card and card(storage, record, books, stored_report(storage, record, books)),
        partial=partial,
    )


def _tell(done: Exported, *, as_json: bool, **more: str) -> None:
    lines = [
        f"{name}: {done.records[name]:,} records in {len(files)} files" for name, files in done.files.items()
    ]
    lines.append(f"{done.left_out:,} records left out (failed, or without an answer)")
    show(asdict(done) | more, escape("\n".join([f"{done.to}:", *lines, *more.values()])), as_json=as_json)


def _listed(columns: str | None) -> list[str] | None:
    return None if columns is None else [name.strip() for name in columns.split(",") if name.strip()]


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not match or match[2].upper() not in _UNITS or not float(match[1]):
        raise SpecError(f"--file-size {text}: write it as 256MB or 1GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])
