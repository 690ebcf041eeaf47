"""Translate functions in a subset of Python to LLVM IR, in one pass over their syntax tree.

The subset has int64, float64, bool, ``None`` and tuples; ``if``, ``while``, and ``for`` over an ascending range or the
members of a tuple; calls of intrinsics, of C functions and of other functions in the subset. Types follow from the
arguments. An ``if`` whose condition is known while code is generated is translated as one branch only. A variable may
change its type, but not in a branch or a loop; ``and`` and ``or`` return a bool.
"""

import ast
from collections import Counter

from llvmlite import ir
from numba.core import cgutils

from gpu_bn.kernels.cpu.expressions import BIT, CONTEXT, INT, INT64, VOID, Expressions, Value, as_value, pack


class Unit:
    """An LLVM module with one function that C calls, and the functions that it calls in turn."""

    def __init__(self, codegen):
        self.module = codegen._create_empty_module("gpu_bn")
        self._functions = {}

    def add(self, kernel, parameter_types, name):
        """Add the function that C calls."""
        if isinstance(self._define(kernel, parameter_types, name)[1], tuple):
            raise TypeError(f"expected a kernel that returns a number, {kernel.py_func.__qualname__} returns a tuple")

    def call(self, builder, kernel, arguments):
        """Return the result of a call; a function that is not inlined is translated once for each type of arguments."""
        if kernel.inlines:
            return Body(self, builder, kernel, arguments).inline()
        key = kernel, types_of(arguments)
        if key not in self._functions:
            name = self.module.get_unique_name(kernel.py_func.__name__)
            self._functions[key] = function, _ = self._define(kernel, types_of(arguments), name)
            function.linkage = "internal"
            function.attributes.add("noinline")
        function, result = self._functions[key]
        returned = builder.call(function, [as_value(one).llvm for one in flatten(arguments)])
        each = [returned]
        if isinstance(result, tuple):
            each = [builder.extract_value(returned, at) for at in range(len(flatten(result)))]
        return unflatten(result, iter(each))

    def _define(self, kernel, parameter_types, name):
        """Return a new LLVM function, and the types of its result."""
        parameters = [CONTEXT.get_value_type(t) for t in flatten(parameter_types)]
        function = ir.Function(self.module, ir.FunctionType(VOID, parameters), name)
        builder = ir.IRBuilder(function.append_basic_block())
        body = Body(self, builder, kernel, unflatten(tuple(parameter_types), iter(function.args)))
        result = body.define()
        function.ftype = ir.FunctionType(llvm_type(result), parameters)
        function.type = function.ftype.as_pointer()
        function.return_value = ir.values.ReturnValue(function, llvm_type(result))
        return function, result


def types_of(value):
    """Return the Numba type of a number, ``None`` for ``None``, and for a tuple a tuple of them."""
    if isinstance(value, tuple):
        return tuple(map(types_of, value))
    return None if value is None else as_value(value).type


def flatten(tree):
    """Return the members of nested tuples as a list, without ``None``."""
    if isinstance(tree, tuple):
        return [leaf for one in tree for leaf in flatten(one)]
    return [] if tree is None else [tree]


def unflatten(tree, llvm_values):
    """Return values in the nested tuples of the types ``tree``; ``llvm_values`` is an iterator over them."""
    if isinstance(tree, tuple):
        return tuple([unflatten(one, llvm_values) for one in tree])
    return None if tree is None else Value(tree, next(llvm_values))


def llvm_type(tree):
    """Return the LLVM type of a result of the types ``tree``: a flat struct for a tuple, void for ``None``."""
    each = [CONTEXT.get_value_type(t) for t in flatten(tree)]
    return ir.LiteralStructType(each) if isinstance(tree, tuple) else each[0] if each else VOID


