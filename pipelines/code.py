"""Which code runs: digests of Dray's own sources and of the user's packages, and functions named by import path.

Ray ships the driver's working directory in front of the import path of its workers, and folders named `jobs` or
`pipelines` are common. So a worker compares its own sources with the driver's before it touches a row.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.machinery
import importlib.util
import site
import sys
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pipelines
from pipelines.errors import CodeMismatch, SpecError

#: What a prompt package may be made of: prompts are often kept in text files next to the code that reads them. A
#: changed comment costs a message that names the change; a prompt file left out costs a dataset of mixed prompts.
SOURCE_SUFFIXES = frozenset({".py", ".jinja", ".jinja2", ".j2", ".txt", ".json", ".yaml", ".yml", ".toml"})

_OWN_NAMES = ("jobs", "pipelines")


def code_path() -> str:
    """The folder of the `pipelines` package that this process imported."""
    return str(Path(pipelines.__path__[0]).resolve())


@cache
def code_digest() -> str:
    """16 hex digits over the package's sources: relative names and contents, so equal on every machine."""
    return _digest_of_folder(Path(code_path()), frozenset({".py"}))


def check_code(expected_digest: str, expected_path: str) -> None:
    """Raise CodeMismatch where this process runs other code than the driver, which sent its digest and path."""
    if code_digest() != expected_digest:
        if code_path() == expected_path:
            raise CodeMismatch(
                f"the code in {expected_path} was changed while the job ran; run the job again"
            )
        raise CodeMismatch(
            f"a worker imported {code_path()} (digest {code_digest()}), the driver runs {expected_path} "
            f"(digest {expected_digest}); install the driver's version of dray on every node, and start Ray "
            f"outside of folders that hold another `pipelines` package"
        )


def digest_of_package(module_name: str, folders: Sequence[str] = ()) -> str:
    """16 hex digits over the sources of a user's module, or of the whole top-level package that it belongs to.

    The function may call anything in its package; what it imports from elsewhere is not covered. Raises SpecError
    where the module cannot be found.
    """
    top = _find(module_name.partition(".")[0], folders)
    if top.submodule_search_locations and top.origin:
        return _digest_of_folder(Path(top.origin).parent, SOURCE_SUFFIXES)
    if top.submodule_search_locations:
        # A namespace package (no __init__.py) may be spread over the disk: take the module's own folder.
        importlib.import_module(module_name)
        module = _find(module_name, folders)
        locations = list(module.submodule_search_locations or ())
        own = Path(locations[0]) if locations else Path(module.origin or "").parent
        return _digest_of_folder(own, SOURCE_SUFFIXES)
    return hashlib.sha256(Path(top.origin or "").read_bytes()).hexdigest()[:16]


def load_function(
    reference: str, folders: Sequence[str] = (), key: str = "prompt.function"
) -> Callable[..., Any]:
    """The function that `package.module:name` names, under `key` of the job file.

    `folders` go behind everything on the import path: they can add packages, never replace any. Raises SpecError for
    whatever goes wrong while importing, in one line.
    """
    module_name, _, name = reference.partition(":")
    _find(module_name.partition(".")[0], folders, key)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        raise SpecError(f"{key}: importing {module_name} failed: {type(error).__name__}: {first}") from error
    function = getattr(module, name, None)
    if function is None:
        known = [k for k, v in vars(module).items() if callable(v) and not k.startswith("_")]
        raise SpecError(
            f"{key}: {module.__file__} has no function {name!r}"
            + (f"; it has {', '.join(known[:8])}" if known else "")
        )
    if not callable(function):
        raise SpecError(f"{key}: {reference} is a {type(function).__name__}, not a function")
    return function  # type: ignore[no-any-return]


def source_of_package(module_name: str, folders: Sequence[str] = ()) -> Path | None:
    """The file or folder of a user's module or top-level package; None for an installed one."""
    top = _find(module_name.partition(".")[0], folders)
    places = list(top.submodule_search_locations or ())
    place = Path(places[0] if places else top.origin or "").resolve()
    installed = {Path(path).resolve() for path in _installed_folders()}
    return None if place.parent in installed else place


def user_folders(reference: str, folders: Sequence[str] = ()) -> tuple[str, ...]:
    """The folder that workers need on their import path for `package.module:name`; none for an installed package."""
    source = source_of_package(reference.partition(":")[0], folders)
    return () if source is None else (str(source.parent),)


def add_folders(folders: Iterable[str]) -> None:
    """Put the user's folders at the end of the import path, once each."""
    for folder in folders:
        if folder not in sys.path:
            sys.path.append(folder)
            importlib.invalidate_caches()


def _find(
    top_level: str, folders: Sequence[str], key: str = "prompt.function"
) -> importlib.machinery.ModuleSpec:
    if top_level in _OWN_NAMES:
        raise SpecError(
            f"{key}: the package name {top_level!r} is Dray's own; give your package another name"
        )
    add_folders(folders)
    try:
        found = importlib.util.find_spec(top_level)
    except (ImportError, ValueError):
        found = None
    if found is None:
        places = f" (looked in {', '.join(folders)} too)" if folders else ""
        raise SpecError(
            f"{key}: no package or module {top_level!r} to import{places}; install it, or put its "
            f"folder on PYTHONPATH"
        )
    return found


def _installed_folders() -> list[str]:
    paths = sysconfig.get_paths()
    return [paths["purelib"], paths["platlib"], paths["stdlib"], *site.getsitepackages()]


def _digest_of_folder(folder: Path, suffixes: frozenset[str]) -> str:
    digest = hashlib.sha256()
    files = [
        path
        for path in folder.rglob("*")
        if path.suffix in suffixes and path.is_file() and "__pycache__" not in path.parts
    ]
    for path in sorted(files, key=lambda path: path.relative_to(folder).as_posix()):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()}\0{content}\n".encode())
    return digest.hexdigest()[:16]
