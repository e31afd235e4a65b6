"""The command line's surface, frozen: a change of it is a decision and shows in the diff of cli.txt.

Write it anew with `python -m tests.golden.test_cli_surface`.
"""

from __future__ import annotations

from pathlib import Path

import click
from click.testing import CliRunner

from jobs.cli import main

GOLDEN = Path(__file__).with_name("cli.txt")


def surface() -> str:
    """The help of every command, as a terminal of 100 columns shows it."""
    runner = CliRunner()
    texts = [runner.invoke(main, ["--help"], prog_name="dray", terminal_width=100).output]
    texts += [
        runner.invoke(main, [name, "--help"], prog_name="dray", terminal_width=100).output
        for name in sorted(main.list_commands(click.Context(main)))
    ]
    return "\n".join(texts)


def test_the_command_line_is_as_it_was() -> None:
    assert surface() == GOLDEN.read_text()


if __name__ == "__main__":
    GOLDEN.write_text(surface())
