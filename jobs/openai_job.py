"""The job that an OpenAI batch file becomes: its own sections, what the user says besides, and the file that holds both."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from jobs.job_file import Key, Tree, read_job_file
from jobs.loading import fill, overridden
from jobs.openai_body import CHAT, EMBEDDINGS, ENDPOINTS, LIMITS
from jobs.openai_shared import prompt_of, sampling_of
from jobs.references import References
from pipelines.errors import SpecError
from pipelines.storage import Storage

REQUESTS, OUT = "requests.parquet", "out"
#: The column of each row's own sampling parameters.
PARAMS = "sampling_params"
#: The column of vectors; beside it `…_prompt_tokens`.
VECTOR = "embedding"

_MOST_MISTAKES = 10
#: Sections of the user's job file that the batch file takes the place of, and the keys of them that may be given all the
#: same.
_TAKEN: dict[str, frozenset[str]] = {
    "input": frozenset({"storage_options", "images_folder"}),
    "output": frozenset({"storage_options", "compression"}),
    "prompt": frozenset({"chat_template_kwargs"}),
    "steps": frozenset(),
    "schedule": frozenset(),
}
_TAKEN_KEYS = (("sampling", "max_tokens_column"), ("sampling", "params_column"))


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of a converted file without reading it again."""

    source: str
    sha256: str
    endpoint: str
    requests: int
    model: str | None
    common: dict[str, Any]
    """Sampling parameters that all lines give, and all alike."""
    varying: list[str]
    """Those that stand in the column `PARAMS`."""
    shared: dict[str, Any]
    """See `openai_body.SHARED`."""


# ── What the user's job file and overrides say ───────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class Given:
    """What the user says besides the batch file."""

    extends: str | None
    """The job file's absolute path."""
    overrides: Tree
    """The model's name among them."""
    tree: Tree
    """All of it."""

    def storage_options(self, section: str) -> dict[str, Any]:
        """Those of `input` or `output`, references filled in."""
        key = (section, "storage_options")
        found = self.section(section).get(key[1])
        return fill(found, key, References(os.environ, {})) if isinstance(found, dict) else {}

    def section(self, name: str) -> dict[str, Any]:
        """Empty for what is none: `load` will say so."""
        found = self.tree.values.get(name)
        return found if isinstance(found, dict) else {}


def given_by(extends: str | None, model: str | None, overrides: Sequence[str] | Mapping[str, Any]) -> Given:
    """Raises SpecError for no model, and for what is the batch file's to say."""
    above = Tree({}, {})
    if model is not None:
        above = overridden(above, {"model.source": os.path.abspath(model) if os.path.isdir(model) else model})
    above = overridden(above, overrides)
    tree, path = above, None
    if extends is not None:
        path = os.path.abspath(os.path.expanduser(extends))
        environment = References(os.environ, {})
        tree = read_job_file(Path(path), lambda text, *_: environment.fill(text)).merged(above)
    problems = [
        f"{tree.where(key, 'job')}: {'.'.join(key)}: the batch file says that; leave it out"
        for key in _given_keys(tree.values)
        if (key[0] in _TAKEN and (len(key) == 1 or key[1] not in _TAKEN[key[0]])) or key in _TAKEN_KEYS
    ]
    if ("model", "source") not in tree.origins:
        problems.append(
            "model: missing; name what answers the requests with --model, or as model.source of a job file"
        )
    if problems:
        raise SpecError("\n".join(problems[:_MOST_MISTAKES]))
    return Given(extends=path, overrides=above, tree=tree)


def limits_of(given: Given) -> dict[str, int | None]:
    """As `openai_body.LIMITS`, by what the user says."""
    if ("sampling", "max_tokens") not in given.tree.origins:
        return LIMITS
    limit = given.section("sampling").get("max_tokens")
    # What a reference stands for only `load` finds out.
    return dict.fromkeys(LIMITS, limit if isinstance(limit, int) else None)


def _given_keys(values: Any, key: Key = ()) -> Iterator[Key]:
    """The keys that have a value; null takes one away."""
    if isinstance(values, dict):
        for name, value in values.items():
            yield from _given_keys(value, (*key, name))
    elif values is not None:
        yield key


def check_against_lines(given: Given, facts: Facts) -> None:
    """Raises SpecError for an override of what the lines say, and for tools whose calls nobody would find."""
    said = [*facts.common, *facts.varying]
    said += sampling_of(facts.shared) if facts.endpoint != EMBEDDINGS else ()
    for key in said:
        if ("sampling", key) in given.overrides.origins:
            raise SpecError(
                f"override: sampling.{key}: the lines of {facts.source} say it; leave out the override, or take it out of them"
            )
    if "tools" in prompt_of(facts.shared) and given.section("sampling").get("tool_call_parser") is None:
        raise SpecError(
            f"{facts.source}: body.tools: nothing finds the calls in the model's answers; give vLLM's name of the parser for "
            "it, for example sampling.tool_call_parser=hermes"
        )


# ── The job file ─────────────────────────────────────────────────────────────────────────────────────────────────


def job_settings(given: Given, facts: Facts, target: Storage) -> dict[str, Any]:
    """The job of a batch file: its own sections above what the user's file says, and the overrides above both."""
    column, theirs = ENDPOINTS[facts.endpoint], given.tree.origins
    ours: dict[str, Any] = {} if given.extends is None else {"extends": [given.extends]}
    if ("name",) not in theirs:
        ours["name"] = f"batch-{_stem(facts.source)}"
    ours |= {
        "input": {"path": target.url(REQUESTS)},
        "output": {"path": target.url(OUT), "columns": ["custom_id"]},
    }
    if ("errors", "max_error_rate") not in theirs:
        ours["errors"] = {"max_error_rate": 1.0}  # failed requests have a file of their own
    if facts.endpoint == EMBEDDINGS:
        embed = {"column": VECTOR, "prompt": {"prompt_column": column}, "prompt_tokens": True}
        embed |= {key: facts.shared[key] for key in ("dimensions",) if key in facts.shared}
        ours |= {"prompt": None, "steps": [{"embed": embed}]}
        ours["output"]["columns"].append(column)  # a step sees what is carried
    else:
        sampling = sampling_of(facts.shared) | facts.common
        if "max_tokens" not in sampling and ("sampling", "max_tokens") not in theirs:
            sampling["max_tokens"] = LIMITS[facts.endpoint]
        if facts.varying:
            sampling["params_column"] = PARAMS
        asked = (
            {"messages_column": column}
            if facts.endpoint == CHAT
            else {"prompt_column": column, "chat": False}
        )
        ours |= {"prompt": asked | prompt_of(facts.shared), "sampling": sampling}
    return Tree(_literal(ours), {}).merged(given.overrides).values


def _stem(source: str) -> str:
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", source.rpartition("/")[2].removesuffix(".jsonl"))
    return stem[:80]


def _literal(value: Any) -> Any:
    """Texts of the batch file, and names of files, as a job file has them: `${` begins a reference there."""
    if isinstance(value, dict):
        return {key: _literal(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_literal(item) for item in value]
    return value.replace("${", "$${") if isinstance(value, str) else value


class _Dumper(yaml.SafeDumper):
    """Quotes every text but names: Dray's job files are YAML 1.2, where more looks like a number than PyYAML thinks."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = None if re.fullmatch(r"[A-Za-z_]\w*", text) else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def as_yaml(settings: Mapping[str, Any]) -> str:
    text = yaml.dump(settings, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1 << 20)
    return f"# Made by `dray run-batch`; made anew by each call.\n{text}"
