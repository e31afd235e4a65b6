"""`dray models`: the node's cache of models."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Group
from rich.markup import escape
from rich.progress import DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from jobs.command import command, main, show, stderr
from pipelines.errors import ModelError

if TYPE_CHECKING:
    from pipelines.model_manifest import Manifest


@main.group("models")
def models() -> None:
    """Keep models on this machine, whole and checked: docs/models.md."""


@command("pull", models)
@click.argument("source", metavar="SOURCE")
@click.option(
    "--revision", metavar="R", help="A hub's branch, tag or commit; of a URL what an earlier pull said."
)
@click.option("--to", metavar="FOLDER", help="A folder of your own instead of the cache.")
def pull(source: str, revision: str | None, to: str | None, as_json: bool) -> None:
    """Copy a model here: a hub id, a folder, or a URL such as s3://bucket/model. Goes on where it was stopped."""
    from pipelines.model_cache import pull as pull_model
    from pipelines.policy import check_model_allowed
    from pipelines.settings import ModelSettings

    source = _absolute(source)
    check_model_allowed(ModelSettings(source=source, revision=revision))
    columns = TextColumn("{task.description}"), DownloadColumn(binary_units=True), TransferSpeedColumn()
    with Progress(
        *columns, console=stderr, transient=True, disable=as_json or not stderr.is_terminal
    ) as progress:
        task = progress.add_task(escape(source), total=None)
        folder, manifest = pull_model(
            source, revision, to=to, note=lambda count: progress.update(task, advance=count)
        )
    show(
        _entry(folder, manifest),
        f"{escape(source)}: {len(manifest.files)} files, {_gib(manifest.size)}, in {folder}\nrevision {manifest.revision}",
        as_json=as_json,
    )


@command("list", models)
def list_models(as_json: bool) -> None:
    """Show the models of this machine's cache."""
    from pipelines.model_cache import cache_root, cached_models, damaged_entries, unfinished

    found = [_entry(folder, manifest) for folder, manifest in cached_models()]
    rest = [str(folder) for folder in unfinished()]
    broken = [str(folder) for folder in damaged_entries()]
    table = Table("source", "revision", "size", "pulled", box=None, pad_edge=False)
    for entry in found:
        part = "" if entry["weights"] else " (without weights)"
        day = time.strftime("%Y-%m-%d", time.gmtime(entry["pulled_at"]))
        table.add_row(escape(entry["source"]) + part, str(entry["revision"])[:19], _gib(entry["bytes"]), day)
    lines: list[Any] = [table if found else f"no models in {cache_root()}"]
    lines += [f"unfinished: {folder}: `dray models pull` goes on with it" for folder in rest]
    lines += [f"damaged: {folder}: `dray models pull` copies it anew" for folder in broken]
    show(
        {"folder": str(cache_root()), "models": found, "unfinished": rest, "damaged": broken},
        Group(*lines),
        as_json=as_json,
    )


@command("verify", models)
@click.argument("source", metavar="[SOURCE]", required=False)
def verify(source: str | None, as_json: bool) -> None:
    """Read every file of the cache's models, or of one, and compare it with its sha256. Exit code 1 when one differs."""
    from pipelines.model_cache import cached_models, damaged_entries
    from pipelines.model_manifest import damaged, read_manifest

    wanted = None if source is None else _absolute(source)
    entries = list(cached_models())
    if wanted is not None:
        own = read_manifest(Path(wanted)) if os.path.isdir(wanted) else None  # what `pull --to` made
        entries = [(Path(wanted), own)] if own else [e for e in entries if e[1].source == wanted]
        if not entries:
            raise ModelError(f"{wanted} is not in the cache: `dray models pull` brings it")
    problems = [f"{folder}/{line}" for folder, manifest in entries for line in damaged(folder, manifest)]
    if wanted is None:
        problems += [f"{folder}: files are missing or cut short" for folder in damaged_entries()]
    lines = [escape(problem) for problem in problems]
    lines += ["delete the folder, and `dray models pull` copies it anew"] if problems else []
    show(
        {"ok": not problems, "models": len(entries), "problems": problems},
        "\n".join(lines) or f"{len(entries)} models are as their manifests say",
        as_json=as_json,
    )
    if problems:
        sys.exit(1)


def _absolute(source: str) -> str:
    """Local folders by their whole path, as in a job file."""
    if "://" in source or not (source.startswith((".", "~", "/")) or os.path.isdir(source)):
        return source
    return os.path.abspath(os.path.expanduser(source))


def _entry(folder: Path, manifest: Manifest) -> dict[str, Any]:
    return {
        "source": manifest.source,
        "revision": manifest.revision,
        "asked": manifest.asked,
        "folder": str(folder),
        "files": len(manifest.files),
        "bytes": manifest.size,
        "weights": not folder.name.endswith(".config"),
        "pulled_at": manifest.pulled_at,
    }


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"
