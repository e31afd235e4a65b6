"""Job files: merging, overrides, references, provenance, and that every mistake is one useful line."""

from __future__ import annotations

from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from jobs.loading import LoadedJob, load
from pipelines.errors import SpecError

ROOT = Path(__file__).parents[2]

JOB = """\
name: test
input: {path: in/}
prompt:
  template: "{{ question }}"
model: {source: org/model}
output: {path: out/}
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, text: str) -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def refused(*args: Any, **options: Any) -> str:
    with pytest.raises(SpecError) as error:
        load(*args, **options)
    return str(error.value)


def job(extra: str = "", *overrides: str, **options: Any) -> LoadedJob:
    return load(write("job.yaml", JOB + extra), overrides, **options)


def mistakes(extra: str = "", *overrides: str, **options: Any) -> str:
    return refused(write("job.yaml", JOB + extra), overrides, **options)


@pytest.mark.parametrize("path", sorted((ROOT / "conf/jobs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_job_file_of_the_repository_is_valid(path: Path) -> None:
    loaded = load(path, directory=ROOT)
    assert loaded.spec.name == path.stem
    assert len(loaded.files) > 1


def test_base_states_the_defaults() -> None:
    plain = load({"name": "x", "input": {"path": "i"}, "prompt": {"template": "t"}, "model": {"source": "m"},
                  "output": {"path": "o"}})  # fmt: skip
    based = load({**plain.raw, "extends": str(ROOT / "conf/base.yaml")})
    assert based.spec == plain.spec


# ── Merging ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_later_files_win_and_the_job_itself_last() -> None:
    write("conf/base.yaml", "sampling: {temperature: 0.1, top_p: 0.5, stop: [a, b]}\npool: {replicas: 2}\n")
    write("conf/model.yaml", "sampling: {temperature: 0.2, stop: [c]}\n")
    path = write(
        "conf/jobs/job.yaml", JOB + "extends: [../base.yaml, ../model.yaml]\nsampling: {temperature: 0.3}\n"
    )
    spec = load(path).spec
    assert (spec.sampling.temperature, spec.sampling.top_p, spec.sampling.stop) == (0.3, 0.5, ["c"])
    assert spec.pool.replicas == 2


def test_extends_is_relative_to_its_file_and_recursive() -> None:
    write("a/base.yaml", "extends: deeper/root.yaml\nshards: {rows: 7}\n")
    write("a/deeper/root.yaml", "shards: {rows: 1}\nerrors: {max_attempts: 9}\n")
    loaded = load(write("b/job.yaml", JOB + "extends: ../a/base.yaml\n"))
    assert loaded.spec.shards.rows == 7
    assert loaded.spec.errors.max_attempts == 9
    assert [path.name for path in loaded.files] == ["root.yaml", "base.yaml", "job.yaml"]


def test_a_diamond_is_no_circle() -> None:
    write("root.yaml", "shards: {rows: 1}\n")
    write("a.yaml", "extends: root.yaml\n")
    write("b.yaml", "extends: root.yaml\n")
    assert job("extends: [a.yaml, b.yaml]\n").spec.shards.rows == 1


def test_extends_in_a_circle_names_the_circle() -> None:
    write("a.yaml", "extends: b.yaml\n")
    write("b.yaml", "extends: a.yaml\n")
    assert refused("a.yaml") == "a.yaml: extends goes round in a circle: a.yaml → b.yaml → a.yaml"


def test_extends_without_file_names_the_nearest() -> None:
    write("base.yaml", "{}\n")
    assert mistakes("extends: bas.yaml\n") == (
        "job.yaml:7: extends: no such file: bas.yaml; did you mean base.yaml?"
    )


def test_null_means_null_where_the_key_knows_it_and_else_takes_away() -> None:
    write(
        "base.yaml",
        "sampling: {max_tokens: 5, temperature: 0.5}\nmodel: {engine: {dtype: half, max_num_seqs: 1}}\n",
    )
    spec = job(
        "extends: base.yaml\nsampling: {max_tokens: null, temperature: null}\n", "model.engine.dtype=null"
    ).spec
    assert spec.sampling.max_tokens is None
    assert spec.sampling.temperature == 1.0
    assert spec.model.engine == {"max_num_seqs": 1}


def test_null_deep_inside_an_engine_argument_stays() -> None:
    spec = job("", "model.engine={hf_overrides: {sliding_window: null}}").spec
    assert spec.model.engine == {"hf_overrides": {"sliding_window": None}}


def test_yaml_scalars_are_those_of_yaml_1_2() -> None:
    spec = job("sampling: {stop: [no, 12:30, 2026-01-01], temperature: 1e-3, max_tokens: 1_000}\n").spec
    assert spec.sampling.stop == ["no", "12:30", "2026-01-01"]
    assert (spec.sampling.temperature, spec.sampling.max_tokens) == (0.001, 1000)


def test_merge_keys_and_anchors() -> None:
    extra = "shards: &s {rows: 3}\nerrors: {<<: {max_attempts: 5, max_error_rate: 0.5}, max_attempts: 6}\n"
    spec = job(extra).spec
    assert (spec.errors.max_attempts, spec.errors.max_error_rate) == (6, 0.5)


# ── Overrides ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("sampling.temperature=0", "sampling.temperature", 0.0),
        ("sampling.stop=[x, y]", "sampling.stop", ["x", "y"]),
        ("sampling.stop=x", "sampling.stop", "x"),
        ("sampling.max_tokens=null", "sampling.max_tokens", None),
        ("prompt.template=Say: {{ x }}", "prompt.template", "Say: {{ x }}"),
        ("prompt.template={{ x }} = y", "prompt.template", "{{ x }} = y"),
        ("prompt.template={% if x %}{{ x }}{% endif %}", "prompt.template", "{% if x %}{{ x }}{% endif %}"),
        (r'prompt.template="a\nb"', "prompt.template", "a\nb"),
        ("model.revision=007", "model.revision", "007"),
        ("name=2026", "name", "2026"),
        ("pool.replicas={min: 1, max: 3}", "pool.replicas.max", 3),
        ("pool.replicas=2", "pool.replicas", 2),
        ("model.engine.max_model_len=4096", "model.engine", {"max_model_len": 4096}),
        ("input.path=[s3://b/a, s3://b/c]", "input.path", ["s3://b/a", "s3://b/c"]),
    ],
)
def test_overrides(override: str, key: str, value: object) -> None:
    found: Any = job("", override).spec
    for name in key.split("."):
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)


def test_overrides_as_a_mapping_and_the_last_one_wins() -> None:
    path = write("job.yaml", JOB)
    assert load(path, {"sampling.n": 3}).spec.sampling.n == 3
    assert load(path, ["sampling.n=3", "sampling.n=4"]).spec.sampling.n == 4


@pytest.mark.parametrize("override", ["sampling.n", "=3", "sampling..n=3", ""])
def test_an_override_must_be_key_and_value(override: str) -> None:
    assert mistakes("", override).startswith("override: ")


# ── References ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_environment_and_run_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUCKET", "s3://b")
    monkeypatch.setenv("EMPTY", "")
    spec = job(
        "sampling: {max_tokens: '${env:TOKENS:-7}', stop: ['${env:EMPTY:-x}', 'a${env:EMPTY}']}\n",
        "input.path=${env:BUCKET}/${run.date}/",
        variables={"date": "2026-11-01"},
    ).spec
    assert spec.input.path == "s3://b/2026-11-01/"
    assert spec.sampling.max_tokens == 7
    assert spec.sampling.stop == ["x", "a"]


def test_run_variables_have_defaults_and_take_others() -> None:
    extra = "sampling: {stop: ['${run.date}', '${run.shop}', '${run.none:-no}']}\n"
    stop = job(extra, variables={"run.shop": "north"}).spec.sampling.stop
    assert stop == [datetime.now(UTC).date().isoformat(), "north", "no"]


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("costs $5 or $x, {{ a }} {$b}", "costs $5 or $x, {{ a }} {$b}"),
        ("$${env:HOME} and $$", "${env:HOME} and $$"),
        ("${ and ${env:", "${ and ${env:"),
        ("{{ '${run.date}' }}", "{{ 'D' }}"),
    ],
)
def test_dollars_and_braces(written: str, read: str) -> None:
    loaded = load(write("job.yaml", JOB), {"prompt.template": written}, {"date": "D"})
    assert loaded.spec.prompt.template == read


def test_a_reference_inside_a_value_is_not_read_again() -> None:
    loaded = load(
        write("job.yaml", JOB), {"prompt.template": "${env:A}"}, environ={"A": "${env:B} ${run.date} $${x}"}
    )
    assert loaded.spec.prompt.template == "${env:B} ${run.date} $${x}"


def test_engine_arguments_from_the_environment_are_numbers() -> None:
    overrides = {
        "model.engine": {
            "tensor_parallel_size": "${env:TP}",
            "dtype": "${env:DTYPE}",
            "served_model_name": "a${env:TP}",
        }
    }
    loaded = load(write("job.yaml", JOB), overrides, environ={"TP": "2", "DTYPE": "half"})
    assert loaded.spec.model.engine == {"tensor_parallel_size": 2, "dtype": "half", "served_model_name": "a2"}


def test_a_missing_variable_names_variable_key_and_line() -> None:
    message = mistakes("sampling:\n  stop: ${env:STOPP}\n", environ={"STOP": "x"})
    assert message == (
        "job.yaml:8: sampling.stop: the environment variable STOPP is not set (there is STOP); "
        "set it, or give a default: ${env:STOPP:-…}"
    )
    assert "job.yaml:7: shards.rows: the run variable ${run.rows} has no value" in mistakes(
        "shards: {rows: '${run.rows}'}\n"
    )


def test_an_unknown_reference_is_refused_with_the_way_out() -> None:
    assert "unknown reference ${HOME}" in mistakes("", "input.path=${HOME}/x")
    assert "write $${HOME}" in mistakes("", "input.path=${HOME}/x")


# ── What is stored ───────────────────────────────────────────────────────────────────────────────────────────────

SECRETS = {
    "name": "x",
    "input": {
        "path": "https://user:hunter2@host/in/",
        "storage_options": {
            "key": "hunter2",
            "secret": "${env:SECRET}",
            "token": "${env:TOKEN:-hunter2}",
            "endpoint_url": "http://user:hunter2@localhost:9000",
            "profile": "me",
            "anon": False,
            "client_kwargs": {"aws_secret_access_key": "hunter2", "region_name": "eu"},
            "headers": [{"Authorization": "Bearer hunter2"}],
            "password": 12345678,
        },
    },
    "prompt": {"template": "the secret token: {{ key }}"},
    "model": {"source": "m", "engine": {"hf_token": "hunter2", "max_num_batched_tokens": 8}},
    "output": {"path": "o"},
}


def test_secrets_are_not_stored_nor_shown() -> None:
    loaded = load(SECRETS, environ={"SECRET": "hunter2"})
    options = loaded.raw["input"]["storage_options"]
    assert options == {
        "key": "***",
        "secret": "${env:SECRET}",
        "token": "${env:TOKEN}",
        "endpoint_url": "http://***@localhost:9000",
        "profile": "me",
        "anon": False,
        "client_kwargs": {"aws_secret_access_key": "***", "region_name": "eu"},
        "headers": [{"Authorization": "***"}],
        "password": "***",
    }
    assert loaded.raw["model"]["engine"] == {"hf_token": "***", "max_num_batched_tokens": 8}
    assert loaded.raw["prompt"] == SECRETS["prompt"]
    assert "hunter2" not in str(loaded.raw)
    assert loaded.spec.input.storage_options["secret"] == "hunter2"
    assert "secret" not in repr(loaded.spec.input)


def test_a_stored_job_loads_again_from_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    first = job("", "prompt.template=$${a} {{ x }} ${run.date}", variables={"date": "1"})
    write("elsewhere/x", "")
    monkeypatch.chdir("elsewhere")
    assert load(first.raw, variables=first.variables).spec == first.spec


def test_a_masked_secret_must_be_given_again() -> None:
    stored = load(SECRETS, environ={"SECRET": "s"}).raw
    assert "input.storage_options.key: a secret that was not stored" in refused(
        stored, environ={"SECRET": "s", "TOKEN": "t"}
    )


def test_a_value_from_the_environment_is_not_shown_in_messages() -> None:
    message = mistakes("", "sampling.temperature=${env:T}", environ={"T": "hunter2"})
    assert message.endswith("expected a number of at least 0, got the value of ${env:T}")


# ── Paths ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_data_paths_are_relative_to_the_working_directory(tmp_path: Path) -> None:
    Path("models/tiny").mkdir(parents=True)
    path = write("conf/deep/job.yaml", JOB)
    spec = load(path, ["input.path=[in/*.parquet, s3://b/x, /abs]", "model.source=models/tiny"]).spec
    assert spec.input.path == [f"{tmp_path}/in/*.parquet", "s3://b/x", "/abs"]
    assert spec.output.path == f"{tmp_path}/out"
    assert spec.model.source == f"{tmp_path}/models/tiny"
    assert load(path).spec.model.source == "org/model"  # a hub id: there is no such folder


# ── Mistakes ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("sampling:\n  temperatur: 0\n", "job.yaml:8: sampling.temperatur: unknown key; did you mean 'temperature'?"),
        ("temperature: 0\n", "job.yaml:7: temperature: unknown key; did you mean sampling.temperature?"),
        ("sampling: {temperature: hot}\n", "job.yaml:7: sampling.temperature: expected a number of at least 0, got 'hot'"),
        ("sampling: {n: true}\n", "job.yaml:7: sampling.n: expected a whole number above 0, got true"),
        ("sampling: {top_p: .nan}\n", "job.yaml:7: sampling.top_p: expected a number above 0 and at most 1, got nan"),
        ("sampling: {temperature: .inf}\n", "job.yaml:7: sampling.temperature: expected a number of at least 0, got inf"),
        ("errors: {max_error_rate: 5}\n", "job.yaml:7: errors.max_error_rate: expected a number from 0 to 1, got 5"),
        ("sampling: {stop: [1]}\n", "job.yaml:7: sampling.stop: expected text, a list of text or null, got [1]"),
        ("sampling: 3\n", "job.yaml:7: sampling: expected a mapping of temperature, top_p, top_k, min_p, max_tokens, max_tokens_column …, got 3"),
        ("pool: {device: gpus}\n", "job.yaml:7: pool.device: expected auto, gpu or cpu, got 'gpus'; did you mean 'gpu'?"),
        ("pool: {replicas: x}\n", "job.yaml:7: pool.replicas: expected a whole number above 0, auto or a mapping of min, max, got 'x'"),
        ("pool: {replicas: {min: x, max: 1}}\n", "job.yaml:7: pool.replicas.min: expected a whole number above 0, got 'x'"),
        ("pool: {replicas: {min: 4, max: 2}}\n", "job.yaml:7: pool.replicas: min 4 is above max 2"),
        ("pool: {admission: {high: 4, low: 8}}\n", "job.yaml:7: pool.admission: low 8 is above high 4"),
        ("cluster: {address: 'http://x'}\n", "job.yaml:7: cluster.address: expected local, auto, host:port or ray://host:port, got 'http://x'"),
        ("cluster: {address: auto, num_cpus: 2}\n", "job.yaml:7: cluster: num_cpus: only for address: local; a running cluster has its own"),
        ("a: [\n", "job.yaml:8:1: not valid YAML: expected the node content, but found '<stream end>'"),
        ("a: {{ x }}\n", "job.yaml:7:5: a key must be text; put text that begins with {{ in quotes"),
        ("a: b: {{ c }}\n", "job.yaml:7:5: not valid YAML: mapping values are not allowed here; put text with {{ }} in quotes"),
        ("a: b: c\n", "job.yaml:7:5: not valid YAML: mapping values are not allowed here; put text with a colon in quotes"),
        ("\ta: 1\n", "job.yaml:7:1: not valid YAML: found character '\\t' that cannot start any token; YAML is indented with spaces, not tabs"),
        ("name: again\n", "job.yaml:7:1: the key 'name' is given twice, first in line 1"),
        ("sampling: {stop: x, n: 1, stop: y}\n", "job.yaml:7:27: the key 'stop' is given twice, first in line 7"),
        ("1: x\n", "job.yaml:7:1: the key 1 must be text; put it in quotes"),
        ("a: !!python/object:os.system {}\n", "job.yaml:7:4: the tag tag:yaml.org,2002:python/object:os.system is not allowed"),
        ("a: &a [*a]\n", "job.yaml:7:4: an alias that repeats itself without end"),
        ("extends: [1]\n", "job.yaml:7: extends: expected a path or a list of paths, got [1]"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(extra: str, message: str) -> None:
    assert mistakes(extra) == message


def test_engine_arguments_are_checked_with_their_line() -> None:
    lines = mistakes("", "model.engine={max_modl_len: 3, tokenizer: x}").splitlines()
    assert lines[-1] == "override: model.engine.tokenizer: give it as `model.tokenizer`"
    if find_spec("vllm"):
        assert lines[0].startswith(
            "override: model.engine.max_modl_len: vLLM has no engine argument of this name"
        )


def test_a_mistake_in_an_inherited_file_names_that_file() -> None:
    write("base.yaml", "# comment\n\nsampling:\n  top_p: 3\n  top_k: x\n")
    lines = mistakes("extends: base.yaml\nsampling:\n  top_k: y\n").splitlines()
    assert lines == [
        "base.yaml:4: sampling.top_p: expected a number above 0 and at most 1, got 3",
        "job.yaml:9: sampling.top_k: expected a whole number from -1 to 2147483647, got 'y'",
    ]


def test_a_missing_key_names_its_section() -> None:
    path = write("job.yaml", "name: x\ninput:\n  format: csv\nprompt: {template: t}\nmodel: {source: m}\n")
    assert refused(path).splitlines() == [
        "job.yaml:2: input.path: missing; expected text or a list of text "
        "(a file, folder, glob or list of them; a local path or any fsspec URL)",
        "job.yaml: output: missing; expected a mapping of path, columns, rename, compression, failed_rows, "
        "storage_options … (where and how the dataset is written)",
    ]


def test_many_mistakes_are_capped() -> None:
    lines = mistakes("sampling: {" + ", ".join(f"key{i}: 1" for i in range(15)) + "}\n").splitlines()
    assert len(lines) == 11
    assert lines[-1] == "… and 5 more"


def test_a_mistake_in_an_override_names_no_file() -> None:
    assert mistakes("", "foo.bar=1").startswith("override: foo: unknown key; known are name, input, ")
    assert mistakes("sampling: {n: 1}\n", "sampling.foo=1").startswith("override: sampling.foo: unknown key")
    elastic = "pool: {replicas: {min: 1, max: 2}}\n"
    assert mistakes(elastic, "pool.replicas={min: x}").startswith("override: pool.replicas.min: ")
    assert mistakes(elastic, "pool.replicas={min: 3}").startswith(
        "override: pool.replicas: min 3 is above max 2"
    )


def test_text_for_numbers_says_quotes() -> None:
    assert mistakes("", "prompt=null", "prompt={prompt_column: 3}").endswith("got 3; put it in quotes")


@pytest.mark.parametrize(
    "content", [b"", b"# nothing\n", b"- a\n- b\n", b"text", b"\xff\xfe\x00", b"a: \x01"]
)
def test_what_is_no_job_file(content: bytes) -> None:
    Path("job.yaml").write_bytes(content)
    message = refused("job.yaml")
    assert message.startswith("job.yaml")
    assert "\n" not in message


def test_no_such_file_and_a_folder() -> None:
    write("jobs.yaml", JOB)
    assert refused("job.yaml") == "job.yaml: no such job file; did you mean jobs.yaml?"
    Path("folder.yaml").mkdir()
    assert refused("folder.yaml") == "folder.yaml: is a folder, not a job file"


def test_aliases_cannot_blow_up() -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
    )
    assert "repeats itself" in mistakes(bomb)


def test_where() -> None:
    loaded = job("sampling:\n  n: 2\n", "shards.rows=3")
    assert loaded.where("sampling.n") == "job.yaml:8"
    assert loaded.where("shards.rows") == "override"
    assert loaded.where("errors.max_attempts") == "job.yaml"
