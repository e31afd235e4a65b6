"""Templates that nobody should write: each is refused when it is compiled, or gives every row a text or an error, soon."""

from __future__ import annotations

import string
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines import sandbox
from pipelines.errors import ROW_ERROR_CODES, RowError, SpecError
from pipelines.template import Template
from tests.unit.fuzz import FACTOR, examples, refusal, within

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(0 if FACTOR > 1 else 300),
]  # `within` watches each example

ROWS: list[dict[str, Any]] = [
    {
        "doc": "text",
        "n": 10**9,
        "items": list(range(1000)),
        "meta": {"lang": None, "tags": ["a", None]},
        "b": b"\xff",
    },
    {"doc": "x" * 10_000, "n": -1, "items": [], "meta": {}, "b": b""},
]

EXPRESSIONS = [
    "doc", "n", "items", "meta", "meta.lang", "meta.tags", "b", "nothing", "none", "1", "10**9", "10**10**10", "2**n", "-n", "1/0", "'a'*n",
    "[1]*n", "doc*n", "doc+1", "doc~n", "range(n)", "range(99999)", "range(10**9)", "range(5)", "items|sum", "items|list", "items|batch(n)|list",
    "items|slice(n)|list", "doc|center(n)", "doc|indent(n)", "doc|truncate(n)", "n|round(n)", "1.5|round(10**8)", "doc|wordwrap(0)",
    "doc|replace('', doc)", "doc.ljust(n)", "doc.zfill(n)", "doc.expandtabs(n)", "'%*d' % (n, 1)", "'%999999999d' % 1", "'{:999999999}'.format(1)",
    "'{:{w}}'.format(1, w=n)", "'{0.__class__}'.format(doc)", "doc.__class__.__mro__", "().__class__.__bases__[0].__subclasses__()",
    "self.__init__.__globals__", "cycler.__init__.__globals__", "joiner.__init__.__globals__.os", "namespace.__init__", "loop.index", "loop(items)",
    "f(40)", "caller()", "super()", "items|map('center', n)|list", "items|map(attribute='real')|list", "items|sort(attribute='__class__')|list",
    "doc|attr('__class__')", "meta|attr('pop')", "meta.update({})", "items.append(1)", "doc|tojson(indent=n)", "meta|tojson", "items|tojson", "b|tojson",
    "doc|urlize", "meta|xmlattr", "meta|items|list", "doc|int(n)", "n|filesizeformat", "items|random", "lipsum(n=10**6)", "dict(a=n)", "meta|dictsort",
    "'9'*5000|int", "doc.encode().decode('idna')", "doc.format_map(meta)", "ns.x", "doc is defined", "n in range(10)", "doc[n]", "doc[::-1]", "doc[:n]",
    "items[n:]", "(((((doc)))))", "doc if n else", "doc|nofilter", "doc is notest", "9" * 5000, "'\\ud800'", "'\\x00'", "doc(", "[", "{", "not not n",
    "ns.x ~ ns.x", "ns.x + ns.x", "[ns.x, ns.x]", "{'a': ns.x, 'b': ns.x}", "ns.x|string", "ns.x == ns.x",
]  # fmt: skip
PIECES = [
    "{% for i in EXPR %}", "{% for i in EXPR recursive %}", "{% for a, b in EXPR %}", "{% for i in EXPR if EXPR %}", "{% else %}", "{% endfor %}",
    "{% if EXPR %}", "{% elif EXPR %}", "{% endif %}", "{% set x = EXPR %}", "{% set ns = namespace(x=EXPR) %}", "{% set ns.x = EXPR %}",
    "{% set x %}", "{% endset %}", "{% macro f(n) %}", "{% endmacro %}", "{% call f(EXPR) %}", "{% endcall %}", "{% filter upper %}", "{% endfilter %}",
    "{% raw %}", "{% endraw %}", "{% block b %}", "{% endblock %}", "{% with y = EXPR %}", "{% endwith %}", "{% include 'x' %}", "{% extends 'x' %}",
    "{% import 'x' as y %}", "{% from 'x' import y %}", "{% autoescape true %}", "{% endautoescape %}", "{% do EXPR %}", "{% break %}", "{% trans %}",
    "{{ EXPR }}", "{{- EXPR -}}", "{{ EXPR", "{%", "%}", "}}", "{#", "#}", "# for", "\n", " ",
]  # fmt: skip

