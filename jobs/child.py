"""A `dray` command as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from pipelines.code import code_path

_DRAY = """
from pipelines.orphans import end_with_parent
end_with_parent()
from jobs.cli import main
main(prog_name="dray")
"""


def start_dray(
    arguments: Sequence[str], *, stdout: IO[bytes] | int | None = None, stderr: IO[bytes] | int | None = None
) -> subprocess.Popen[bytes]:
    """The same Dray as this one, never one of the working directory (`-P`). It ends when this process is killed.

    In a session of its own, so that Ctrl-C comes to it once, from us.
    """
    root = str(Path(code_path()).parent)
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, "-P", "-c", _DRAY, *arguments],
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
    )
