"""The page escapes what it is given, fetches nothing and stays small for very many shards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from jobs.inspect import books_and_report
from jobs.report_html import BINS, LANES, render_html, spread
from tests.unit.stages import committed
from tests.unit.test_retry import settings, write_rows


def test_amounts_are_kept_when_spread() -> None:
    assert sum(spread([(0, 10, 7), (3, 3, 2), (9.95, 10, 1)], 0, 10 / BINS)) == pytest.approx(10)


def test_page_is_inert_and_bounded(tmp_path: Path) -> None:
    write_rows(tmp_path / "in")
    books, report = books_and_report(committed(settings(tmp_path)).storage)
    part, evil = books.parts[0], "<script>alert(1)</script>"
    many = tuple(
        replace(
            part,
            footer=replace(
                part.footer,
                error_examples={"x": {"row_id": evil, "error_message": evil}},
                provenance=replace(
                    part.footer.provenance, replica=f"{evil}{n % 64}", started_at=n, committed_at=n + 5.0
                ),
            ),
        )
        for n in range(100_000)
    )
    report = replace(report, job=evil, stats=replace(report.stats, error_codes={"x": 1}))
    page = render_html(report, many)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 3
    assert "http://" not in page and "https://" not in page  # noqa: PT018
    assert page.count("<rect") < BINS * (LANES + 1) + 1000
    assert len(page) < 1_000_000
