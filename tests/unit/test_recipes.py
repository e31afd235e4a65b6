"""The recipes of `conf/recipes/`: each loads, and plans on the input that the commands in its head comment write."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from jobs import load
from jobs.preview import preview
from jobs.proposal import propose
from tests.local.runs import CONF, ROOT, TINY

RECIPES = sorted((CONF / "recipes").iterdir())
pytestmark = pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)


@cache
def head(recipe: Path) -> str:
    """The comment that a recipe begins with, without its `#`."""
    lines = recipe.read_text().splitlines()
    length = next(place for place, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[:length])


def commands(recipe: Path) -> list[list[str]]:
    """The commands of the head comment: its indented lines."""
    return [shlex.split(line) for line in re.findall(r"^    (\S.*)$", head(recipe), re.MULTILINE)]


def test_the_head_says_how_to_run_it_and_what_to_change(recipe: Path) -> None:
    assert recipe.suffix == ".yaml"
    assert "From the repository's root:" in head(recipe)
    assert "For your own: the model" in head(recipe)
    (*makers, last) = commands(recipe)
    assert last == ["dray", "run", f"conf/recipes/{recipe.name}"]
    for python, script, *_ in makers:
        assert python == "python"
        assert (ROOT / script).is_file()
    assert len(makers) == 1


@pytest.mark.slow  # a process, and the tokenizer's libraries
def test_it_plans_on_its_own_input_and_renders_its_prompts(recipe: Path, tmp_path: Path) -> None:
    for _, script, *arguments in commands(recipe)[:-1]:
        subprocess.run([sys.executable, ROOT / script, *arguments], cwd=tmp_path, check=True, timeout=60)
    job = load(recipe, [f"model.source={TINY}"], directory=tmp_path)
    assert (job.spec.name, Path(job.spec.output.path)) == (recipe.stem, tmp_path / "out" / recipe.stem)
    proposal = propose(job)
    assert proposal.summary["rows"] >= 100
    for row in preview(job, rows=5, generate=False):
        assert row["error_code"] is None
        # The tiny model has 512 tokens of context; another try after a cut answer gets twice the tokens.
        assert row["prompt_tokens"] + 2 * (job.spec.pools[0].sampling.max_tokens or 0) <= 512


def test_it_is_in_the_table(recipe: Path) -> None:
    assert f"conf/recipes/{recipe.name})" in (ROOT / "docs" / "recipes.md").read_text()
