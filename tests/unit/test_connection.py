"""When Ray may start beside planning: never where the working directory, which changes meanwhile, is part of the job."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from jobs.connection import _directory_matters, _finished
from jobs.loading import load
from jobs.spec import JobSpec


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variable but PATH, in a folder with one file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.environ", {"PATH": "/usr/bin:/bin"})
    (tmp_path / "ca.pem").write_text("")


def spec(**overrides: Any) -> JobSpec:
    tree = {
        "name": "early",
        "input": {"path": "in"},
        "prompt": {"template": "{{ q }}"},
        "model": {"source": "acme/m"},
        "output": {"path": "out"},
    }
    return load({**tree, **overrides}).spec


def test_most_jobs_do_not_depend_on_it() -> None:
    assert not _directory_matters(spec())


def test_a_prompt_function_may_lie_there() -> None:
    assert _directory_matters(spec(prompt={"function": "mine.qa:build"}))


@pytest.mark.parametrize(
    ("value", "matters"),
    [("ca.pem", True), ("/x:ca.pem", True), ("none.pem", False), ("/ca.pem", False), ("", False)],
)
def test_a_variable_may_name_a_file_there(monkeypatch: pytest.MonkeyPatch, value: str, matters: bool) -> None:
    job = spec()
    monkeypatch.setitem(os.environ, "AWS_CA_BUNDLE", value)
    assert _directory_matters(job) is matters


def test_a_storage_option_may_too() -> None:
    options = {"client_kwargs": {"verify": "ca.pem"}}
    assert _directory_matters(spec(input={"path": "s3://b/in", "storage_options": options}))


def test_a_finished_output_starts_no_ray(tmp_path: Path) -> None:
    job = spec()
    assert not _finished(job)
    (tmp_path / "out" / "data").mkdir(parents=True)
    (tmp_path / "out" / "data" / "_SUCCESS").write_text("")
    assert _finished(job)
