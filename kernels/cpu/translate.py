"""Translates functions of a small part of Python to LLVM's code, in one pass over their text.

The part: int64, float64 and truth values, ``None``, tuples; ``if``, ``while``, ``for`` over a range that ascends or
over what a tuple has; calls of intrinsics, of other such functions and of C's. Types follow from the arguments. What
is known while code is generated is settled then: of an ``if`` on it only one branch is translated. A variable may
change its type, but not in a branch or a loop; ``and`` and ``or`` give truth values.
"""

import ast
from collections import Counter

from llvmlite import ir
from numba.core import cgutils

from gpu_bn.kernels.cpu.expressions import BIT, CONTEXT, INT, VOID, WORD, Expressions, Value, as_value, packed


class Unit:
    """A module of LLVM's with a function that C calls, and those that it calls."""

    def __init__(self, codegen):
        self.module = codegen._create_empty_module("gpu_bn")
        self._made = {}

    def add(self, kernel, kinds, name):
        """Add the function that C calls; its parameters are of the given types."""
        if isinstance(self._define(kernel, kinds, name)[1], tuple):
            raise TypeError(f"{kernel.py_func.__qualname__} returns a tuple, which C does not know")

    def call(self, builder, kernel, arguments):
        """The result of a function, of which there is one for each combination of types of arguments."""
        if kernel.inlines:
            return Body(self, builder, kernel, arguments).inlined()
        key = kernel, shape(arguments)
        if key not in self._made:
            name = self.module.get_unique_name(kernel.py_func.__name__)
            self._made[key] = function, _ = self._define(kernel, shape(arguments), name)
            function.linkage = "internal"
            function.attributes.add("noinline")
        function, result = self._made[key]
        code = builder.call(function, [as_value(one).code for one in leaves(arguments)])
        each = [code]
        if isinstance(result, tuple):
            each = [builder.extract_value(code, at) for at in range(len(leaves(result)))]
        return filled(result, iter(each))

    def _define(self, kernel, kinds, name):
        """A function of LLVM's, and the shape of what it returns."""
        parameters = [CONTEXT.get_value_type(t) for t in leaves(kinds)]
        function = ir.Function(self.module, ir.FunctionType(VOID, parameters), name)
        builder = ir.IRBuilder(function.append_basic_block())
        body = Body(self, builder, kernel, filled(tuple(kinds), iter(function.args)))
        result = body.apart()
        function.ftype = ir.FunctionType(ir_type(result), parameters)
        function.type = function.ftype.as_pointer()
        function.return_value = ir.values.ReturnValue(function, ir_type(result))
        return function, result


def shape(one):
    """The type of a value, of a tuple those of what it has; of ``None`` it is ``None``."""
    if isinstance(one, tuple):
        return tuple(map(shape, one))
    return None if one is None else as_value(one).t


def leaves(tree):
    """What is in a tuple and in the tuples in it, without ``None``."""
    if isinstance(tree, tuple):
        return [leaf for one in tree for leaf in leaves(one)]
    return [] if tree is None else [tree]


def filled(tree, codes):
    """The values of a shape, of LLVM's."""
    if isinstance(tree, tuple):
        return tuple([filled(one, codes) for one in tree])
    return None if tree is None else Value(tree, next(codes))


def ir_type(tree):
    """The type of LLVM's that has a shape's values."""
    each = [CONTEXT.get_value_type(t) for t in leaves(tree)]
    return ir.LiteralStructType(each) if isinstance(tree, tuple) else each[0] if each else VOID


