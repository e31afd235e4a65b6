"""What a prompt template may do, and how much of it: sandboxed Jinja in which nulls are never printed and no loop is endless.

A null or missing column becomes a `Null`: false, none and undefined for the template's tests, so that
`{{ lang or 'en' }}`, `{% if lang %}` and `{{ lang | default('en') }}` work, and an error that names the column as soon
as anything would turn it into text.

Work is counted, not timed, so that a row fails on every machine or on none: each pass of a loop and each filtered item
is a step, a call is five, and one row has `MOST_STEPS`. No value of a template may be longer than `MOST_TEXT`.
"""

from __future__ import annotations

import functools
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

#: Steps of one row; loops that print something take 0.1 to 0.5 s for so many.
MOST_STEPS = 1_000_000
#: What a call of a macro or method counts for; it takes 4 µs.
_CALL_STEPS = 5
#: Characters of a text, items of a list: ten times the longest context of any model.
MOST_TEXT = 2**26
#: Bits of an integer. Powers and products would otherwise compute for hours inside one operation.
_MOST_BITS = 2**16
#: A width or precision; wider columns than this are mistakes, and formatting would allocate them.
_MOST_WIDTH = 100_000
#: In `"%9999999d" % x` and in `"{:9999999}".format(x)`; and a width that comes from an argument.
_WIDE_PERCENT = re.compile(r"%[^a-zA-Z%]*(?:\d{6}|\*)")
_WIDE_FORMAT = re.compile(r":[^{}]*\d{6}")
_NESTED_FORMAT = re.compile(r":[^{}]*\{")


class TooMuchWork(Exception):
    """The template would loop, or grow a value, beyond all use."""


class _Budget(threading.local):
    """What is left to the row that this thread renders."""

    steps = MOST_STEPS

    def take(self, steps: int) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise TooMuchWork(f"the template takes more than {MOST_STEPS:,} steps for one row")


_BUDGET = _Budget()


def new_row() -> None:
    """A full budget for what this thread renders next."""
    _BUDGET.steps = MOST_STEPS


def check_length(length: int) -> None:
    """Raises TooMuchWork for a text or list of more than `MOST_TEXT`."""
    if length > MOST_TEXT:
        raise TooMuchWork(f"the template makes a value of more than {MOST_TEXT:,} characters or items")


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


class _Counter(NodeTransformer):
    """Puts the counting into a template's tree, where it compiles: around what loops go through, and for `~`."""

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802 -- Jinja's name
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "counted", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:  # noqa: N802 -- Jinja's name
        self.generic_visit(node)
        parts = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(parts, "concatenated", [], [], None, None, lineno=node.lineno)


class _Environment(ImmutableSandboxedEnvironment):
    """Nulls inside structs and lists are `Null` as well: `{{ meta.lang | upper }}` must not print NONE."""

    intercepted_binops = frozenset(
        {"+", "*", "**", "%"}
    )  # also keeps Jinja from computing them while it compiles

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Counter().visit(super()._parse(source, name, filename))
        return tree

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 -- as Jinja's own
        _BUDGET.take(_CALL_STEPS)
        if isinstance(getattr(__obj, "__self__", None), str | bytes):
            _check_widths(args)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%":
            _check_percent(left)
        elif operator == "+":
            if isinstance(left, Sized) and isinstance(right, Sized):
                check_length(len(left) + len(right))
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > _MOST_BITS:
                raise TooMuchWork(f"the template computes a number of more than {_MOST_BITS:,} bits")
        elif operator == "*":
            for text, times in ((left, right), (right, left)):
                if isinstance(times, int) and isinstance(text, Sized):
                    check_length(len(text) * times)
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        format_, sandboxed = value.__self__, wrapped

        def checked(*args: Any, **kwargs: Any) -> str:
            if _WIDE_FORMAT.search(format_):
                raise TooMuchWork("the template formats a value with a width of six digits or more")
            if _NESTED_FORMAT.search(format_):
                _check_widths((*args, *kwargs.values()))
            return sandboxed(*args, **kwargs)

        return checked

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
    if isinstance(value, list | tuple | dict):
        _weigh(value)
    return value


def _to_json(value: Any, indent: int | None = None) -> str:
    # Jinja's own writes < > & ' as \u003c and so on, for HTML.
    return json.dumps(value, ensure_ascii=False, indent=indent, default=_null_in_json)


def _null_in_json(value: Any) -> None:
    if not isinstance(value, Null):
        raise TypeError(f"a {type(value).__name__} cannot be written as JSON")


# ── Counting ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _counted(value: Any) -> Any:
    """What a loop goes through, paid for before or while it does."""
    if isinstance(value, list | tuple | dict | str | range):
        _BUDGET.take(len(value))
        return value
    return _counting(value)


def _counting(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _BUDGET.take(1)
        yield item


def _weigh(value: Any) -> None:
    """Pay for a value and all that is in it: a list of a list twice, forty times over, prints for ever."""
    _BUDGET.take(1)
    if isinstance(value, list | tuple | dict):
        _BUDGET.take(len(value))
        for item in value.values() if isinstance(value, dict) else value:
            if isinstance(item, list | tuple | dict):
                _weigh(item)
    elif isinstance(value, range):
        _BUDGET.take(len(value))


def _concatenated(parts: list[Any]) -> str:
    texts = []
    for part in parts:
        if isinstance(part, list | tuple | dict):
            _weigh(part)
        texts.append(str(part))
    check_length(sum(map(len, texts)))
    return "".join(texts)


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter of Jinja's that pays for the items of its value and takes no absurd width."""
    environment_first = hasattr(function, "jinja_pass_arg")

    @functools.wraps(function)  # with Jinja's marks of what it passes
    def paid(*args: Any, **kwargs: Any) -> Any:
        value = args[1] if environment_first and len(args) > 1 else args[0]
        _weigh(value)
        if name in _WITH_WIDTHS:
            _check_widths((*args[1:], *kwargs.values()))
        if name == "format":
            _check_percent(value)
        return function(*args, **kwargs)

    return paid


#: Filters whose numbers are widths, counts or digits.
_WITH_WIDTHS = frozenset({"center", "indent", "slice", "batch", "round", "wordwrap", "tojson"})


def _check_widths(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, int | float) and abs(value) > _MOST_WIDTH:
            raise TooMuchWork(f"the template asks for a width of {value:,}; at most {_MOST_WIDTH:,}")


def _check_percent(format_: Any) -> None:
    text = format_.decode("latin-1") if isinstance(format_, bytes) else format_
    if isinstance(text, str) and _WIDE_PERCENT.search(text):
        raise TooMuchWork("the template formats a value with a width of six digits or more, or with `*`")


def _environment() -> _Environment:
    # Jinja drops one newline at the end of a template: the one that YAML's `template: |` adds.
    environment = _Environment(undefined=Null, finalize=_print)
    environment.tests["none"] = lambda value: value is None or isinstance(value, Null)
    environment.filters["tojson"] = _to_json
    for name, function in environment.filters.items():
        environment.filters[name] = _bounded(name, function)
    environment.filters |= {"counted": _counted, "concatenated": _concatenated}
    del environment.globals["lipsum"]  # random text by the thousand paragraphs is no prompt
    return environment


ENVIRONMENT = _environment()
