"""Translate the expressions that kernels may use to LLVM IR: numbers, tuples, conditions and calls.

Whatever is known while code is generated is a plain Python value: a constant, a tuple, ``None`` or a function.
Everything else is a :class:`Value`.
"""

import ast
import builtins
import operator
from functools import cache, reduce

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import default_manager

INT, FLOAT, BOOL = types.int64, types.float64, types.boolean
INT64, DOUBLE, BIT, VOID = ir.IntType(64), ir.DoubleType(), ir.IntType(1), ir.VoidType()
PYTHON_OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.BitAnd: operator.and_, ast.BitOr: operator.or_,
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.Is: operator.is_, ast.IsNot: operator.is_not,
}  # fmt: skip
FLOAT_INSTRUCTIONS = {ast.Add: "fadd", ast.Sub: "fsub", ast.Mult: "fmul", ast.Div: "fdiv"}
INT_INSTRUCTIONS = {ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul"}
BIT_INSTRUCTIONS = {ast.BitAnd: "and_", ast.BitOr: "or_"}
COMPARISONS = {ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}


class Value:
    """A number, vector or pointer that the generated code computes: its Numba type and its LLVM value."""

    def __init__(self, t, llvm):
        self.type, self.llvm = t, llvm


class Slot:
    """The stack memory of a variable that is assigned more than once."""

    def __init__(self, t, pointer):
        self.type, self.pointer = t, pointer


class Context:
    """The methods of Numba's typing context that intrinsics call."""

    @staticmethod
    def get_value_type(t):
        return default_manager[t].get_value_type()

    @staticmethod
    def get_dummy_value():
        return ir.Constant(ir.IntType(8).as_pointer(), None)

    def make_tuple(self, builder, t, values):
        return pack(builder, self.get_value_type(t), values)

    @staticmethod
    def cast(builder, value, t, wanted):
        if t == wanted or isinstance(t, types.Literal):
            return value
        if wanted == FLOAT and t in (INT, BOOL):
            return builder.sitofp(value, DOUBLE) if t == INT else builder.uitofp(value, DOUBLE)
        if wanted == INT and t in (FLOAT, BOOL):
            return builder.fptosi(value, INT64) if t == FLOAT else builder.zext(value, INT64)
        raise TypeError(f"expected {wanted}, got {t}")


CONTEXT = Context()


def pack(builder, t, values):
    """Return LLVM values as one LLVM struct or array of type ``t``."""
    packed = ir.Constant(t, ir.Undefined)
    for at, value in enumerate(values):
        packed = builder.insert_value(packed, value, at)
    return packed


def as_value(number):
    """Return a number as a :class:`Value`, whether it is one already or a Python constant."""
    if isinstance(number, Value):
        return number
    if isinstance(number, bool):
        return Value(BOOL, BIT(int(number)))
    if isinstance(number, int):
        return Value(INT, INT64(number))
    if isinstance(number, float):
        return Value(FLOAT, DOUBLE(number))
    raise TypeError(f"expected a number, got {number!r}")


def as_bool(condition):
    """Return a condition, which is a Python bool or an LLVM bit, as a Python bool or a :class:`Value`."""
    return condition if isinstance(condition, bool) else Value(BOOL, condition)


def type_of(value, literal=False):
    """Return the Numba type of a value; ``literal``: for a Python int, the literal type of its value."""
    if isinstance(value, tuple):
        return types.BaseTuple.from_types(list(map(type_of, value)))
    if value is None:
        return types.none
    if literal and isinstance(value, int) and not isinstance(value, bool):
        return types.literal(value)
    return as_value(value).type


@cache
def scope(function):
    """Return the builtins, globals and closure variables that a function sees, by name."""
    closed = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return vars(builtins) | function.__globals__ | {name: cell.cell_contents for name, cell in closed}


class Expressions:
    """Translate expressions at the position of a builder; ``names`` has the local variables."""

    def __init__(self, unit, builder, kernel):
        self.unit, self.builder, self.kernel = unit, builder, kernel
        self.names, self.scope = {}, scope(kernel.py_func)

    def error(self, node, text):
        return TypeError(f"{self.kernel.py_func.__code__.co_filename}, line {node.lineno}: {text}")

    def evaluate(self, node):
        """Return the value of an expression."""
        translate = getattr(self, f"evaluate_{type(node).__name__}", None)
        if translate is None:
            raise self.error(node, f"kernels do not support {type(node).__name__}")
        return translate(node)

    # ---------------------------------------------------------------------------------------------- variables, tuples
    def evaluate_Constant(self, node):
        return node.value

    def evaluate_Name(self, node):
        if node.id in self.names:
            return self.load(self.names[node.id])
        if node.id in self.scope:
            return self.scope[node.id]
        raise self.error(node, f"{node.id} is not defined")

    def evaluate_Tuple(self, node):
        return tuple(map(self.evaluate, node.elts))

    def evaluate_Subscript(self, node):
        return self.evaluate(node.value)[self.evaluate(node.slice)]

    def store(self, slot, value):
        """Store a value, and return its slots: those given, or new ones where the type differs."""
        if isinstance(value, tuple):
            slots = slot if isinstance(slot, tuple) and len(slot) == len(value) else (None,) * len(value)
            return tuple([self.store(*pair) for pair in zip(slots, value, strict=True)])
        if value is None:
            return None
        value = as_value(value)
        if isinstance(slot, Slot) and slot.type == FLOAT and value.type == INT:
            value = self.convert(value, FLOAT)
        if not (isinstance(slot, Slot) and slot.type == value.type):
            slot = Slot(value.type, cgutils.alloca_once(self.builder, CONTEXT.get_value_type(value.type)))
        self.builder.store(value.llvm, slot.pointer)
        return slot

    def load(self, bound):
        """Return what a name is bound to, with slots replaced by the values in them."""
        if isinstance(bound, tuple):
            return tuple(map(self.load, bound))
        return Value(bound.type, self.builder.load(bound.pointer)) if isinstance(bound, Slot) else bound

    # -------------------------------------------------------------------------------------------------------- numbers
    def convert(self, number, t):
        value = as_value(number)
        return Value(t, CONTEXT.cast(self.builder, value.llvm, value.type, t))

    def promote(self, a, b):
        """Convert two numbers to their common type: float64 if one of them has it, else int64."""
        a, b = as_value(a), as_value(b)
        t = FLOAT if FLOAT in (a.type, b.type) else INT
        return self.convert(a, t), self.convert(b, t)

    def evaluate_BinOp(self, node):
        return self.binary(node, self.evaluate(node.left), self.evaluate(node.right))

    def binary(self, node, a, b):
        """Return the result of the operator of ``node`` on two values."""
        builder, op = self.builder, type(node.op)
        if not (isinstance(a, Value) or isinstance(b, Value)) and op in PYTHON_OPERATORS:
            return PYTHON_OPERATORS[op](a, b)
        a, b = self.promote(a, b)
        if op is ast.Div:
            a, b = self.convert(a, FLOAT), self.convert(b, FLOAT)
        if a.type == FLOAT and op in FLOAT_INSTRUCTIONS:
            return Value(FLOAT, getattr(builder, FLOAT_INSTRUCTIONS[op])(a.llvm, b.llvm))
        if a.type == INT and op in INT_INSTRUCTIONS:
            return Value(INT, getattr(builder, INT_INSTRUCTIONS[op])(a.llvm, b.llvm, flags=("nsw",)))
        if a.type == INT and op in BIT_INSTRUCTIONS:
            return Value(INT, getattr(builder, BIT_INSTRUCTIONS[op])(a.llvm, b.llvm))
        if a.type == FLOAT or op not in (ast.FloorDiv, ast.Mod):
            raise self.error(node, f"kernels do not support {op.__name__} of {a.type}")
        rest = builder.srem(a.llvm, b.llvm)  # has the sign of a; in Python it has the sign of b
        differs = builder.icmp_signed("<", builder.xor(rest, b.llvm), INT64(0))
        below = builder.and_(builder.icmp_signed("!=", rest, INT64(0)), differs)
        if op is ast.Mod:
            return Value(INT, builder.add(rest, builder.select(below, b.llvm, INT64(0))))
        return Value(INT, builder.sub(builder.sdiv(a.llvm, b.llvm), builder.zext(below, INT64)))

    def evaluate_UnaryOp(self, node):
        if isinstance(node.op, ast.Not):
            return as_bool(self.condition(node))
        if not isinstance(node.op, ast.USub):
            raise self.error(node, f"kernels do not support {type(node.op).__name__}")
        return self.negate(self.evaluate(node.operand))

    def negate(self, number):
        if not isinstance(number, Value):
            return -number
        if number.type == FLOAT:
            return Value(FLOAT, self.builder.fneg(number.llvm))
        return Value(number.type, self.builder.sub(INT64(0), number.llvm, flags=("nsw",)))

    # ----------------------------------------------------------------------------------------------------- conditions
    # A condition is a Python bool if it is known while code is generated, else an LLVM bit.
    def evaluate_Compare(self, node):
        if len(node.ops) > 1:
            raise self.error(node, "kernels do not support chained comparisons")
        return as_bool(self.compare(type(node.ops[0]), self.evaluate(node.left), self.evaluate(node.comparators[0])))

    def compare(self, relation, a, b):
        """Return the condition that two values are in a relation, such as ``ast.Lt``."""
        if not (isinstance(a, Value) or isinstance(b, Value)) or relation in (ast.Is, ast.IsNot):
            return PYTHON_OPERATORS[relation](a, b)
        a, b = self.promote(a, b)
        if a.type == FLOAT:
            instruction = self.builder.fcmp_unordered if relation is ast.NotEq else self.builder.fcmp_ordered
            return instruction(COMPARISONS[relation], a.llvm, b.llvm)
        return self.builder.icmp_signed(COMPARISONS[relation], a.llvm, b.llvm)

    def evaluate_BoolOp(self, node):
        return as_bool(self.condition(node, True))

    def condition(self, node, strict=False):
        """Return the condition that an expression is true; ``strict``: operands of ``and``, ``or`` must be bools."""
        if isinstance(node, ast.BoolOp):
            return self.short_circuit(node.op, node.values, strict)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            condition = self.condition(node.operand)
            return not condition if isinstance(condition, bool) else self.builder.not_(condition)
        value = self.evaluate(node)
        if strict and (value.type if isinstance(value, Value) else type(value)) not in (BOOL, bool):
            raise self.error(node, "expected a bool as the operand of `and` or `or`")
        if not isinstance(value, Value):
            return bool(value)
        return value.llvm if value.type == BOOL else self.compare(ast.NotEq, value, 0)

    def short_circuit(self, op, operands, strict):
        """Return the condition of ``and`` or ``or``, which evaluates no operand after the one that decides."""
        both = isinstance(op, ast.And)
        first = self.condition(operands[0], strict)
        if len(operands) == 1 or first is (not both):
            return first
        if isinstance(first, bool):
            return self.short_circuit(op, operands[1:], strict)
        slot = self.store(None, as_bool(first))
        with self.builder.if_then(first if both else self.builder.not_(first)):
            self.store(slot, as_bool(self.short_circuit(op, operands[1:], strict)))
        return self.load(slot).llvm

    def evaluate_IfExp(self, node):
        test = self.condition(node.test)
        if isinstance(test, bool):
            return self.evaluate(node.body if test else node.orelse)
        first = last = None
        with self.builder.if_else(test) as branches:
            for branch, side in zip(branches, (node.body, node.orelse), strict=True):
                with branch:
                    first, last = last, self.store(last, self.evaluate(side))
        if first != last:
            raise self.error(node, "the two values of a conditional expression have different types")
        return self.load(last)

    # ---------------------------------------------------------------------------------------------------------- calls
    def evaluate_Call(self, node):
        function, arguments = self.evaluate(node.func), tuple(map(self.evaluate, node.args))
        if node.keywords:
            raise self.error(node, "kernels do not support keyword arguments")
        if hasattr(function, "_defn"):
            return self.call_intrinsic(function, arguments)
        if isinstance(function, types.ExternalFunction):
            return self.call_external(function, arguments)
        if hasattr(function, "tree"):
            return self.unit.call(self.builder, function, arguments)
        translate = getattr(self, f"builtin_{getattr(function, '__name__', '')}", None)
        if translate is None:
            raise self.error(node, f"kernels cannot call {function!r}")
        return translate(*arguments)

    def call_intrinsic(self, function, arguments):
        sig, generate = function._defn(None, *[type_of(one, function._prefer_literal) for one in arguments])
        given = [self.to_llvm(*pair) for pair in zip(arguments, sig.args, strict=True)]
        return self.from_llvm(sig.return_type, generate(CONTEXT, self.builder, sig, given))

    def call_external(self, function, arguments):
        """Call a C function, an ``ExternalFunction`` of Numba."""
        sig = function.sig
        result = VOID if sig.return_type == types.void else CONTEXT.get_value_type(sig.return_type)
        t = ir.FunctionType(result, [CONTEXT.get_value_type(one) for one in sig.args])
        callee = cgutils.get_or_insert_function(self.unit.module, t, function.symbol)
        given = [self.convert(*pair).llvm for pair in zip(arguments, sig.args, strict=True)]
        return self.from_llvm(sig.return_type, self.builder.call(callee, given))

    def to_llvm(self, value, t):
        """Return a value as the LLVM value of a Numba type: a struct for a tuple, a null pointer for ``None``."""
        if isinstance(t, types.BaseTuple):
            each = [self.to_llvm(*pair) for pair in zip(value, t, strict=True)]
            return pack(self.builder, CONTEXT.get_value_type(t), each)
        if value is None:
            return CONTEXT.get_dummy_value()
        return as_value(value).llvm if isinstance(t, types.Literal) else self.convert(value, t).llvm

    def from_llvm(self, t, llvm):
        """Return the value of Numba type ``t`` that an LLVM value stands for."""
        if isinstance(t, types.BaseTuple):
            return tuple([self.from_llvm(one, self.builder.extract_value(llvm, at)) for at, one in enumerate(t)])
        return None if isinstance(t, types.NoneType) else Value(t, llvm)

    def builtin_float(self, number):
        return self.convert(number, FLOAT)

    def builtin_int(self, number):
        return self.convert(number, INT)

    def builtin_abs(self, number):
        return self.select(self.compare(ast.Lt, number, 0), self.negate(number), number)

    def builtin_min(self, *numbers):
        return reduce(lambda a, b: self.select(self.compare(ast.Lt, b, a), b, a), numbers)

    def builtin_max(self, *numbers):
        return reduce(lambda a, b: self.select(self.compare(ast.Gt, b, a), b, a), numbers)

    def select(self, condition, a, b):
        """Return ``a`` where the condition holds, else ``b``, without a branch."""
        if isinstance(condition, bool):
            return a if condition else b
        a, b = self.promote(a, b)
        return Value(a.type, self.builder.select(condition, a.llvm, b.llvm))
