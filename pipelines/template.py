"""Prompt templates: sandboxed Jinja over a row's columns, in which a null is never printed as "None".

A null or missing column becomes a `Null`: false, none and undefined for the template's tests, so that
`{{ lang or 'en' }}`, `{% if lang %}` and `{{ lang | default('en') }}` work, and an error that names the column as soon
as anything would turn it into text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pipelines.errors import RowError, SpecError


class MissingValue(jinja2.UndefinedError):
    """The template needs a value that this row does not have."""


class Null(jinja2.StrictUndefined):
    """A null or absent value: like none as long as it is only asked for, an error when it is used."""

    def _fail(self, *args: Any, **kwargs: Any) -> NoReturn:
        name = self._undefined_name
        if self._undefined_hint:  # Jinja made it: an unsafe attribute, the first item of an empty list
            known = issubclass(self._undefined_exception, jinja2.UndefinedError)
            raise (MissingValue if known else self._undefined_exception)(self._undefined_hint)
        if isinstance(self._undefined_obj, _MISSING_TYPE):
            raise MissingValue(f"column {name!r} is null or missing")
        raise MissingValue(f"{name!r} is null or missing inside a value of the row")

    # An undefined value fails on every operation but these; jinja2.StrictUndefined lists the same names.
    __iter__ = __str__ = __len__ = __contains__ = _fail
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _fail
    __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = _fail
    __mod__ = __rmod__ = __pow__ = __rpow__ = __pos__ = __neg__ = _fail
    __lt__ = __le__ = __gt__ = __ge__ = _fail
    __call__ = __getitem__ = __int__ = __float__ = __complex__ = _fail

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self._fail()

    def __repr__(self) -> str:
        return "None"

    def __bool__(self) -> bool:  # type: ignore[override]
        return False

    def __eq__(self, other: object) -> bool:  # type: ignore[override]
        return other is None or isinstance(other, Null)

    def __ne__(self, other: object) -> bool:  # type: ignore[override]
        return not self == other

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(None)


_MISSING_TYPE = type(jinja2.utils.missing)


class _Environment(ImmutableSandboxedEnvironment):
    """Nulls inside structs and lists are `Null` as well: `{{ meta.lang | upper }}` must not print NONE."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        value = super().getattr(obj, attribute)
        return self.undefined(obj=obj, name=attribute) if value is None else value

    def getitem(self, obj: Any, argument: Any) -> Any:
        value = super().getitem(obj, argument)
        return self.undefined(obj=obj, name=argument) if value is None else value


def _print(value: Any) -> Any:
    if value is None:
        raise MissingValue("an expression of the template is null")
    if isinstance(value, bytes):
        raise TypeError("the value is binary, not text")  # would print as b'…'
    return value


def _to_json(value: Any, indent: int | None = None) -> str:
    # Jinja's own writes < > & ' as \u003c and so on, for HTML.
    return json.dumps(value, ensure_ascii=False, indent=indent, default=_null_in_json)


def _null_in_json(value: Any) -> None:
    if not isinstance(value, Null):
        raise TypeError(f"a {type(value).__name__} cannot be written as JSON")


def _environment() -> _Environment:
    # Jinja drops one newline at the end of a template: the one that YAML's `template: |` adds.
    environment = _Environment(undefined=Null, finalize=_print)
    environment.tests["none"] = lambda value: value is None or isinstance(value, Null)
    environment.filters["tojson"] = _to_json
    return environment


_ENVIRONMENT = _environment()


class Template:
    """A compiled prompt template. Raises SpecError with key and line for a syntax error."""

    def __init__(self, source: str, key: str) -> None:
        try:
            tree = _ENVIRONMENT.parse(source)
            code = _ENVIRONMENT.compile(source)
        except jinja2.TemplateSyntaxError as error:
            raise SpecError(f"{key}: line {error.lineno} of the template: {error.message}") from None
        except RecursionError:
            raise SpecError(f"{key}: the template is nested too deeply") from None
        self._template = jinja2.Template.from_code(_ENVIRONMENT, code, dict(_ENVIRONMENT.globals))
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
        try:
            return "".join(render(context(row)))
        except MissingValue as error:
            raise RowError("missing_value", str(error)) from None
        except Exception as error:  # noqa: BLE001 -- whatever a template raises is its row's error
            raise RowError("prompt_error", one_line(error)) from None


#: Names that a template has without any row.
GLOBALS = frozenset(_ENVIRONMENT.globals)


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
