"""Failed elements of lists, and what a retry makes of them: no answer is taken away, no row lost or added."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs import load, retry_failed
from jobs.inspect import verify
from pipelines.errors import SpecError
from tests.local.runs import content, rows_of
from tests.unit.stages import Output, committed, run
from tests.unit.test_explode import EXPLODE, settings, totals, write_lists


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package of the user's own, in the working directory; its name."""
    name = f"lists_{random.getrandbits(40):x}"
    monkeypatch.chdir(tmp_path)
    yield name
    sys.modules.pop(name, None)
    sys.path[:] = [folder for folder in sys.path if folder != str(tmp_path)]


def wrote(tmp_path: Path, code: str, made: str, bad: str) -> list[dict[str, Any]]:
    """Steps that make the list `made` of each row (Python, of `i`, its number), and fail the elements in `bad`."""
    (tmp_path / f"{code}.py").write_text(
        "def lists(record):\n"
        "    i = int(record['row_id'].rpartition('#')[2])\n"
        f"    made = {made}\n"
        "    if made is None:\n"
        "        raise ValueError('no list')\n"
        "    return {'made': made}\n"
        "def check(record):\n"
        f"    if record['part'] in {bad}:\n"
        "        raise ValueError('not yet')\n"
        "    return {'size': len(record['part'])}\n"
    )
    sys.modules.pop(code, None)
    return [
        {"map": {"function": f"{code}:lists", "adds": {"made": "list<string>"}}},
        {"explode": {"column": "made", "into": "part"}},
        {"name": "check", "map": {"function": f"{code}:check", "adds": {"size": "int64"}}},
    ]


def told(output: Output) -> dict[str, tuple[str | None, str | None]]:
    """Place of a row → its element and error."""
    rows = content(output.folder)
    return {row["row_id"].rpartition("#")[2]: (row["part"], row["error_code"]) for row in rows}


@pytest.mark.parametrize("failed_rows", ["inline", "separate"])
def test_a_failed_element_is_a_failed_row_and_is_mended_alone(
    tmp_path: Path, code: str, failed_rows: str
) -> None:
    write_lists(tmp_path / "in")
    where = {"failed_rows": failed_rows}
    whole = "None if i == 4 else ['a', 'b', 'c'][: i + 1]"
    output = committed(settings(tmp_path, *wrote(tmp_path, code, whole, "['b']"), output=where))
    stats = totals(output)
    assert (stats.rows_in, stats.rows_added) == (6, 1 + 2 + 2 + 2)
    assert (stats.rows_ok, stats.rows_failed) == (4 + 4, 4 + 1)
    assert stats.error_rate == 5 / 13
    if failed_rows == "inline":
        assert (told(output)["1/0"], told(output)["1/1"]) == (("a", None), ("b", "step_error"))
        assert told(output)["4"] == (None, "step_error")
    before = {row["row_id"]: row for row in rows_of(output.folder).to_pylist() if not row["error_code"]}

    wrote(tmp_path, code, "['a', 'b', 'c'][: i + 1]", "[]")
    run(output.retry("second"), output.plan.shards)
    after = {row["row_id"]: row for row in rows_of(output.folder).to_pylist()}
    assert {row_id: after[row_id] for row_id in before} == before  # run ids as well
    clean = committed(
        settings(
            tmp_path, *wrote(tmp_path, code, "['a', 'b', 'c'][: i + 1]", "[]"), out="clean", output=where
        )
    )
    assert content(output.folder) == content(clean.folder)
    verdict = verify(output.storage, deep=True)
    assert (verdict["problems"], verdict["rows_failed"], verdict["rows_added"]) == ([], 0, 9)


def test_a_retry_whose_lists_are_others_takes_no_answer_away(tmp_path: Path, code: str) -> None:
    write_lists(tmp_path / "in")
    output = committed(settings(tmp_path, *wrote(tmp_path, code, "['a', 'b', 'c', 'b']", "['b']")))
    first = {row: one for row, one in told(output).items() if one[1] is None}
    assert len(first) == 12

    # Of the failed elements 1 and 3 the new lists have only the one, and it fails of something else.
    wrote(tmp_path, code, "['x', 'y']", "['x', 'y']")
    run(output.retry("shorter"), output.plan.shards)
    assert told(output) == {
        **first,
        **{f"{i}/{k}": ("by"[k == 1], "step_error") for i in range(6) for k in (1, 3)},
    }
    assert verify(output.storage, deep=True)["problems"] == []

    wrote(tmp_path, code, "None", "[]")  # rows that fail before they have a list
    before = told(output)
    run(output.retry("none"), output.plan.shards)
    assert told(output) == before

    wrote(tmp_path, code, "['x', 'y', 'z', 'w', 'v']", "[]")
    run(output.retry("longer"), output.plan.shards)
    mended = {f"{i}/{k}": ("y" if k == 1 else "w", None) for i in range(6) for k in (1, 3)}
    assert told(output) == {**first, **mended}
    verdict = verify(output.storage, deep=True)
    assert (verdict["problems"], verdict["rows_ok"], verdict["rows_failed"]) == ([], 24, 0)


def test_a_retried_element_that_a_step_drops_is_counted(tmp_path: Path, code: str) -> None:
    write_lists(tmp_path / "in")
    keep = {"filter": {"where": "part != 'y'"}}
    output = committed(settings(tmp_path, *wrote(tmp_path, code, "['a', 'b']", "['b']"), keep))
    wrote(tmp_path, code, "['a', 'y']", "[]")
    run(output.retry("second"), output.plan.shards)
    verdict = verify(output.storage, deep=True)
    assert (verdict["problems"], verdict["rows_ok"], verdict["rows_dropped"]) == ([], 6, 6)


def test_a_retry_may_not_change_which_rows_there_are(tmp_path: Path) -> None:
    write_lists(tmp_path / "in")
    output = committed(settings(tmp_path, EXPLODE))
    other = {"explode": {**EXPLODE["explode"], "on_empty": "null"}}
    with pytest.raises(SpecError, match=r"steps\.explode"):
        retry_failed(load({**output.settings, "steps": [other]}))
    retry_failed(load(output.settings))  # no failed row: nothing to do
