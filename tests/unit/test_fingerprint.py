"""The fingerprint: what belongs to it, what does not, and how differences are told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from jobs.fingerprint import digest_of_model, explain_difference, fingerprint, identity, steps_of
from jobs.loading import load
from pipelines.errors import ModelError

JOB: dict[str, Any] = {
    "name": "x",
    "input": {"path": "in", "columns": ["a", "b"]},
    "prompt": {"template": "{{ a }}"},
    "model": {
        "source": "org/model",
        "engine": {"dtype": "half", "max_num_seqs": 8, "hf_overrides": {"x": 1}},
    },
    "sampling": {"temperature": 0.5},
    "output": {"path": "out"},
}


def of(*overrides: str, folders: tuple[str, ...] = (), **options: Any) -> dict[str, Any]:
    return identity(load(JOB, overrides, **options), folders)


def test_it_is_pinned() -> None:
    # A change here disowns every output that exists: only with a new FORMAT_VERSION.
    assert fingerprint(of()) == "a5a8ec6bea0c48bf"


@pytest.mark.parametrize(
    "override",
    [
        "name=y",
        "input.path=elsewhere",
        "input.on_changed=replace",
        "input.storage_options.key=k",
        "output.path=elsewhere",
        "output.compression=gzip",
        "output.storage_options.key=k",
        "pool.replicas=9",
        "shards.rows=5",
        "errors.max_attempts=9",
        "cluster.num_cpus=2",
        "model.engine.max_num_seqs=9",
        "model.engine.gpu_memory_utilization=0.5",
        "model.engine.tensor_parallel_size=2",
        "model.engine.compilation_config={level: 3}",
        "model.engine.hf_token=secret",
        "sampling.top_p=1.0",
        "sampling.temperature=5e-1",
        "reuse.equal_prompts=greedy",
        "reuse.equal_prompts=none",
    ],
)
def test_what_does_not_change_it(override: str) -> None:
    assert fingerprint(of(override)) == fingerprint(of())


@pytest.mark.parametrize(
    "override",
    [
        "input.columns=[b, a]",
        "input.filter=a == 'x'",
        "input.id_column=b",
        "input.format=csv",
        "prompt.template={{ a }} ",
        "prompt.system=s",
        "prompt.chat=false",
        "prompt.chat=true",
        "prompt.chat_template_kwargs.x=1",
        "prompt.tools=[{type: function, function: {name: f}}]",
        "model.source=org/other",
        "model.revision=abc",
        "model.tokenizer=org/other",
        "model.backend=simulated",
        "model.engine.dtype=float32",
        "model.engine.max_model_len=9",
        "model.engine.quantization=fp8",
        "model.engine.hf_overrides.x=2",
        "sampling.temperature=0.6",
        "sampling.seed=0",
        "sampling.stop=x",
        "sampling.logprobs=0",
        "sampling.reasoning_parser=qwen3",
        "sampling.tool_call_parser=hermes",
        "sampling.max_tokens=null",
        "sampling.max_tokens_column=n",
        "sampling.params_column=p",
        "output.columns=[a]",
        "output.rename.a=c",
        "output.failed_rows=separate",
        "reuse.equal_prompts=all",
    ],
)
def test_what_changes_it(override: str) -> None:
    new = of(override)
    assert fingerprint(new) != fingerprint(of())
    told = explain_difference(of(), new)
    assert any(line.startswith(override.partition("=")[0]) for line in told), told


def test_the_order_in_which_a_tools_keys_stand_counts_since_the_prompt_has_it() -> None:
    tool = {"name": "f", "description": "d"}
    one, other = (
        of(f"prompt.tools={json.dumps([{'type': 'function', 'function': function}])}")
        for function in (tool, dict(reversed(tool.items())))
    )
    assert fingerprint(one) != fingerprint(other)


@pytest.mark.parametrize(
    "step",
    [
        {"parse": {"json": {"b": "int64", "a": "string"}}},
        {"parse": {"xml": {"b": "int64", "a": "string"}}},
        {"gather": {"columns": {"all_b": "question", "all_a": "generated_text"}}},
    ],
)
def test_the_order_of_the_columns_that_a_step_adds_counts_since_parts_have_it(step: dict[str, Any]) -> None:
    ((kind, settings),) = step.items()
    ((key, columns),) = settings.items()
    other = {kind: {key: dict(reversed(columns.items()))}}
    found = [of(f"steps={json.dumps([one])}") for one in (step, other)]
    assert fingerprint(found[0]) != fingerprint(found[1])
    for identity_, given in zip(found, (step, other), strict=True):
        (read,) = steps_of(json.loads(json.dumps(identity_, sort_keys=True)))
        assert list(read.model_dump(by_alias=True)[kind][key]) == list(given[kind][key])


def test_the_order_of_what_a_map_adds_counts_too() -> None:
    columns = {"b": "int64", "a": "string"}
    steps = [
        [{"map": {"function": "tests.unit.test_fingerprint:of", "adds": added}}]
        for added in (columns, dict(reversed(columns.items())))
    ]
    one, other = (fingerprint(of(f"steps={json.dumps(step)}")) for step in steps)
    assert one != other


def test_simulated_answers_count_and_their_speed_does_not() -> None:
    base = of("model.backend=simulated")
    assert fingerprint(of("model.backend=simulated", "model.simulated.start_s=3")) == fingerprint(base)
    for content in ("min_tokens=3", "prefix=<think>so</think>"):
        assert fingerprint(of("model.backend=simulated", f"model.simulated.{content}")) != fingerprint(base)


def test_run_variables_count_as_written_and_environment_variables_by_value() -> None:
    daily = ["prompt.template={{ a }} ${run.date} ${env:X}", "sampling.seed=${run.seed}"]
    monday = of(*daily, variables={"date": "1", "seed": "1"}, environ={"X": "hunter2"})
    tuesday = of(*daily, variables={"date": "2", "seed": "2"}, environ={"X": "hunter2"})
    other = of(*daily, variables={"date": "1", "seed": "1"}, environ={"X": "other"})
    assert fingerprint(monday) == fingerprint(tuesday)
    assert fingerprint(monday) != fingerprint(other)
    assert "hunter2" not in str(monday)
    assert explain_difference(monday, other)[0].startswith(
        "prompt.template: {{ a }} ${run.date} ${env:X} (content "
    )


def test_the_way_a_value_was_given_does_not_count() -> None:
    given = of("sampling.stop=${env:X}", environ={"X": "end"})
    assert fingerprint(given) == fingerprint(of("sampling.stop=${env:Y}", environ={"Y": "end"}))


def test_differences_are_told() -> None:
    old = of("prompt.template=" + "long " * 40 + "one")
    new = of("prompt.template=" + "long " * 40 + "two", "sampling.temperature=0.7", "sampling.seed=1")
    assert explain_difference(old, new) == [
        'prompt.template: …long long long long one" → …long long long long two"',
        "sampling.seed: nothing → 1",
        "sampling.temperature: 0.5 → 0.7",
    ]
    assert explain_difference(old, old) == []


def test_user_code_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "fingerprinted_prompts"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "qa.py").write_text("def build(row): return 'a'\n")
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    override = ("prompt.template=null", "prompt.function=fingerprinted_prompts.qa:build")
    before = of(*override, folders=(str(tmp_path),))
    (package / "other.py").write_text("x = 1\n")
    after = of(*override, folders=(str(tmp_path),))
    assert [line.partition(":")[0] for line in explain_difference(before, after)] == ["prompt.function code"]


# ── Local models ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("x")
    (folder / "model.safetensors").write_bytes(b"w" * 1000)
    (folder / "train.py").write_text("pass")
    (folder / "README.md").write_text("hello")
    return folder


def test_a_copy_of_a_model_is_the_same_model(model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "elsewhere" / "copy", copy_function=shutil.copyfile)
    assert digest_of_model(copy) == digest_of_model(model)
    a, b = (identity(load(JOB, {"model.source": str(folder)})) for folder in (model, copy))
    assert fingerprint(a) == fingerprint(b)
    assert explain_difference(a, b) == []


@pytest.mark.parametrize("name", ["config.json", "chat_template.jinja", "model.safetensors"])
def test_a_models_files_count(model: Path, name: str) -> None:
    before = digest_of_model(model)
    content = (model / name).read_bytes()
    (model / name).write_bytes(content[:-1] + b"!")
    assert digest_of_model(model) != before


def test_what_is_no_part_of_the_model_does_not_count(model: Path) -> None:
    before = digest_of_model(model)
    (model / "train.py").write_text("changed")
    (model / "README.md").write_text("changed")
    (model / ".cache").mkdir()
    assert digest_of_model(model) == before
    assert digest_of_model(model, code=True) != before


@pytest.mark.parametrize("place", [10, 35 << 20, (70 << 20) - 10])
def test_large_weights_count_by_samples(model: Path, place: int) -> None:
    weights = model / "model.safetensors"
    with weights.open("wb") as file:
        file.truncate(70 << 20)
    before = digest_of_model(model)
    with weights.open("r+b") as file:
        file.seek(place)
        file.write(b"!")
    assert digest_of_model(model) != before


def test_a_model_folder_that_is_not_there() -> None:
    with pytest.raises(ModelError, match="there is no folder /nowhere/model"):
        of("model.source=/nowhere/model")
