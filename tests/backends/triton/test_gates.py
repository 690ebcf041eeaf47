"""The machine code of the Triton kernels: registers, spills, shared memory and the width of accesses.

This file compiles a covering set, and samples of kernels that ``support/triton_variants.py`` does not enumerate;
``project/test_gates.py`` checks the record of all kernels that it does enumerate.
"""

from __future__ import annotations

import math
from itertools import product

import pytest
from support.gates import Group, Record

torch = pytest.importorskip("torch", reason="the Triton backend serves torch tensors: pip install torch")
pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from emulator.compile import triton_cubin
from support.machine_code import disassemble
from support.triton_backends import RecordingBackend
from support.triton_variants import (
    DTYPES,
    FAMILY,
    Tensors,
    code_of,
    compile_launch,
    compiler_options,
    holds,
    kernel_name,
    record_launches,
    variants,
)

import gpu_bn
from gpu_bn.activations import ROWS
from gpu_bn.plan import DEVICES

FULL = {"float16": 8, "bfloat16": 8, "float32": 4, "float64": 2}


def _covering():
    """Yield groups with each architecture, dtype, layout and kind of call; mostly those that need many registers."""
    for arch, dtype, columns, kind in (
        (75, "float16", False, "split"), (80, "float16", True, "held"), (90, "float16", False, "cluster"),
        (120, "float32", False, "held"), (89, "bfloat16", True, "masked groups"), (86, "float64", False, "held"),
        (100, "float16", True, "split"), (80, "float32", True, "phases"), (90, "float64", True, "held"),
        (75, "float32", True, "held"), (120, "float16", True, "frozen"), (100, "float32", True, "cluster"),
        (86, "float16", False, "sizes"), (89, "float32", False, "long"), (75, "float16", True, "wide"),
    ):  # fmt: skip
        for activation in ("relu", "gelu"):
            if activation == "gelu" or kind != "sizes":
                yield Group(arch, activation, dtype, FULL[dtype], columns, kind)
    for dtype, vector, columns in (("float16", 4, False), ("float16", 1, True), ("float32", 2, True)):
        yield Group(90, "gelu", dtype, vector, columns, "split")
        yield Group(80, "relu", dtype, vector, columns, "held")
    yield Group(80, "gelu", "float16", 1, False, "held")
    yield Group(120, "gelu", "float64", 2, True, "phases")
    yield Group(120, "relu", "float16", 8, False, "ragged split")
    yield Group(75, "gelu", "float16", 8, False, "ragged held")


def _marked(groups):
    for index, group in enumerate(groups):
        marks = [] if index == 0 else [pytest.mark.slow if index % 8 == 3 else pytest.mark.exhaustive]
        yield pytest.param(group, id=str(group), marks=marks)


@pytest.mark.compile
@pytest.mark.usefixtures("compile_triton")
@pytest.mark.parametrize("group", list(_marked(_covering())))
def test_gates(group):
    FAMILY.check(group)


def _spilling():
    """Return the groups of streaming kernels, which loop over tensors, whose record has spills."""
    cells = Record.read(FAMILY).cells
    return [group for group, cell in cells.items() if cell.spilled and not holds(group.kind)]


@pytest.mark.compile
@pytest.mark.usefixtures("compile_triton")
@pytest.mark.parametrize("group", list(_marked(_spilling())))
def test_what_is_spilled_hardly_slows_loops(group):
    """At most one in 150 instructions of a loop loads or stores spilled registers."""
    for step, special in variants(group).values():
        if "merge" not in step.kernel.__name__ and compile_launch(group.arch, step, special).spilled:
            [machine] = disassemble(triton_cubin(step.kernel, group.arch, **compiler_options(special))).values()
            loops = machine.hot(group.width)
            assert loops
            for loop in loops:
                assert 150 * sum(ins.base in ("LDL", "STL") for ins in loop.code) <= len(loop.code)


def marked(index):
    """Return the marks of a case: of nine, one is in every run, one is slow, and seven are exhaustive."""
    return [[], pytest.mark.slow, *[pytest.mark.exhaustive] * 7][index % 9]


OTHERS = [(name, kind) for kind in ("split", "masked", "frozen") for name in ROWS if name not in ("relu", "gelu")]
"""Streaming kernels that are not enumerated, with the other activations."""


