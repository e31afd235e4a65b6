"""A prompt template: compiled once, rendered row by row. What it may do is `sandbox`'s."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import jinja2
from jinja2 import meta, nodes

from pipelines.errors import RowError, SpecError
from pipelines.sandbox import ENVIRONMENT, MissingValue, Null, check_length, new_row


class Template:
    """A compiled prompt template. Raises SpecError with key and line for a syntax error."""

    def __init__(self, source: str, key: str) -> None:
        try:
            tree = ENVIRONMENT.parse(source)
            code = ENVIRONMENT.compile(source)
        except jinja2.TemplateSyntaxError as error:
            raise SpecError(f"{key}: line {error.lineno} of the template: {error.message}") from None
        except (RecursionError, MemoryError, SyntaxError):
            # Of Jinja's parser, or of Python's for the code that Jinja makes: it takes 20 loops in each other.
            raise SpecError(f"{key}: the template is nested too deeply") from None
        except (ValueError, OverflowError) as error:  # a number of thousands of digits, a lone surrogate
            raise SpecError(f"{key}: the template does not compile: {one_line(error)}") from None
        self._template = jinja2.Template.from_code(ENVIRONMENT, code, dict(ENVIRONMENT.globals))
        names = meta.find_undeclared_variables(tree)
        self.columns: frozenset[str] = frozenset(names)
        """Names that the template takes from the row; Jinja's own functions among them (see `GLOBALS`)."""
        self.optional: frozenset[str] = frozenset(_guarded(tree)) & self.columns
        """Those that it gives a default or asks `is defined` about: they may be absent."""

    @cached_property
    def _render(self) -> tuple[Callable[..., Iterable[str]], Callable[..., Any]]:
        # What `Template.render` does, without its handling of exceptions: rewriting the traceback costs far more
        # than rendering, and a row's error needs one line of it.
        return self._template.root_render_func, self._template.new_context

    def render(self, row: dict[str, Any]) -> str:
        """The text for one row. Raises RowError `missing_value` or `prompt_error`."""
        render, context = self._render
        new_row()
        try:
            return _joined(render(context(row)))
        except MissingValue as error:
            raise RowError("missing_value", str(error)) from None
        except Exception as error:  # noqa: BLE001 -- whatever a template raises is its row's error
            raise RowError("prompt_error", one_line(error)) from None


def _joined(pieces: Iterable[str]) -> str:
    made: list[str] = []
    length = 0
    for piece in pieces:
        length += len(piece)
        check_length(length)
        made.append(piece)
    return "".join(made)


#: Names that a template has without any row.
GLOBALS = frozenset(ENVIRONMENT.globals)


def null(column: str) -> Null:
    """What a template sees in place of a null of this column."""
    return Null(name=column)


def one_line(error: BaseException) -> str:
    """`KeyError: 'lang'`: an exception's type and the first line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= 500 else text[:499] + "…"


def _guarded(tree: nodes.Template) -> Iterable[str]:
    for node in tree.find_all((nodes.Filter, nodes.Test)):
        asks = node.name in ("default", "d", "defined", "undefined")
        if asks and isinstance(node.node, nodes.Name):
            yield node.node.name
