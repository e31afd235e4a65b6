"""`dray estimate`: random rows of every kind of input, and the true token counts within the intervals."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from jobs.cli import main
from jobs.estimate import estimate
from jobs.inspect import report_of
from jobs.loading import load
from jobs.proposal import input_schema, work_of
from jobs.sampling import RowSample, sample_rows
from jobs.spec_columns import needed_columns
from pipelines.errors import SpecError
from pipelines.listing import list_files
from tests.local.runs import job, write_questions
from tests.unit.stages import committed
from tests.unit.test_generations import OTHER, comment
from tests.unit.test_generations import settings as made_of
from tests.unit.test_model_steps import EMBED, alone

pytestmark = pytest.mark.slow


ROWS = 900


def write_skewed(folder: Path, form: str = "parquet") -> None:
    """Three files of texts whose lengths are skewed, a fifth of them in another language."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(3)
    words = np.minimum(np.ceil(random.lognormal(2.0, 0.9, ROWS)), 60).astype(int)
    rows = [
        {"number": i, "text": f"{i} " + "word " * int(n), "lang": "de" if random.random() < 0.2 else "en"}
        for i, n in enumerate(words)
    ]
    for name, part in (("a", rows[:100]), ("b", rows[100:400]), ("c", rows[400:])):
        if form == "parquet":
            pq.write_table(pa.Table.from_pylist(part), folder / f"{name}.parquet", row_group_size=70)
        else:
            lines = "".join(json.dumps(row) + "\n" for row in part).encode()
            if form == "jsonl":
                (folder / f"{name}.jsonl").write_bytes(lines)
            else:
                (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines))


def spec_of(tmp_path: Path, **sections: Any) -> dict[str, Any]:
    model = {"simulated": {"min_tokens": 1, "max_tokens": 60}, **sections.pop("model", {})}
    return job(
        tmp_path / "in",
        tmp_path / "out",
        prompt={"template": "{{ text }}"},
        model=model,
        **sections,
    )


def drawn(tmp_path: Path, count: int, *seeds: int, **sections: Any) -> list[RowSample]:
    made = load(spec_of(tmp_path, **sections))
    files = list_files(made.spec.input, needed_columns(made.spec))
    work = work_of(made, input_schema(made.spec, files), fingerprint="", run_id="t")
    return [sample_rows(files, work, count, seed) for seed in seeds]


@pytest.mark.parametrize("form", ["parquet", "jsonl", "jsonl.gz"])
def test_every_row_is_as_likely_as_any_other(tmp_path: Path, form: str) -> None:
    write_skewed(tmp_path / "in", form)
    seen: Counter[int] = Counter()
    for sample in drawn(tmp_path, 90, *range(60)):
        numbers = sample.table["number"].to_pylist()
        assert len(set(numbers)) == len(numbers) == sample.drawn == 90
        assert sample.population == sample.rows_read == ROWS
        seen.update(numbers)
    counts = np.array([seen[i] for i in range(ROWS)])
    # Each row is drawn 6 times on average; the sum over 900 squares is chi-square with a deviation of 42.
    assert abs((((counts - 6) ** 2) / (6 * 0.9)).sum() - ROWS) < 6 * np.sqrt(2 * ROWS)
    for part in np.split(counts, [100, 400]):
        assert abs(part.mean() - 6) < 0.6


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_filtered_rows_count_for_the_population_only(tmp_path: Path, form: str) -> None:
    write_skewed(tmp_path / "in", form)
    (sample,) = drawn(tmp_path, 200, 1, input={"path": str(tmp_path / "in"), "filter": "lang == 'en'"})
    assert set(sample.table["lang"].to_pylist()) == {"en"}
    assert sample.rows_read == ROWS
    if form == "parquet":  # drawn before the filter is looked at
        assert (sample.drawn, sample.population) == (200, ROWS)
        assert 130 < len(sample.table) < 190
    else:  # read through, so the filter's share is known
        assert sample.drawn == len(sample.table) == 200
        assert sample.population < ROWS


def truth(tmp_path: Path, **sections: Any) -> Any:
    """What the whole job does: an estimate from all rows, which is no estimate."""
    return estimate(load(spec_of(tmp_path, **sections)), rows=ROWS)


@pytest.mark.parametrize(
    ("form", "sections"),
    [
        ("parquet", {}),
        ("parquet", {"input": {"filter": "lang == 'en'"}, "sampling": {"temperature": 1, "n": 2}}),
        ("jsonl", {"input": {"filter": "lang == 'en'"}, "sampling": {"max_tokens": 20}}),
    ],
)
def test_the_true_counts_lie_within(tmp_path: Path, form: str, sections: dict[str, Any]) -> None:
    write_skewed(tmp_path / "in", form)
    whole = truth(tmp_path, **sections)
    assert whole.output_tokens.low == whole.output_tokens.value == whole.output_tokens.high
    hits, tries = 0, 4
    for seed in range(tries):
        found = estimate(load(spec_of(tmp_path, **sections)), rows=150, seed=seed)
        assert found.rows_sampled == 150
        assert found.rows_read == ROWS
        for name in ("prompt_tokens", "output_tokens", "rows_kept"):
            interval, true = getattr(found, name), getattr(whole, name).value
            hits += interval.low <= true <= interval.high
            assert abs(interval.value / true - 1) < 0.4
    assert hits >= 3 * tries - 2  # nineteen of twenty on average


