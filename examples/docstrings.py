"""The docstrings of the running Python's standard library: a dataset of real prose that needs no download.

    python examples/docstrings.py OUT_DIR [--rows N] [--files 8]

writes Parquet files with the string columns name (qualified), module, kind (module, class or function), doc
and lang (always "en"), in a fixed order: by module name, then as the source has them. The sources are parsed,
never imported. How many rows there are depends on the Python version and on how it was packaged; CPython 3.11
has about 8,600.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

# Other people's packages, and tests: their docstrings are rare and odd.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class Docstring(NamedTuple):
    """One documented object of the standard library."""

    name: str
    module: str
    kind: str
    doc: str
    lang: str = "en"


def docstrings(root: Path | None = None) -> Iterator[Docstring]:
    """The docstrings under `root` (the running Python's standard library unless given), in order."""
    root = root or Path(sysconfig.get_path("stdlib"))
    modules: dict[str, Path] = {}
    for folder, below, files in os.walk(root):
        below[:] = [name for name in below if name not in SKIPPED_FOLDERS]
        for path in (Path(folder, name) for name in files if name.endswith(".py")):
            module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            modules[module] = path
    for module, path in sorted(modules.items()):
        yield from _of_node(ast.parse(path.read_bytes()), module, module)


def write(out: Path, rows: int | None = None, files: int = 8) -> list[Path]:
    """Write the first `rows` docstrings (all unless given) to numbered files in `out`; returns the paths."""
    found = list(itertools.islice(docstrings(), rows))
    columns = {field: [getattr(doc, field) for doc in found] for field in Docstring._fields}
    table = pa.table(columns, schema=pa.schema([(field, pa.string()) for field in Docstring._fields]))
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"docstrings-{n:05d}-of-{files:05d}.parquet" for n in range(files)]
    for n, path in enumerate(paths):
        start, end = len(found) * n // files, len(found) * (n + 1) // files
        pq.write_table(table.slice(start, end - start), path)
    return paths


def _of_node(node: _Documented, name: str, module: str) -> Iterator[Docstring]:
    if doc := ast.get_docstring(node):
        kind = {ast.Module: "module", ast.ClassDef: "class"}.get(type(node), "function")
        # A lone surrogate (an escaped one in a docstring) has no UTF-8 form, so it cannot be an Arrow string.
        yield Docstring(name, module, kind, doc.encode("utf-8", "replace").decode())
    for child in _defined_in(node):
        yield from _of_node(child, f"{name}.{child.name}", module)


def _defined_in(node: ast.AST) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Classes and functions directly under `node`, also those that stand in an if, a try or a loop."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
        elif isinstance(child, ast.stmt | ast.excepthandler):
            yield from _defined_in(child)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the standard library's docstrings as Parquet.")
    parser.add_argument("out", type=Path, help="the folder to write to")
    parser.add_argument("--rows", type=int, help="write the first N docstrings only")
    parser.add_argument("--files", type=int, default=8, help="how many files to spread the rows over")
    args = parser.parse_args()
    if args.files < 1 or (args.rows is not None and args.rows < args.files):
        parser.error("--files must be at least 1 and at most --rows")
    for path in write(args.out, args.rows, args.files):
        print(path)


if __name__ == "__main__":
    main()