class Body(Expressions):
    """Translates a call of a function: its text, where a builder stands."""

    def __init__(self, unit, builder, kernel, arguments):
        super().__init__(unit, builder, kernel)
        names = [node for node in ast.walk(kernel.tree) if isinstance(node, ast.Name)]
        stored = Counter([*kernel.parameters, *[node.id for node in names if isinstance(node.ctx, ast.Store)]])
        self.changes = {name for name, count in stored.items() if count > 1}
        self.loops, self.results = [], None
        """The blocks behind loops; of a function of its own, the shape of what it returns, once that is known."""
        for name, value in zip(kernel.parameters, arguments, strict=True):
            self.assign(name, value)

    def inlined(self):
        """The result of the call."""
        *most, last = self.kernel.tree.body
        returns = isinstance(last, ast.Return)
        self.run(most if returns else [*most, last])
        return self.of(last.value) if returns and last.value is not None else None

    def apart(self):
        """As a function of its own; the shape of its result, which the first ``return`` settles."""
        self.results = []
        self.run(self.kernel.tree.body)
        if not self.builder.block.is_terminated:
            self.finish(None)
        return self.results[0]

    # ------------------------------------------------------------------------------------------------------ variables
    def assign(self, name, value):
        self.names[name] = self.store(self.names.get(name), value) if name in self.changes else value

    def bind(self, target, value):
        if isinstance(target, ast.Name):
            self.assign(target.id, value)
        else:
            for one, part in zip(target.elts, value, strict=True):
                self.bind(one, part)

    def check(self, node, before):
        """A branch or a loop leaves variables where they were."""
        for name, bound in before.items():
            if self.names[name] != bound:
                raise self.error(node, f"{name} changes its type")

    # ----------------------------------------------------------------------------------------------------- statements
    def run(self, statements):
        for one in statements:
            if self.builder.block.is_terminated:
                return
            translate = getattr(self, f"run_{type(one).__name__}", None)
            if translate is None:
                raise self.error(one, f"kernels know no {type(one).__name__}")
            translate(one)

    def run_Pass(self, _):
        pass

    def run_Expr(self, node):
        self.of(node.value)

    def run_Assign(self, node):
        value = self.of(node.value)
        for target in node.targets:
            self.bind(target, value)

    def run_AugAssign(self, node):
        self.bind(node.target, self.binary(node, self.load(self.names[node.target.id]), self.of(node.value)))

    def run_Return(self, node):
        if self.results is None:
            raise self.error(node, "what is inlined returns at its end only")
        self.finish(None if node.value is None else self.of(node.value))

    def finish(self, value):
        self.results = self.results or [shape(value)]
        pairs = zip(leaves(value), leaves(self.results[0]), strict=True)
        codes = [self.convert(*pair).code for pair in pairs]
        if isinstance(self.results[0], tuple):
            codes = [packed(self.builder, ir_type(self.results[0]), codes)]
        if codes:
            self.builder.ret(*codes)
        else:
            self.builder.ret_void()

    def run_If(self, node):
        test = self.truth(node.test)
        if isinstance(test, bool):
            self.run(node.body if test else node.orelse)
            return
        before, ended = dict(self.names), True
        with self.builder.if_else(test) as branches:
            for branch, side in zip(branches, (node.body, node.orelse), strict=True):
                with branch:
                    self.run(side)
                    ended = ended and self.builder.block.is_terminated
                    self.check(node, before)
        if ended:
            self.builder.unreachable()

    def run_While(self, node):
        self.loop(node, lambda: self.truth(node.test))

    def run_Break(self, _):
        self.builder.branch(self.loops[-1])

    def loop(self, node, test, begin=None, end=None):
        """``begin`` and ``end`` add to what is done each time."""
        builder, before = self.builder, dict(self.names)
        head, body, after = [builder.append_basic_block() for _ in range(3)]
        builder.branch(head)
        builder.position_at_end(head)
        goes_on = test()
        builder.cbranch(BIT(int(goes_on)) if isinstance(goes_on, bool) else goes_on, body, after)
        builder.position_at_end(body)
        self.loops.append(after)
        if begin:
            begin()
        self.run(node.body)
        self.loops.pop()
        if not builder.block.is_terminated:
            if end:
                end()
            builder.branch(head)
        self.check(node, before)
        builder.position_at_end(after)

    def run_For(self, node):
        called = node.iter.func.id if isinstance(node.iter, ast.Call) and isinstance(node.iter.func, ast.Name) else ""
        if called == "range":
            self.ascend(node, *[self.convert(self.of(one), INT).code for one in node.iter.args])
            return
        members = self.of(node.iter.args[0] if called == "enumerate" else node.iter)
        for member in enumerate(members) if called == "enumerate" else members:
            self.bind(node.target, member)
            self.run(node.body)

    def ascend(self, node, *limits):
        builder = self.builder
        start, stop, by = {1: (WORD(0), *limits, WORD(1)), 2: (*limits, WORD(1)), 3: limits}[len(limits)]
        place = cgutils.alloca_once_value(builder, start)
        self.loop(
            node,
            lambda: builder.icmp_signed("<", builder.load(place), stop),
            lambda: self.bind(node.target, Value(INT, builder.load(place))),
            lambda: builder.store(builder.add(builder.load(place), by, flags=("nsw",)), place),
        )
