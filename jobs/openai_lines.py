"""The lines of an OpenAI batch file, checked one by one and against each other.

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {…}}

Sources: https://platform.openai.com/docs/api-reference/batch/request-input, vLLM's `BatchRequestInput`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from jobs import openai_shared
from jobs.openai_body import (
    ENDPOINTS,
    LIMITS,
    SHARED,
    Asked,
    BatchMistakes,
    LineMistake,
    Refused,
    read_body,
)
from jobs.openai_json import SURROGATE, TooDeep, are_equal, is_text, printable, read_json, shown

_MOST_MISTAKES = 10
_KEYS = ("custom_id", "method", "url", "body")
#: How half of a surrogate pair comes into a value: a line's bytes are UTF-8.
_ESCAPED = re.compile(rb"\\u[dD][89a-fA-F]")


class Request(NamedTuple):
    """One good line."""

    custom_id: str
    prompt: str
    """See `openai_body.Asked`."""
    own: dict[str, Any]


class Lines:
    """Reads one file; what its lines have in common is known when it is read. `limits`: as `openai_body.LIMITS`."""

    def __init__(self, source: str, limits: Mapping[str, int | None] = LIMITS) -> None:
        self.source = source
        self._limits = limits
        self._common: dict[str, Any] = {}
        self.shared: dict[str, Any] = {}
        """What only the job can have: `Asked.shared` of all lines."""
        # In order, as a set's differs between processes.
        self._own: dict[str, None] = {}
        # 130 bytes a request with ids of 15 letters: 1.3 GB for ten million.
        self._line_of: dict[str, int] = {}
        # What all have to say alike: the line that said it first, and what.
        self._first: dict[str, tuple[int, Any]] = {}
        self._mistakes: list[LineMistake] = []
        self._more = 0

    @property
    def count(self) -> int:
        """Requests so far."""
        return len(self._line_of)

    @property
    def endpoint(self) -> str:
        """The `url` of all lines."""
        url: str = self._first["url"][1]
        return url

    @property
    def model(self) -> str | None:
        """The `model` of all bodies."""
        named: str | None = self._first["body.model"][1]
        return named

    @property
    def common(self) -> dict[str, Any]:
        """Sampling parameters that all lines give, and all alike. Never a seed: the job's would be no request's own."""
        if "max_tokens" in self._own and "max_tokens" not in self._common:
            # Nor a least length beside limits of the lines' own: the job's limit may be below it.
            return {key: value for key, value in self._common.items() if key != "min_tokens"}
        return self._common

    @property
    def varying(self) -> list[str]:
        """Sampling parameters that are not the same in all lines, in the order in which they came."""
        common = self.common
        return [key for key in self._own if key not in common]

    def requests(self, lines: Iterable[bytes]) -> Iterator[Request]:
        """The requests, in order, until the first mistake; the rest is read all the same.

        Raises BatchMistakes at the end, also for a file without requests.
        """
        for number, line in enumerate(lines, 1):
            text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if text.strip() and (request := self._request(number, text)) and not self._mistakes:
                yield request
        if self._mistakes:
            raise BatchMistakes(self.source, tuple(self._mistakes), self._more)
        if not self.count:
            nothing = LineMistake(line=None, custom_id=None, key="", text="holds no requests")
            raise BatchMistakes(self.source, (nothing,))

    def _request(self, line: int, text: bytes) -> Request | None:
        custom_id = None
        try:
            value = _object(text)
            custom_id = _custom_id(value)
            first = self._line_of.setdefault(custom_id, line)
            if first != line:
                raise Refused("custom_id", f"line {first} has it already; each line needs its own")
            if _ESCAPED.search(text) and (key := _key_of_no_text(value)) is not None:
                raise Refused(key, SURROGATE)
            asked = self._asked(line, custom_id, value)
        except Refused as refused:
            self._note(line, custom_id, *refused.args)
            return None
        return None if asked is None else Request(custom_id, asked.prompt, asked.own)

    def _asked(self, line: int, custom_id: str, value: dict[str, Any]) -> Asked | None:
        """What the line asks; None where what is wrong has been noted."""
        for key in sorted(value.keys() - set(_KEYS)):
            self._note(line, custom_id, key, f"a line has {', '.join(_KEYS)} and nothing else; take it out")
        if value.get("method") != "POST":
            self._note(line, custom_id, "method", f'expected "POST", got {shown(value.get("method"))}')
        url, body = value.get("url"), value.get("body")
        if not isinstance(url, str) or url not in ENDPOINTS:
            raise Refused("url", f"expected one of {', '.join(ENDPOINTS)}; got {shown(url)}")
        if not self._alike(line, custom_id, "url", url):
            return None
        if not isinstance(body, dict):
            raise Refused("body", f"expected an object, got {shown(body)}")
        model = body.get("model")
        if model is not None and not isinstance(model, str):
            raise Refused("body.model", f"expected a name, got {shown(model)}")
        asked = read_body(body, self.endpoint, self._limits[self.endpoint])
        if isinstance(asked, list):
            for key, text in asked:
                self._note(line, custom_id, f"body.{key}".rstrip("."), text)
            return None
        self._compare(line, custom_id, model, asked)
        return asked

    def _compare(self, line: int, custom_id: str, model: Any, asked: Asked) -> None:
        """With the lines before."""
        is_first = "body.model" not in self._first
        self._alike(line, custom_id, "body.model", model)
        if is_first or not are_equal(asked.shared, self.shared):
            for key in SHARED[self.endpoint]:
                self._alike(line, custom_id, f"body.{key}", asked.shared.get(key))
        if is_first:
            self.shared = asked.shared
            for key, text in openai_shared.problems_of(asked.shared, self.endpoint):
                self._note(line, custom_id, f"body.{key}", text)
            self._common = {key: value for key, value in asked.own.items() if key != "seed"}
        elif asked.own != self._common:
            self._common = {key: value for key, value in self._common.items() if asked.own.get(key) == value}
        self._own |= dict.fromkeys(asked.own)

    def _alike(self, line: int, custom_id: str, key: str, value: Any) -> bool:
        """Whether the first line said the same."""
        first, said = self._first.setdefault(key, (line, value))
        if are_equal(said, value):
            return True
        a, b = ("none" if one is None else shown(one) for one in (said, value))
        why = "a file has one" if key in ("url", "body.model") else "it is the same for a whole job"
        self._note(line, custom_id, key, f"{b}, and line {first} has {a}: {why}; split the file")
        return False

    def _note(self, line: int, custom_id: str | None, key: str, text: str) -> None:
        if len(self._mistakes) < _MOST_MISTAKES:
            self._mistakes.append(LineMistake(line=line, custom_id=custom_id, key=printable(key), text=text))
        else:
            self._more += 1


def _object(text: bytes) -> dict[str, Any]:
    try:
        value = read_json(text.decode())
    except TooDeep as error:
        raise Refused("", f"{error}: {_start(text)}") from None
    except ValueError as error:
        raise Refused("", f"no JSON in UTF-8 ({error}): {_start(text)}") from None
    if not isinstance(value, dict):
        raise Refused("", f"expected an object with {', '.join(_KEYS)}; got {shown(value)}")
    return value


def _custom_id(value: dict[str, Any]) -> str:
    custom_id = value.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id or not is_text(custom_id):
        raise Refused("custom_id", f"expected text that no other line has, got {shown(custom_id)}")
    return custom_id


def _start(text: bytes) -> str:
    return shown(text[:80].decode("utf-8", "replace").rstrip())


def _key_of_no_text(value: dict[str, Any]) -> str | None:
    """The first key that holds, or is, what cannot be written as UTF-8."""
    for key, item in value.items():
        inside = item if key == "body" and isinstance(item, dict) else {}
        for name, one in inside.items():
            if not is_text({name: one}):
                return f"body.{name}"
        if not inside and not is_text({key: item}):
            return key
    return None
