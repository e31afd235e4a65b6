"""How many rows may fail: `errors.max_error_rate` of all, and of the latest `errors.window_rows`.

Only rows count that stand in a part with an `error_code`. What a store or an engine did is repeated, not counted.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable

from pipelines.errors import ErrorBudgetSpent
from pipelines.part import Footer
from pipelines.settings import ErrorSettings
from pipelines.shard_stats import ShardStats

#: Error codes that a message shows, with an example row each.
_SHOWN = 3
_MESSAGE_LENGTH = 160


class ErrorBudget:
    """Counts the failed rows of one run as shards are committed, and says when there are too many."""

    def __init__(self, settings: ErrorSettings, rows_total: int | None, output: str) -> None:
        """`rows_total`: of the whole job, where that is known before it is done. `output`: its URL, for messages."""
        self._settings, self._rows_total, self._output = settings, rows_total, output
        self._rows_failed = 0
        self._window: deque[Footer] = deque()
        self._window_rows = 0
        self._examples: dict[str, str] = {}
        self._codes: Counter[str] = Counter()

    def take(self, footer: Footer) -> None:
        """Count one committed shard. Raises ErrorBudgetSpent."""
        self._note([footer])
        most = self._settings.max_error_rate
        if self._rows_total and self._rows_failed > most * self._rows_total:
            raise self.spent(self._rows_failed, self._rows_total, self._codes)
        limit = self._settings.window_rows
        if limit is None:
            return
        self._window.append(footer)
        self._window_rows += footer.stats.rows
        while self._window_rows - self._window[0].stats.rows >= limit:
            self._window_rows -= self._window.popleft().stats.rows
        failed = sum(one.stats.rows_failed for one in self._window)
        # A window that is not full yet says nothing about the job.
        if (
            self._window_rows >= limit
            and failed >= self._settings.window_min_failed
            and failed > most * self._window_rows
        ):
            codes: Counter[str] = sum((Counter(one.stats.error_codes) for one in self._window), Counter())
            raise self.spent(failed, self._window_rows, codes, "of the latest ")

    def check_total(self, stats: ShardStats, footers: Iterable[Footer]) -> None:
        """The last word, over all parts of the output. Raises ErrorBudgetSpent."""
        if stats.error_rate > self._settings.max_error_rate:
            self._note(footers)
            raise self.spent(stats.rows_failed, stats.rows, Counter(stats.error_codes))

    def spent(self, failed: int, rows: int, codes: Counter[str], of: str = "of ") -> ErrorBudgetSpent:
        """The error, with the commonest codes and a row of each."""
        rate = failed / rows
        enough = math.ceil(rate * 1000) / 1000
        lines = [
            f"{failed:,} {of}{rows:,} rows failed ({rate:.2%}), errors.max_error_rate is "
            f"{self._settings.max_error_rate:.2%}:"
        ]
        for code, count in codes.most_common(_SHOWN):
            example = f", for example {self._examples[code]}" if code in self._examples else ""
            lines.append(f"  {code}: {count:,} rows{example}")
        lines.append(
            f"Committed rows are kept in {self._output}. `dray retry-failed {self._output}` runs the failed ones again, "
            f"with other settings if you add them; errors.max_error_rate={enough:g} accepts them"
        )
        return ErrorBudgetSpent("\n".join(lines))

    def _note(self, footers: Iterable[Footer]) -> None:
        for footer in footers:
            self._rows_failed += footer.stats.rows_failed
            self._codes.update(footer.stats.error_codes)
            for code, example in footer.error_examples.items():
                message = " ".join(example["error_message"].split())
                short = message if len(message) <= _MESSAGE_LENGTH else message[: _MESSAGE_LENGTH - 1] + "…"
                self._examples.setdefault(code, f"{example['row_id']}: {short}")
