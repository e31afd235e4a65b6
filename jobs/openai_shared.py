"""What the requests of an OpenAI batch file can only have in common, as sections of a job file.

n, response_format, structured_outputs, guided_… ─► `sampling_of`
tools, tool_choice, chat_template_kwargs, reasoning_effort ─► `prompt_of`
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from jobs.openai_body import EMBEDDINGS, Refused, mistakes_by_key
from jobs.openai_json import is_text, read_json, shown
from pipelines.ask_settings import EmbedStep
from pipelines.chat_options import CHAT_OPTIONS
from pipelines.output_schema import schema_problem
from pipelines.settings import PromptSettings, SamplingSettings, Settings


def problems_of(shared: Mapping[str, Any], endpoint: str) -> list[tuple[str, str]]:
    """What is wrong with it, as of `read_body`."""
    try:
        if endpoint == EMBEDDINGS:
            if "encoding_format" in shared and shared["encoding_format"] != "base64":
                raise Refused("encoding_format", f"{shown(shared['encoding_format'])}: give float or base64")
            _check(EmbedStep, {"column": "x", "prompt": {"prompt_column": "x"}}, shared, ("dimensions",))
            return []
        sampling = sampling_of(shared)
        _check(SamplingSettings, {}, sampling, ("n", "skip_special_tokens", "structured_outputs"))
        if "output_schema" in sampling and (problem := schema_problem(sampling["output_schema"])):
            raise Refused(next(iter(_constraints(shared))), problem)
        if "tool_choice" in shared and shared["tool_choice"] != "none":
            raise Refused(
                "tool_choice",
                f"{shown(shared['tool_choice'])}: only auto and none are supported; to force a form on answers use response_format",
            )
        prompt = prompt_of(shared)
        if not isinstance(prompt.get("chat_template_kwargs", {}), dict):
            raise Refused(
                "chat_template_kwargs", f"expected an object, got {shown(shared['chat_template_kwargs'])}"
            )
        for name in sorted(CHAT_OPTIONS & prompt.get("chat_template_kwargs", {}).keys()):
            raise Refused(
                f"chat_template_kwargs.{name}",
                "no variable of the model's chat template, but says how that is applied; take it out of the line",
            )
        _check(PromptSettings, {"messages_column": "x"}, prompt, ("tools",))
    except Refused as refused:
        return [refused.args]
    return []


def _check(
    settings: type[Settings], base: Mapping[str, Any], given: Mapping[str, Any], keys: tuple[str, ...]
) -> None:
    try:
        settings.model_validate({**base, **{key: given[key] for key in keys if key in given}}, strict=True)
    except ValidationError as error:
        raise Refused(*mistakes_by_key(error, given)[0]) from None


def sampling_of(shared: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of the job's `sampling`. Raises for more than one constraint, and for what is none."""
    plain = {key: shared[key] for key in ("n", "skip_special_tokens") if key in shared}
    found = _constraints(shared)
    if len(found) > 1:
        raise Refused(" and ".join(found), "an answer has one form: give one of them")
    return plain | next(iter(found.values()), {})


def _constraints(shared: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Key of the body → what it is in the job's `sampling`."""
    found: dict[str, dict[str, Any]] = {}
    if "response_format" in shared:
        found["response_format"] = _response_format(shared["response_format"])
    if "structured_outputs" in shared:
        asked = shared["structured_outputs"]
        given = {k: v for k, v in asked.items() if v not in (None, False)} if isinstance(asked, dict) else {}
        if len(given) != 1 or not given.keys() <= {"json", "json_object", "regex", "choice", "grammar"}:
            raise Refused(
                "structured_outputs",
                f"expected one of json, json_object, regex, choice, grammar; got {shown(asked)}",
            )
        found["structured_outputs"] = _constraint(*next(iter(given.items())), "structured_outputs")
    for kind in ("json", "regex", "choice", "grammar"):
        if f"guided_{kind}" in shared:
            found[f"guided_{kind}"] = _constraint(kind, shared[f"guided_{kind}"], f"guided_{kind}")
    return found


def _response_format(given: Any) -> dict[str, Any]:
    kind = given.get("type") if isinstance(given, dict) else None
    if kind == "json_object":
        return _constraint("json_object", True, "response_format")
    if kind == "json_schema":
        asked = given.get("json_schema")
        return _constraint(
            "json",
            asked.get("schema") if isinstance(asked, dict) else asked,
            "response_format.json_schema.schema",
        )
    raise Refused("response_format", f"{shown(given)}: its type must be text, json_schema or json_object")


def _constraint(kind: str, value: Any, key: str) -> dict[str, Any]:
    if kind == "json_object":
        return {"output_schema": {"type": "object"}}
    if kind != "json":
        return {"structured_outputs": {kind: value}}
    try:
        schema = read_json(value) if isinstance(value, str) else value
    except ValueError:
        schema = None
    if not isinstance(schema, dict) or not is_text(schema):
        raise Refused(key, f"expected a JSON Schema, got {shown(value)}")
    return {"output_schema": schema}


def prompt_of(shared: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of the job's `prompt`. With `tool_choice: none` the model is shown no tools, so that it calls none."""
    tools = {"tools": shared["tools"]} if "tools" in shared and shared.get("tool_choice") != "none" else {}
    variables = shared.get("chat_template_kwargs", {})
    if "reasoning_effort" in shared and isinstance(variables, dict):
        # As vLLM's server hands it to templates, of which some ask for `enable_thinking` instead.
        effort = shared["reasoning_effort"]
        variables = {"enable_thinking": effort != "none", **variables, "reasoning_effort": effort}
    return tools | ({"chat_template_kwargs": variables} if variables else {})
