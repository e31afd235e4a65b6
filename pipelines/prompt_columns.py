"""Which columns a prompt cannot do without, and which types they must have; no data is read for it."""

from __future__ import annotations

import pyarrow as pa

from pipelines.arrow_types import is_list, is_text_or_null
from pipelines.settings import PromptSettings, SamplingSettings
from pipelines.template import GLOBALS, Template


def templates(prompt: PromptSettings, key: str = "prompt") -> list[tuple[str, str]]:
    """(key, source) of the templates; `key` is where the prompt stands in the job file."""
    given = {f"{key}.template": prompt.template, f"{key}.system": prompt.system}
    return [(name, source) for name, source in given.items() if source is not None]


def prompt_columns(
    prompt: PromptSettings, sampling: SamplingSettings | None = None, key: str = "prompt"
) -> list[tuple[str, str]]:
    """(key, column) for each column that the prompt and its sampling cannot do without. Raises SpecError."""
    found = []
    for name, source in templates(prompt, key):
        template = Template(source, name)
        needed = template.columns - template.optional - GLOBALS - {"row_id"}
        found += [(name, column) for column in sorted(needed)]
    columns = {
        f"{key}.messages_column": prompt.messages_column,
        f"{key}.prompt_column": prompt.prompt_column,
        f"{key}.images_column": prompt.images_column,
    }
    if sampling is not None:
        columns["sampling.max_tokens_column"] = sampling.max_tokens_column
        columns["sampling.params_column"] = sampling.params_column
    return found + [(name, column) for name, column in columns.items() if column is not None]


def prompt_type_problems(prompt: PromptSettings, schema: pa.Schema, key: str = "prompt") -> list[str]:
    """Columns that hold other values than a prompt is made of."""
    problems = []
    name = prompt.prompt_column
    if name in schema.names and not is_text_or_null(schema.field(name).type):
        problems.append(f"{key}.prompt_column: {name!r} holds {schema.field(name).type} values, not text")
    name = prompt.messages_column
    if name in schema.names:
        type_ = schema.field(name).type
        if not is_text_or_null(type_) and not _is_messages(type_):
            problems.append(
                f"{key}.messages_column: {name!r} holds {type_} values, not a list of role and content or JSON text"
            )
    name = prompt.images_column
    if name in schema.names and not _is_images(schema.field(name).type):
        problems.append(
            f"{key}.images_column: {name!r} holds {schema.field(name).type} values, not images: bytes, "
            "{bytes, path}, URLs or paths, or lists of them"
        )
    return problems


def _is_images(type_: pa.DataType) -> bool:
    if is_list(type_):
        type_ = type_.value_type
    if pa.types.is_struct(type_):
        return bool(type_.get_field_index("bytes") >= 0 or type_.get_field_index("path") >= 0)
    is_binary = pa.types.is_binary(type_) or pa.types.is_large_binary(type_) or pa.types.is_binary_view(type_)
    return bool(is_binary or is_text_or_null(type_))


def _is_messages(type_: pa.DataType) -> bool:
    if not is_list(type_) or not pa.types.is_struct(type_.value_type):
        return False
    return all(type_.value_type.get_field_index(name) >= 0 for name in ("role", "content"))
