"""The terminal of a run: progress on it, and everybody else's chatter in a log file.

Ray's raylet and vLLM's processes write to file descriptors 1 and 2 directly; over a live display that is noise, and on
standard output it would spoil `--json`. So both descriptors point to the log while a job runs, and Dray keeps the real ones.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from pipelines.errors import OutputError

if TYPE_CHECKING:  # it brings Ray Data along, seconds of imports that `dray tune` does without
    from jobs.runner import Progress


def log_folder() -> Path:
    """Where run logs go: `$DRAY_LOGS`, or `dray/logs` in the user's cache folder, made if need be.

    The temporary folder where there is no home that can be written, as in many containers.
    """
    chosen = os.environ.get("DRAY_LOGS")
    try:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(chosen or Path(cache) / "dray" / "logs")
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        if chosen:
            raise OutputError(f"DRAY_LOGS: {chosen} cannot be made or written") from None
        return Path(tempfile.gettempdir())
    return folder


@contextlib.contextmanager
def chatter_to(log: Path) -> Iterator[IO[str]]:
    """Send descriptors 1 and 2 and all logging to `log`; yields the real standard error, for Dray's own words."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = {fd: os.dup(fd) for fd in (1, 2)}
    with (
        open(log, "ab", buffering=0) as sink,
        io.TextIOWrapper(os.fdopen(os.dup(saved[2]), "wb", buffering=0), write_through=True) as terminal,
    ):
        handler = logging.StreamHandler(
            io.TextIOWrapper(os.fdopen(os.dup(sink.fileno()), "wb", 0), write_through=True)
        )
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root, dray = logging.getLogger(), logging.getLogger("dray")
        root.addHandler(handler)
        dray.setLevel(logging.INFO)
        logging.captureWarnings(True)
        try:
            for fd in saved:
                os.dup2(sink.fileno(), fd)
            yield terminal
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for fd, real in saved.items():
                os.dup2(real, fd)
                os.close(real)
            logging.captureWarnings(False)
            root.removeHandler(handler)
            handler.stream.close()


class Display:
    """Shows a run's progress: a live line on a terminal, a plain line at each change of note elsewhere."""

    #: Percent of the shards between two plain lines.
    PLAIN_STEP = 10

    def __init__(self, terminal: IO[str], *, quiet: bool = False) -> None:
        self.console = Console(file=terminal, quiet=quiet, highlight=False)
        self._bars: Bars | None = None
        self._phase = ""
        self._percent = -1
        self._meter = Meter()

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            self._bars = Bars(
                TextColumn("{task.description:9}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("shards"),
                TextColumn("{task.fields[detail]}"),
                TimeElapsedColumn(),
                console=self.console,
                transient=True,
            )
            self._bars.start()
            self._task = self._bars.add_task("planning", total=None, detail="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars:
            self._bars.stop()

    def __call__(self, progress: Progress) -> None:
        if progress.note:
            self.console.print(progress.note)
        detail = self._meter.describe(progress)
        if self._bars:
            self._bars.update(
                self._task,
                description=progress.phase,
                total=progress.shards_total or None,
                completed=progress.shards_done,
                detail=detail,
            )
            return
        percent = 100 * progress.shards_done // progress.shards_total if progress.shards_total else 0
        if progress.phase != self._phase or percent >= self._percent + self.PLAIN_STEP:
            self._phase, self._percent = progress.phase, percent
            shards = (
                f" {progress.shards_done}/{progress.shards_total} shards" if progress.shards_total else ""
            )
            self.console.print(f"{progress.phase}:{shards} {detail}".rstrip())


class Meter:
    """Rates of a run, from the first committed shard on."""

    def __init__(self) -> None:
        self._started: float | None = None

    def describe(self, progress: Progress) -> str:
        """Rows, tokens per second in and out, errors and the time left, as far as they are known."""
        stats, now = progress.stats, time.monotonic()
        if progress.phase == "running" and self._started is None:
            # The first shard's own time belongs to the rate; its start is not known more closely than this.
            self._started = now - stats.generate_s - stats.commit_s
        if not stats.rows_in or self._started is None:
            return ""
        elapsed = max(now - self._started, 1e-3)
        words = [f"{progress.rows_before + stats.rows_in:,} rows"]
        words.append(
            f"{stats.prompt_tokens / elapsed:,.0f} in, {stats.completion_tokens / elapsed:,.0f} out tokens/s"
        )
        if stats.rows_failed:
            words.append(f"{stats.rows_failed:,} failed")
        if progress.retries:
            words.append(f"{progress.retries} shards tried again")
        if progress.rows_total and progress.phase == "running":
            left = progress.rows_total - progress.rows_before - stats.rows_read
            words.append(f"{max(left, 0) * elapsed / stats.rows_read:,.0f} s left")
        return " · ".join(words)
