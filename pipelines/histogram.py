"""A mergeable histogram of seconds, for latencies: exponential buckets, so that quantiles keep a relative error.

Bucket k holds values in (GROWTH**(k-1), GROWTH**k]; a quantile is off by at most half a bucket, 4.5 % with
GROWTH = 2**(1/8). The scheme is that of Prometheus' native histograms (schema 3).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

GROWTH = 2 ** (1 / 8)
_LOG_GROWTH = math.log(GROWTH)
#: Everything below a microsecond is one bucket.
_FLOOR = 1e-6


@dataclass(frozen=True)
class Histogram:
    """Counts by bucket, and the exact sum. Add with `+`; values in seconds."""

    counts: dict[int, int] = field(default_factory=dict)
    total: float = 0.0

    @classmethod
    def of(cls, values: Iterable[float]) -> Histogram:
        counts: dict[int, int] = {}
        total = 0.0
        for value in values:
            total += value
            key = math.ceil(math.log(max(value, _FLOOR)) / _LOG_GROWTH - 1e-9)
            counts[key] = counts.get(key, 0) + 1
        return cls(dict(sorted(counts.items())), total)

    @property
    def count(self) -> int:
        return sum(self.counts.values())

    def quantile(self, q: float) -> float | None:
        """The value below which a share `q` of the values lies, to within 4.5 %; None when empty."""
        rank, seen = q * self.count, 0
        for key in sorted(self.counts):
            seen += self.counts[key]
            if seen >= rank:
                return float(GROWTH ** (key - 0.5))
        return None

    def middles(self) -> list[tuple[float, int]]:
        """Each bucket's middle in seconds, and how many values it holds."""
        return [(float(GROWTH ** (key - 0.5)), count) for key, count in self.counts.items()]

    def __add__(self, other: Histogram) -> Histogram:
        keys = sorted({*self.counts, *other.counts})
        counts = {k: self.counts.get(k, 0) + other.counts.get(k, 0) for k in keys}
        return Histogram(counts, self.total + other.total)

    def to_dict(self) -> dict[str, Any]:
        return {"counts": {str(k): v for k, v in self.counts.items()}, "sum": self.total}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Histogram:
        return cls({int(k): v for k, v in data.get("counts", {}).items()}, data.get("sum", 0.0))