def test_time_and_cost_follow_from_speed_engines_and_price(tmp_path: Path) -> None:
    write_skewed(tmp_path / "in")
    made = spec_of(
        tmp_path,
        model={"simulated": {"min_tokens": 20, "max_tokens": 60, "tokens_per_s": 8000, "start_s": 0.3}},
        pool={"replicas": 2},
        cost={"gpu_hour_usd": 3.0},
    )
    found = estimate(load(made), rows=200)
    (one,) = found.generations
    assert one.tokens_per_s == pytest.approx(8000, rel=0.3)
    assert one.tokens_per_s is not None
    busy = found.output_tokens.value / one.tokens_per_s
    assert found.wall_s.value == pytest.approx(found.engine_start_s + busy / 2)
    assert found.wall_s.low < found.wall_s.value < found.wall_s.high
    assert (found.gpu_hours.value, found.cost_usd.value if found.cost_usd else None) == (
        0.0,
        0.0,
    )  # a CPU pool
    assert any("SIMULATED" in note for note in found.notes)


@pytest.mark.parametrize("other", [None, OTHER], ids=["one engine", "two pools"])
def test_every_generation_counts(tmp_path: Path, other: dict[str, Any] | None) -> None:
    """One engine for both, or two; of a whole input what the job's own books say, steps between included."""
    write_questions(tmp_path / "in", rows=40)
    base = made_of(
        tmp_path,
        {"filter": {"where": "completion_tokens > 12"}},
        comment(**({"model": other} if other else {})),
    )
    found = estimate(load(base), rows=40)
    stats = report_of(committed(base).storage).stats
    assert (found.prompt_tokens.value, found.output_tokens.value) == (
        stats.prompt_tokens,
        stats.completion_tokens,
    )
    own, step = found.generations
    assert (own.name, step.name) == ("", "generate")
    assert step.output_tokens.value == stats.steps["generate"]["completion_tokens"] > 0
    assert step.prompt_tokens.value == stats.steps["generate"]["prompt_tokens"]
    assert own.output_tokens.value + step.output_tokens.value == found.output_tokens.value
    assert found.engines == (2 if other else 1)
    times = [one.output_tokens.value / one.tokens_per_s for one in found.generations if one.tokens_per_s]
    busy = max(times) if other else sum(times)  # two pools work at once
    assert found.wall_s.value == pytest.approx(found.engine_start_s + busy)


def test_a_corpus_to_embed_is_estimated_by_the_tokens_that_are_read(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", rows=40)
    base = alone(tmp_path, {"filter": {"where": "question != ''"}}, EMBED)
    found = estimate(load(base), rows=40)
    stats = report_of(committed(base).storage).stats
    assert (found.prompt_tokens.value, found.output_tokens.value) == (stats.prompt_tokens, 0)
    (one,) = found.generations
    assert one.tokens_per_s is not None
    assert found.wall_s.value == pytest.approx(found.engine_start_s + stats.prompt_tokens / one.tokens_per_s)


def test_a_generation_that_no_sampled_row_comes_to_is_named(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", rows=10)
    base = made_of(tmp_path, {"filter": {"where": "completion_tokens > 5000"}}, comment())
    (note,) = [
        note for note in estimate(load(base), rows=10).notes if "generate" in note and "--rows" in note
    ]
    assert "counts as nothing" in note


def test_the_command_prints_a_table_and_writes_nothing(tmp_path: Path) -> None:
    write_skewed(tmp_path / "in")
    (tmp_path / "job.yaml").write_text(json.dumps(spec_of(tmp_path)))
    done = CliRunner().invoke(main, ["estimate", str(tmp_path / "job.yaml"), "--rows", "50"])
    assert done.exit_code == 0, done.output
    assert "output tokens" in done.stdout
    assert "output tokens, " not in done.stdout  # there is one generation
    as_json = CliRunner().invoke(main, ["estimate", str(tmp_path / "job.yaml"), "--rows", "50", "--json"])
    found = json.loads(as_json.stdout)
    assert found["rows_read"] == ROWS
    assert found["rows_kept"] == {"value": ROWS, "low": ROWS, "high": ROWS}  # there is no filter
    assert found["output_tokens"]["low"] < found["output_tokens"]["value"] < found["output_tokens"]["high"]
    assert not (tmp_path / "out").exists()


def test_one_row_is_refused(tmp_path: Path) -> None:
    write_skewed(tmp_path / "in")
    with pytest.raises(SpecError, match="--rows"):
        estimate(load(spec_of(tmp_path)), rows=1)
