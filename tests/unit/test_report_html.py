"""The page escapes what it is given, hides what it must, fetches nothing, stays small, and its figures are the footers'."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from jobs import load
from jobs.cli import main
from jobs.fingerprint import fingerprint, identity
from jobs.ledger import Run
from jobs.metering import Usage
from jobs.report_charts import BINS, DRAWN, LANES, Axis, duration, of_lengths, quantile, spread, timeline
from jobs.report_compare import Figure, compared, cost_of, differing_settings
from jobs.report_html import Facts, facts_of, render_html
from jobs.spec import CostSettings
from pipelines.settings import ModelSettings
from pipelines.shard_stats import Turn
from tests.local.runs import job
from tests.unit.stages import Output, committed, planned

EVIL = "<script>alert(1)</script>"
SECRET = "Ada Lovelace"
#: Of 24 rows in shards of 8.
FAILING = (1, 9, 17)


def made(folder: Path, target: str = "out", **sections: object) -> Output:
    """A job of which three rows fail: a message tells why that holds the customer's name."""
    (folder / "in").mkdir(exist_ok=True)
    rows = [
        {"question": f"{EVIL} {i}", "customer": SECRET, "count": 0 if i in FAILING else 1} for i in range(24)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "in" / "q.parquet")
    template = "{{ question }} {% if count == 0 %}{{ {}[customer] + 1 }}{% endif %}"
    sections = {"prompt": {"template": template}, "shards": {"rows": 8}, **sections}
    return committed(job(folder / "in", folder / target, **sections))


