"""An output handed on as a dataset: splits, files, formats and the card."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from jobs.books import SUCCESS, fold
from jobs.cli import main
from jobs.dataset import Splits
from jobs.dataset_formats import plain
from jobs.inspect import opened, report_of
from jobs.output import write_card
from pipelines.errors import SpecError
from tests.local.runs import job, rows_of, write_questions
from tests.unit.stages import Output, committed

pytestmark = pytest.mark.slow


def finished(tmp_path: Path, **sections: Any) -> Output:
    """An output of 120 questions, one of which has failed."""
    write_questions(tmp_path / "in", rows=120, files=3)
    table = pq.read_table(tmp_path / "in" / "q001.parquet")
    questions = table["question"].to_pylist()
    questions[3] = None
    broken = table.set_column(
        table.column_names.index("question"), "question", pa.array(questions, pa.string())
    )
    pq.write_table(broken, tmp_path / "in" / "q001.parquet")
    output = committed(job(tmp_path / "in", tmp_path / "out", shards={"rows": 25}, **sections))
    output.storage.write(SUCCESS, b"{}")
    return output


def export(*arguments: str, fails: bool = False) -> dict[str, Any]:
    done = CliRunner().invoke(main, ["export", *arguments, "--json"])
    assert bool(done.exit_code) is fails, done.output
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[0] if fails else done.stdout)
    return found


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# ── Splits ───────────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.one_of(st.text(), st.none())), st.lists(st.text()), st.integers(1, 9))
def test_new_rows_move_no_old_ones(values: list[Any], more: list[str], tenths: int) -> None:
    splits = Splits.of([f"train={tenths / 10}", f"test={1 - tenths / 10}"])
    before = splits.numbers(values).tolist()
    assert splits.numbers([*values, *more]).tolist()[: len(values)] == before
    assert set(before) <= {0, 1}


def test_shares_are_about_what_was_asked_for() -> None:
    numbers = Counter(Splits.of(["a=0.7", "b=0.2", "c=0.1"]).numbers(map(str, range(20_000))).tolist())
    assert [round(numbers[i] / 20_000, 2) for i in range(3)] == [0.7, 0.2, 0.1]


@pytest.mark.parametrize(
    "given_", [["a=0.5"], ["a=x"], ["a"], ["a=0.5", "a=0.5"], ["a=1.5", "b=-0.5"], ["a b=1"]]
)
def test_a_wrong_split_is_told(given_: list[str]) -> None:
    with pytest.raises(SpecError, match="--split"):
        Splits.of(given_)


# ── Files ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_good_record_is_in_one_split_once_and_the_same_each_time(tmp_path: Path) -> None:
    output = finished(tmp_path)
    options = ["--split", "train=0.8", "--split", "validation=0.2", "--file-size", "4kB"]
    done = export("jsonl", str(output.folder), str(tmp_path / "a"), *options)
    export("jsonl", str(output.folder), str(tmp_path / "b"), *options)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert (done["left_out"], sum(done["records"].values())) == (1, 119)
    rows = {
        split: [
            json.loads(line) for name in files for line in (tmp_path / "a" / name).read_text().splitlines()
        ]
        for split, files in done["files"].items()
    }
    good = [row for row in rows_of(output.folder).to_pylist() if row["error_code"] is None]
    expected = {row["row_id"]: {k: v for k, v in row.items() if not k.startswith("error_")} for row in good}
    assert {row["row_id"]: row for split in rows.values() for row in split} == expected
    assert done["records"] == {split: len(found) for split, found in rows.items()}
    assert all(done["records"].values())


def test_files_have_about_the_wanted_size(tmp_path: Path) -> None:
    output = finished(tmp_path)
    whole = export("jsonl", str(output.folder), str(tmp_path / "whole"))
    assert len(whole["files"]["train"]) == 1
    cut = export("jsonl", str(output.folder), str(tmp_path / "cut"), "--file-size", "12kB")
    sizes = [(tmp_path / "cut" / name).stat().st_size for name in cut["files"]["train"]]
    assert len(sizes) > 2
    # A shard's 25 records are looked at together here: none is as large as what may be too much.
    assert all(12_000 <= size < 24_000 for size in sizes[:-1])
    assert sum(sizes) == (tmp_path / "whole" / whole["files"]["train"][0]).stat().st_size


def test_an_output_without_a_good_record_gives_a_dataset_without_files(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    dirty = pa.array([b"caf\xe9"] * 9, pa.binary()).view(pa.string())  # which fails its row
    pq.write_table(pa.table({"question": ["1 + 1?"] * 9, "note": dirty}), tmp_path / "in" / "a.parquet")
    output = committed(job(tmp_path / "in", tmp_path / "out"))
    output.storage.write(SUCCESS, b"{}")
    assert "## Examples" not in card(output)
    done = export("jsonl", str(output.folder), str(tmp_path / "a"))
    assert (done["left_out"], done["records"], done["files"]) == (9, {"train": 0}, {"train": []})
    assert (tmp_path / "a").is_dir()


def test_rows_of_one_value_stay_together(tmp_path: Path) -> None:
    output = finished(tmp_path)
    export(
        "huggingface",
        str(output.folder),
        str(tmp_path / "hf"),
        "--split",
        "a=0.5",
        "--split",
        "b=0.5",
        "--split-by",
        "kind",
    )
    kinds = {
        split: set(
            ds.dataset(sorted((tmp_path / "hf" / "data").glob(f"{split}-*"))).to_table()["kind"].to_pylist()
        )
        for split in ("a", "b")
        if list((tmp_path / "hf" / "data").glob(f"{split}-*"))
    }
    assert sum(map(len, kinds.values())) == len(set().union(*kinds.values()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
def test_datasets_loads_the_folder(tmp_path: Path) -> None:
    from datasets import load_dataset

    output = finished(tmp_path)
    target = tmp_path / "hf"
    export(
        "huggingface", str(output.folder), str(target), "--split", "train=0.5", "--split", "test=0.5",
        "--columns", "question,generated_text,row_id",
    )  # fmt: skip
    loaded = load_dataset(str(target), cache_dir=str(tmp_path / "cache"))
    assert {name: loaded[name].column_names for name in loaded} == {
        name: ["question", "generated_text", "row_id"] for name in ("train", "test")
    }
    good = rows_of(output.folder).filter(ds.field("error_code").is_null())
    found = [row for name in loaded for row in loaded[name]]
    assert sorted(row["row_id"] for row in found) == good["row_id"].to_pylist()


def test_what_is_there_or_not_done_is_refused_and_a_failure_leaves_nothing(tmp_path: Path) -> None:
    output = finished(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    full = export("jsonl", str(output.folder), str(tmp_path / "full"), fails=True)
    assert "already holds mine.txt" in full["message"]
    wrong = export(
        "jsonl", str(output.folder), str(tmp_path / "new"), "--columns", "row_id,nothing", fails=True
    )
    assert "--columns: the output has no column 'nothing'" in wrong["message"]
    output.storage.delete(SUCCESS)
    early = export("jsonl", str(output.folder), str(tmp_path / "new"), fails=True)
    assert "is not finished" in early["message"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "in", "out"]
    assert export("jsonl", str(output.folder), str(tmp_path / "new"), "--partial")["records"] == {
        "train": 119
    }


def test_openai_lines_hold_the_prompt_and_the_answer(tmp_path: Path) -> None:
    output = finished(tmp_path, prompt={"template": "Q: {{ question }}", "system": "Answer as {{ kind }}."})
    export("openai", str(output.folder), str(tmp_path / "chat"))
    lines = [json.loads(line) for line in (tmp_path / "chat/data/train-00000.jsonl").read_text().splitlines()]
    good = rows_of(output.folder).filter(ds.field("error_code").is_null()).to_pylist()
    expected = [
        {
            "messages": [
                {"role": "system", "content": f"Answer as {row['kind']}."},
                {"role": "user", "content": f"Q: {row['question']}"},
                {"role": "assistant", "content": row["generated_text"]},
            ]
        }
        for row in good
        if row["generated_text"]
    ]
    assert sorted(map(json.dumps, lines)) == sorted(map(json.dumps, expected))


def test_failed_rows_that_stand_apart_are_counted(tmp_path: Path) -> None:
    output = finished(tmp_path, output={"failed_rows": "separate"})
    done = export("jsonl", str(output.folder), str(tmp_path / "a"))
    assert (done["left_out"], done["records"]) == (1, {"train": 119})


def test_a_remote_target_is_whole_or_empty(tmp_path: Path) -> None:
    import fsspec

    output = finished(tmp_path)
    store = fsspec.filesystem("memory")
    export("jsonl", str(output.folder), "memory://whole/set", "--file-size", "1kB")
    assert store.exists("/whole/set/_SUCCESS")
    last = max((output.folder / "data").glob("part-*"))
    last.write_bytes(last.read_bytes()[:200] + b"\0" * 300 + last.read_bytes()[500:])
    export("jsonl", str(output.folder), "memory://broken/set", "--file-size", "1kB", fails=True)
    assert not store.find("/broken")


def test_openai_lines_are_of_the_prompt_that_was_run(tmp_path: Path) -> None:
    finished(tmp_path)
    changed = job(tmp_path / "in", tmp_path / "out", prompt={"template": "Changed: {{ question }}"})
    (tmp_path / "job.yaml").write_text(json.dumps(changed))
    export("openai", str(tmp_path / "job.yaml"), str(tmp_path / "chat"))
    assert "Changed" not in (tmp_path / "chat/data/train-00000.jsonl").read_text()
    plain_text = finished(tmp_path / "b", prompt={"template": "{{ question }}", "chat": False})
    refused = export("openai", str(plain_text.folder), str(tmp_path / "no"), fails=True)
    assert "asks for completions" in refused["message"]


def test_openai_lines_need_the_prompts_columns(tmp_path: Path) -> None:
    output = finished(tmp_path, output={"columns": ["kind"]})
    failed = export("openai", str(output.folder), str(tmp_path / "chat"), fails=True)
    assert "the prompt needs the column 'question'" in failed["message"]


def test_json_has_every_value_of_arrow() -> None:
    value = {
        "at": datetime(2026, 11, 25, tzinfo=UTC),
        "price": Decimal("1.10"),
        "bytes": b"\x00\xff",
        "nan": [float("nan"), 1.5, None],
        "id": UUID(int=5),
        "map": [{"k": float("inf")}],
    }
    assert plain(value) == {
        "at": "2026-11-25T00:00:00+00:00",
        "price": "1.10",
        "bytes": "AP8=",
        "nan": [None, 1.5, None],
        "id": "00000000-0000-0000-0000-000000000005",
        "map": [{"k": None}],
    }


# ── The card ─────────────────────────────────────────────────────────────────────────────────────────────────────


def card(output: Output) -> str:
    write_card(output.storage, fold(output.storage, opened(output.storage)[1]), report_of(output.storage))
    return output.storage.read("README.md").decode()


def test_the_card_says_what_the_dataset_is(tmp_path: Path) -> None:
    output = finished(tmp_path, prompt={"template": "Say | or ``` for {{ question }}"})
    text = card(output)
    assert "119 ok, 1 failed" in text
    assert "missing_value 1" in text
    assert "| `generated_text` (Dray) | string |" in text
    assert "````yaml" in text
    assert "Say | or ``` for {{ question }}" in text
    first = rows_of(output.folder).to_pylist()[0]
    assert "## Examples" in text
    assert first["question"].split()[0] in text.split("## Examples")[1]
    for line in text.splitlines():
        if line.startswith("| "):
            assert line.replace("\\|", "").count("|") == 3, line


def test_the_card_says_which_columns_are_not_the_inputs(tmp_path: Path) -> None:
    gather = {"gather": {"columns": {"generated_text": "texts"}}}
    text = card(finished(tmp_path, output={"conversation": "chat"}, steps=[gather]))
    assert "| `chat` (Dray) | list" in text
    assert "| `texts` (a step) | list" in text
    assert "| `question` | string |" in text


def test_a_job_that_hides_columns_shows_no_examples(tmp_path: Path) -> None:
    output = finished(tmp_path, report={"redact": ["question"]})
    assert "## Examples" not in card(output)


def test_the_card_of_some_columns_shows_only_these(tmp_path: Path) -> None:
    output = finished(tmp_path)
    export("huggingface", str(output.folder), str(tmp_path / "hf"), "--columns", "generated_text")
    text = (tmp_path / "hf" / "README.md").read_text()
    shown = {line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| `")}
    assert {name.split(" ")[0] for name in shown} == {"`generated_text`"}
    assert str(tmp_path / "in") not in text
