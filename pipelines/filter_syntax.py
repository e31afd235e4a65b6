"""The nodes of Python's syntax that a filter may have, each as a call of an Arrow compute kernel."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.arrow_types import is_text
from pipelines.errors import SpecError
from pipelines.wording import first_line, unknown

#: A column of values or one constant; Arrow's kernels take both.
Value = Any
Evaluate = Callable[[pa.Table], Value]

ALLOWED = (
    "comparisons, and/or/not, & | ~, in/not in, is None, + - * / // %, len(), abs(), col('any name'), "
    ".lower() .upper() .strip() .startswith() .endswith() .contains() .matches()"
)

_COMPARE: dict[type[ast.cmpop], str] = {
    ast.Eq: "equal",
    ast.NotEq: "not_equal",
    ast.Lt: "less",
    ast.LtE: "less_equal",
    ast.Gt: "greater",
    ast.GtE: "greater_equal",
}
#: Method → (kernel, number of string arguments).
_METHODS: dict[str, tuple[str, int]] = {
    "lower": ("utf8_lower", 0),
    "upper": ("utf8_upper", 0),
    "strip": ("utf8_trim_whitespace", 0),
    "startswith": ("starts_with", 1),
    "endswith": ("ends_with", 1),
    "contains": ("match_substring", 1),
    "matches": ("match_substring_regex", 1),  # RE2: linear time, so a user's pattern cannot hang a worker
}
_ARITHMETIC: dict[type[ast.operator], str] = {
    ast.Add: "add_checked",
    ast.Sub: "subtract_checked",
    ast.Mult: "multiply_checked",
}


class Compiler:
    """Turns allowed syntax nodes into closures over a table; everything else is a SpecError."""

    def __init__(self, text: str, key: str) -> None:
        self.text, self.key = text, key
        self.columns: set[str] = set()

    def error(self, node: ast.AST, problem: str) -> SpecError:
        part = ast.get_source_segment(self.text, node) or self.text
        where = "" if part == self.text else f", in {part!r}"
        return SpecError(f"{named(self.text, self.key)}: {problem}{where}")

    def compile(self, node: ast.expr) -> Evaluate:
        match node:
            case ast.BoolOp(op=op, values=values):
                name = "and_kleene" if isinstance(op, ast.And) else "or_kleene"
                return self._logic(node, name, values)
            case ast.BinOp(left=left, op=ast.BitAnd(), right=right):
                return self._logic(node, "and_kleene", [left, right])
            case ast.BinOp(left=left, op=ast.BitOr(), right=right):
                return self._logic(node, "or_kleene", [left, right])
            case ast.BinOp(left=left, op=op, right=right):
                return self._arithmetic(node, left, op, right)
            case ast.UnaryOp(op=ast.Not() | ast.Invert(), operand=operand):
                return self._call(node, "invert", [self._condition(operand)])
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return self._call(node, "negate_checked", [self._number(operand)])
            case ast.Compare(left=left, ops=ops, comparators=comparators):
                return self._compare(node, [left, *comparators], ops)
            case ast.Constant(value=value):
                return self._constant(node, value)
            case ast.Name(id=name):
                return self._column(node, name)
            case (
                ast.Attribute(value=value, attr=name)
                | ast.Subscript(value=value, slice=ast.Constant(value=str(name)))
            ):
                return self._struct_field(node, value, name)
            case ast.Call():
                return self._function(node)
        raise self.error(node, f"{type(node).__name__} is not allowed (allowed: {ALLOWED})")

    # ── Leaves ───────────────────────────────────────────────────────────────────────────────────────────────

    def _constant(self, node: ast.AST, value: object) -> Evaluate:
        if not isinstance(value, (str, int, float, bool)):
            raise self.error(node, "use `is None` or `is not None`" if value is None else "unknown constant")
        try:
            scalar = pa.scalar(value)
        except (OverflowError, pa.ArrowInvalid, UnicodeEncodeError) as error:
            raise self.error(node, f"constant out of range ({error})") from None
        return lambda table: scalar

    def _column(self, node: ast.AST, name: str) -> Evaluate:
        self.columns.add(name)

        def evaluate(table: pa.Table) -> Value:
            if name not in table.column_names:
                hint = "" if isinstance(node, ast.Call) else " (text goes in quotes)"
                raise self.error(node, unknown(name, table.column_names) + hint)
            return _plain(table.column(name))

        return evaluate

    def _struct_field(self, node: ast.AST, of: ast.expr, name: str) -> Evaluate:
        inner = self.compile(of)

        def evaluate(table: pa.Table) -> Value:
            value = inner(table)
            if not pa.types.is_struct(value.type):
                raise self.error(node, f"{value.type} has no field {name!r}")
            names = [value.type.field(i).name for i in range(value.type.num_fields)]
            if name not in names:
                raise self.error(node, unknown(name, names, "field"))
            return _plain(pc.struct_field(value, names.index(name)))

        return evaluate

    # ── Operators ────────────────────────────────────────────────────────────────────────────────────────────

    def _call(self, node: ast.AST, kernel: str, arguments: list[Evaluate], **options: Any) -> Evaluate:
        function = getattr(pc, kernel)

        def evaluate(table: pa.Table) -> Value:
            values = [argument(table) for argument in arguments]
            try:
                return function(*values, **options)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
                types = " and ".join(str(value.type) for value in values)
                raise self.error(node, f"{first_line(error)} ({types})") from None

        return evaluate

    def _logic(self, node: ast.AST, kernel: str, values: list[ast.expr]) -> Evaluate:
        conditions = [self._condition(value) for value in values]
        function = getattr(pc, kernel)

        def evaluate(table: pa.Table) -> Value:
            result = conditions[0](table)
            for condition in conditions[1:]:  # a loop: filters that programs write have hundreds of terms
                result = function(result, condition(table))
            return result

        return evaluate

    def _condition(self, node: ast.expr) -> Evaluate:
        if isinstance(node, ast.Constant) and not isinstance(node.value, bool):
            raise self.error(node, "not a condition; with & and | put each comparison in parentheses")
        return self._typed(node, pa.types.is_boolean, "a condition (true or false)")

    def _number(self, node: ast.expr) -> Evaluate:
        inner = self._typed(node, _is_number, "a number")

        def evaluate(table: pa.Table) -> Value:
            value = inner(table)
            # int8 + int8 would stay int8 and overflow.
            return value.cast(pa.int64()) if pa.types.is_integer(value.type) else value

        return evaluate

    def _typed(self, node: ast.expr, is_type: Callable[[pa.DataType], bool], wanted: str) -> Evaluate:
        inner = self.compile(node)

        def evaluate(table: pa.Table) -> Value:
            value = inner(table)
            if not is_type(value.type):
                raise self.error(node, f"{value.type} where {wanted} is needed")
            return value

        return evaluate

    def _arithmetic(self, node: ast.AST, left: ast.expr, op: ast.operator, right: ast.expr) -> Evaluate:
        a, b = self._number(left), self._number(right)
        if type(op) in _ARITHMETIC:
            return self._call(node, _ARITHMETIC[type(op)], [a, b])
        if not isinstance(op, ast.Div | ast.FloorDiv | ast.Mod):
            raise self.error(node, f"{type(op).__name__} is not allowed (allowed: {ALLOWED})")

        def nonzero(table: pa.Table) -> Value:
            divisor = b(table)  # division by zero is null, not an error of the shard
            return pc.if_else(pc.equal(divisor, 0), pa.scalar(None, divisor.type), divisor)

        def true_quotient(table: pa.Table) -> Value:
            return pc.divide(a(table).cast(pa.float64()), nonzero(table).cast(pa.float64()))

        if isinstance(op, ast.Div):
            return self._call(node, "add", [true_quotient, self._constant(node, 0.0)])

        def remainder(table: pa.Table) -> Value:
            x, y = a(table), nonzero(table)
            quotient = pc.divide(x, y)
            if not pa.types.is_integer(quotient.type):
                quotient = pc.trunc(quotient)
            rest = pc.subtract(x, pc.multiply(quotient, y))
            # Python's remainder has the divisor's sign, the machine's the dividend's.
            wrong = pc.less(pc.multiply(pc.sign(rest), pc.sign(y)), 0)
            return pc.if_else(wrong, pc.add(rest, y), rest)

        if isinstance(op, ast.Mod):
            return self._call(node, "add", [remainder, self._constant(node, 0)])

        def floor_quotient(table: pa.Table) -> Value:
            return pc.divide(pc.subtract(a(table), remainder(table)), nonzero(table))

        return self._call(node, "add", [floor_quotient, self._constant(node, 0)])

    def _compare(self, node: ast.AST, operands: list[ast.expr], ops: list[ast.cmpop]) -> Evaluate:
        pairs = [self._compare_two(node, operands[i], op, operands[i + 1]) for i, op in enumerate(ops)]
        result = pairs[0]
        for pair in pairs[1:]:
            result = self._call(node, "and_kleene", [result, pair])
        return result

    def _compare_two(self, node: ast.AST, left: ast.expr, op: ast.cmpop, right: ast.expr) -> Evaluate:
        is_none = isinstance(right, ast.Constant) and right.value is None
        match op:
            case ast.Is() | ast.IsNot():
                if not is_none:
                    raise self.error(node, "`is` goes with None only; use ==")
                kernel = "is_null" if isinstance(op, ast.Is) else "is_valid"
                return self._call(node, kernel, [self.compile(left)])
            case ast.In() | ast.NotIn():
                inside = self._inside(node, left, right)
                return inside if isinstance(op, ast.In) else self._call(node, "invert", [inside])
        a, b = self.compile(left), self.compile(right)
        kernel = _COMPARE[type(op)]

        def evaluate(table: pa.Table) -> Value:
            x, y = self._alike(node, a(table), b(table))
            return getattr(pc, kernel)(x, y)

        return self._guarded(node, evaluate)

    def _inside(self, node: ast.AST, left: ast.expr, right: ast.expr) -> Evaluate:
        value = self.compile(left)
        if isinstance(right, ast.List | ast.Tuple | ast.Set):
            if not all(isinstance(item, ast.Constant | ast.UnaryOp) for item in right.elts):
                raise self.error(right, "a list after `in` holds constants only")
            if not right.elts:
                raise self.error(right, "the list after `in` is empty")
            items = [self.compile(item) for item in right.elts]

            def evaluate(table: pa.Table) -> Value:
                column = value(table)
                wanted = [self._alike(node, column, item(table))[1] for item in items]
                if is_text(column.type):  # one kernel, whatever the list's length
                    texts = pa.array([scalar.as_py() for scalar in wanted], column.type)
                    found = pc.is_in(column, value_set=texts)
                    return pc.if_else(pc.is_null(column), pa.scalar(None, pa.bool_()), found)
                # Numbers one by one: `equal` promotes int8 and 3.5 to a common type, `is_in` does not.
                found = pc.equal(column, wanted[0])
                for scalar in wanted[1:]:
                    found = pc.or_kleene(found, pc.equal(column, scalar))
                return found

            return self._guarded(node, evaluate)
        if isinstance(left, ast.Constant) and isinstance(left.value, str):  # 'needle' in text
            return self._call(node, "match_substring", [self._text(right)], pattern=left.value)
        raise self.error(node, "`in` needs a list of constants, or 'text' in column")

    def _text(self, node: ast.expr) -> Evaluate:
        return self._typed(node, is_text, "text")

    def _function(self, node: ast.Call) -> Evaluate:
        if node.keywords:
            raise self.error(node, "keyword arguments are not allowed")
        match node.func, node.args:
            case ast.Name(id="col"), [ast.Constant(value=str(name))]:
                return self._column(node, name)
            case ast.Name(id="len"), [argument]:
                return self._length(node, self.compile(argument))
            case ast.Name(id="abs"), [argument]:
                return self._call(node, "abs_checked", [self._number(argument)])
            case ast.Name(id="lower" | "upper" | "strip" as name), [argument]:
                return self._call(node, _METHODS[name][0], [self._text(argument)])
            case ast.Attribute(value=value, attr=name), arguments if name in _METHODS:
                kernel, count = _METHODS[name]
                texts = [
                    a.value for a in arguments if isinstance(a, ast.Constant) and isinstance(a.value, str)
                ]
                if len(texts) != len(arguments) or len(texts) != count:
                    raise self.error(node, f".{name}() takes {'one string' if count else 'no argument'}")
                options = {"pattern": texts[0]} if count else {}
                return self._call(node, kernel, [self._text(value)], **options)
        raise self.error(node, f"unknown function (allowed: {ALLOWED})")

    def _length(self, node: ast.AST, inner: Evaluate) -> Evaluate:
        def evaluate(table: pa.Table) -> Value:
            value = inner(table)
            if is_text(value.type):
                return pc.utf8_length(value)
            if pa.types.is_binary(value.type) or pa.types.is_large_binary(value.type):
                return pc.binary_length(value)
            return pc.list_value_length(value)

        return self._guarded(node, evaluate)

    def _guarded(self, node: ast.AST, evaluate: Evaluate) -> Evaluate:
        def guarded(table: pa.Table) -> Value:
            try:
                return evaluate(table)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
                raise self.error(node, first_line(error)) from None

        return guarded

    def _alike(self, node: ast.AST, x: Value, y: Value) -> tuple[Value, Value]:
        """Both sides as they can be compared; SpecError for text against numbers and the like."""
        a, b = _kind(x.type), _kind(y.type)
        if a == b:
            return x, y
        # A date or time column against text: `day >= '2026-01-31'`.
        if a == "time" and b == "text" and isinstance(y, pa.Scalar):
            return x, y.cast(x.type)
        if b == "time" and a == "text" and isinstance(x, pa.Scalar):
            return x.cast(y.type), y
        raise self.error(node, f"{x.type} cannot be compared with {y.type}")


def named(text: str, key: str) -> str:
    """How a message begins: the key and the condition, shortened."""
    return f"{key} {text if len(text) <= 200 else text[:200] + '…'!r}"


def _plain(value: Value) -> Value:
    """Dictionary columns as their values: most kernels do not take dictionaries."""
    return value.cast(value.type.value_type) if pa.types.is_dictionary(value.type) else value


def _is_number(type_: pa.DataType) -> bool:
    return bool(pa.types.is_integer(type_) or pa.types.is_floating(type_) or pa.types.is_decimal(type_))


def _kind(type_: pa.DataType) -> str:
    if is_text(type_):
        return "text"
    if _is_number(type_):
        return "number"
    if pa.types.is_temporal(type_):
        return "time"
    return str(type_)
