"""What the driver makes of outcomes: which failures end a run, and which are one engine's. Footers are of real parts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import load, retry_failed, run
from jobs.runner import Driver
from jobs.stopping import StopRequest
from pipelines.errors import (
    DrayError,
    EngineStartError,
    ModelError,
    StorageDenied,
    StorageError,
)
from pipelines.part import read_part
from pipelines.run import Outcome
from pipelines.stage import Failure
from tests.local.runs import job
from tests.tiny_vision import image, vision_tokenizer
from tests.unit import stages
from tests.unit.test_kept import answered, questions

REFUSALS = [EngineStartError, ModelError, StorageError, StorageDenied]


def _after(output: stages.Output, error: DrayError, *overrides: str) -> Driver:
    """A driver that has heard of one part of this output, and then of a shard that `error` befell."""
    driver = Driver(
        load(output.settings, overrides),
        output.storage,
        output.plan,
        output.work("run", *overrides),
        lambda progress: None,
        cast("Any", None),
        StopRequest(),
    )
    driver.done.clear()  # as before the first part
    done, failing = output.plan.shards
    driver._take(
        Outcome(shard_id=done.id, footer=read_part(output.storage, done.part_name).footer, failure=None)
    )
    driver._take(Outcome(shard_id=failing.id, footer=None, failure=Failure.of("generate", error)))
    return driver


@pytest.mark.parametrize("kind", REFUSALS)
def test_an_engine_that_does_not_start_beside_others_that_work_is_one_shards_failure(
    tmp_path: Path, kind: type[DrayError]
) -> None:
    questions(tmp_path / "in", [f"What is {k}?" for k in range(10)])
    output = stages.committed(job(tmp_path / "in", tmp_path / "out", shards={"rows": 5}))
    driver = _after(output, kind("a bad node"))
    assert driver.ending is None
    assert driver.attempts[output.plan.shards[1].id] == 1


@pytest.mark.parametrize("kind", REFUSALS)
def test_one_that_does_not_start_ends_the_run_where_answers_were_only_kept(
    tmp_path: Path, kind: type[DrayError]
) -> None:
    questions(tmp_path / "in", [f"What is {k}?" for k in range(10)])
    answered(tmp_path, "first")
    output = answered(tmp_path, "again", "first")
    driver = _after(output, kind("no such model"))
    assert "no such model" in str(driver.ending)


def test_a_folder_of_images_is_asked_for_where_rows_are_to_be_read(tmp_path: Path) -> None:
    """Not by a run that finds everything done, for which it may be gone."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "red.png").write_bytes(image("red"))
    pq.write_table(pa.table({"text": ["What?"] * 2, "seen": ["red.png", "gone.png"]}), tmp_path / "x.parquet")
    settings = job(
        tmp_path / "x.parquet",
        tmp_path / "out",
        input={"images_folder": str(pictures)},
        prompt={"template": "{{ text }}", "images_column": "seen"},
        errors={"max_error_rate": 0.5},
        model={"source": str(vision_tokenizer(tmp_path / "model"))},
    )
    output = stages.planned(settings)
    shutil.move(pictures, tmp_path / "elsewhere")
    with pytest.raises(StorageError, match=r"^input\.images_folder"):
        run(load(settings))

    shutil.move(tmp_path / "elsewhere", pictures)
    stages.run(output.work("first"), output.plan.shards)
    assert run(load(settings)).state == "complete"
    shutil.move(pictures, tmp_path / "elsewhere")
    assert run(load(settings)).state == "complete"
    with pytest.raises(StorageError, match=r"^input\.images_folder"):
        retry_failed(load(settings))