class Tags(HTMLParser):
    """Every tag and attribute, and what is never closed or closed twice."""

    VOID = frozenset({"meta", "link"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: set[str] = set()
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes |= {name for name, _ in attrs}
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes |= {name for name, _ in attrs}

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, (tag, self.getpos())


def many(facts: Facts, count: int) -> Facts:
    """The same page with `count` shards on 64 replicas whose names are hostile."""
    part = facts.books.parts[0]
    parts = tuple(
        replace(
            part,
            footer=replace(
                part.footer,
                provenance=replace(
                    part.footer.provenance,
                    replica=f"{EVIL}{n % 64}",
                    started_at=n,
                    committed_at=n + 5.0,
                    turns=(Turn(generation="", replica=f"{EVIL}{n % 64}", began_at=n + 1, ended_at=n + 4),),
                ),
            ),
        )
        for n in range(count)
    )
    return replace(facts, books=replace(facts.books, parts=parts))


@pytest.mark.slow
def test_page_is_inert_and_bounded(tmp_path: Path) -> None:
    facts = facts_of(made(tmp_path).storage)
    report = replace(facts.report, job=EVIL, problems=(EVIL,), output=EVIL, engines=(EVIL,))
    facts = replace(many(facts, 20_000), report=report)
    page = render_html(facts)
    tags = Tags(page)
    assert not tags.open
    assert not {"script", "img", "iframe", "object"} & tags.tags.keys()
    assert not {name for name in tags.attributes if name.startswith("on") or name == "src"}
    assert page.count("&lt;script&gt;") >= 6
    assert "http://" not in page and "https://" not in page  # noqa: PT018
    assert tags.tags["rect"] < BINS * (LANES + 1) + 1000
    assert len(page) < 1_000_000
    assert "SIMULATED" in page


def test_failed_rows_are_shown_whole_or_without_what_is_hidden(tmp_path: Path) -> None:
    output = made(tmp_path)
    page = render_html(facts_of(output.storage))
    assert page.count(SECRET) == 2 * len(FAILING), "the column, and the message that quotes it"
    assert "[redacted]" not in page

    hidden = made(tmp_path, "hidden", report={"redact": ["customer"]}, output={"rename": {"customer": "who"}})
    page = render_html(facts_of(hidden.storage))
    assert SECRET not in page
    assert page.count("[redacted]") == 2 * len(FAILING)
    assert "&lt;script&gt;alert(1)&lt;/script&gt; 9" in page
    # A job file can hide more than was hidden when the output was made, and no less.
    later = load({**output.settings, "report": {"redact": ["customer"]}}).spec
    assert SECRET not in render_html(facts_of(output.storage, later))
    assert SECRET not in render_html(facts_of(hidden.storage, load(output.settings).spec))


def test_failed_rows_are_found_where_they_are_kept_apart(tmp_path: Path) -> None:
    facts = facts_of(made(tmp_path, output={"failed_rows": "separate"}).storage)
    found = facts.examples["missing_value"]
    assert [example.row_id.rpartition("#")[2] for example in found] == [str(i) for i in FAILING]


def test_hiding_changes_no_fingerprint(tmp_path: Path) -> None:
    plain = job(tmp_path / "in", tmp_path / "out")
    hiding = {**plain, "report": {"redact": ["customer"]}, "cost": {"gpu_hour_usd": 3}}
    assert fingerprint(identity(load(plain))) == fingerprint(identity(load(hiding)))


def test_lengths_are_those_of_the_answered_rows(tmp_path: Path) -> None:
    output = made(tmp_path, sampling={"n": 2, "temperature": 1})
    facts = facts_of(output.storage)
    assert facts.lengths.prompts.total() == 24 - len(FAILING)
    assert facts.lengths.answers.total() == 2 * (24 - len(FAILING))
    stats = facts.report.stats
    assert sum(k * n for k, n in facts.lengths.answers.items()) == stats.completion_tokens
    assert sum(k * n for k, n in facts.lengths.prompts.items()) == stats.prompt_tokens


def test_amounts_are_kept_when_spread() -> None:
    assert sum(spread([(0, 1, 7), (0.3, 0.3, 2), (0.995, 1, 1)])) == pytest.approx(10)


def test_idle_time_is_cut_out_of_the_axis() -> None:
    axis = Axis.of([(100, 110), (105, 120), (120.5, 130), (90_000, 90_010)])
    assert axis.spans == ((100, 130), (90_000, 90_010))
    assert axis.busy_s == 40
    assert axis.cuts == (0.75,)
    assert [axis.at(when) for when in (0, 100, 115, 50_000, 90_000, 90_005, 99_999)] == [
        0,
        0,
        0.375,
        0.75,
        0.75,
        0.875,
        1,
    ]


def test_throughput_adds_up_to_the_tokens(tmp_path: Path) -> None:
    facts = facts_of(made(tmp_path).storage)
    for count in (3, DRAWN + 5):
        found = timeline(many(facts, count).books.parts)
        tokens = facts.books.parts[0].footer.stats.completion_tokens * count
        drawn = sum(bar.height * found.peak for bar in found.throughput) * found.busy_s / BINS
        assert drawn == pytest.approx(tokens)
        assert found.each_shard == (count <= DRAWN)
        for lane in found.lanes:
            for bar in lane.bars:
                assert 0 <= bar.x <= 1 and bar.y >= 0 and bar.y + bar.height <= 1 + 1e-9  # noqa: PT018


def test_length_bins_hold_every_value() -> None:
    counted = Counter({1: 2, 7: 1, 1000: 3})
    found = of_lengths("x", counted, "")
    assert sum(int(bar.title.rpartition(" ")[2]) for bar in found.bars) == 6
    assert (quantile(counted, 0.5), quantile(counted, 0.99), quantile(Counter(), 0.5)) == (7, 1000, 0)


def test_durations_are_for_people() -> None:
    given = (None, 0.018, 47.24, 119.96, 200, 3600, 7530)
    assert [duration(value) for value in given] == [
        "–",
        "18 ms",
        "47.2 s",
        "120.0 s",
        "3 min 20 s",
        "1 h 00 min",
        "2 h 05 min",
    ]


def test_an_output_without_parts_has_a_page(tmp_path: Path) -> None:
    made(tmp_path)
    storage = planned(job(tmp_path / "in", tmp_path / "empty")).storage
    page = render_html(facts_of(storage))
    assert not Tags(page).open
    assert "incomplete" in page


def test_a_shard_stands_in_each_engine_that_it_passed_through(tmp_path: Path) -> None:
    part = facts_of(made(tmp_path).storage).books.parts[0]
    turns = (
        Turn(generation="", replica="writer", began_at=20.0, ended_at=40.0),
        Turn(generation="read", replica="reader", began_at=60.0, ended_at=100.0),
    )
    provenance = replace(part.footer.provenance, started_at=0.0, committed_at=100.0, turns=turns)
    stats = replace(
        part.footer.stats,
        completion_tokens=900,
        steps={"read": {"in": 1, "out": 1, "dropped": 0, "failed": 0, "completion_tokens": 400}},
    )
    drawn = timeline([replace(part, footer=replace(part.footer, provenance=provenance, stats=stats))])
    reader, writer = drawn.lanes
    assert (reader.replica, writer.replica) == ("reader", "writer")
    assert [(bar.x, bar.x + bar.width) for bar in writer.bars] == [(0, 0.4), pytest.approx((0.2, 0.4))]
    waited, read, failed = reader.bars  # what failed stands where the shard ended
    assert [(bar.x, bar.x + bar.width) for bar in (waited, read)] == [(0.4, 1), pytest.approx((0.6, 1))]
    assert failed.kind == "failed"
    # 500 tokens in the writer's 20 s, 400 in the reader's 40.
    assert drawn.peak == pytest.approx(25)
    assert max(bar.height for bar in drawn.throughput if bar.x > 0.5) == pytest.approx(10 / 25)


def test_cost_is_what_runs_counted_and_else_each_engine_from_its_start_to_its_last_commit(
    tmp_path: Path,
) -> None:
    """By parts that do not tell the GPUs of their engines, as older ones."""
    books = facts_of(made(tmp_path).storage).books

    def origin(replica: str, ready: float, end: float, run: str) -> dict[str, object]:
        times = {"engine_start_s": 600.0, "engine_ready_at": ready, "committed_at": end}
        return {"run_id": run, "replica": replica, "device": "H100", "turns": (), **times}

    # Engines of run a: 0 to 7200 and 1800 to 7200; of run b: 99,400 to 103,000.
    given = (
        origin("x", 600, 7200, "a"),
        origin("y", 2400, 7000, "a"),
        origin("x", 100_000, 103_000, "b"),
    )
    parts = tuple(
        replace(
            part,
            footer=replace(part.footer, provenance=replace(part.footer.provenance, **fields)),
        )
        for part, fields in zip(books.parts, given, strict=True)
    )
    books = replace(books, parts=parts)
    price = CostSettings(gpu_hour_usd=2)
    killed = cost_of(books, [], ModelSettings(source="m", engine={"tensor_parallel_size": 2}), 1, price)
    assert killed.gpu_hours == pytest.approx(2 * (2 + 5200 / 3600 + 1))
    assert killed.usd == pytest.approx(2 * killed.gpu_hours)
    one = ModelSettings(source="m")
    assert cost_of(books, [], one, 3, price).gpu_hours == pytest.approx(killed.gpu_hours / 6)
    assert cost_of(books, [], one, None, CostSettings()).assumed
    # Run a counted for itself: of another pool, whose engines no part names, as well.
    counted = [ended("a", 5 * 3600.0), ended("c", 3600.0)]
    assert cost_of(books, counted, one, 1, price).gpu_hours == pytest.approx(5 + 1 + 1)
    assert not cost_of(books, [*counted, ended("b", 1.0)], one, None, price).assumed


def test_of_a_killed_run_the_engines_of_all_pools_cost(tmp_path: Path) -> None:
    """As many GPUs as each had, which the job's own settings need not tell."""
    books = facts_of(made(tmp_path).storage).books

    def turn(generation: str, replica: str, began: float, ended: float, gpus: float) -> Turn:
        return Turn(
            generation=generation,
            replica=replica,
            began_at=began + 100,
            ended_at=ended,
            engine_began_at=began,
            gpus=gpus,
        )

    # Writers share a GPU, 0 to 3600 and 0 to 1800; the judge has two, 600 to 7800; what parses on a CPU has none.
    passed = [
        (turn("", "w1", 0, 1800, 0.5), turn("judge", "j", 600, 2400, 2), turn("last", "cpu", 0, 2500, 0)),
        (turn("", "w1", 0, 3600, 0.5), turn("judge", "j", 600, 7800, 2), turn("last", "cpu", 0, 7900, 0)),
        (turn("", "w2", 0, 1800, 0.5), turn("judge", "j", 600, 7000, 2), turn("last", "cpu", 0, 7100, 0)),
    ]
    parts = []
    for part, turns in zip(books.parts, passed, strict=True):
        origin = replace(part.footer.provenance, run_id="a", replica="cpu", device="cpu", turns=turns)
        parts.append(replace(part, footer=replace(part.footer, provenance=origin)))
    books = replace(books, parts=tuple(parts))
    found = cost_of(books, [], ModelSettings(source="m"), None, CostSettings(gpu_hour_usd=2))
    assert found.gpu_hours == pytest.approx(0.5 * (1 + 0.5) + 2 * 2)
    assert (found.usd, found.assumed) == (pytest.approx(2 * found.gpu_hours), False)
    assert cost_of(books, [ended("a", 3600.0)], ModelSettings(source="m"), 1, CostSettings()).gpu_hours == 1


def ended(run_id: str, gpu_s: float) -> Run:
    """A run with totals."""
    usage = Usage(rows=1, failed=0, prompt_tokens=1, output_tokens=1, gpu_s=gpu_s, cost_usd=None)
    times = {"started_at": 0.0, "ended_at": 1.0}
    return Run(run_id=run_id, command="run", state="succeeded", message="", usage=usage, **times)


def test_two_runs_are_compared(tmp_path: Path) -> None:
    ours, theirs = made(tmp_path), made(tmp_path, "other", sampling={"max_tokens": 8}, pool={"replicas": 2})
    a, b = facts_of(ours.storage), facts_of(theirs.storage)
    differing = differing_settings(a.record, b.record)
    assert ("sampling.max_tokens", "48", "8") in differing
    assert ("pool.replicas", "not set", "2") in differing
    assert not [key for key, _, _ in differing if key.startswith("output")]
    by_name = {line.name: line for line in compared(a.figures, b.figures)}
    tokens = a.report.stats.completion_tokens / b.report.stats.completion_tokens
    assert by_name["Output tokens"].ratio == f"{tokens:,.2f}×"
    assert not Tags(render_html(a, b)).open
    lines = compared(
        [
            Figure(name="t", value=3, shown="3", better="less"),
            Figure(name="r", value=3, shown="3", better="more"),
        ],
        [Figure(name="t", value=2, shown="2"), Figure(name="r", value=2, shown="2")],
    )
    assert [(line.ratio, line.verdict) for line in lines] == [("1.50×", "worse"), ("1.50×", "better")]


def test_command_line(tmp_path: Path) -> None:
    output = made(tmp_path)
    runner = CliRunner()
    done = runner.invoke(main, ["report", str(output.folder), "--html", "-"])
    assert done.exit_code == 0
    assert done.stdout.lstrip().startswith("<!doctype html>")
    page = tmp_path / "page.html"
    done = runner.invoke(
        main, ["report", str(output.folder), "--html", str(page), "--against", str(output.folder)]
    )
    assert done.exit_code == 0
    assert "Compared with" in page.read_text()
    for wrong in (
        ["--html", str(tmp_path / "no" / "x.html")],
        ["--against", str(output.folder)],
        ["--html", "-", "--json"],
    ):
        assert runner.invoke(main, ["report", str(output.folder), *wrong]).exit_code in (1, 2)
