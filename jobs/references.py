"""`${env:NAME}`, `${env:NAME:-default}` and `${run.date}` in the strings of a job; and secrets that are not stored.

`$${` stands for a literal `${`. A lone `$` and Jinja's `{{ }}` are left as they are.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.errors import SpecError

MASK = "***"
"""Stands in stored specs where a secret was written out."""

_REFERENCE = re.compile(r"\$\$\{|\$\{([^{}]*)\}")
_ENV = re.compile(r"env:([A-Za-z_][A-Za-z0-9_]*)(:-(.*))?", re.DOTALL)
_RUN = re.compile(r"run\.([A-Za-z_][A-Za-z0-9_-]*)(:-(.*))?", re.DOTALL)
_SECRET_NAME = re.compile(
    r"(^|_)(key|secret|token|password|passwd|pwd|passphrase|credentials?|authorization|cookie|sas|connection_string"
    r"|account_key|api_?key|accesskey|secretkey)(_|$)"
)
_NOT_SECRET = frozenset({"anon", "profile"})
_USER_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")


@dataclass(frozen=True)
class References:
    """What references stand for; `env` is the process's environment, `run` the variables of this run."""

    env: Mapping[str, str]
    run: Mapping[str, str] | None
    """None leaves references to run variables as they stand."""

    def fill(self, text: str) -> str:
        """`text` with its references filled in. Raises SpecError, without the file and key, which it does not know."""

        def value(match: re.Match[str]) -> str:
            if match[0] == "$${":
                return "${"
            if env := _ENV.fullmatch(match[1]):
                return self._env(match[0], env[1], env[3])
            if run := _RUN.fullmatch(match[1]):
                return match[0] if self.run is None else self._run(match[0], run[1], run[3])
            raise SpecError(
                f"unknown reference {match[0]}; known are ${{env:NAME}}, ${{env:NAME:-default}} and ${{run.NAME}}; "
                f"write ${match[0]} for the text itself"
            )

        return _REFERENCE.sub(value, text)

    def _env(self, reference: str, name: str, default: str | None) -> str:
        given = self.env.get(name)
        if given or (given is not None and default is None):
            return given
        if default is not None:
            return default
        near = difflib.get_close_matches(name, self.env, n=1, cutoff=0.8)
        raise SpecError(
            f"the environment variable {name} is not set"
            + (f" (there is {near[0]})" if near else "")
            + f"; set it, or give a default: ${{env:{name}:-…}}"
        )

    def _run(self, reference: str, name: str, default: str | None) -> str:
        assert self.run is not None
        if name in self.run:
            return self.run[name]
        if default is not None:
            return default
        known = ", ".join(f"${{run.{known}}}" for known in sorted(self.run))
        raise SpecError(f"the run variable {reference} has no value; known are {known}")


def references_in(value: Any, kind: str) -> bool:
    """Whether a string, or a string in a list or mapping, refers to `env` or `run`."""
    if isinstance(value, str):
        pattern = _ENV if kind == "env" else _RUN
        return any(
            match[1] is not None and pattern.fullmatch(match[1]) for match in _REFERENCE.finditer(value)
        )
    if isinstance(value, dict):
        return any(references_in(item, kind) for item in value.values())
    return isinstance(value, list) and any(references_in(item, kind) for item in value)


def is_one_reference(text: str) -> bool:
    """Whether the text is a reference and nothing else."""
    match = _REFERENCE.fullmatch(text)
    return match is not None and match[0] != "$${"


def masked(value: Any, name: str = "") -> Any:
    """A tree for storing: secrets that were written out become `MASK`, references to them stay.

    A secret is known by its key's name (`key`, `secret`, `hf_token`, `Authorization`, …), or is a URL's user part.
    Prompts and sampling are left alone.
    """
    if isinstance(value, dict):
        return {
            key: item if not name and key in ("prompt", "sampling") else masked(item, key)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [masked(item, name) for item in value]
    if isinstance(value, (bool, int, float)) or value is None:
        # A number under a name with `token` counts tokens; under `password` it may be one.
        return _reference_without_default(str(value)) if "password" in name.lower() else value
    if is_secret_name(name):
        return _reference_without_default(value)
    return _USER_IN_URL.sub(_masked_user, value) if isinstance(value, str) else value


def is_secret_name(name: str) -> bool:
    """Whether a key of this name holds a secret."""
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().replace("-", "_")
    return snake not in _NOT_SECRET and _SECRET_NAME.search(snake) is not None


def _reference_without_default(value: Any) -> str:
    match = _REFERENCE.fullmatch(value) if isinstance(value, str) else None
    env = _ENV.fullmatch(match[1] or "") if match else None
    return f"${{env:{env[1]}}}" if env else MASK


def _masked_user(match: re.Match[str]) -> str:
    return match[0] if is_one_reference(match[0][:-1]) else f"{MASK}@"
