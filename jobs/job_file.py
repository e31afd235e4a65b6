"""Job files as trees: YAML in, `extends` merged, and for every key the file and line that it came from.

YAML 1.2's scalars, as editors and most people expect them: `no`, `on` and `12:30` are text, `1e-3` is a number.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipelines.errors import SpecError
from pipelines.wording import printable

Key = tuple[str, ...]
"""A dotted key, in parts."""

#: Aliases can make a small file enormous; no job file comes near this.
_MOST_NODES = 100_000


@dataclass(frozen=True)
class Origin:
    """Where a key was set."""

    file: str
    line: int | None = None

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Tree:
    """A job file as nested dicts, before references are filled in."""

    values: dict[str, Any]
    origins: dict[Key, Origin]
    files: tuple[Path, ...] = ()
    """All files that took part, the most general first."""

    def merged(self, other: Tree) -> Tree:
        """`other` wins: mappings are merged deeply, everything else is replaced."""
        files = tuple(dict.fromkeys((*self.files, *other.files)))
        return Tree(_merge(self.values, other.values), {**self.origins, **other.origins}, files)

    def where(self, key: Key, default: str) -> Origin:
        """Where a key was set; for one that was not, where its section was."""
        for length in range(len(key), 0, -1):
            if key[:length] in self.origins:
                return self.origins[key[:length]]
        below = (origin for known, origin in self.origins.items() if known[: len(key)] == key and key)
        return next(below, Origin(default))


def read_job_file(path: Path, fill: Callable[[str, Key, Origin], str]) -> Tree:
    """A file with everything that it extends, the file itself last. `fill` resolves references in `extends`.

    Raises SpecError that names file, line and column of what is wrong.
    """
    return _read(path, fill, ())


def tree_of(
    values: Mapping[str, Any], name: str, directory: Path, fill: Callable[[str, Key, Origin], str]
) -> Tree:
    """The same for a mapping made in Python, whose `extends` is relative to `directory`."""
    plain = _plain(values, name)
    origins: dict[Key, Origin] = {}
    _mark(plain, (), Origin(name), origins)
    return _extended(Tree(plain, origins), directory, name, fill, ())


def tree_at(key: Key, value: Any, name: str) -> Tree:
    """One value, set from outside any file."""
    origins = {key: Origin(name)}
    nested = _plain(value, name)
    _mark(nested, key, Origin(name), origins)
    for part in reversed(key):
        nested = {part: nested}
    return Tree(nested, origins)


def parse_value(text: str) -> Any:
    """One YAML value, as in an override. Raises yaml.YAMLError or SpecError."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        return None if node is None else _Builder(loader, "override").value(node, ())
    finally:
        loader.dispose()


def shown(path: Path) -> str:
    """A path as messages name it: relative to the working directory where it lies below."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _read(path: Path, fill: Callable[[str, Key, Origin], str], chain: tuple[Path, ...]) -> Tree:
    path = Path(os.path.abspath(path))
    if path in chain:
        circle = " → ".join(shown(step) for step in (*chain[chain.index(path) :], path))
        raise SpecError(f"{shown(path)}: extends goes round in a circle: {circle}")
    tree = _parse(path)
    return _extended(tree, path.parent, shown(path), fill, (*chain, path))


def _extended(
    tree: Tree, folder: Path, name: str, fill: Callable[[str, Key, Origin], str], chain: tuple[Path, ...]
) -> Tree:
    given = tree.values.pop("extends", None)
    origin = tree.origins.pop(("extends",), Origin(name))
    listed = [given] if isinstance(given, str) else given or []
    if not isinstance(listed, list) or not all(isinstance(item, str) for item in listed):
        raise SpecError(f"{origin}: extends: expected a path or a list of paths, got {repr(given)[:80]}")
    base = Tree({}, {})
    for item in listed:
        parent = folder / os.path.expanduser(fill(item, ("extends",), origin))
        if not parent.is_file():
            raise SpecError(f"{origin}: extends: no such file: {printable(shown(parent))}{_near(parent)}")
        base = base.merged(_read(parent, fill, chain))
    return base.merged(tree)


def _parse(path: Path) -> Tree:
    name = shown(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise SpecError(f"{name}: no such job file{_near(path)}") from None
    except IsADirectoryError:
        raise SpecError(f"{name}: is a folder, not a job file") from None
    except UnicodeDecodeError as error:
        raise SpecError(f"{name}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise SpecError(f"{name}: cannot be read: {error.strerror}") from None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            raise SpecError(f"{name}: the file is empty")
        if not isinstance(node, yaml.MappingNode):
            raise SpecError(
                f"{name}:{node.start_mark.line + 1}: expected keys and values, as in `name: my-job`"
            )
        builder = _Builder(loader, name)
        return Tree(builder.value(node, ()), builder.origins, (path,))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        line = text.splitlines()[mark.line] if mark and mark.line < len(text.splitlines()) else ""
        raise SpecError(
            f"{name}{place}: not valid YAML: {error.problem or error.context}{_hint(line)}"
        ) from None
    except yaml.YAMLError as error:
        raise SpecError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise SpecError(f"{name}: nested too deeply") from None


def _hint(line: str) -> str:
    if "\t" in line:
        return "; YAML is indented with spaces, not tabs"
    if "{{" in line:
        return "; put text with {{ }} in quotes"
    if line.count(": ") > 1:
        return "; put text with a colon in quotes"
    return ""


def _near(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {shown(path.parent / near[0])}?" if near else ""


class _Loader(yaml.SafeLoader):
    """Safe YAML with the scalars of YAML 1.2's core schema, and `_` within numbers."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 -- PyYAML's own form


