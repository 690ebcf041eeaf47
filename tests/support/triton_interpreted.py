"""Run conformance cases on the Triton backend in Triton's interpreter, and print the failures as JSON.

This is a separate process, because kernels are either interpreted or compiled from their import on. The arguments are
a tier or ``auto``, and the cases: ``all``, ``some``, the ``extended`` ones (masks, ghost batches, renormalisation) or
those of ``ragged`` rows. With ``few`` before it, as in ``few some``, an eighth of them is run.
"""

from __future__ import annotations

import json
import math
import os
import sys

from gpu_bn.testing import Case, cases, check, extended_cases


def some_cases() -> list[Case]:
    """Choose small cases that cover every activation, dtype, layout and mode, and numerically hard values."""
    small = [case for case in cases() if math.prod(case.shape) <= 1000]
    chosen, seen = [], set()
    for case in small:
        kinds = {
            ("activation", case.activation, case.residual and case.mode),
            ("dtype", case.dtype, case.mode),
            ("layout", case.layout),
            ("numbers", case.mean, case.std, case.dtype),
            ("parameters", case.affine, case.mode, case.param_dtype),
        }
        if not kinds <= seen:
            chosen.append(case)
            seen |= kinds
    return chosen


def small_extended() -> list[Case]:
    """Return the extended cases without large ones and three for which the interpreter's sums are not exact enough.

    It adds the elements of a block's column in float32 one by one, where a GPU adds them as a tree. The conformance
    suite runs these three on the emulator.
    """
    return [
        case
        for case in extended_cases()
        if math.prod(case.shape) <= 25_000 and (case.layout != "channels_last" or case.dtype == "float64")
    ]


def ragged() -> list[Case]:
    """Return cases of rows that begin and end within vectors."""
    return [
        Case((4, 8, 7, 7), "float16", activation="relu", residual=True),
        Case((8, 3, 27), "float32", activation="gelu", mean=1e4, std=1.0),
        Case((4, 8, 9, 9), "bfloat16", residual=True),
        Case((1, 8, 1, 1025), "float32", activation="silu"),
    ]


def main(tier: str, which: str) -> None:
    """Run the cases and print their number and the failures."""
    from gpu_bn.backends.triton.backend import TritonBackend

    backend = TritonBackend(tier=None if tier == "auto" else tier)
    kinds = {"all": cases, "some": some_cases, "extended": small_extended, "ragged": ragged}
    selected = kinds[which.removeprefix("few ")]()[:: 8 if which.startswith("few ") else 1]
    failures = {}
    for case in selected:
        try:
            check(case, backend)
        except Exception as error:
            failures[str(case)] = f"{type(error).__name__}: {error}"
    print(json.dumps({"cases": len(selected), "failures": failures}))


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "1"
    main(*sys.argv[1:])
