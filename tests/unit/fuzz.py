"""What the fuzz tests share: how many examples, a watchdog, and what counts as a good refusal.

`make test-fast` tries the same few examples each time. `FUZZ=50 pytest tests/unit -k fuzz` tries fifty times as many, new ones
each time.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings

from pipelines.errors import BadInput

T = TypeVar("T")
FACTOR = int(os.environ.get("FUZZ", "1"))
#: Seconds after which an example counts as hanging. Far beyond what any takes, on a busy machine too.
HANGS_S = 60.0


def examples(count: int) -> settings:
    """Settings for a fuzz test with so many examples in a short run."""
    return settings(
        max_examples=count * FACTOR,
        derandomize=FACTOR == 1,
        deadline=None,  # `within` ends what hangs; how long the rest takes is the machine's affair
        database=None,
        print_blob=FACTOR > 1,
        report_multiple_bugs=False,
        suppress_health_check=[
            HealthCheck.too_slow,
            HealthCheck.function_scoped_fixture,
            HealthCheck.filter_too_much,
        ],
    )


def within(call: Callable[[], T], seconds: float = HANGS_S) -> T:
    """What `call` returns or raises; a failure of the test where it is not back in time."""
    outcome: list[tuple[bool, Any]] = []

    def run() -> None:
        try:
            outcome.append((True, call()))
        except BaseException as error:  # noqa: BLE001 - raised again below, in the test's thread
            outcome.append((False, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        faulthandler.dump_traceback(sys.stderr)
        pytest.fail(f"still running after {seconds:g} s")
    returned, value = outcome[0]
    if returned:
        return value  # type: ignore[no-any-return]
    raise value


def refusal(call: Callable[[], T], *names: str) -> str | None:
    """The message with which `call` refuses; None where it accepts. Anything but a readable BadInput is raised.

    Each line names one of `names`: a file, a key or an override.
    """
    try:
        within(call)
    except BadInput as error:
        text = str(error)
        text.encode()  # a lone surrogate could not be printed
        lines = text.split("\n")
        assert 1 <= len(lines) <= 11, text  # ten mistakes, and how many more
        for line in lines:
            assert line.strip() == line != "", repr(text)
            assert len(line) < 1500, repr(line)
            assert any(name in line for name in names) or line.startswith("…"), repr(line)
        return text
    return None
