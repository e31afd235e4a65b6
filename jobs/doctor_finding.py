"""One line of `dray doctor`, and how a check becomes one even when the check itself fails or hangs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from pipelines.errors import DrayError

Verdict = Literal["ok", "problem", "note"]

GIB = 2**30
#: An environment holds one engine build; the other device gets a folder of its own (requirements/install.py).
GPU_SETUP = "make setup DEVICE=gpu VENV=.venv-gpu"
CPU_SETUP = "make setup DEVICE=cpu VENV=.venv-cpu"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found."""

    name: str
    verdict: Verdict
    """`problem`: a job will fail or cannot start. `note`: works, but slower or with a risk."""
    detail: str
    remedy: str = ""
    """A command to run or a key to change; empty when ok."""


def attempt(
    name: str, check: Callable[[], Iterable[Finding]], *, limit_s: float | None = None, remedy: str = ""
) -> Iterator[Finding]:
    """The check's findings; what it raises is a problem of that name, with `remedy`.

    With `limit_s` the check runs on a thread that is left behind when it has no answer by then: name resolution and
    libraries' own retries know no timeout that holds.
    """
    if limit_s is None:
        yield from _caught(name, check, remedy)
        return
    found: list[Finding] = []
    thread = threading.Thread(target=lambda: found.extend(_caught(name, check, remedy)), daemon=True)
    thread.start()
    thread.join(limit_s)
    if thread.is_alive():
        yield Finding(name, "problem", f"no answer within {limit_s:g} s", remedy)
    else:
        yield from found


def _caught(name: str, check: Callable[[], Iterable[Finding]], remedy: str) -> Iterator[Finding]:
    try:
        yield from check()
    except DrayError as error:
        yield Finding(name, "problem", one_line(str(error)), remedy)
    except Exception as error:  # noqa: BLE001 - a doctor that stops at the first broken part is no use
        _log.debug("%s", name, exc_info=True)
        detail = f"the check itself failed: {type(error).__name__}: {one_line(str(error))}"
        yield Finding(name, "problem", detail, remedy)


def one_line(text: str, most: int = 400) -> str:
    """All white space as single spaces, cut to `most` characters."""
    flat = " ".join(text.split())
    return flat if len(flat) <= most else flat[: most - 1] + "…"


def gib(size: float) -> str:
    """Bytes for people: `139.8 GiB`, `2 MiB`, `6 KiB`."""
    if size >= GIB:
        return f"{size / GIB:.1f} GiB"
    return f"{size / 2**20:.0f} MiB" if size >= 2**20 else f"{size / 2**10:.0f} KiB"
