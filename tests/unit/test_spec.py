"""What a job may be: sections that contradict each other, and columns that the input does not have."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pydantic import BaseModel, ValidationError

from jobs.places import overlap
from jobs.spec import JobSpec
from jobs.spec_columns import check_against_schema, needed_columns
from pipelines.errors import SpecError
from pipelines.settings import PromptSettings

TEXT, NUMBER = pa.string(), pa.int64()
MESSAGES = pa.list_(pa.struct([("role", TEXT), ("content", TEXT)]))


def spec(**sections: Any) -> JobSpec:
    base: dict[str, Any] = {
        "name": "test",
        "input": {"path": "/in"},
        "prompt": {"template": "{{ doc }}"},
        "model": {"source": "m"},
        "output": {"path": "/out"},
    }
    return JobSpec.model_validate({name: {**base.get(name, {}), **value} for name, value in {**base, **sections}.items()
                                   if isinstance(value, dict)} | {"name": "test"})  # fmt: skip


def problem(**sections: Any) -> str:
    with pytest.raises(ValidationError) as error:
        spec(**sections)
    return "\n".join(found["msg"] for found in error.value.errors())


def against(schema: dict[str, pa.DataType], **sections: Any) -> list[str]:
    with pytest.raises(SpecError) as error:
        check_against_schema(spec(**sections), pa.schema(list(schema.items())))
    return str(error.value).splitlines()


def sections(model: type[BaseModel]) -> list[type[BaseModel]]:
    """A model and the models of its fields."""
    inner = [
        field.annotation
        for field in model.model_fields.values()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    ]
    return [model, *(found for each in inner for found in sections(each))]


def test_every_key_is_described() -> None:
    bare = [
        f"{model.__name__}.{name}"
        for model in sections(JobSpec)
        for name, field in model.model_fields.items()
        if not field.description
    ]
    assert bare == []


def test_specs_are_frozen() -> None:
    with pytest.raises(ValidationError):
        spec().sampling.n = 3


@pytest.mark.parametrize(
    ("name", "good"),
    [
        ("a", True),
        ("My-job_2.x", True),
        ("", False),
        ("a b", False),
        ("../x", False),
        (".x", False),
        ("x" * 101, False),
    ],
)
def test_names(name: str, good: bool) -> None:
    data = {**spec().model_dump(), "name": name}
    if good:
        assert JobSpec.model_validate(data).name == name
    else:
        with pytest.raises(ValidationError):
            JobSpec.model_validate(data)


@pytest.mark.parametrize(
    ("address", "good"),
    [
        ("local", True),
        ("auto", True),
        ("head:6379", True),
        ("ray://head.cluster:10001", True),
        ("[::1]:6379", True),
        ("head", False),
        ("http://head:8265", False),
        ("", False),
    ],
)
def test_addresses(address: str, good: bool) -> None:
    if good:
        assert spec(cluster={"address": address}).cluster.address == address
    else:
        assert "expected local, auto, host:port" in problem(cluster={"address": address})


# ── Output against input ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("source", "target", "how"),
    [
        ("/d/in", "/d/in", "is"),
        ("/d/in/", "/d//in", "is"),
        ("/d/in", "file:///d/in", "is"),
        ("/d/in", "/d/in/out", "lies in"),
        ("/d/in", "/d/in2", ""),
        ("/d/in/../out", "/d/out", "is"),
        ("/", "/d", "lies in"),
        ("s3://b", "s3://b/out", "lies in"),
        ("s3://b/p/", "s3a://b/p", "is"),
        ("s3://b/p", "s3://c/p", ""),
        ("s3://b/p", "gs://b/p", ""),
        ("/b/p", "s3://b/p", ""),
        ("/d/out/data", "/d/out", "holds"),
        ("/d/out/data/part-1.parquet", "/d/out", "holds"),
        ("/d/out/.dray", "/d/out", "holds"),
        ("/d/out/raw", "/d/out", ""),
        ("/d/out/database", "/d/out", ""),
        ("/d/*.parquet", "/d/out", ""),
        ("/d/*", "/d/out", "is matched by"),
        ("/d/**/*.parquet", "/d/out", "is matched by"),
        ("/d/**", "/d/out", "is matched by"),
        ("/d/*/data/*.parquet", "/d/out", "is matched by"),
        ("/d/*/raw/*.parquet", "/d/out", ""),
        ("/d/ou[st]", "/d/out", "is matched by"),
        ("/d/ou[!t]", "/d/out", ""),
        ("/d/in?", "/d/out", ""),
        ("s3://b/*/x.parquet", "s3://b/out", ""),
        ("s3://b/*", "s3://b/out", "is matched by"),
    ],
)
def test_overlap(source: str, target: str, how: str) -> None:
    assert overlap(input_path=source, output_path=target) == how


def test_overlap_follows_links(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    os.symlink(tmp_path / "real", tmp_path / "link")
    assert overlap(input_path=str(tmp_path / "real"), output_path=str(tmp_path / "link" / "out")) == "lies in"


def test_output_in_one_of_several_inputs() -> None:
    message = problem(input={"path": ["s3://b/x", "s3://b/out/"]}, output={"path": "s3://b/out"})
    assert "output.path: s3://b/out is input.path s3://b/out/" in message
    assert spec(input={"path": ["s3://b/x"]}, output={"path": "s3://b/out"})


# ── Columns ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ({"rename": {"a": "x", "b": "x"}}, "'a' and 'b' would both become 'x'"),
        ({"columns": ["a", "x"], "rename": {"a": "x"}}, "'a' and 'x' would both become 'x'"),
        ({"rename": {"a": "run_id"}}, "'a' cannot become 'run_id', a result column"),
        ({"columns": ["generated_text"]}, "for example output.rename.generated_text=input_generated_text"),
        ({"columns": ["a"], "rename": {"b": "c"}}, "'b' is not among output.columns (a)"),
        ({"columns": ["a", "a"]}, "names 'a' more than once"),
    ],
)
def test_output_columns(output: dict[str, Any], message: str) -> None:
    assert message in problem(output=output)


def test_output_columns_must_be_read() -> None:
    read = {"columns": ["a", "b"], "id_column": "key"}
    assert "'c' is not among the columns that are read (a, b, doc, key)" in problem(
        input=read, output={"columns": ["c"]}
    )
    assert "'c' is not among the columns that are read" in problem(input=read, output={"rename": {"c": "d"}})
    assert spec(input=read, output={"columns": ["key", "doc"]})


def test_logprobs_are_a_result_column_only_when_asked_for() -> None:
    output = {"columns": ["logprobs"]}
    assert spec(output=output)
    assert "'logprobs'" in problem(output=output, sampling={"logprobs": 1})


def test_templates_and_filters_are_compiled() -> None:
    message = problem(prompt={"template": "a\n{% if %}", "system": "{{"}, input={"filter": "a ="})
    assert "prompt.template: line 2 of the template" in message
    assert "prompt.system: line 1 of the template" in message
    assert "input.filter" in message


def test_needed_columns() -> None:
    made = spec(
        prompt={
            "template": "{{ doc }} {{ row_id }} {{ range(3) }} {{ x | default('') }}",
            "system": "{{ lang }}",
        },
        input={"filter": "score > 1", "id_column": "key"},
    )
    assert needed_columns(made) == {"doc", "lang", "score", "key"}
    function = spec(prompt={"template": None, "function": "a.b:c"})
    assert needed_columns(function) == frozenset()


# ── Against the schema ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_fitting_schema_passes() -> None:
    check_against_schema(spec(), pa.schema([("doc", TEXT)]))
    check_against_schema(
        spec(prompt={"template": "{{ doc }} {{ x | d('') }} {% if y is defined %}{{ y }}{% endif %}"}),
        pa.schema([("doc", TEXT)]),
    )


def test_missing_columns_name_the_key_and_the_nearest() -> None:
    lines = against(
        {"doc": TEXT, "language": TEXT},
        prompt={"template": "{{ docs }}", "system": "{{ lnaguage }}"},
        input={"columns": ["dco"], "id_column": "idd", "filter": "lang == 'en'"},
        output={"rename": {"docs": "text"}},
    )
    assert lines[:5] == [
        "input.columns: unknown column 'dco'; did you mean 'doc'?",
        "input.id_column: unknown column 'idd'; there are: doc, language",
        "prompt.template: unknown column 'docs'; did you mean 'doc'?",
        "prompt.system: unknown column 'lnaguage'; did you mean 'language'?",
        "output.rename: unknown column 'docs'; did you mean 'doc'?",
    ]
    assert lines[5].startswith(
        "input.filter \"lang == 'en'\": unknown column 'lang'; did you mean 'language'?"
    )
    assert len(lines) == 6


@pytest.mark.parametrize(
    ("prompt", "type_", "message"),
    [
        ({"prompt_column": "x"}, NUMBER, "prompt.prompt_column: 'x' holds int64 values, not text"),
        ({"prompt_column": "x"}, pa.dictionary(pa.int32(), TEXT), None),
        ({"prompt_column": "x"}, pa.large_string(), None),
        ({"messages_column": "x"}, MESSAGES, None),
        ({"messages_column": "x"}, TEXT, None),
        ({"messages_column": "x"}, pa.list_(TEXT), "not a list of role and content or JSON text"),
        ({"messages_column": "x"}, pa.binary(), "not a list of role and content or JSON text"),
    ],
)
def test_column_types(prompt: dict[str, str], type_: pa.DataType, message: str | None) -> None:
    given = {"template": None, **prompt}
    if message:
        assert message in against({"x": type_}, prompt=given)[0]
    else:
        check_against_schema(spec(prompt=given), pa.schema([("x", type_)]))


def test_the_column_of_max_tokens_is_read_and_holds_whole_numbers() -> None:
    sampling = {"max_tokens_column": "n"}
    assert "n" in needed_columns(spec(sampling=sampling))
    assert against({"doc": TEXT, "n": pa.float64()}, sampling=sampling) == [
        "sampling.max_tokens_column: 'n' holds double values, not whole numbers"
    ]
    assert "unknown column 'n'" in against({"doc": TEXT, "m": NUMBER}, sampling=sampling)[0]
    check_against_schema(spec(sampling=sampling), pa.schema([("doc", TEXT), ("n", NUMBER)]))


@pytest.mark.parametrize(
    ("type_", "message"),
    [
        (TEXT, None),
        (pa.dictionary(pa.int32(), TEXT), None),
        (pa.struct([("temperature", pa.float64()), ("stop", pa.list_(TEXT))]), None),
        (NUMBER, "'p' holds int64 values, not structs or JSON text of temperature, top_p, "),
        (pa.map_(TEXT, TEXT), "'p' holds map<string, string> values, not structs or JSON text of temp"),
        (
            pa.struct([("n", NUMBER), ("top_p", pa.float64()), ("logprobs", NUMBER)]),
            "'p' has 'n', 'logprobs', which no row may set; it may have temperature, top_p, ",
        ),
    ],
)
def test_the_column_of_parameters_is_read_and_holds_no_other_keys(
    type_: pa.DataType, message: str | None
) -> None:
    sampling = {"params_column": "p"}
    assert "p" in needed_columns(spec(sampling=sampling))
    assert "unknown column 'p'" in against({"doc": TEXT}, sampling=sampling)[0]
    if message is None:
        check_against_schema(spec(sampling=sampling), pa.schema([("doc", TEXT), ("p", type_)]))
    else:
        [problem_] = against({"doc": TEXT, "p": type_}, sampling=sampling)
        assert problem_.startswith(f"sampling.params_column: {message}")
        assert problem_.endswith("repetition_penalty")


def test_input_columns_with_names_of_results() -> None:
    schema = {"doc": TEXT, "row_id": TEXT, "error_code": TEXT}
    assert [line.split(";")[0] for line in against(schema)] == [
        "output.rename: the input column 'row_id' has the name of a result column",
        "output.rename: the input column 'error_code' has the name of a result column",
    ]
    fields = pa.schema(list(schema.items()))
    check_against_schema(spec(output={"columns": ["doc"]}), fields)
    check_against_schema(spec(input={"columns": ["doc"]}), fields)
    check_against_schema(spec(output={"rename": {"row_id": "a", "error_code": "b"}}), fields)
    assert against(schema, output={"rename": {"row_id": "doc", "error_code": "b"}}) == [
        "output.rename: 'doc' and 'row_id' would both become 'doc'"
    ]


# ── Sections ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "found none of them"),
        ({"template": ""}, "found none of them"),
        ({"template": "x", "prompt_column": "y"}, "found template and prompt_column"),
        ({"template": "x", "system": "y", "chat": False}, "remove `chat: false`"),
        ({"function": "no-module"}, "should match pattern"),
    ],
)
def test_prompt_sections(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PromptSettings.model_validate(given)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"temperature": 0, "n": 2}, "n equal answers"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens 9 is above max_tokens 8"),
        ({"max_tokens": 2**31}, "less than or equal to 2147483647"),
        ({"min_tokens": 2**30 + 1, "max_tokens": None}, "less than or equal to 1073741824"),
        ({"top_k": 2**31}, "less than or equal to 2147483647"),
        ({"stop_token_ids": [1, 2**31]}, "less than or equal to 2147483647"),
        (
            {"params_column": "p", "max_tokens_column": "n"},
            "give max_tokens_column or params_column, not both",
        ),
    ],
)
def test_sampling_sections(sampling: dict[str, Any], message: str) -> None:
    assert message in problem(sampling=sampling)
