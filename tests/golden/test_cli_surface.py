"""The command line's surface, frozen: a change of it is a decision and shows in the diff of cli.txt.

Write it anew with `python -m tests.golden.test_cli_surface`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
from click.testing import CliRunner

from jobs.cli import main

GOLDEN = Path(__file__).with_name("cli.txt")


def surface() -> str:
    """The help of every command, as a terminal of 100 columns shows it."""
    runner = CliRunner()
    paths = [[], *_below(main, [])]
    return "\n".join(
        runner.invoke(main, [*path, "--help"], prog_name="dray", terminal_width=100).output for path in paths
    )


def _below(group: click.Group, path: list[str]) -> Iterator[list[str]]:
    """The names that lead to each command of a group, and to those of groups in it."""
    for name, command in sorted(group.commands.items()):
        yield [*path, name]
        if isinstance(command, click.Group):
            yield from _below(command, [*path, name])


def test_the_command_line_is_as_it_was() -> None:
    assert surface() == GOLDEN.read_text()


if __name__ == "__main__":
    GOLDEN.write_text(surface())
