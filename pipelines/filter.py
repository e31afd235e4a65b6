"""`input.filter`: a row condition in a safe subset of Python, evaluated with Arrow's compute kernels.

    lang == 'en' and 0.5 < score <= 1 and len(doc) < 20_000 and not url.startswith('http://')

The text is parsed to Python's syntax tree and each allowed node becomes a call of a vectorised kernel
(`filter_syntax`); nothing is ever passed to `eval`. Null behaves as in SQL: a comparison with null is null, and a row
whose condition is null is not selected (`is None` and `is not None` ask for it).
"""

from __future__ import annotations

import ast
import re
import warnings
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.errors import SpecError
from pipelines.filter_syntax import Compiler, Evaluate, named

#: `lang = 'en'`, the commonest slip.
_LONE_EQUALS = re.compile(r"(?<![=!<>])=(?!=)")


@dataclass(frozen=True)
class Filter:
    """A compiled row condition."""

    text: str
    key: str
    """Where the condition stands in the job file."""
    columns: frozenset[str]
    """Top-level columns that the condition reads."""
    _evaluate: Evaluate = field(repr=False, compare=False)

    def check(self, schema: pa.Schema) -> None:
        """Raise SpecError where a column is missing or the types do not go together; reads no data."""
        # One row of nulls: without a row some kernels do not look at their options (a bad regular expression).
        self.mask(pa.table([pa.nulls(1, item.type) for item in schema], schema=_nullable(schema)))

    def mask(self, table: pa.Table) -> pa.BooleanArray:
        """One value per row of `table`, never null: true where the condition holds.

        Raises SpecError for a column that `table` does not have, and for types or values that do not go together.
        """
        try:
            value = self._evaluate(table)
        except RecursionError:
            raise SpecError(f"{named(self.text, self.key)}: too deeply nested") from None
        if not pa.types.is_boolean(value.type):
            raise SpecError(f"{named(self.text, self.key)}: gives {value.type} values, not true or false")
        if isinstance(value, pa.Scalar):
            return pa.array([value.as_py() is True] * table.num_rows, pa.bool_())
        if isinstance(value, pa.ChunkedArray):
            value = value.combine_chunks()
        return pc.fill_null(value, False)


def compile_filter(text: str, key: str = "input.filter") -> Filter:
    """Compile a row condition, which stands under `key` in the job file. Raises SpecError that quotes the text and the part that is not understood."""
    stripped = text.strip()
    compiler = Compiler(stripped, key)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # `is 'en'`: refused below with a better message
            tree = ast.parse(stripped, mode="eval")
        evaluate = compiler.compile(tree.body)
    except SyntaxError as error:
        place = f" at character {error.offset}" if error.offset else ""
        hint = "; compare with ==" if _LONE_EQUALS.search(stripped) else ""
        raise SpecError(f"{named(stripped, key)}: not a condition: {error.msg}{place}{hint}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise SpecError(f"{named(stripped, key)}: cannot be parsed: {error}") from None
    return Filter(stripped, key, frozenset(compiler.columns), evaluate)


def _nullable(schema: pa.Schema) -> pa.Schema:
    """The schema with every column nullable."""
    return pa.schema([item.with_nullable(True) for item in schema])
