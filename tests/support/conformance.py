"""Choose the cases that each backend of the conformance suite gets, in a normal and in a long run."""

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
"""Cases, each with its mark: none for the normal run."""


def nothing(_backend: Any, _case: Case) -> None:
    """Require no more than right results."""


@dataclass(frozen=True)
class Target:
    """Hold a backend under test.

    Attributes:
        name: in the names of tests.
        open: makes the backend, with the help of pytest's fixtures.
        require: asserts what else holds after a case, such as the number of launches.
        refuses: whether it may refuse a case by ``NoPlanError``.
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
    """Return all cases, one in ``step`` for the normal run.

    Kernels of each activation and dtype take half a second or more to compile. A normal run has each activation in
    float32, each dtype with three activations; a long run a quarter of the rest.
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

    class OfTensors(TorchBackend):
        name = "torch"  # by which the suite sends it tensors

    return OfTensors()


def torch_compiled(_request: pytest.FixtureRequest) -> str:
    pytest.importorskip("torch")
    return "torch"


# ------------------------------------------------------------------------------------------ CuPy's, emulated
TIERS = ((80, None), (80, "cta"), (80, "cooperative"), (80, "split"), (90, None), (90, "cluster"))
"""Architectures, and a tier that is forced on training calls or None for the plan's own choice."""
CUPY = (
    (80, "cta", Case((4, 6, 5), param_dtype="bfloat16")),
    (80, "split", Case((4, 6, 5), "float16", param_dtype="float16")),
    (90, "split", Case((4, 2, 64, 32), affine="none", activation="relu")),
    (90, "cta", Case((3, 2, 41, 8), activation="leaky_relu", residual=True)),
    (90, "cta", Case((3, 2, 41, 8), activation="relu", mean=1e30, std=1e30, mode="train_no_stats")),
    (90, "cta", Case((3, 2, 41, 8), activation="relu", mean=1e-20, std=1e-20, eps=1e-50)),
)
"""In every run: 16-bit parameters, no parameters and two blocks a channel, a mask's slope, squares out of range."""
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
    """Choose by tier: a seventh of the cases with all pairs of values in the normal run, the others in the long one."""
    every = cases()
    runs = {}
    for index, case in enumerate(covering(every)):
        # A tier that is forced on thousands of channels emulates as many blocks, for half a minute.
        at = 0 if case.shape[case.channel_axis] > MANY_CHANNELS else index // 3 % len(TIERS)
        runs[case] = at, SLOW if index % 7 else ()
    for at, (arch, tier) in enumerate(TIERS):
        found = [(case, runs[case][1] if runs.get(case, (None,))[0] == at else EXHAUSTIVE) for case in every]
        special = [(case, ()) for *which, case in CUPY if which == [arch, tier]]
        if not at:
            marks = ((), EXHAUSTIVE, SLOW, EXHAUSTIVE)
            special += [(case, marks[index % 4]) for index, case in enumerate(extended_cases())]
        yield cupy_target(arch, tier), dict([*found, *special]).items()
    for which in ((90, "cta"), (90, "split")):
        yield cupy_target(*which), [(case, ()) for arch, tier, case in CUPY if (arch, tier) == which]


# ---------------------------------------------------------------------------------------- Triton's, emulated
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
"""Architecture, tier and case: each kernel in each mapping, dtype and kind of activation, and the hard numbers."""
SLOW_DOUBLES = 89
"""There a launch of its own merges what the blocks of two launches have found."""
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
"""Masks, ghost batches and renormalisation."""


def triton_target(arch: int, tier: str | None) -> Target:
    def make(request: pytest.FixtureRequest) -> Any:
        pytest.importorskip("torch", reason="the Triton backend serves torch tensors: pip install torch")
        pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
        compile_triton = request.getfixturevalue("compile_triton")
        from gpu_bn.backends.triton.launch import CLUSTERS
        from support.triton_backends import EmulatedBackend

        if tier == "cluster" and not CLUSTERS:
            pytest.skip("this Triton does not compile clusters of blocks: there is no plan with them")
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
    """Choose every third of some cases for the normal run, the others for the long one, and all cases by hand."""
    chosen = {one: SLOW if index % 3 else () for index, one in enumerate(TRITON)}
    chosen |= {(80, None, case): SLOW if index % 3 else () for index, case in enumerate(TRITON_EXTENDED)}
    for offset, (arch, tier) in enumerate(
        [(80, None), (80, "split"), (SLOW_DOUBLES, "split"), (90, None), (90, "cluster")]
    ):
        every = [] if tier == "cluster" or arch == SLOW_DOUBLES else cases()
        found = [(case, SLOW if index % 300 == 7 * offset else EXHAUSTIVE) for index, case in enumerate(every)]
        own = [(case, marks) for (*which, case), marks in chosen.items() if which == [arch, tier]]
        yield triton_target(arch, tier), dict([*found, *own]).items()


# ------------------------------------------------------------------------- the emulator's reference kernels
REFERENCE = (("cuda", 80), ("cuda", 90), ("triton", 80), ("triton", 90))
KNOWN = ("float32", "float16", "bfloat16")


def trained_cases() -> list[Case]:
    """Return every case that trains on a dtype the reference kernels know, less its activation and its residual.

    Left out are evaluation and float64. Cases that differ in activation and residual only are one.
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
    """Put each case on one target, a quarter of them in the normal run, the others in the long one; by hand all."""
    for at, (language, arch) in enumerate(REFERENCE):
        marks = [(), *[SLOW] * 3, *[EXHAUSTIVE] * 12]
        found = [(case, marks[(index + 4 * at) % 16]) for index, case in enumerate(trained_cases())]
        name = f"reference {language} sm_{arch}"
        yield Target(name, partial(reference_backend, language, arch), two_launches), found


def targets() -> Iterator[tuple[Target, Selected]]:
    """Return each backend with its cases."""
    yield Target("numpy", lambda _: "numpy"), every_case()
    yield Target("cpu", lambda _: "cpu"), compiled_cases()
    yield Target("torch on numpy", torch_on_numpy), [(case, ()) for case in (*covering(cases()), *extended_cases())]
    yield Target("torch", torch_compiled), compiled_cases(step=3)
    yield from chain(cupy_cases(), triton_cases(), reference_cases())


def parameters() -> list[Any]:
    """Return every target with each of its cases, as pytest's parameters."""
    found = []
    for target, selected in targets():
        kind = [] if target.require is nothing else [pytest.mark.compile]
        for case, marks in selected:
            found.append(pytest.param(target, case, marks=[*kind, *([marks] if marks else [])], id=f"{target} {case}"))
    return found