expressions = st.sampled_from(EXPRESSIONS) | st.builds(
    "{} {} {}".format,
    st.sampled_from(EXPRESSIONS),
    st.sampled_from(["+", "*", "~", "|", "==", "and", "**", "%", "in", "."]),
    st.sampled_from(EXPRESSIONS),
)
pieces = st.builds(
    lambda piece, a, b: piece.replace("EXPR", a, 1).replace("EXPR", b, 1), st.sampled_from(PIECES), expressions, expressions
)  # fmt: skip
#: Blocks that close, or no example would get past the parser.
blocks = st.recursive(
    expressions.map("{{{{ {} }}}}".format) | st.text(string.printable, max_size=5),
    lambda below: (
        st.builds(
            "{}{}{}".format,
            st.builds("{{% for i in {} %}}".format, expressions) | st.just("{% for i in range(99999) %}"),
            below,
            st.just("{% endfor %}"),
        )
        | st.builds(
            "{{% macro f(n) %}}{}{{{{ f(n-1) ~ f(n-1) if n }}}}{{% endmacro %}}{}".format, below, below
        )
        | st.builds(
            "{{% set ns = namespace(x='ab') %}}{}{{% set ns.x = {} %}}{}".format, below, expressions, below
        )
        | st.builds("{{% if {} %}}{}{{% endif %}}".format, expressions, below)
        | st.lists(below, max_size=3).map("".join)
    ),
    max_leaves=6,
)


def renders(source: str) -> None:
    """Compiles or is refused; each row gets a text that can be stored, or an error of the row's."""
    made: list[Template] = []
    if refusal(lambda: made.append(Template(source, "prompt.template")), "prompt.template"):
        return
    for row in ROWS:
        outcome = within(lambda row=row: _outcome(made[0], row))  # type: ignore[misc]
        if isinstance(outcome, RowError):
            assert outcome.code in ROW_ERROR_CODES
            assert str(outcome).strip()
            assert "\n" not in str(outcome)
            assert len(str(outcome)) < 1000
            str(outcome).encode()
        else:
            assert isinstance(outcome, str)


def _outcome(template: Template, row: dict[str, Any]) -> str | RowError:
    try:
        return template.render(row)
    except RowError as error:
        return error


@pytest.fixture(autouse=True)
def fewer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A million takes seconds; the real limits are met in test_prompt."""
    if FACTOR == 1:
        monkeypatch.setattr(sandbox, "MOST_STEPS", 20_000)


@examples(120)
@given(st.lists(pieces | st.text(max_size=8), max_size=8).map("".join))
def test_any_pieces(source: str) -> None:
    renders(source)


@examples(60)
@given(blocks)
def test_any_blocks(source: str) -> None:
    renders(source)


@examples(60)
@given(st.text())
def test_any_text(source: str) -> None:
    renders(source)


@pytest.mark.parametrize("expression", EXPRESSIONS, ids=range(len(EXPRESSIONS)))
def test_each_expression_alone(expression: str) -> None:
    renders("{{ " + expression + " }}")


@pytest.mark.parametrize("expression", [e for e in EXPRESSIONS if "__" in e and "sort" not in e])
def test_no_way_out_of_the_sandbox(expression: str) -> None:
    try:
        template = Template("{{ " + expression + " }}", "prompt.template")
    except SpecError:
        return
    with pytest.raises(RowError):
        template.render(ROWS[0])
