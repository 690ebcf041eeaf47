"""Expressions of the part of Python that kernels are written in, as LLVM's code: numbers, tuples, truth, calls.

What is known while code is generated is a value of Python's: a constant, a tuple, ``None``, a function. Anything else
is a :class:`Value`.
"""

import ast
import builtins
import operator
from functools import cache

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import default_manager

INT, FLOAT, TRUTH = types.int64, types.float64, types.boolean
WORD, DOUBLE, BIT, VOID = ir.IntType(64), ir.DoubleType(), ir.IntType(1), ir.VoidType()
KNOWN = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.BitAnd: operator.and_, ast.BitOr: operator.or_,
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.Is: operator.is_, ast.IsNot: operator.is_not,
}  # fmt: skip
FLOATS = {ast.Add: "fadd", ast.Sub: "fsub", ast.Mult: "fmul", ast.Div: "fdiv"}
WHOLES = {ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul"}
BITS = {ast.BitAnd: "and_", ast.BitOr: "or_"}
RELATIONS = {ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}


class Value:
    """A number, a vector or a pointer, of one of Numba's types, in code that is being generated."""

    def __init__(self, t, code):
        self.t, self.code = t, code


class Slot:
    """Where a variable is that is assigned more than once."""

    def __init__(self, t, pointer):
        self.t, self.pointer = t, pointer


class Context:
    """What intrinsics ask of a compiler."""

    @staticmethod
    def get_value_type(t):
        return default_manager[t].get_value_type()

    @staticmethod
    def get_dummy_value():
        return ir.Constant(ir.IntType(8).as_pointer(), None)

    def make_tuple(self, builder, t, codes):
        return packed(builder, self.get_value_type(t), codes)

    @staticmethod
    def cast(builder, code, t, wanted):
        if t == wanted or isinstance(t, types.Literal):
            return code
        if wanted == FLOAT and t in (INT, TRUTH):
            return builder.sitofp(code, DOUBLE) if t == INT else builder.uitofp(code, DOUBLE)
        if wanted == INT and t in (FLOAT, TRUTH):
            return builder.fptosi(code, WORD) if t == FLOAT else builder.zext(code, WORD)
        raise TypeError(f"{t} where {wanted} is expected")


CONTEXT = Context()


def packed(builder, t, codes):
    """Some values as one of LLVM's."""
    made = ir.Constant(t, ir.Undefined)
    for at, code in enumerate(codes):
        made = builder.insert_value(made, code, at)
    return made


def as_value(one):
    """A number that may be known, as a value."""
    if isinstance(one, Value):
        return one
    if isinstance(one, bool):
        return Value(TRUTH, BIT(int(one)))
    if isinstance(one, int):
        return Value(INT, WORD(one))
    if isinstance(one, float):
        return Value(FLOAT, DOUBLE(one))
    raise TypeError(f"{one!r} is no number")


def as_truth(found):
    """A truth that may be known, else is LLVM's, as a value."""
    return found if isinstance(found, bool) else Value(TRUTH, found)


def kind(one, literal=False):
    """Numba's type of a value; ``literal``: of a number that is known, one that says which."""
    if isinstance(one, tuple):
        return types.BaseTuple.from_types(list(map(kind, one)))
    if one is None:
        return types.none
    if literal and isinstance(one, int) and not isinstance(one, bool):
        return types.literal(one)
    return as_value(one).t


@cache
def scope(function):
    """The names that a function sees and are not its own."""
    closed = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return vars(builtins) | function.__globals__ | {name: cell.cell_contents for name, cell in closed}


class Expressions:
    """Translates expressions, where a builder stands; ``names`` are the variables."""

    def __init__(self, unit, builder, kernel):
        self.unit, self.builder, self.kernel = unit, builder, kernel
        self.names, self.scope = {}, scope(kernel.py_func)

    def error(self, node, text):
        return TypeError(f"{self.kernel.py_func.__code__.co_filename}, line {node.lineno}: {text}")

    def of(self, node):
        """The value of an expression."""
        translate = getattr(self, f"of_{type(node).__name__}", None)
        if translate is None:
            raise self.error(node, f"kernels know no {type(node).__name__}")
        return translate(node)

    # ---------------------------------------------------------------------------------------------- variables, tuples
    def of_Constant(self, node):
        return node.value

    def of_Name(self, node):
        if node.id in self.names:
            return self.load(self.names[node.id])
        if node.id in self.scope:
            return self.scope[node.id]
        raise self.error(node, f"{node.id} is not defined")

    def of_Tuple(self, node):
        return tuple(map(self.of, node.elts))

    def of_Subscript(self, node):
        return self.of(node.value)[self.of(node.slice)]

    def store(self, old, value):
        """Put a value where the old one is, if that has its type, and return where it is."""
        if isinstance(value, tuple):
            olds = old if isinstance(old, tuple) and len(old) == len(value) else (None,) * len(value)
            return tuple([self.store(*pair) for pair in zip(olds, value, strict=True)])
        if value is None:
            return None
        value = as_value(value)
        if isinstance(old, Slot) and old.t == FLOAT and value.t == INT:
            value = self.convert(value, FLOAT)
        if not (isinstance(old, Slot) and old.t == value.t):
            old = Slot(value.t, cgutils.alloca_once(self.builder, CONTEXT.get_value_type(value.t)))
        self.builder.store(value.code, old.pointer)
        return old

    def load(self, bound):
        if isinstance(bound, tuple):
            return tuple(map(self.load, bound))
        return Value(bound.t, self.builder.load(bound.pointer)) if isinstance(bound, Slot) else bound

    # -------------------------------------------------------------------------------------------------------- numbers
    def convert(self, one, t):
        value = as_value(one)
        return Value(t, CONTEXT.cast(self.builder, value.code, value.t, t))

    def alike(self, a, b):
        """Two numbers, of one type."""
        a, b = as_value(a), as_value(b)
        t = FLOAT if FLOAT in (a.t, b.t) else INT
        return self.convert(a, t), self.convert(b, t)

    def of_BinOp(self, node):
        return self.binary(node, self.of(node.left), self.of(node.right))

    def binary(self, node, a, b):
        builder, op = self.builder, type(node.op)
        if not (isinstance(a, Value) or isinstance(b, Value)) and op in KNOWN:
            return KNOWN[op](a, b)
        a, b = self.alike(a, b)
        if op is ast.Div:
            a, b = self.convert(a, FLOAT), self.convert(b, FLOAT)
        if a.t == FLOAT and op in FLOATS:
            return Value(FLOAT, getattr(builder, FLOATS[op])(a.code, b.code))
        if a.t == INT and op in WHOLES:
            return Value(INT, getattr(builder, WHOLES[op])(a.code, b.code, flags=("nsw",)))
        if a.t == INT and op in BITS:
            return Value(INT, getattr(builder, BITS[op])(a.code, b.code))
        if a.t == FLOAT or op not in (ast.FloorDiv, ast.Mod):
            raise self.error(node, f"kernels know no {op.__name__} of {a.t}")
        rest = builder.srem(a.code, b.code)  # of the sign of a; that of Python's has b's
        differs = builder.icmp_signed("<", builder.xor(rest, b.code), WORD(0))
        below = builder.and_(builder.icmp_signed("!=", rest, WORD(0)), differs)
        if op is ast.Mod:
            return Value(INT, builder.add(rest, builder.select(below, b.code, WORD(0))))
        return Value(INT, builder.sub(builder.sdiv(a.code, b.code), builder.zext(below, WORD)))

    def of_UnaryOp(self, node):
        if isinstance(node.op, ast.Not):
            return as_truth(self.truth(node))
        if not isinstance(node.op, ast.USub):
            raise self.error(node, f"kernels know no {type(node.op).__name__}")
        return self.negative(self.of(node.operand))

    def negative(self, one):
        if not isinstance(one, Value):
            return -one
        minus = self.builder.fneg(one.code) if one.t == FLOAT else self.builder.sub(WORD(0), one.code, flags=("nsw",))
        return Value(one.t, minus)

    # ---------------------------------------------------------------------------------------------------------- truth
    def of_Compare(self, node):
        if len(node.ops) > 1:
            raise self.error(node, "one comparison after the other")
        return as_truth(self.compare(type(node.ops[0]), self.of(node.left), self.of(node.comparators[0])))

    def compare(self, relation, a, b):
        if not (isinstance(a, Value) or isinstance(b, Value)) or relation in (ast.Is, ast.IsNot):
            return KNOWN[relation](a, b)
        a, b = self.alike(a, b)
        if a.t == FLOAT:
            instruction = self.builder.fcmp_unordered if relation is ast.NotEq else self.builder.fcmp_ordered
            return instruction(RELATIONS[relation], a.code, b.code)
        return self.builder.icmp_signed(RELATIONS[relation], a.code, b.code)

    def of_BoolOp(self, node):
        return as_truth(self.truth(node, True))

    def truth(self, node, whole=False):
        """Whether an expression counts as true; ``whole``: what is so judged must be a truth value itself."""
        if isinstance(node, ast.BoolOp):
            return self.either(node.op, node.values, whole)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            found = self.truth(node.operand)
            return not found if isinstance(found, bool) else self.builder.not_(found)
        found = self.of(node)
        if whole and (found.t if isinstance(found, Value) else type(found)) not in (TRUTH, bool):
            raise self.error(node, "no truth value")
        if not isinstance(found, Value):
            return bool(found)
        return found.code if found.t == TRUTH else self.compare(ast.NotEq, found, 0)

    def either(self, op, operands, whole):
        """The truth of ``and`` or ``or``; what need not be looked at is not."""
        both = isinstance(op, ast.And)
        first = self.truth(operands[0], whole)
        if len(operands) == 1 or first is (not both):
            return first
        if isinstance(first, bool):
            return self.either(op, operands[1:], whole)
        place = self.store(None, as_truth(first))
        with self.builder.if_then(first if both else self.builder.not_(first)):
            self.store(place, as_truth(self.either(op, operands[1:], whole)))
        return self.load(place).code

    def of_IfExp(self, node):
        test = self.truth(node.test)
        if isinstance(test, bool):
            return self.of(node.body if test else node.orelse)
        first = last = None
        with self.builder.if_else(test) as branches:
            for branch, side in zip(branches, (node.body, node.orelse), strict=True):
                with branch:
                    first, last = last, self.store(last, self.of(side))
        if first != last:
            raise self.error(node, "two types of values")
        return self.load(last)

    # ---------------------------------------------------------------------------------------------------------- calls
    def of_Call(self, node):
        function, arguments = self.of(node.func), tuple(map(self.of, node.args))
        if node.keywords:
            raise self.error(node, "arguments have no names")
        if hasattr(function, "_defn"):
            return self.intrinsic(function, arguments)
        if isinstance(function, types.ExternalFunction):
            return self.external(function, arguments)
        if hasattr(function, "tree"):
            return self.unit.call(self.builder, function, arguments)
        translate = getattr(self, f"call_{getattr(function, '__name__', '')}", None)
        if translate is None:
            raise self.error(node, f"kernels cannot call {function!r}")
        return translate(*arguments)

    def intrinsic(self, function, arguments):
        sig, generate = function._defn(None, *[kind(one, function._prefer_literal) for one in arguments])
        given = [self.lowered(*pair) for pair in zip(arguments, sig.args, strict=True)]
        return self.raised(sig.return_type, generate(CONTEXT, self.builder, sig, given))

    def external(self, function, arguments):
        sig = function.sig
        result = VOID if sig.return_type == types.void else CONTEXT.get_value_type(sig.return_type)
        t = ir.FunctionType(result, [CONTEXT.get_value_type(one) for one in sig.args])
        callee = cgutils.get_or_insert_function(self.unit.module, t, function.symbol)
        given = [self.convert(*pair).code for pair in zip(arguments, sig.args, strict=True)]
        return self.raised(sig.return_type, self.builder.call(callee, given))

    def lowered(self, one, t):
        """An argument as LLVM's value of one of Numba's types."""
        if isinstance(t, types.BaseTuple):
            each = [self.lowered(*pair) for pair in zip(one, t, strict=True)]
            return packed(self.builder, CONTEXT.get_value_type(t), each)
        if one is None:
            return CONTEXT.get_dummy_value()
        return as_value(one).code if isinstance(t, types.Literal) else self.convert(one, t).code

    def raised(self, t, code):
        """The contrary."""
        if isinstance(t, types.BaseTuple):
            return tuple([self.raised(one, self.builder.extract_value(code, at)) for at, one in enumerate(t)])
        return None if isinstance(t, types.NoneType) else Value(t, code)

    def call_float(self, one):
        return self.convert(one, FLOAT)

    def call_int(self, one):
        return self.convert(one, INT)

    def call_abs(self, one):
        return self.choose(self.compare(ast.Lt, one, 0), self.negative(one), one)

    def call_min(self, first, *others):
        for one in others:
            first = self.choose(self.compare(ast.Lt, one, first), one, first)
        return first

    def call_max(self, first, *others):
        for one in others:
            first = self.choose(self.compare(ast.Gt, one, first), one, first)
        return first

    def choose(self, test, a, b):
        if isinstance(test, bool):
            return a if test else b
        a, b = self.alike(a, b)
        return Value(a.t, self.builder.select(test, a.code, b.code))
