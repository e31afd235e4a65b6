"""What one request of an OpenAI batch file asks: its prompt, the sampling of its own, and what only the whole job can have.

    body ─► `read_body` ─► Asked(prompt, own, shared); for `shared` see `jobs.openai_shared`

Nothing is dropped silently: a key is mapped, has no influence on the answer, holds the value that says nothing, or is refused by name.

Sources: https://platform.openai.com/docs/api-reference (chat, completions, embeddings); of vLLM 0.32
`entrypoints/openai/chat_completion/protocol.py` and `completion/protocol.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pydantic import ValidationError

from jobs.openai_json import are_equal, is_text, read_json, shown
from pipelines.errors import SpecError
from pipelines.settings import ROW_PARAMS, SamplingSettings

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
#: Endpoint → what its bodies call the prompt; the column of the job's input has the same name.
ENDPOINTS = {CHAT: "messages", COMPLETIONS: "prompt", EMBEDDINGS: "input"}

#: Most tokens of an answer whose line gives no limit, unless the job file gives one: OpenAI's.
LIMITS: dict[str, int | None] = {CHAT: None, COMPLETIONS: 16, EMBEDDINGS: None}

_GENERATED = (
    "n",
    "skip_special_tokens",
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
)
#: What only the job can have.
SHARED = {
    CHAT: (*_GENERATED, "tools", "tool_choice", "chat_template_kwargs", "reasoning_effort"),
    COMPLETIONS: _GENERATED,
    EMBEDDINGS: ("dimensions", "encoding_format"),
}
#: Keys that change no answer: whose request it is, how it is paid for, hurried, cached or sent.
IGNORED = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "stream_options",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "priority",
        "request_id",
        "session_id",
        "cache_salt",
        "stream_interval",
    }
)
#: Values that say nothing, being the default of OpenAI or vLLM; any other one of these keys is refused.
_NEUTRAL: dict[str, Any] = {
    "stream": False,
    "logit_bias": {},
    "best_of": 1,
    "echo": False,
    "use_beam_search": False,
    "length_penalty": 1.0,
    "spaces_between_special_tokens": True,
    "return_token_ids": False,
    "return_tokens_as_token_ids": False,
}
NEUTRAL: dict[str, dict[str, Any]] = {
    CHAT: {
        **_NEUTRAL,
        "logprobs": False,
        "top_logprobs": 0,
        "modalities": ["text"],
        "parallel_tool_calls": True,
        "verbosity": "medium",
        "add_generation_prompt": True,
        "continue_final_message": False,
        "add_special_tokens": False,
        "include_reasoning": True,
        "n": 1,
        "skip_special_tokens": True,
        "response_format": {"type": "text"},
        "tools": [],
        "tool_choice": "auto",
        "chat_template_kwargs": {},
    },
    COMPLETIONS: {
        **_NEUTRAL,
        "suffix": "",
        "add_special_tokens": True,
        "n": 1,
        "skip_special_tokens": True,
        "response_format": {"type": "text"},
    },
    EMBEDDINGS: {"encoding_format": "float", "add_special_tokens": True},
}
_WAYS_OUT = {
    "stream": "a batch has no stream",
    "functions": "give them as tools",
    "function_call": "give tools and tool_choice",
    "modalities": "answers are text",
    "audio": "answers are text",
    "parallel_tool_calls": "an answer holds the calls that the model makes",
}


@dataclass(frozen=True, kw_only=True)
class LineMistake:
    """One thing that is wrong with a batch file."""

    line: int | None
    """From 1; None where it is about the file as a whole."""
    custom_id: str | None
    key: str
    """`body.temperature`, `custom_id`; empty where it is about the line as a whole."""
    text: str
    """What was given, and the way out."""


class BatchMistakes(SpecError):
    """What is wrong with a batch file, one line each and ten at most; `mistakes` has them as data."""

    def __init__(self, source: str, mistakes: tuple[LineMistake, ...], more: int = 0) -> None:
        lines = []
        for one in mistakes:
            who = "" if one.custom_id is None else f" (custom_id {shown(one.custom_id)})"
            about = f" {one.key}:" if one.key else ""
            place = source if one.line is None else f"{source}:{one.line}"
            lines.append(f"{place}{who}:{about} {one.text}")
        super().__init__("\n".join(lines + ([f"… and {more} more"] if more else [])))
        self.mistakes = mistakes


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What one body asks."""

    prompt: str
    """The messages as JSON text, or the text."""
    own: dict[str, Any]
    """Of `ROW_PARAMS`, what is given, as `SamplingSettings` has it."""
    shared: dict[str, Any]
    """Of `SHARED`, what is given and no default, as it is written."""


class Refused(Exception):
    """`args`: key of the body, what is wrong."""


