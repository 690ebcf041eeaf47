"""Choose the cases that the conformance suite runs on each backend, in a normal, a long and an exhaustive run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import pytest

from gpu_bn.activations import ROWS
from gpu_bn.testing import Case, cases, extended_cases
from support.pairwise import covering

SLOW, EXHAUSTIVE = pytest.mark.slow, pytest.mark.exhaustive
Selected = Iterable[tuple[Case, Any]]
"""Cases, each with its pytest mark; ``()`` for the normal run."""


def nothing(_backend: Any, _case: Case) -> None:
    """Require nothing beside correct results."""


@dataclass(frozen=True)
class Target:
    """A backend under test.

    Attributes:
        name: the name of the backend in the names of tests.
        open: creates the backend from pytest's fixtures.
        require: asserts more after each case, such as the number of launches.
        refuses: whether the backend may refuse a case by ``NoPlanError``.
    """

    name: str
    open: Callable[[pytest.FixtureRequest], Any]
    require: Callable[[Any, Case], None] = nothing
    refuses: bool = False

    def __str__(self) -> str:
        return self.name


# ------------------------------------------------------------------------------------------------- on the CPU
def every_case() -> Selected:
    return [(case, ()) for case in (*cases(), *extended_cases())]


USUAL = ("identity", "relu", "silu")
"""The activations that a normal run compiles for every dtype."""


def kernel_mark(activation: str, dtype: str) -> Any:
    """Return the mark of a test that compiles the kernels of an activation and a dtype."""
    if activation in USUAL or dtype == "float32":
        return ()
    return SLOW if (list(ROWS).index(activation) + (dtype == "float16")) % 4 == 1 else EXHAUSTIVE


def compiled_cases(step: int = 1) -> Selected:
    """Return all cases, with one in ``step`` in the normal run.

    The kernels of each activation and dtype take at least half a second to compile. So the normal run has all
    activations in float32 only, and three activations in the other dtypes. The long run has a quarter of the others.
    """
    for index, case in enumerate(cases()):
        mark = kernel_mark(case.activation, case.dtype)
        if mark == () and case.activation not in USUAL and not case.residual:
            mark = SLOW
        yield case, SLOW if mark == () and index % step else mark
    yield from ((case, ()) for case in extended_cases())


def torch_on_numpy(_request: pytest.FixtureRequest) -> Any:
    pytest.importorskip("torch")
    from gpu_bn.backends.torch_cpu import TorchBackend

    class NamedBackend(TorchBackend):
        name = "torch"  # the name of its adapter

    return NamedBackend()


def torch_compiled(_request: pytest.FixtureRequest) -> str:
    pytest.importorskip("torch")
    return "torch"


# ------------------------------------------------------------------------------------------ CuPy, emulated
TIERS = ((80, None), (80, "cta"), (80, "cooperative"), (80, "split"), (90, None), (90, "cluster"))
"""Architectures, each with a tier that is forced on training calls, or ``None`` if the planner chooses it."""
CUPY = (
    (80, "cta", Case((4, 6, 5), param_dtype="bfloat16")),
    (80, "split", Case((4, 6, 5), "float16", param_dtype="float16")),
    (90, "split", Case((4, 2, 64, 32), affine="none", activation="relu")),
    (90, "cta", Case((3, 2, 41, 8), activation="leaky_relu", residual=True)),
    (90, "cta", Case((3, 2, 41, 8), activation="relu", mean=1e30, std=1e30, mode="train_no_stats")),
    (90, "cta", Case((3, 2, 41, 8), activation="relu", mean=1e-20, std=1e-20, eps=1e-50)),
)
"""The architecture, tier and case of calls in every run: parameters of 16 bits, no parameters with two blocks per
channel, a slope with sign bits, squares out of range."""
MANY_CHANNELS = 1000


def cupy_target(arch: int, tier: str | None) -> Target:
    def launches(backend: Any, case: Case) -> None:
        names = backend.gpu.launched
        backward = sum("backward" in name for name in names)
        most = 1 if tier not in (None, "split") or case.mode == "eval" else 2
        if case.mask is case.virtual_batch_size is case.renorm is None:
            assert backward <= most
            assert len(names) - backward <= most

    def make(request: pytest.FixtureRequest) -> Any:
        gpu = request.getfixturevalue("make_gpu")(arch, tier)
        gpu.backend.gpu = gpu
        return gpu.backend

    return Target(f"cupy sm_{arch} {tier or 'planned'}", make, launches, refuses=tier is not None)


def cupy_cases() -> Iterator[tuple[Target, Selected]]:
    """Yield the targets of all tiers with their cases.

    Of the pairwise covering cases, a seventh is in the normal run and the rest in the long one. All other cases are in
    the exhaustive run.
    """
    every = cases()
    runs = {}
    for index, case in enumerate(covering(every)):
        # With a forced tier, thousands of channels need as many emulated blocks, which takes half a minute.
        at = 0 if case.shape[case.channel_axis] > MANY_CHANNELS else index // 3 % len(TIERS)
        runs[case] = at, SLOW if index % 7 else ()
    for at, (arch, tier) in enumerate(TIERS):
        selected = [(case, runs[case][1] if runs.get(case, (None,))[0] == at else EXHAUSTIVE) for case in every]
        special = [(case, ()) for *which, case in CUPY if which == [arch, tier]]
        if not at:
            marks = ((), EXHAUSTIVE, SLOW, EXHAUSTIVE)
            special += [(case, marks[index % 4]) for index, case in enumerate(extended_cases())]
        yield cupy_target(arch, tier), dict([*selected, *special]).items()
    for which in ((90, "cta"), (90, "split")):
        yield cupy_target(*which), [(case, ()) for arch, tier, case in CUPY if (arch, tier) == which]


# ---------------------------------------------------------------------------------------- Triton, emulated
FROZEN = Case((4, 6, 5, 7), mode="eval", activation="elu", residual=True, mean=1e4, std=1.0, param_dtype="float64")
HUGE = Case((4, 6, 5, 7), activation="relu", mode="train_no_stats", mean=1e30, std=1e30)
TRITON = (
    (80, None, Case((3, 5, 4, 7), activation="relu", affine="none")),
    (80, None, Case((4, 6, 5, 7), "bfloat16", activation="silu", residual=True)),
    (80, None, Case((4, 6, 16, 2), "float16", activation="leaky_relu", residual=True)),
    (80, None, Case((12, 24), "float64", activation="gelu", param_dtype="float32")),
    (80, "split", Case((3, 7, 1111), activation="relu", residual=True)),
    (80, "split", Case((600, 33), activation="gelu_tanh")),
    (80, "split", Case((20, 48, 6, 6), "float16", "channels_last", activation="relu6", residual=True, affine="bias")),
    (80, "split", Case((6, 3, 520), "bfloat16", activation="leaky_relu", residual=True)),
    (80, "split", Case((12, 8, 10, 11), mean=1e4, std=1.0, activation="relu")),
    (80, "split", Case((12, 8, 10, 11), mean=1e18, std=1e18, activation="relu")),
    (80, "split", Case((4, 6, 5, 7), mean=1e-20, std=1e-20, eps=1e-50, activation="relu")),
    (80, None, Case((4, 6, 5), "float16", param_dtype="bfloat16", mode="train_no_stats", affine="weight")),
    (90, "cluster", Case((70, 40), activation="tanh")),
    (90, "cluster", Case((12, 8, 12, 12), "float16", activation="relu", residual=True)),
    (80, None, FROZEN),
    (90, None, Case((300, 41), "float16", "sliced", activation="relu", residual=True)),
    (80, "split", HUGE),
    (89, "split", Case((12, 8, 10, 11), mean=1e4, std=1.0, activation="relu", residual=True)),
    (89, "split", Case((20, 48, 6, 6), "float16", "channels_last", activation="silu", affine="bias")),
    (89, "split", Case((6, 3, 520), "bfloat16", mask="random", virtual_batch_size=3, activation="relu")),
    (89, "split", Case((12, 24), "float64", mode="train_no_stats", param_dtype="float32", residual=True)),
    (89, "split", Case((12, 8, 10, 11), mean=1e18, std=1e18, activation="relu")),
    (89, "split", Case((4, 6, 5, 7), mean=1e-20, std=1e-20, eps=1e-50, activation="relu")),
    (89, "split", Case((12, 8, 10, 11), mask="first_empty", virtual_batch_size=4, residual=True)),
    (89, "split", Case((600, 33), mask="random", mean=1e4, std=1.0, activation="relu")),
    (89, "split", Case((8, 3, 1111), "bfloat16", mean=1e4, std=1e3, activation="relu", residual=True)),
    (89, "split", HUGE),
)
"""The architecture, tier and case of calls that cover each kernel in each layout, dtype and kind of activation, and
numerically hard values."""
SLOW_DOUBLES = 89
"""The architecture on which a separate launch merges the partial results of blocks."""
TRITON_EXTENDED = (
    Case((4, 6, 5, 7), mask="random", activation="silu", residual=True),
    Case((12, 8, 10, 11), "float16", "channels_last", mask="random", virtual_batch_size=4, activation="relu",
         residual=True),
    Case((12, 8, 10, 11), "bfloat16", "channels_last", mask="random", virtual_batch_size=4, activation="relu",
         residual=True),
    Case((12, 8, 10, 11), "float32", "channels_last", mask="random", virtual_batch_size=4, activation="relu",
         residual=True),
    Case((6, 5, 32), "float16", mask="lengths", activation="relu", residual=True),
    Case((12, 8, 10, 11), mask="first_empty", virtual_batch_size=4, residual=True),
    Case((12, 8, 10, 11), mask="random", mean=1e4, std=1.0, activation="relu"),
    Case((6, 5, 4), mask="one", activation="relu", residual=True),
    Case((6, 5, 33), "float16", mask="lengths", mode="eval", activation="relu", residual=True),
    Case((32, 40), "float16", virtual_batch_size=8, momentum=0.3, activation="relu", residual=True),
    Case((600, 33), mask="samples", activation="gelu", layout="fortran"),
    Case((8, 6, 12), "float64", "fortran", virtual_batch_size=4, mask="random"),
    Case((12, 8, 10, 11), renorm=(1.5, 0.5), activation="relu", residual=True),
)  # fmt: skip
"""The cases of masks, ghost batches and renormalisation."""


def triton_target(arch: int, tier: str | None) -> Target:
    def make(request: pytest.FixtureRequest) -> Any:
        pytest.importorskip("torch", reason="the Triton backend serves torch tensors: pip install torch")
        pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
        compile_triton = request.getfixturevalue("compile_triton")
        from gpu_bn.backends.triton.launch import CLUSTERS
        from support.triton_backends import EmulatedBackend

        if tier == "cluster" and not CLUSTERS:
            pytest.skip("this Triton does not compile clusters of blocks, so no plan uses them")
        return EmulatedBackend(request.getfixturevalue("device"), compile_triton, arch, tier=tier)

    def launches(backend: Any, case: Case) -> None:
        from support.triton_variants import MOST_SPILLED

        most = 4 if case.virtual_batch_size is case.mask is None else 5
        assert len(backend.steps) <= most + 2 * (arch == SLOW_DOUBLES) or case.renorm
        assert all(compiled.spill_bytes <= MOST_SPILLED for compiled in backend.compiled)
        if tier == "cluster":
            assert max(step.num_ctas for step in backend.steps) > 1

    return Target(f"triton sm_{arch} {tier or 'planned'}", make, launches)


def triton_cases() -> Iterator[tuple[Target, Selected]]:
    """Yield the targets of all tiers. A third of the cases above is in the normal run, the others are in the long one.

    One in 300 of all conformance cases is in the long run, the others are in the exhaustive one.
    """
    chosen = {row: SLOW if index % 3 else () for index, row in enumerate(TRITON)}
    chosen |= {(80, None, case): SLOW if index % 3 else () for index, case in enumerate(TRITON_EXTENDED)}
    for offset, (arch, tier) in enumerate(
        [(80, None), (80, "split"), (SLOW_DOUBLES, "split"), (90, None), (90, "cluster")]
    ):
        every = [] if tier == "cluster" or arch == SLOW_DOUBLES else cases()
        selected = [(case, SLOW if index % 300 == 7 * offset else EXHAUSTIVE) for index, case in enumerate(every)]
        special = [(case, marks) for (*which, case), marks in chosen.items() if which == [arch, tier]]
        yield triton_target(arch, tier), dict([*selected, *special]).items()


# ------------------------------------------------------------------------- the emulator's reference kernels
REFERENCE = (("cuda", 80), ("cuda", 90), ("triton", 80), ("triton", 90))
KNOWN = ("float32", "float16", "bfloat16")


def trained_cases() -> list[Case]:
    """Return the training cases of the dtypes that the reference kernels support, without activation and residual.

    Cases that differ only in these two are listed once.
    """
    trains = [case for case in cases() if case.mode != "eval" and case.dtype in KNOWN]
    return list(dict.fromkeys(replace(case, activation="identity", parameter=None, residual=False) for case in trains))


def reference_backend(language: str, arch: int, request: pytest.FixtureRequest) -> Any:
    from support import reference_backend as reference

    device = request.getfixturevalue("device")
    if language == "cuda":
        kernels = request.getfixturevalue("compile_cuda")(reference.CUDA_SOURCE, arch)
        return reference.CudaBackend(device, kernels)
    compile_triton = request.getfixturevalue("compile_triton")

    def compiled(type_: str, **options: Any) -> Any:
        return reference.compile_reference_triton(compile_triton, type_, arch, **options)

    return reference.TritonBackend(device, compiled)


def two_launches(backend: Any, _case: Case) -> None:
    assert len(backend.device.reports) == 2, "one launch for the statistics, one for the output"


def reference_cases() -> Iterator[tuple[Target, Selected]]:
    """Yield the reference kernels with all trained cases, each target with another part of them in the normal run.

    Of 16 cases, 1 is in the normal run, 3 are in the long one and 12 in the exhaustive one.
    """
    for at, (language, arch) in enumerate(REFERENCE):
        marks = [(), *[SLOW] * 3, *[EXHAUSTIVE] * 12]
        selected = [(case, marks[(index + 4 * at) % 16]) for index, case in enumerate(trained_cases())]
        name = f"reference {language} sm_{arch}"
        yield Target(name, partial(reference_backend, language, arch), two_launches), selected


def targets() -> Iterator[tuple[Target, Selected]]:
    """Yield each backend with its cases."""
    yield Target("numpy", lambda _: "numpy"), every_case()
    yield Target("cpu", lambda _: "cpu"), compiled_cases()
    yield Target("torch on numpy", torch_on_numpy), [(case, ()) for case in (*covering(cases()), *extended_cases())]
    yield Target("torch", torch_compiled), compiled_cases(step=3)
    yield from chain(cupy_cases(), triton_cases(), reference_cases())


def parameters() -> list[Any]:
    """Return each target with each of its cases as parameters for pytest."""
    values = []
    for target, selected in targets():
        kind = [] if target.require is nothing else [pytest.mark.compile]
        for case, marks in selected:
            values.append(pytest.param(target, case, marks=[*kind, *([marks] if marks else [])], id=f"{target} {case}"))
    return values
