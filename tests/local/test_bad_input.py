"""What people get wrong, through the command line: exit code 2, one line that helps, no traceback, nothing started."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from jobs.cli import main

JOB = """\
name: bad-input
input:
  path: in
prompt:
  template: "{{ question }}"
model:
  source: model
  backend: simulated
output:
  path: out
"""

Dray = Callable[..., Result]


@pytest.fixture
def dray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dray:
    """Runs a command in a folder with a job file and three rows of input."""
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    Path("job.yaml").write_text(JOB)
    pq.write_table(pa.table({"question": ["a", "b", "c"], "lang": ["en"] * 3}), "in/x.parquet")

    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(main, list(arguments))

    return invoke


def refused(result: Result) -> list[str]:
    """The lines of a refusal, after checking that it is one."""
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.output
    assert not Path("out").exists()
    return result.stderr.removeprefix("error: ").splitlines()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sampling.temperatur=0", "override: sampling.temperatur: unknown key; did you mean 'temperature'?"),
        ("sampling.temperature=hot", "override: sampling.temperature: expected a number of at least 0, got 'hot'"),
        ("temperature=1", "override: temperature: unknown key; did you mean sampling.temperature?"),
        ("input.path=${env:NO_SUCH_VARIABLE}", "override: input.path: the environment variable NO_SUCH_VARIABLE is not set"),
        ("prompt.template={% if %}", "override: prompt.template: line 1 of the template: "),
        ("prompt.function=a.b:c", "prompt: give exactly one of template, messages_column, prompt_column, function"),
        ("input.filter=lang = 'en'", "override: input.filter: \"lang = 'en'\": not a condition"),
        ("output.path=in/out", "lies in input.path"),
        ("output.path=in", "is input.path"),
        ("model.engine.tokenizer=x", "override: model.engine.tokenizer: give it as `model.tokenizer`"),
        ("nonsense", "override: expected key=value"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["validate", "run"])
def test_mistakes_in_the_job(dray: Dray, command: str, override: str, message: str) -> None:
    (line,) = refused(dray(command, "job.yaml", override))[:1]
    assert message in line


def test_mistakes_name_file_and_line(dray: Dray) -> None:
    Path("base.yaml").write_text("sampling:\n  top_p: 2\n")
    Path("job.yaml").write_text(JOB + "extends: base.yaml\npool:\n  replica: 2\n")
    assert refused(dray("validate", "job.yaml")) == [
        "base.yaml:2: sampling.top_p: expected a number above 0 and at most 1, got 2",
        "job.yaml:13: pool.replica: unknown key; did you mean 'replicas'?",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "job.yaml: the file is empty"),
        ("a: [", "job.yaml:1:5: not valid YAML"),
        (JOB + "name: x\n", "job.yaml:11:1: the key 'name' is given twice, first in line 1"),
        (JOB.replace('"{{ question }}"', "{{ question }}"), "job.yaml:5:14: a key must be text; put text that begins with {{ in quotes"),
        ("extends: nowhere.yaml\n", "job.yaml:1: extends: no such file: nowhere.yaml"),
    ],
)  # fmt: skip
def test_job_files_that_cannot_be_read(dray: Dray, content: str, message: str) -> None:
    Path("job.yaml").write_text(content)
    (line,) = refused(dray("validate", "job.yaml"))
    assert line.startswith(message)


def test_no_such_job_file(dray: Dray) -> None:
    assert refused(dray("run", "jbo.yaml")) == ["jbo.yaml: no such job file; did you mean job.yaml?"]
    (line,) = refused(dray("status", "nowhere"))
    assert "nowhere" in line


@pytest.fixture
def model(dray: Dray) -> None:
    """A model folder that is enough for planning."""
    Path("model").mkdir()
    Path("model/config.json").write_text(
        json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"})
    )
    Path("model/tokenizer_config.json").write_text("{}")
    Path("model/tokenizer.json").write_text("{}")


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["input.path=nowhere"], "nowhere"),
        (["input.path=in/*.csv"], "in/*.csv"),
        (["prompt.template={{ qestion }}"], "'qestion'; did you mean 'question'?"),
        (["prompt.template=null", "prompt.prompt_column=questions"], "'questions'; did you mean 'question'?"),
        (["input.columns=[lng]"], "'lng'; did you mean 'lang'?"),
        (["input.filter=lnag == 'en'"], "did you mean 'lang'?"),
        (["input.filter=lang > 3"], "cannot be compared"),
        (["output.columns=[langs]"], "'langs'; did you mean 'lang'?"),
        (["output.rename={lang: run_id}"], "'lang' cannot become 'run_id', a result column"),
        (["output.rename={lang: question}"], "would both become 'question'"),
        (["prompt.template=null", "prompt.function=no_such_package_here.x:f"], "no package or module 'no_such_package_here'"),
    ],
)  # fmt: skip
def test_jobs_that_do_not_fit_their_input(dray: Dray, overrides: list[str], message: str) -> None:
    assert message in refused(dray("plan", "job.yaml", *overrides))[0]


@pytest.mark.usefixtures("model")
def test_input_columns_with_names_of_results(dray: Dray) -> None:
    pq.write_table(pa.table({"question": ["a"], "row_id": ["b"]}), "in/x.parquet")
    (line,) = refused(dray("plan", "job.yaml"))
    assert "output.rename.row_id=input_row_id" in line
    assert dray("plan", "job.yaml", "output.rename.row_id=input_row_id").exit_code == 0


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize("content", [b"", b"PAR1", b"not parquet at all" * 10])
def test_input_files_that_are_broken(dray: Dray, content: bytes) -> None:
    Path("in/x.parquet").write_bytes(content)
    assert "x.parquet" in refused(dray("plan", "job.yaml"))[0]


def test_a_model_that_is_not_there(dray: Dray) -> None:
    (line,) = refused(dray("plan", "job.yaml", "model.source=./nowhere"))
    assert "nowhere" in line


def test_errors_as_json(dray: Dray) -> None:
    result = dray("validate", "job.yaml", "foo=1", "--json")
    assert json.loads(result.stdout) == {
        "error": "SpecError",
        "exit_code": 2,
        "message": result.stderr.removeprefix("error: ").rstrip("\n"),
    }


def test_secrets_do_not_reach_messages(dray: Dray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    for override in (
        "sampling.temperature=${env:SECRET}",
        "input.storage_options=${env:SECRET}",
        "pool=${env:SECRET}",
    ):
        result = dray("validate", "job.yaml", override)
        assert result.exit_code == 2
        assert "hunter2" not in result.output
