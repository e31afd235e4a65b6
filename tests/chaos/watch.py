"""What a trial sees of an output while drivers work on it: parts and attempt records, with the time each appeared."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from dataclasses import dataclass, field

from tests.chaos.reader import Place

_PART = re.compile(r"data/part-\d{6,}-(?P<shard>[0-9a-f]{16})\.parquet")
_RECORD = re.compile(r"\.dray/attempts/(?P<shard>[0-9a-f]{16})/generate-\d{6}\.json")


@dataclass
class Watch:
    """Polls an output from a thread of its own, as a bystander: straight at the store, never through the proxy."""

    output: Place
    every_s: float
    parts: dict[str, float] = field(default_factory=dict)
    """Shard id → when its part was first seen, in monotonic seconds."""
    begun: dict[str, list[tuple[float, int | None]]] = field(default_factory=dict)
    """Shard id → its attempts at generating: when first seen, and how many rows (None: the whole shard)."""
    _seen: set[str] = field(default_factory=set)
    _stop: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def in_flight(self, at: float) -> set[str]:
        """Shards that an engine had begun and that were not committed at that time."""
        began = {shard for shard, attempts in self.begun.items() if attempts[0][0] <= at}
        return {shard for shard in began if self.parts.get(shard, float("inf")) > at}

    def look(self) -> None:
        """Take in what stands there now."""
        now = time.monotonic()
        for name in self.output.names():
            if name in self._seen:
                continue
            if match := _PART.fullmatch(name):
                self.parts.setdefault(match["shard"], now)
            elif match := _RECORD.fullmatch(name):
                with self.output.files.open_input_file(f"{self.output.path}/{name}") as file:
                    rows = json.loads(file.read())["rows"]
                self.begun.setdefault(match["shard"], []).append((now, None if rows is None else len(rows)))
            self._seen.add(name)

    def _poll(self) -> None:
        while not self._stop.wait(self.every_s):
            # Files come and go under a listing: the next look sees what this one missed.
            with contextlib.suppress(OSError, ValueError):
                self.look()
