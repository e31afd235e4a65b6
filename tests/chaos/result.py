"""What a trial is told, and what it tells."""

from __future__ import annotations

from dataclasses import dataclass, field


class Unexpected(Exception):
    """A driver did something else than the fault allows."""


class Skip(Exception):
    """This machine cannot do the trial; says why."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """What a trial is told."""

    fault: str
    engine: str
    seed: int
    pool: str
    """JSON file: question → the answer of an undisturbed greedy run."""
    s3: dict[str, str] | None = None
    """`endpoint_url`, `key`, `secret` of the server that all trials share."""
    overrides: list[str] = field(default_factory=list)
    """`key=value` for every run with this engine."""
    keep: bool = False
    """Keep the folder of a sound trial, too."""


@dataclass(kw_only=True)
class Result:
    """One line of the JSON report. Rows unless it says otherwise."""

    fault: str
    engine: str
    seed: int
    store: str = "local"
    outcome: str = "failed"
    """`ok`, `failed` (see `problem`), `skipped` (see `note`)."""
    problem: str = ""
    note: str = ""
    struck: bool = False
    """The fault met a run in progress."""
    rows: int = 0
    lost: int = 0
    doubled: int = 0
    wrong: int = 0
    misjudged: int = 0
    repeated_rows: int | None = None
    """Rows that an engine was given beyond once; None where Dray keeps no record of attempts."""
    in_flight_rows: int | None = None
    """Rows of the shards that were begun and not committed when the fault struck, summed over strikes."""
    allowed_rows: int | None = None
    """What may be repeated: engines × shards each, per strike, or what was in flight, if commits lagged behind and that is
    more. Not for faults that repeat on purpose."""
    recover_s: float | None = None
    """From the strike until all that was in flight then stood committed (or the next part, where nothing was)."""
    seconds: float = 0.0
    drivers: list[int | None] = field(default_factory=list)
    """Exit codes, in order of their start."""
    left_behind: list[str] = field(default_factory=list)
    """Processes that ran on after the last driver, Ray's own agents apart."""
    folder: str = ""