for _tag, _pattern, _first in (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^(?:[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+)$", list("-+0123456789")),
    (
        "float",
        r"^(?:[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+0123456789."),
    ),
    ("merge", r"^<<$", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


def _int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = node.value.replace("_", "")
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


_Loader.add_constructor("tag:yaml.org,2002:int", _int)


#: What a job file is made of, and what messages call it; YAML's sets, dates and binaries could not be stored as JSON.
_KINDS = {
    "map": "a mapping",
    "seq": "a list",
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "null": "null",
}


class _Builder:
    """Makes plain values of YAML's nodes, noting each key's line and refusing keys given twice."""

    def __init__(self, loader: _Loader, name: str) -> None:
        self.loader = loader
        self.name = name
        self.origins: dict[Key, Origin] = {}
        self._nodes = 0
        self._open: list[int] = []
        self._flattened: set[int] = set()

    def value(self, node: yaml.Node, key: Key | None) -> Any:
        self._nodes += 1
        if self._nodes > _MOST_NODES or id(node) in self._open:
            raise self.error(node, "an alias that repeats itself without end")
        prefix, _, kind = node.tag.rpartition(":")
        if prefix != "tag:yaml.org,2002" or kind not in _KINDS:
            raise self.error(node, f"the tag {node.tag} is not allowed")
        if isinstance(node, yaml.ScalarNode):
            try:
                return self.loader.construct_object(node)
            except (
                ValueError,
                KeyError,
                TypeError,
            ):  # a tag that does not fit, or a number of thousands of digits
                raise self.error(node, f"{node.value[:60]!r} cannot be read as {_KINDS[kind]}") from None
        self._open.append(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return self.mapping(node, key)
            return [self.value(item, None) for item in node.value]
        finally:
            self._open.pop()

    def mapping(self, node: yaml.MappingNode, key: Key | None) -> dict[str, Any]:
        if id(node) not in self._flattened:
            self._refuse_twice(node)
            self._flattened.add(id(node))
            self.loader.flatten_mapping(node)
        made = {}
        for key_node, value_node in node.value:
            name = key_node.value
            below = None if key is None else (*key, name)
            if below is not None:
                self.origins[below] = Origin(self.name, key_node.start_mark.line + 1)
            made[name] = self.value(value_node, below)
        return made

    def _refuse_twice(self, node: yaml.MappingNode) -> None:
        lines: dict[str, int] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise self.error(key_node, "a key must be text; put text that begins with {{ in quotes")
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            if key_node.tag != "tag:yaml.org,2002:str":
                raise self.error(
                    key_node, f"the key {key_node.value or 'null'} must be text; put it in quotes"
                )
            line = key_node.start_mark.line + 1
            if key_node.value in lines:
                raise self.error(
                    key_node,
                    f"the key {key_node.value!r} is given twice, first in line {lines[key_node.value]}",
                )
            lines[key_node.value] = line

    def error(self, node: yaml.Node, problem: str) -> SpecError:
        mark = node.start_mark
        return SpecError(f"{self.name}:{mark.line + 1}:{mark.column + 1}: {problem}")


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in top.items():
        below = base.get(name)
        merged[name] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _plain(value: Any, name: str) -> Any:
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise SpecError(f"{name}: the key {key!r} must be text")
        return {key: _plain(item, name) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, name) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _mark(value: Any, key: Key, origin: Origin, origins: dict[Key, Origin]) -> None:
    if isinstance(value, dict):
        for name, item in value.items():
            origins[(*key, name)] = origin
            _mark(item, (*key, name), origin, origins)
