"""Job files and overrides that nobody should write: each is a job, or refused in lines that name file or key."""

from __future__ import annotations

import math
import string
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from jobs import load
from jobs.cli import main
from jobs.spec import JobSpec
from tests.unit.fuzz import FACTOR, examples, refusal, within

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(0 if FACTOR > 1 else 300),
]  # `within` watches each example

GOOD: dict[str, Any] = {
    "name": "fuzz",
    "input": {"path": "in"},
    "prompt": {"template": "{{ doc }}"},
    "model": {"source": "m", "backend": "simulated"},
    "output": {"path": "out"},
}


def _keys() -> list[tuple[str, ...]]:
    """Every key that a job file may have, down to sections of sections."""
    found: list[tuple[str, ...]] = []

    def walk(model: Any, above: tuple[str, ...]) -> None:
        for name, field in model.model_fields.items():
            found.append((*above, name))
            if hasattr(field.annotation, "model_fields"):
                walk(field.annotation, (*above, name))

    walk(JobSpec, ())
    return [*found, ("extends",)]


KEYS = _keys()
WORDS = [
    "",
    "auto",
    "all",
    "s3://b/x",
    "${env:HOME}",
    "${env:NOT_SET_9}",
    "${run.date}",
    "$${x}",
    "{{ doc }}",
    "a == 'b",
    "\x00",
]
texts = st.sampled_from(WORDS) | st.text(max_size=12)
numbers = (
    st.integers()
    | st.sampled_from([0, -1, 2**31, 2**63, 2**64, 10**30, 10**400, 10**4000])
    | st.floats()
    | st.sampled_from([math.inf, math.nan, -0.0, 1e308, 5e-324])
)
scalars = st.none() | st.booleans() | numbers | texts
names = st.sampled_from([part for key in KEYS for part in key]) | texts
values = st.recursive(
    scalars,
    lambda below: st.lists(below, max_size=4) | st.dictionaries(names, below, max_size=4),
    max_leaves=8,
)


def placed(tree: dict[str, Any], key: tuple[str, ...], value: Any) -> dict[str, Any]:
    """`tree` with `value` at `key`."""
    head, *rest = key
    inside = tree.get(head)
    below = inside if isinstance(inside, dict) else {}
    return {**tree, head: placed(below, tuple(rest), value) if rest else value}


@examples(120)
@given(st.lists(st.tuples(st.sampled_from(KEYS), values), min_size=1, max_size=3))
def test_any_value_under_any_key(changes: list[tuple[tuple[str, ...], Any]]) -> None:
    tree = GOOD
    for key, value in changes:
        tree = placed(tree, key, value)
    refusal(lambda: load(tree, environ={"HOME": "/h"}), "job")


@examples(40)
@given(values)
def test_any_tree(tree: Any) -> None:
    if isinstance(tree, dict):
        refusal(lambda: load(tree, environ={}), "job")


PIECES = [
    "name: x", "input: {path: in}", "input:\n  path: [a, b]", "prompt: {template: '{{ doc }}'}", "model: {source: m}",
    "output: {path: out}", "a: &a [*a]", "a: &a {b: *a}", "<<: *a", "<<: {name: y}", "<<: [1]", "<<: 1", "? [1, 2]\n: x",
    "? {a: b}\n: c", "!!python/object/apply:os.system ['true']", "name: !!python/name:os.system", "name: !secret x",
    "input: !!set {path}", "input: !!omap [path: a]", "name: !!binary aGk=", "name: !!binary '%'", "name: !!timestamp 2001-01-01",
    "name: !!timestamp x", "name: !!int abc", "name: !!float abc", "name: !!bool maybe", "name: !!null x", "sampling: {n: 0x}",
    "sampling: {n: 0o9}", "sampling: {n: 1_0}", "sampling: {n: 1__}", "sampling: {seed: -0x10}", "sampling: {n: 9" + "9" * 5000 + "}",
    "sampling: {temperature: 1e999999}", "sampling: {temperature: .nan}", "\tname: tab", "name: 'unterminated", "name: \"\\q\"",
    "name: |\n  text\n", "name: >-2\n", "---", "...", "--- a\n--- b", "%YAML 9.9", "%TAG ! x:", "# comment", "", "- a", "name: [", "name: {",
    "name: x", "null: x", "1: x", "true: x", "~: x", "'': x", "name:: x", "prompt: {template: {{ doc }}}", "\x00", "\ufeffname: x", "\x85",
    "name: \u2028x", "extends: nowhere.yaml", "extends: [.]", "extends: {a: b}", "extends: [1]", "extends: job.yaml", "extends: ''",
    "l: &l [x, x, x, x, x, x, x, x, x]\nm: &m [*l, *l, *l, *l, *l, *l, *l, *l]\nn: &n [*m, *m, *m, *m, *m, *m, *m]\n"
    "o: &o [*n, *n, *n, *n, *n, *n]\np: [*o, *o, *o, *o, *o, *o, *o, *o]",
    "model: " + "{engine: " * 3000, "name: " + "[" * 3000,
]  # fmt: skip


@examples(80)
@given(st.lists(st.sampled_from(PIECES) | st.text(string.printable, max_size=20), max_size=6))
def test_any_yaml(tmp_path: Path, pieces: list[str]) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("\n".join(pieces))
    refusal(lambda: load(path, environ={}), "job.yaml")


@pytest.mark.parametrize("piece", dict.fromkeys(PIECES), ids=range(len(set(PIECES))))
def test_each_piece_alone(tmp_path: Path, piece: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(piece)
    assert refusal(lambda: load(path, environ={}), "job.yaml")


@examples(30)
@given(st.binary(max_size=60))
def test_any_bytes(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(data)
    refusal(lambda: load(path, environ={}), "job.yaml")


dotted = st.sampled_from([".".join(key) for key in KEYS]) | texts
assigned = values.map(lambda value: yaml.safe_dump(value, default_flow_style=True).strip()) | texts
overrides = st.builds("{}={}".format, dotted, assigned) | st.sampled_from(PIECES) | texts


@examples(100)
@given(st.lists(overrides, min_size=1, max_size=3))
def test_any_override(given_: list[str]) -> None:
    refusal(lambda: load(GOOD, given_, environ={}), "job", "override")


@examples(20)
@given(tree=values, changes=st.lists(overrides, max_size=2))
def test_the_command_line_says_it_in_one_go(tmp_path: Path, tree: Any, changes: list[str]) -> None:
    """Exit code 0 or 2, the error on stderr, and nothing that looks like a bug of ours."""
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump({**GOOD, **tree} if isinstance(tree, dict) else tree, allow_unicode=True))
    done = within(lambda: CliRunner().invoke(main, ["validate", "--", str(path), *changes]))
    assert done.exit_code in (0, 2), done.output
    assert "Traceback" not in done.output
    assert "unexpected" not in done.stderr
    if done.exit_code:
        assert done.stderr


@pytest.mark.parametrize("given_", [10**4000, "a\nb", ["\x85"], {"a": "x" * 2000}], ids=range(4))
def test_extends_is_refused_in_one_short_line(given_: Any) -> None:
    text = refusal(lambda: load({**GOOD, "extends": given_}, environ={}), "job: extends")
    assert text is not None
    assert "\n" not in text