def read_body(body: Mapping[str, Any], endpoint: str, limit: int | None) -> Asked | list[tuple[str, str]]:
    """What a body asks, or what is wrong with it: (key of the body, what was given and the way out).

    `limit`: the most tokens of an answer where the body says none; None: as many as there is room for, or not known. What is
    `shared` is looked at by `openai_shared.problems_of`, once for all lines. A null is a key that is not given.
    """
    given = {key: value for key, value in body.items() if value is not None}
    neutral, name = NEUTRAL[endpoint], ENDPOINTS[endpoint]
    problems: list[tuple[str, str]] = []
    own: dict[str, Any] = {}
    shared: dict[str, Any] = {}
    for key, value in given.items():
        if key in (name, "model") or key in IGNORED or (key in neutral and _same(value, neutral[key])):
            continue
        if key in SHARED[endpoint]:
            shared[key] = value
        elif endpoint != EMBEDDINGS and key in ROW_PARAMS:
            own[key] = value
        elif endpoint == CHAT and key == "max_completion_tokens":
            if not are_equal(given.get("max_tokens", value), value):
                problems.append(
                    (key, f"{shown(value)}, and max_tokens is {shown(given['max_tokens'])}: give one")
                )
            own["max_tokens"] = value
        else:
            way = _WAYS_OUT.get(key, "it would change the answer, and Dray has nothing for it")
            problems.append((key, f"{shown(value)} is not supported ({way}); take it out of the line"))
    try:
        prompt = _PROMPTS[endpoint](given.get(name))
    except Refused as refused:
        prompt = ""
        problems.append(refused.args)
    seed = own.pop("seed", None)
    if own:
        own, wrong = _sampled(json.dumps(own, sort_keys=True), json.dumps(shared.get("n", 1)))
        problems += wrong
        if not wrong and limit is not None and "max_tokens" not in own and own.get("min_tokens", 0) > limit:
            why = f"above the {limit} tokens that an answer has where its line gives no max_tokens; give one"
            problems.append(("min_tokens", f"{own['min_tokens']}: {why}"))
    if seed is not None:
        if not isinstance(seed, int) or isinstance(seed, bool):
            problems.append(("seed", f"{shown(seed)}: expected a whole number"))
        own = {**own, "seed": seed}
    return problems or Asked(prompt=prompt, own=own, shared=shared)


def _same(value: Any, neutral: Any) -> bool:
    """Equal, and not as 0 equals false."""
    return bool(value == neutral) and isinstance(value, bool) == isinstance(neutral, bool)


@lru_cache(4096)
def _sampled(text: str, n: str) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The parameters as `SamplingSettings` has them: numbers of one type, stop strings as a list; empty lists left out.

    Both are JSON. Most lines have what another one has, and a check takes 8 µs. A seed, which they may all have for
    themselves, is not among them.
    """
    own, samples = json.loads(text), json.loads(n)
    if isinstance(own.get("stop"), str):
        own["stop"] = [own["stop"]]
    own = {key: value for key, value in own.items() if value != []}
    more = {"n": samples} if isinstance(samples, int) else {}
    try:
        settings = SamplingSettings.model_validate({"max_tokens": None, **own, **more}, strict=True)
    except ValidationError as error:
        return own, mistakes_by_key(error, own)
    return {key: getattr(settings, key) for key in own}, []


def mistakes_by_key(error: ValidationError, given: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pydantic's mistakes, one for each key."""
    told: dict[str, str] = {}
    for found in error.errors():
        key = str(found["loc"][0]) if found["loc"] else ""
        what = f"{shown(given[key])}: " if key in given else ""
        told.setdefault(key, what + found["msg"].removeprefix("Value error, "))
    return list(told.items())


# ── Prompts ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _messages(messages: Any) -> str:
    if not isinstance(messages, list) or not messages:
        raise Refused("messages", f"expected a list of messages, got {shown(messages)}")
    return json.dumps(
        [_message(place, message) for place, message in enumerate(messages)], ensure_ascii=False
    )


def _message(place: int, message: Any) -> dict[str, Any]:
    key = f"messages[{place}]"
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise Refused(key, f"expected an object with role and content, got {shown(message)}")
    content = message.get("content")
    for number, part in enumerate(content if isinstance(content, list) else ()):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "image_url"):
            raise Refused(
                f"{key}.content[{number}]", f"{shown(part)}: only parts of type text and image_url are taken"
            )
    if content is not None and not isinstance(content, str | list):
        raise Refused(f"{key}.content", f"expected text or a list of parts, got {shown(content)}")
    if not isinstance(message.get("tool_calls"), list):
        return message
    return {**message, "tool_calls": [_call(call) for call in message["tool_calls"]]}


def _call(call: Any) -> Any:
    """A call's arguments as an object, which chat templates expect; vLLM's server does the same. What is no JSON, or no such
    JSON as a line may have, stays."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = read_json(function["arguments"] or "{}")
    except ValueError:
        return call
    if not isinstance(arguments, dict) or not is_text(arguments):
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def _text(name: str, value: Any) -> str:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, str):
        raise Refused(name, f"expected one text, got {shown(value)}; give each text a line of its own")
    return value


_PROMPTS: dict[str, Callable[[Any], str]] = {
    CHAT: _messages,
    COMPLETIONS: lambda value: _text("prompt", value),
    EMBEDDINGS: lambda value: _text("input", value),
}
