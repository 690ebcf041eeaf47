"""Check any backend against an independent oracle: conformance cases, their tolerances, and the check of one case.

::

    from gpu_bn.testing import cases, check

    for case in cases():
        errors = check(case, "numpy")       # quantity -> largest error as a share of the error allowed

To add a backend, add an :class:`Adapter` to :data:`gpu_bn.testing.check.ADAPTERS`. It converts arrays.
"""

from gpu_bn.testing.cases import Case, build, cases, extended_cases, unavailable_cases
from gpu_bn.testing.check import ADAPTERS, Adapter, check, compare, run
from gpu_bn.testing.oracle import Problem, Truth, oracle
from gpu_bn.testing.tolerance import tolerance

__all__ = [
    "ADAPTERS",
    "Adapter",
    "Case",
    "Problem",
    "Truth",
    "build",
    "cases",
    "check",
    "compare",
    "extended_cases",
    "oracle",
    "run",
    "tolerance",
    "unavailable_cases",
]