class Body(Expressions):
    """Translate the body of a function for given arguments, at the position of a builder."""

    def __init__(self, unit, builder, kernel, arguments):
        super().__init__(unit, builder, kernel)
        names = [node for node in ast.walk(kernel.tree) if isinstance(node, ast.Name)]
        stored = Counter([*kernel.parameters, *[node.id for node in names if isinstance(node.ctx, ast.Store)]])
        self.reassigned = {name for name, count in stored.items() if count > 1}
        self.loop_exits = []
        """The blocks that ``break`` jumps to, of the loops around the current statement."""
        self.result_types = None
        """``None`` while code is inlined; else a list, empty until the first ``return`` settles the types."""
        for name, value in zip(kernel.parameters, arguments, strict=True):
            self.assign(name, value)

    def inline(self):
        """Translate the body in place, and return its result."""
        *most, last = self.kernel.tree.body
        returns = isinstance(last, ast.Return)
        self.translate(most if returns else [*most, last])
        return self.evaluate(last.value) if returns and last.value is not None else None

    def define(self):
        """Translate the body of an LLVM function, and return the types of its result."""
        self.result_types = []
        self.translate(self.kernel.tree.body)
        if not self.builder.block.is_terminated:
            self.return_value(None)
        return self.result_types[0]

    # ------------------------------------------------------------------------------------------------------ variables
    def assign(self, name, value):
        self.names[name] = self.store(self.names.get(name), value) if name in self.reassigned else value

    def bind(self, target, value):
        if isinstance(target, ast.Name):
            self.assign(target.id, value)
        else:
            for one, part in zip(target.elts, value, strict=True):
                self.bind(one, part)

    def check_types(self, node, before):
        """Refuse a branch or a loop after which a variable is in another slot than ``before``."""
        for name, bound in before.items():
            if self.names[name] != bound:
                raise self.error(node, f"{name} changes its type in a branch or a loop")

    # ----------------------------------------------------------------------------------------------------- statements
    def translate(self, statements):
        for statement in statements:
            if self.builder.block.is_terminated:
                return
            translate = getattr(self, f"translate_{type(statement).__name__}", None)
            if translate is None:
                raise self.error(statement, f"kernels do not support {type(statement).__name__}")
            translate(statement)

    def translate_Pass(self, _):
        pass

    def translate_Expr(self, node):
        self.evaluate(node.value)

    def translate_Assign(self, node):
        value = self.evaluate(node.value)
        for target in node.targets:
            self.bind(target, value)

    def translate_AugAssign(self, node):
        self.bind(node.target, self.binary(node, self.load(self.names[node.target.id]), self.evaluate(node.value)))

    def translate_Return(self, node):
        if self.result_types is None:
            raise self.error(node, "an inlined function may return only in its last statement")
        self.return_value(None if node.value is None else self.evaluate(node.value))

    def return_value(self, value):
        self.result_types = self.result_types or [types_of(value)]
        pairs = zip(flatten(value), flatten(self.result_types[0]), strict=True)
        each = [self.convert(*pair).llvm for pair in pairs]
        if isinstance(self.result_types[0], tuple):
            each = [pack(self.builder, llvm_type(self.result_types[0]), each)]
        if each:
            self.builder.ret(*each)
        else:
            self.builder.ret_void()

    def translate_If(self, node):
        test = self.condition(node.test)
        if isinstance(test, bool):
            self.translate(node.body if test else node.orelse)
            return
        before, ended = dict(self.names), True
        with self.builder.if_else(test) as branches:
            for branch, side in zip(branches, (node.body, node.orelse), strict=True):
                with branch:
                    self.translate(side)
                    ended = ended and self.builder.block.is_terminated
                    self.check_types(node, before)
        if ended:
            self.builder.unreachable()

    def translate_While(self, node):
        self.loop(node, lambda: self.condition(node.test))

    def translate_Break(self, _):
        self.builder.branch(self.loop_exits[-1])

    def loop(self, node, test, begin=None, end=None):
        """Translate a loop; ``begin`` and ``end`` add code before and after its body."""
        builder, before = self.builder, dict(self.names)
        head, body, after = [builder.append_basic_block() for _ in range(3)]
        builder.branch(head)
        builder.position_at_end(head)
        goes_on = test()
        builder.cbranch(BIT(int(goes_on)) if isinstance(goes_on, bool) else goes_on, body, after)
        builder.position_at_end(body)
        self.loop_exits.append(after)
        if begin:
            begin()
        self.translate(node.body)
        self.loop_exits.pop()
        if not builder.block.is_terminated:
            if end:
                end()
            builder.branch(head)
        self.check_types(node, before)
        builder.position_at_end(after)

    def translate_For(self, node):
        called = node.iter.func.id if isinstance(node.iter, ast.Call) and isinstance(node.iter.func, ast.Name) else ""
        if called == "range":
            self.loop_over_range(node, *[self.convert(self.evaluate(one), INT).llvm for one in node.iter.args])
            return
        members = self.evaluate(node.iter.args[0] if called == "enumerate" else node.iter)
        for member in enumerate(members) if called == "enumerate" else members:
            self.bind(node.target, member)
            self.translate(node.body)

    def loop_over_range(self, node, *limits):
        builder = self.builder
        start, stop, step = {1: (INT64(0), *limits, INT64(1)), 2: (*limits, INT64(1)), 3: limits}[len(limits)]
        counter = cgutils.alloca_once_value(builder, start)
        self.loop(
            node,
            lambda: builder.icmp_signed("<", builder.load(counter), stop),
            lambda: self.bind(node.target, Value(INT, builder.load(counter))),
            lambda: builder.store(builder.add(builder.load(counter), step, flags=("nsw",)), counter),
        )
