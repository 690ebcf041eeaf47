"""Code translated to LLVM gives what Python gives; code that cannot be translated is refused with its line."""

import ctypes
import linecache
import math
import textwrap
from itertools import count, product

import pytest

pytest.importorskip("numba", reason="needs Numba, whose types kernels have")

from gpu_bn.kernels.cpu.compiler import cold, inlined

WHOLE, REAL = ctypes.c_int64, ctypes.c_double
_names = count()


def define(text, **names):
    """Execute a source text and return its last function; ``linecache`` knows the text, as if it were a file."""
    name, text = f"<translated {next(_names)}>", textwrap.dedent(text)
    linecache.cache[name] = len(text), None, text.splitlines(True), name
    known = {"__name__": __name__, "inlined": inlined, "cold": cold, **names}
    exec(compile(text, name, "exec", dont_inherit=True), known)
    return list(known.values())[-1]


def compiled(kernel, real=(), returns=WHOLE):
    kinds = [REAL if name in real else WHOLE for name in kernel.parameters]
    call = ctypes.CFUNCTYPE(returns, *kinds)(kernel.address(real))
    call.kernel = kernel
    return call


WHOLES = {
    "arithmetic": "a + b * 3 - -a",
    "quotient": "a // b",
    "remainder": "a % b",
    "bits": "(a & b) | 4",
    "comparisons": "int(a < b) + 2 * (a <= b) + 4 * (a > b) + 8 * (a >= b) + 16 * (a == b) + 32 * (a != b)",
    "and, or, not": "1 if (a > 2 and not b < 0) or a == b else 0",
    "not looked at": "1 if b == 0 or a // b > 1 else 0",
    "a choice": "a if a & 1 else b",
    "pairs": "((a, b) if a < b else (b, a))[0]",
    "least": "min(a, b, 3) + 10 * max(a, b, -3) + abs(a)",
    "a float": "int(float(a) / 4.0 > b)",
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLES)
def test_whole_numbers(name):
    text = f"def f(a, b):\n    return {WHOLES[name]}"
    exact, call = define(text), compiled(cold(define(text)))
    divides = name in ("quotient", "remainder")
    for a, b in product((-7, -3, -1, 0, 1, 2, 5, 2**40), (-5, -2, 1, 3, 7) if divides else (-5, -2, 0, 1, 3, 7)):
        assert call(a, b) == exact(a, b), (a, b)


REALS = {
    "arithmetic": "a + b * 2 - -a / (b * b + 1)",
    "comparisons": "float((a < b) + 2 * (a <= b) + 4 * (a > b) + 8 * (a >= b) + 16 * (a == b) + 32 * (a != b))",
    "choices": "abs(a) if a > b else a * 1",
    "least": "min(a, b) + max(a, 0.5)",
    "truth": "1.0 if a and b else 0.0",
}


@pytest.mark.parametrize("name", REALS)
def test_floats(name):
    text = f"def f(a, b):\n    return {REALS[name]}"
    exact, call = define(text), compiled(cold(define(text)), ("a", "b"), REAL)
    for pair in product((-2.5, -0.0, 0.0, 1.0, 1e300, math.inf), repeat=2):
        got, truth = call(*pair), exact(*pair)
        assert got == truth or (math.isnan(got) and math.isnan(truth)), pair


LOOPS = """
    @inlined
    def rest(values, by):
        some = values[0] % by
        return some, values[1]

    @cold
    def pair(n, nothing):
        if n > 5 and nothing is None:
            return n, 0.5
        return 0, 1

    @cold
    def add(total, more, odd):
        total += more
        return total

    def f(a, b):
        found, twice = 0, 2.0
        for i in range(a):
            for i in range(i, b, 2):
                if i == 3:
                    break
                found += i
            while True:
                found += 1
                if found % 4 == 0:
                    break
        i = -1
        for i in range(a // 2):
            pass
        found += i
        for at, one in enumerate((a, b, 7)):
            found = add(found, at * one, (None, (1.5, a)))
        for one in (1, 2):
            found -= one
        a, whole = rest((found, a), 10)
        a, half = pair(a, None)
        twice = twice * half
        first = second = a + twice
        x = y = 3
        if b > 2:
            x, y = y + 1, x + 2
        return int(first + second > 9) + 10 * a + 100 * x + 1000 * y + 10000 * found + whole * LAST
"""


def test_loops_tuples_and_calls():
    plain = define(LOOPS, inlined=lambda f: f, cold=lambda f: f, LAST=10**7)
    call = compiled(cold(define(LOOPS, LAST=10**7)))
    for pair in product(range(7), range(-1, 9)):
        assert call(*pair) == plain(*pair), pair


def test_only_the_branch_that_is_known_to_be_taken_is_translated():
    def chosen(which):
        return define("def f(a):\n    if which is None or which:\n        a += 1\n    else:\n        a += missing\n"
                        "    return a if which else missing", which=which)  # fmt: skip

    assert compiled(cold(chosen(True)))(1) == 2
    for other in (False, None):
        with pytest.raises(TypeError, match="missing is not defined"):
            cold(chosen(other)).address()


REFUSED = {
    "kernels do not support ListComp": "    return [a for a in (a, b)][0]",
    "line 3: kernels do not support With": "    a = 2\n    with a:\n        return b",
    "a changes its type": "    for i in range(b):\n        a = (i, i)\n    return b",
    "b changes its type": "    if a:\n        b = b / 2\n    return a",
    "have different types": "    return (a, b) if a else (a, 0.5)",
    "expected a bool as the operand": "    return (a or b) * 2",
    "kernels do not support Pow of int64": "    return a ** b",
    "kernels do not support chained comparisons": "    return 1 if 0 < a < b else 0",
    "kernels cannot call <built-in function print>": "    print(a)\n    return b",
    "kernels do not support keyword arguments": "    return min(a, b=b)",
}


@pytest.mark.parametrize("message", REFUSED)
def test_unsupported_code_is_refused(message):
    with pytest.raises(TypeError, match=message):
        cold(define(f"def f(a, b):\n{REFUSED[message]}")).address()


def test_an_inlined_function_returns_at_its_end():
    text = "@inlined\ndef g(a):\n    if a:\n        return 1\n    return 2\n\ndef f(a):\n    return g(a)"
    with pytest.raises(TypeError, match="an inlined function may return only in its last statement"):
        cold(define(text)).address()


@pytest.mark.parametrize("after", ["def f(a):\n    return a + 2", "", "\ndef f(a):\n    return a + 1"])
def test_a_source_that_has_changed_since_is_not_compiled(after):
    kernel = cold(define("def f(a):\n    return a + 1"))
    name = kernel.py_func.__code__.co_filename
    linecache.cache[name] = len(after), None, after.splitlines(True), name
    with pytest.raises(RuntimeError, match=r"has changed since f was imported"):
        kernel.address()
