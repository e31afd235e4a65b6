"""The output folder is a dataset for whoever reads Parquet: the same rows, and nothing of `.dray/`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from jobs import load, run
from tests.local.runs import job, write_questions
from tests.unit.stages import committed

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished job with several parts."""
    folder = tmp_path_factory.mktemp("readers")
    write_questions(folder / "in", rows=300, files=3)
    settings = job(folder / "in", folder / "out", shards={"rows": 50})
    committed(settings)
    run(load(settings))
    return folder / "out"


def pyarrow_rows(data: str) -> list[str]:
    import pyarrow.dataset

    return list(pyarrow.dataset.dataset(data).to_table()["row_id"].to_pylist())


def pandas_rows(data: str) -> list[str]:
    import pandas as pd

    return list(pd.read_parquet(data)["row_id"])


def duckdb_rows(data: str) -> list[str]:
    import duckdb

    return [row[0] for row in duckdb.sql(f"select row_id from '{data}/*.parquet'").fetchall()]


def ray_rows(data: str) -> list[str]:
    import ray.data

    return [row["row_id"] for row in ray.data.read_parquet(data).take_all()]


def datasets_rows(data: str) -> list[str]:
    from datasets import load_dataset

    return list(load_dataset(data, split="train")["row_id"])


READERS = [pyarrow_rows, pandas_rows, duckdb_rows, ray_rows, datasets_rows]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("reader", READERS)
def test_data_is_read_whole(output: Path, reader: Callable[[str], list[str]]) -> None:
    expected = sorted(f"{output.parent}/in/q{i:03d}.parquet#{n}" for i in range(3) for n in range(100))
    assert sorted(reader(f"{output}/data")) == expected


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
def test_datasets_reads_the_right_files_from_the_root(output: Path) -> None:
    """The card's front matter names data/ and stats/, as two configurations."""
    from datasets import load_dataset

    data = load_dataset(str(output), split="train")
    assert len(data) == 300
    assert "generated_text" in data.column_names
    stats = load_dataset(str(output), "stats", split="train")
    assert len(stats) == 6
    assert sum(stats["rows_ok"]) == 300


def test_the_parts_have_one_schema_and_the_root_shows_nothing_of_dray(output: Path) -> None:
    import pyarrow.dataset as ds
    import pyarrow.parquet as pq

    shown = ds.dataset(output, format="parquet", exclude_invalid_files=True).files
    assert {Path(file).relative_to(output).parts[0] for file in shown} == {"data", "stats"}
    parts = ds.dataset(output / "data").files
    assert len(parts) == 6
    assert len({pq.read_schema(part).remove_metadata() for part in parts}) == 1
