"""The output's schema, frozen: users' readers depend on these names, types and their order."""

from __future__ import annotations

import pyarrow as pa

from pipelines.contracts import FORMAT_VERSION, result_schema
from pipelines.settings import OutputSettings, SamplingSettings, StructuredOutputs

EXPECTED = """\
doc: large_string
lang: string
row_id: string not null
sample_index: int32 not null
generated_text: string
finish_reason: string
prompt_tokens: int32
completion_tokens: int32
cached_tokens: int32
error_code: string
error_message: string
run_id: string not null"""


def test_the_result_schema_of_format_1() -> None:
    columns = pa.schema([pa.field("doc", pa.large_string(), nullable=False), pa.field("lang", pa.string())])
    assert FORMAT_VERSION == 1
    assert result_schema(columns, OutputSettings(path="x"), SamplingSettings()).to_string() == EXPECTED


def test_parsers_add_their_columns() -> None:
    sampling = SamplingSettings(
        reasoning_parser="qwen3", tool_call_parser="hermes", structured_outputs=StructuredOutputs(regex=".*")
    )
    schema = result_schema(pa.schema([]), OutputSettings(path="x"), sampling)
    assert (
        schema.to_string().split("run_id: string not null\n")[1]
        == """\
reasoning: string
reasoning_tokens: int32
tool_calls: list<item: struct<name: string, arguments: string>>
  child 0, item: struct<name: string, arguments: string>
      child 0, name: string
      child 1, arguments: string"""
    )


def test_log_probabilities_add_one_column() -> None:
    schema = result_schema(pa.schema([]), OutputSettings(path="x"), SamplingSettings(logprobs=2))
    assert schema.names[-1] == "logprobs"
    assert pa.types.is_list(schema.field("logprobs").type)