@pytest.mark.compile
@pytest.mark.usefixtures("compile_triton")
@pytest.mark.parametrize(
    ("activation", "kind", "arch"),
    [
        pytest.param(activation, kind, (75, 80, 90, 120)[index % 4], marks=marked(index))
        for index, (activation, kind) in enumerate(OTHERS)
    ],
)
def test_other_activations_in_streaming_kernels(activation, kind, arch):
    group = Group(arch, activation, "float16", 8, arch in (80, 120), kind)
    assert not FAMILY.outside(group, FAMILY.build(group, FAMILY.variants(group), True))


PARAMETERS = [
    {"parameters": torch.float16}, {"parameters": torch.bfloat16}, {"parameters": torch.float64}, {"affine": False},
    {"need": ("dx",)}, {"need": ("dweight", "dresidual")}, {"groups": 2}, {"groups": 8}, {"tracked": False},
]  # fmt: skip


@pytest.mark.compile
@pytest.mark.usefixtures("compile_triton")
@pytest.mark.parametrize(
    ("options", "tier", "arch"),
    [
        pytest.param(options, tier, (80, 90, 75, 120)[index % 4], marks=marked(index))
        for index, (options, tier) in enumerate(product(PARAMETERS, ("split", "cta")))
    ],
    ids=str,
)
def test_other_parameters(options, tier, arch):
    """Options that are not enumerated, because they change only a few instructions, stay within the limits."""
    tensors = Tensors("float16", 8, options.get("parameters") is not None)
    options = dict(options)
    x = tensors(2 * tensors.tile)
    if "groups" in options:
        count = options.pop("groups")
        x = x[: x.shape[0] // count * count]
        options["virtual_batch_size"] = x.shape[0] // count
    group = Group(arch, "relu", "float16", 8, tensors.columns, f"{options}")
    launches = record_launches(x, arch, sms=64, tier=tier, activation="relu", residual=True, **options)
    assert not FAMILY.outside(group, {kernel_name(*launch): compile_launch(arch, *launch) for launch in launches})


@pytest.mark.parametrize("name", ["t4", "a100", "h100", "b200"])
@pytest.mark.parametrize("channels", [64, 128, 256, 512])
@pytest.mark.parametrize("training", [True, False])
def test_channels_last_gives_every_multiprocessor_work(name, channels, training):
    """Layers with 56 x 56 positions, as in ResNet-50, have enough programs forward and backward."""
    device = DEVICES[name]
    backend = RecordingBackend(device, tier="split")
    x = torch.empty(32, 3136, channels, dtype=torch.float16).permute(0, 2, 1)
    vectors = [torch.ones(channels) for _ in range(4)]
    y, saved = gpu_bn.batch_norm_forward(x, *vectors, training=training, backend=backend)
    gpu_bn.batch_norm_backward(y, saved, backend=backend)
    for step, _ in backend.launches:
        programs = step.grid[0] * step.grid[1]
        if "merge" not in step.kernel.__name__:
            assert 1.5 * device.sms <= programs <= 8 * device.sms


@pytest.mark.parametrize("name", DEVICES)
def test_the_plans_are_within_the_limits_of_the_kernels(name):
    for (*shape, columns), tier in product(
        ((64, 64, 3136, False), (32, 256, 256, False), (2, 49, 256, True)), ("split", "cta")
    ):
        backend = RecordingBackend(DEVICES[name], tier=tier)
        x = torch.empty(shape, dtype=DTYPES["float16"])
        x = x.permute(0, 2, 1) if columns else x
        vectors = [torch.ones(x.shape[1]) for _ in range(4)]
        gpu_bn.batch_norm_forward(x, *vectors, training=True, activation="relu", residual=x, backend=backend)
        for step, special in backend.launches:
            assert step.num_warps <= 8
            assert step.num_ctas == 1 or DEVICES[name].arch >= 90
            assert step.grid[1] <= 65535
            sizes = special.constants
            elements = math.prod(sizes.get(name, 1) for name in ("POSITIONS", "LANES", "VEC"))  # merges lack some
            assert elements * sizes.get("TILES", 1) <= step.num_ctas * 32768


def test_the_digest_of_a_function_ignores_its_docstring_and_comments():
    documented = 'def f(x):\n    """Add one."""\n    return x + 1  # one\n'
    assert code_of(documented) == code_of("def f(x):\n    return x + 1\n") != code_of("def f(x):\n    return x + 2\n")
