"""What an answer falls into: reasoning, tool calls, and what is said. vLLM's own parsers tell them apart.

    sampling.reasoning_parser, sampling.tool_call_parser ─► `open_parser` ─► `Parsed` ─► columns beside the answer's text

The texts are made, and parsed, where a generation's answers are read (`pipelines.advance.Reading`); what constrained decoding
must have kept is looked at before, as the answers come (`pipelines.structured`). See docs/decisions/0014.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from pipelines.settings import ModelSettings, PromptSettings, SamplingSettings

REASONING_FIELDS = (pa.field("reasoning", pa.string()), pa.field("reasoning_tokens", pa.int32()))
TOOL_CALLS_FIELD = pa.field(
    "tool_calls", pa.list_(pa.struct([("name", pa.string()), ("arguments", pa.string())]))
)

#: Answers in messages with channels, not in marked text.
GPT_OSS = "openai_gptoss"

#: By key of `sampling`: where the installed vLLM has the names of its parsers, below its own folder.
_REGISTRIES = {
    "reasoning_parser": ("reasoning/__init__.py", "_REASONING_PARSERS_TO_REGISTER"),
    "tool_call_parser": ("tool_parsers/__init__.py", "_TOOL_PARSERS_TO_REGISTER"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Parsed:
    """One answer, taken apart."""

    text: str
    """What is said besides; empty where an answer ended within its reasoning, or only calls tools."""
    reasoning: str | None = None
    reasoning_tokens: int | None = None
    """Tokens up to the end of the reasoning, its markers included; None where the parser does not tell."""
    tool_calls: list[dict[str, str]] | None = None
    """`name`, and `arguments` as JSON text; None where there is none."""


class AnswerParser(Protocol):
    """The parsers of one generation's answers."""

    keeps_special_tokens: bool
    """Whether they read the special tokens of a text, which then must not be skipped."""

    def answer(self, text: str, token_ids: list[int]) -> str:
        """What follows the reasoning, calls of tools included: what a constraint of `sampling` holds for."""

    def parse(self, text: str, token_ids: list[int]) -> Parsed:
        """What the parsers cannot read stays in the text. `token_ids`, in both: of the whole answer, its stop token included."""


def open_parser(
    model: ModelSettings, sampling: SamplingSettings, prompt: PromptSettings | None
) -> AnswerParser | None:
    """The parsers that `sampling` names; None where it names none. Imports vLLM: seconds of CPU, once in a process.

    Raises ModelError for parsers that are not there, or cannot work with the model's tokenizer.
    """
    if not sampling.is_parsed:
        return None
    from pipelines.vllm_parsers import VLLMParsers

    return VLLMParsers(model, sampling, prompt)


@dataclass(frozen=True)
class Said:
    """The answers of a generation as columns, null for failed ones."""

    text: pa.ChunkedArray
    beside: Mapping[str, pa.Array] = field(default_factory=dict)
    """By the names of `parser_fields`."""


#: (prompts, generations) → what each generation says; tables of `PROMPT_SCHEMA` and `GENERATION_SCHEMA`.
Says = Callable[[pa.Table, pa.Table], Said]


def parser_fields(sampling: SamplingSettings) -> tuple[pa.Field, ...]:
    """The columns that the parsers add beside the text, as they are called for the job's own answers."""
    reasoning = REASONING_FIELDS if sampling.reasoning_parser is not None else ()
    return (*reasoning, TOOL_CALLS_FIELD) if sampling.tool_call_parser is not None else reasoning


def parsed_columns(
    parser: AnswerParser, sampling: SamplingSettings, texts: pa.ChunkedArray, generations: pa.Table
) -> Said:
    """The texts taken apart. `texts`: of the generations, null where there is none."""
    answers = [
        None if text is None else parser.parse(text, token_ids)
        for text, token_ids in zip(texts.to_pylist(), generations["token_ids"].to_pylist(), strict=True)
    ]
    said = pa.chunked_array([pa.array([answer and answer.text for answer in answers], pa.string())])
    beside = {
        column.name: pa.array([answer and getattr(answer, column.name) for answer in answers], column.type)
        for column in parser_fields(sampling)
    }
    return Said(said, beside)


@lru_cache(maxsize=len(_REGISTRIES))
def known_parsers(key: str) -> tuple[str, ...] | None:
    """The parsers that the installed vLLM has for `sampling.<key>`; None where vLLM is not installed, or keeps them elsewhere.

    Read from the source with `ast`, as `engine_args` does: importing vLLM takes seconds.
    """
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return None
    file, registry = _REGISTRIES[key]
    source = Path(spec.submodule_search_locations[0]) / file
    if not source.is_file():
        return None
    for node in ast.parse(source.read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            if registry in names:
                keys = [key.value for key in node.value.keys if isinstance(key, ast.Constant)]
                return tuple(sorted(map(str, keys)))
    return None


def parser_problems(key: str, sampling: SamplingSettings, engine: Mapping[str, Any]) -> list[str]:
    """Parsers that vLLM does not have, one line each. `key` is where the sampling stands, `engine` the model's arguments."""
    problems = []
    if sampling.reasoning_parser == GPT_OSS and sampling.is_structured:
        problems.append(
            f"{key}.reasoning_parser: vLLM constrains {GPT_OSS} answers from their first token on, reasoning included; leave "
            "out output_schema and structured_outputs, or let a second generation bring the answer into form"
        )
    for name in _REGISTRIES:
        given, known = getattr(sampling, name), known_parsers(name)
        brought = name == "reasoning_parser" and "reasoning_parser_plugin" in engine
        if given is None or known is None or given in known or brought:
            continue
        near = difflib.get_close_matches(given.lower(), known, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]}? There are" if near else "there are"
        problems.append(f"{key}.{name}: vLLM has no parser {given!r}; {hint}: {', '.join(known)}")
    return problems
