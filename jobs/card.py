"""The dataset card: a README.md that says what a dataset holds, how it was made, and of what.

Its front matter is Hugging Face's (https://huggingface.co/docs/hub/datasets-cards), so that `datasets.load_dataset` reads
the right files. Settings appear as the job file wrote them, with references in place of what they refer to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from jobs.books import Books
from jobs.fingerprint import steps_of
from jobs.pinning import PIN, described
from jobs.report import Report, figures
from jobs.report_rows import shown
from pipelines import __version__
from pipelines.contracts import LOGPROBS_FIELD, RESULT_FIELDS
from pipelines.storage import Storage

if TYPE_CHECKING:
    from jobs.dataset import Exported

#: Records shown, and how many at the beginning of each part are looked at for them.
EXAMPLES = 3
_LOOKED_AT = 256
_OWN = frozenset(field.name for field in (*RESULT_FIELDS, LOGPROBS_FIELD))
#: Sections of the job file that make a dataset what it is.
_RECIPE = ("prompt", "model", "sampling", "steps")
_WHERE = frozenset({"storage_options"})


def output_card(storage: Storage, record: Mapping[str, Any], books: Books, report: Report) -> str:
    """The card of an output: `data/` and the statistics of its shards."""
    configs = [
        {"config_name": "default", "data_files": "data/*.parquet"},
        {"config_name": "stats", "data_files": "stats/*.parquet"},
    ]
    end = """\
Each record is named by (`row_id`, `sample_index`); a row without an answer says why in `error_code` and `error_message`.
Statistics of each shard are in `stats/shards.parquet`, and in the footer of its part.
"""
    schema = books.parts[0].schema if books.parts else pa.schema([])
    return _card(storage, record, books, report, schema, configs, {}, end)


def dataset_card(
    storage: Storage,
    record: Mapping[str, Any],
    books: Books,
    report: Report,
    columns: Sequence[str] | None,
    exported: Exported,
) -> str:
    """The card of an exported dataset folder. `columns`: as for `with_columns`."""
    splits = [
        {"split": name, "path": f"data/{name}-*.parquet"} for name, files in exported.files.items() if files
    ]
    whole = books.parts[0].schema if books.parts else pa.schema([])
    # What was left out of the files stands in no example either.
    names = columns or [name for name in whole.names if name not in ("error_code", "error_message")]
    schema = pa.schema([whole.field(name) for name in names] if len(whole) else [])
    end = (
        f"Made by `dray export huggingface`; {exported.left_out:,} records without an answer were left out.\n"
    )
    configs = [{"config_name": "default", "data_files": splits}]
    return _card(storage, record, books, report, schema, configs, exported.records, end)


def _card(
    storage: Storage,
    record: Mapping[str, Any],
    books: Books,
    report: Report,
    schema: pa.Schema,
    configs: list[dict[str, Any]],
    splits: Mapping[str, int],
    end: str,
) -> str:
    whole = books.parts[0].schema if books.parts else schema
    raw, steps = record["spec"], steps_of(record["identity"])
    added = {name for step in steps for name in step.adds(whole).names}
    own = [*_OWN, record["identity"].get("output.conversation")]
    front = {
        "configs": configs,
        "size_categories": [_size(sum(splits.values()) or report.stats.samples)],
        "tags": ["synthetic", "dray"],
    }
    facts = {
        "state": report.state,
        **{f"split `{name}`": f"{count:,} records" for name, count in splits.items()},
        **figures(report),
    }
    model = raw.get("model") or {}
    origin = {
        "model": str(model.get("source", "–")),
        "pinned": described(record.get(PIN)) or "the folder as it was",
        "licence of the model": _licence(model.get("source")),
        "runs": ", ".join(run.run_id for run in report.runs[-8:]),
        "Dray": __version__,
        "spec": report.fingerprint,
    }
    recipe = {name: _without_places(raw[name]) for name in _RECIPE if raw.get(name)}
    simulated = "\n**The answers come from the simulated engine.**\n" if report.simulated else ""
    return "\n".join(
        [
            "---",
            yaml.safe_dump(front, sort_keys=False).rstrip(),
            "---",
            f"# {report.job}",
            simulated,
            *_table("", "", facts.items()),
            "\n## Columns\n",
            *_table(
                "column",
                "type",
                ((f"`{field.name}`{_whence(field.name, own, added)}", str(field.type)) for field in schema),
            ),
            "\n## How it was made\n",
            *_table("", "", origin.items()),
            "",
            *_fenced(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100).rstrip(), "yaml"),
            *_examples(storage, books, raw, schema.names),
            "",
            end,
        ]
    )


def _examples(storage: Storage, books: Books, raw: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """The first good records, column by column; none where the job hides any column: an answer may quote it."""
    if (raw.get("report") or {}).get("redact"):
        return []
    for part in books.parts:
        try:
            with storage.open_input(f"data/{part.name}") as file, pq.ParquetFile(file) as parquet:
                first = next(parquet.iter_batches(_LOOKED_AT, columns=list({*names, "error_code"})), None)
        except (OSError, pa.ArrowException):
            continue  # gone or damaged: what `dray verify` tells
        if first is None:
            continue
        good = pa.table(first).filter(pc.is_null(pa.table(first)["error_code"]))
        found = good.select(list(names)).slice(0, EXAMPLES).to_pylist()
        if found:
            cells = ([(f"`{k}`", shown(v)) for k, v in record.items() if v is not None] for record in found)
            return [
                "\n## Examples",
                *(line for pairs in cells for line in ("", *_table("column", "value", pairs))),
            ]
    return []


def _whence(name: str, own: list[Any], added: set[str]) -> str:
    return " (Dray)" if name in own else " (a step)" if name in added else ""


def _licence(source: Any) -> str:
    """What the card of a local model folder states."""
    try:
        text = Path(str(source), "README.md").read_text(encoding="utf-8")
        front = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else {}
        return str(front.get("license") or "not stated")
    except (OSError, IndexError, AttributeError, UnicodeDecodeError, yaml.YAMLError):
        return "not stated"


def _without_places(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_places(item) for key, item in value.items() if key not in _WHERE}
    return [_without_places(item) for item in value] if isinstance(value, list) else value


def _size(records: int) -> str:
    """Hugging Face's category for a number of records."""
    bounds = ["1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T"]
    place = sum(records >= 10 ** (3 + power) for power in range(len(bounds)))
    if place == 0:
        return f"n<{bounds[0]}"
    return f"{bounds[place - 1]}<n<{bounds[place]}" if place < len(bounds) else f"n>{bounds[-1]}"


def _table(left: str, right: str, lines: Any) -> list[str]:
    return [
        f"| {left} | {right} |",
        "|---|---|",
        *(f"| {_cell(name)} | {_cell(value)} |" for name, value in lines),
    ]


def _cell(text: str) -> str:
    """Fit for a Markdown table: in one line, and nothing in it is read as a cell's end or as HTML."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def _fenced(text: str, language: str) -> Sequence[str]:
    """A code block whose fence is longer than any in the text."""
    fence = "```"
    while fence in text:
        fence += "`"
    return [f"{fence}{language}", text, fence]
