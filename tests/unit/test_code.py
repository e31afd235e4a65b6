"""Code digests, and functions named by import path."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from pipelines.code import (
    _digest_of_folder,
    add_folders,
    check_code,
    code_digest,
    code_path,
    digest_of_package,
    load_function,
    user_folders,
)
from pipelines.errors import CodeMismatch, SpecError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder for user packages, and an import path that is put back."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    return str(tmp_path)


def write(folder: str, name: str, text: str) -> None:
    path = Path(folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_digest_is_of_contents_and_relative_names(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(str(tmp_path / name), "x.py", "1")
        write(str(tmp_path / name), "sub/y.py", "2")
    write(str(tmp_path / "b"), "__pycache__/x.py", "3")
    write(str(tmp_path / "b"), "notes.txt", "3")
    py = frozenset({".py"})
    first = _digest_of_folder(tmp_path / "a", py)
    assert first == _digest_of_folder(tmp_path / "b", py)
    (tmp_path / "b/sub/y.py").rename(tmp_path / "b/sub/z.py")
    assert first != _digest_of_folder(tmp_path / "b", py)


def test_own_code() -> None:
    assert Path(code_path(), "code.py").is_file()
    assert len(code_digest()) == 16
    check_code(code_digest(), "anywhere")
    with pytest.raises(CodeMismatch) as error:
        check_code("0123456789abcdef", "/driver/pipelines")
    assert code_path() in str(error.value)
    assert "/driver/pipelines" in str(error.value)


def test_a_function_of_a_package(folder: str) -> None:
    write(folder, "acme_a/__init__.py", "")
    write(folder, "acme_a/qa.py", "def build(row): return 'Q: ' + row['x']\n")
    assert load_function("acme_a.qa:build", [folder])({"x": "1"}) == "Q: 1"
    assert user_folders("acme_a.qa:build", [folder]) == (folder,)


def test_an_installed_package_needs_no_folder() -> None:
    assert user_folders("jinja2.utils:concat") == ()
    assert user_folders("json:dumps") == ()
    assert load_function("json:dumps") is json.dumps


def test_user_folders_come_last(folder: str) -> None:
    write(folder, "json.py", "dumps = None\n")
    add_folders([folder, folder])
    assert sys.path[-1] == folder
    assert sys.path.count(folder) == 1
    assert load_function("json:dumps", [folder]) is json.dumps


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("no_such_package_x.y:f", "no package or module 'no_such_package_x' to import"),
        ("acme_b.no:f", "importing acme_b.no failed: ModuleNotFoundError: No module named 'acme_b.no'"),
        ("acme_b.broken:f", "importing acme_b.broken failed: ZeroDivisionError: division by zero"),
        ("acme_b.syntax:f", "importing acme_b.syntax failed: SyntaxError"),
        ("acme_b.qa:biuld", "has no function 'biuld'; it has build"),
        ("acme_b.qa:NUMBER", "acme_b.qa:NUMBER is a int, not a function"),
        ("pipelines.prompt:f", "the package name 'pipelines' is Dray's own"),
        ("jobs.mine:f", "the package name 'jobs' is Dray's own"),
    ],
)
def test_functions_that_cannot_be_had(folder: str, reference: str, message: str) -> None:
    write(folder, "acme_b/__init__.py", "")
    write(folder, "acme_b/qa.py", "NUMBER = 3\ndef build(row): return ''\n")
    write(folder, "acme_b/broken.py", "1 / 0\n")
    write(folder, "acme_b/syntax.py", "def (\n")
    with pytest.raises(SpecError) as error:
        load_function(reference, [folder])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_digest_of_a_package_covers_its_code_and_prompt_files(folder: str) -> None:
    write(folder, "acme_c/__init__.py", "")
    write(folder, "acme_c/qa.py", "x = 1\n")
    digests = {digest_of_package("acme_c.qa", [folder])}
    for name in ("acme_c/other.py", "acme_c/prompts/system.txt", "acme_c/prompts/user.jinja"):
        write(folder, name, "new")
        digests.add(digest_of_package("acme_c.qa", [folder]))
    assert len(digests) == 4
    write(folder, "acme_c/notes.md", "new")
    assert digest_of_package("acme_c.qa", [folder]) in digests


def test_digest_of_a_single_module_and_of_a_namespace_package(folder: str) -> None:
    write(folder, "acme_single.py", "x = 1\n")
    single = digest_of_package("acme_single", [folder])
    write(folder, "unrelated.py", "x = 1\n")
    assert digest_of_package("acme_single", [folder]) == single
    write(folder, "acme_space/inner/qa.py", "x = 1\n")
    spaced = digest_of_package("acme_space.inner.qa", [folder])
    write(folder, "acme_space/inner/qa.py", "x = 2\n")
    assert digest_of_package("acme_space.inner.qa", [folder]) != spaced
