"""The compiled kernels: results do not depend on threads, arguments are prepared once, and bugs are noticed."""

import ctypes
import inspect
import linecache
import mmap
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from support import make_problem, relative_error, rng, same_bits

import gpu_bn
from gpu_bn import registry
from gpu_bn.activations import ROWS
from gpu_bn.testing import Case, build, check, oracle, run
from gpu_bn.testing.oracle import derivative, value

pytest.importorskip("numba", reason="Numba compiles the kernels for CPUs: pip install -e '.[cpu]'")

from gpu_bn.backends.cpu import launch, pages, plans, threads
from gpu_bn.kernels.cpu import calls_channels, calls_rows, channels, compiler, rows
from gpu_bn.kernels.cpu.compiler import cold
from gpu_bn.kernels.cpu.vector import FLOAT16, FLOAT32

RELU, SILU = (list(ROWS).index(name) for name in ("relu", "silu"))


# ------------------------------------------------------------------------------------------------------------- threads
SHAPES = [
    Case((16, 24, 40, 40), activation="relu", residual=True),  # in groups of channels
    Case((2, 3, 420, 420), activation="relu"),  # few channels, cut into parts
    Case((1, 2, 2700, 200), activation="silu"),
    Case((12, 24, 40, 40), layout="channels_last", activation="relu", residual=True),  # in rows
    Case((5000, 300)),
    Case((3001, 7, 5), activation="relu"),
    Case((16, 24, 40, 40), "float16", mode="eval", activation="relu", residual=True),
]


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_threads_do_not_change_a_bit(case, monkeypatch):
    monkeypatch.setattr(threads, "BYTES_PER_THREAD", 1)
    results = []
    for count in (1, 2, 3, 8):
        gpu_bn.set_num_threads(count)
        results.append(run(build(case), "cpu"))
    assert all(same_bits(results[0], other) for other in results[1:])


def test_few_channels_are_cut_into_parts():
    plan = plans.plan(plans.Geometry(2, 3, 600 * 700, (), 0), FLOAT32, True, False)
    assert plan.group == 0
    assert plan.parts > 20
    for case in SHAPES[1:3]:
        n, c, *inner = case.shape
        plan = plans.plan(plans.Geometry(n, c, inner[0] * inner[1], (), 0), FLOAT32, True, False)
        assert plan.group == 0
        assert plan.parts > 10


@pytest.mark.parametrize("case", SHAPES[:6], ids=str)
def test_large_tensors(case):
    assert all(share <= 1 for share in check(case, "cpu").values())


@pytest.mark.parametrize("shape", [(8, 16, 30, 30), (700, 33), (4096, 128), (3, 5, 2100), (64, 5, 7, 7)], ids=str)
def test_float32_far_from_zero(shape):
    x = (1e4 + rng(1).standard_normal(shape)).astype(np.float32)
    y, saved = gpu_bn.batch_norm_forward(x, training=True, eps=1e-12, backend="cpu")
    truth = oracle(make_problem(x, eps=1e-12))
    assert relative_error(saved.moments.var, truth.var) <= 1e-7
    assert relative_error(y, truth.y) <= 1e-6


@pytest.mark.parametrize("shape", [(6, 8, 30), (40, 37), (2, 3, 400_000)], ids=str)
@pytest.mark.parametrize(
    ("activation", "dtype", "residual"),
    [("silu", "float32", False), ("silu", "float32", True), ("relu", "float16", True), ("leaky_relu", "float32", True)],
)
def test_gradients_that_the_sums_keep_are_not_rounded(shape, activation, dtype, residual):
    x, dy, added = (rng(seed).standard_normal(shape).astype(dtype) for seed in range(3))
    _, saved = gpu_bn.batch_norm_forward(
        x, training=True, residual=added if residual else None, activation=activation, backend="cpu"
    )
    kept = gpu_bn.batch_norm_backward(dy, saved, backend="cpu")
    engine, dx, dz = registry.select("cpu", x=x), np.empty_like(x), np.empty_like(x)
    engine.backward_input(dy, saved, engine.backward_reduce(dy, saved, dz), dx)  # each phase computes dz
    assert same_bits(kept.dx, dx)
    assert kept.dresidual is None or same_bits(kept.dresidual, dz)


def test_which_gradients_the_sums_keep():
    def keeps(code, which, adds=False):
        return plans.backward_kernels(False, code, which, False, True, True, adds)[0]

    assert keeps(FLOAT32, SILU)
    assert not keeps(FLOAT32, RELU)
    assert keeps(FLOAT32, RELU, adds=True)
    assert keeps(FLOAT16, RELU, adds=True)
    assert not keeps(FLOAT16, SILU)  # float16 would round them
    assert not keeps(FLOAT16, SILU, adds=True)


# --------------------------------------------------------------------------------------------------------- activations
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.device.gradient])
@pytest.mark.one_in(2)
def test_activations_are_the_functions(name, dtype):
    z = np.concatenate([np.linspace(-40, 40, 4000), 10.0 ** np.arange(-30, 0), -(10.0 ** np.arange(-30, 0))])
    z = np.resize(np.append([np.nan, -1e30, -1e4, 1e4, 1e30, 0], z).astype(dtype), (210, 1, 20))
    parameter, eps = ROWS[name].default.parameter, np.finfo(dtype).eps
    running = np.zeros(1), np.ones(1)
    y, saved = gpu_bn.batch_norm_forward(z, *running, eps=1e-30, activation=name, backend="cpu")
    slopes = gpu_bn.batch_norm_backward(np.ones_like(z), saved, backend="cpu").dx
    assert np.array_equal(np.isnan(y), np.isnan(z))
    assert np.array_equal(np.isnan(slopes), np.isnan(z) & (name != "identity"))
    y, slopes, z = (array[~np.isnan(z)] for array in (y, slopes, z.astype(np.longdouble)))
    exact = value(name, parameter, z)
    for got, truth in ((y, exact), (slopes, derivative(name, parameter, z))):
        assert (np.abs(got - truth) <= 8 * eps * np.maximum(np.abs(truth), np.minimum(np.abs(z), 1))).all()
    tail = (z < -1) & (z > -12) & (name in ("elu", "silu", "gelu", "sigmoid"))
    # exp(-z**2 / 2) magnifies the rounding error of z**2
    assert (np.abs(y - exact) <= (8 + z**2 / 2) * eps * np.abs(exact))[tail].all()


# ----------------------------------------------------------------------------------------------------------- arguments
def test_calls_alike_are_prepared_once(monkeypatch):
    monkeypatch.setattr(launch, "_prepared", {})
    problem = make_problem(rng(1).standard_normal((4, 6, 5)).astype(np.float32))
    for _ in range(3):
        run(problem, "cpu")
    assert len(launch._prepared) == 2  # forward and backward


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bfloat16_and_float16_of_torch_need_no_package(dtype, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    x = torch.from_numpy(rng(1).standard_normal((8, 3, 20)).astype(dtype))
    for half in (torch.bfloat16, torch.float16):
        y = gpu_bn.batch_norm(x.to(half), training=True, backend="cpu")
        assert y.dtype is half
        exact = gpu_bn.batch_norm(x.to(half).double(), training=True, backend="cpu")
        assert (y.double() - exact).abs().max() < 2e-2


# ----------------------------------------------------------------------------------------------- stores past the caches
@pytest.mark.parametrize(
    "shape", [(700, 1025), (700, 1056), (700, 1040), (700, 101), (4000, 64, 3), (70, 99, 9, 9)], ids=str
)
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_stores_past_the_caches_are_aligned(shape, dtype, monkeypatch):
    """Every such store is aligned: an unaligned one would end the process."""
    monkeypatch.setattr(launch, "_prepared", {})
    monkeypatch.setattr(plans, "last_cache", lambda: 1)
    for activation, residual in (("identity", False), ("relu", True), ("silu", False)):
        case = Case(shape, dtype, activation=activation, residual=residual)
        assert all(share <= 1 for share in check(case, "cpu").values())


# --------------------------------------------------------------------------------------------------------- huge pages
def test_large_outputs_ask_for_huge_pages(monkeypatch):
    torch = pytest.importorskip("torch")
    asked = []
    monkeypatch.setattr(launch, "_prepared", {})
    monkeypatch.setattr(pages, "LARGE", 4 * 6 * 7 * 50)
    monkeypatch.setattr(pages, "advise", lambda *memory: asked.append(memory))
    for batch, found in ((7, True), (6, False)):
        x = torch.randn(batch, 6, 50, requires_grad=True)
        y = gpu_bn.batch_norm(x, training=True, backend="cpu")
        (dx,) = torch.autograd.grad(y, x, torch.randn_like(x))
        expected = [(one.data_ptr(), x.nbytes) for one in (y, dx)]
        assert asked == (expected if found else [])
        asked.clear()


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="the system's kernel has no huge pages to ask for"
)
def test_huge_pages_are_asked_for_within_some_memory():
    memory = mmap.mmap(-1, 4 * pages.PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    pages.advise(start + 1, 4 * pages.PAGE - 2)
    ranges = re.findall(r"^(\w+)-(\w+) .*?^VmFlags:([^\n]*)", Path("/proc/self/smaps").read_text(), re.M | re.S)
    asked = [(int(a, 16), int(b, 16)) for a, b, flags in ranges if "hg" in flags.split()]
    inside = [(a, b) for a, b in asked if a < start + 4 * pages.PAGE and b > start]
    first, end = -(-(start + 1) // pages.PAGE) * pages.PAGE, (start - 1) // pages.PAGE * pages.PAGE + 4 * pages.PAGE
    assert inside == [(first, end)]


# ------------------------------------------------------------------------------------------------------- planted bugs
TINY, CHANNELS, PARTS = Case((2, 6, 2, 3)), Case((12, 8, 10, 11)), Case((2, 3, 20, 30))
RUNS = Case((12, 16, 5, 7))
ROW, CHUNKS = Case((300, 41)), Case((700, 40))
BUGS = {
    "a dropped tail of a sum": (channels, "moments", "if count % wide:", "if count % wide < 0:", CHANNELS),
    "a dropped tail of y": (channels, "writer", "if rest:", "if rest < 0:", CHANNELS),
    "a tail begun too late": (channels, "products", "wide * wide)", "wide * wide + 1)", CHANNELS),
    "a swapped stride": (channels, "moments", "offsets(run, steps, first)", "offsets(first, steps, run)", CHANNELS),
    "runs that are lost": (channels, "moments", "range(0, runs if count", "range(0, min(runs, 8) if count", RUNS),
    "a lost float64 sum": (rows, "deviations", "accumulate(products, c, None, tile[1], error_offset)", "pass", ROW),
    "a dropped column": (rows, "products", "accumulate(sums, c, columns - c, tile[0], error_offset)", "pass", ROW),
    "a dropped last row": (rows, "deviations", "min(ROWS, high - first)", "min(ROWS, high - first - 1)", ROW),
    "a wrong Bessel factor": (calls_channels, "forward", "count / max(count - 1.0, 1.0)", "1.0", TINY),
    "an unmerged part": (calls_channels, "forward", "for at in range(parts):", "for at in range(parts - 1):", PARTS),
    "an unmerged chunk": (calls_rows, "forward", "for chunk in range(chunks):", "for chunk in range(1):", CHUNKS),
    "a lost shorter row": (calls_rows, "backward", "if rest and at ==", "if rest < 0 and at ==", Case((301, 3, 7))),
}  # fmt: skip


@pytest.mark.slow  # each compiles a kernel
@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_noticed(bug, monkeypatch):
    module, name, before, after, case = BUGS[bug]
    text = inspect.getsource(module)
    assert before in text
    monkeypatch.setattr(plans, "PART", 256)  # so that small tensors have several parts
    monkeypatch.setattr(plans, "LARGE", 1024)
    monkeypatch.setattr(plans, "CHUNK", 4096)
    monkeypatch.setattr(launch, "_prepared", {})
    assert outcome(case) == "as expected"
    monkeypatch.setattr(compiler, "kernel", cold)  # without the cache, whose key lacks this source
    changed, text = {"__name__": module.__name__}, text.replace(before, after)
    monkeypatch.setitem(linecache.cache, "<planted>", (len(text), None, text.splitlines(True), "<planted>"))
    exec(compile(text, "<planted>", "exec"), changed)
    monkeypatch.setattr(module, name, changed[name])
    assert outcome_in_fork(case) in ("elements wrong", "ended by a signal")


def outcome(case):
    try:
        with np.errstate(all="ignore"):  # bugs may leave infinities in memory
            check(case, "cpu")
    except AssertionError as error:
        return "elements wrong" if "elements wrong" in str(error) else repr(error)
    except BaseException as error:
        return repr(error)
    return "as expected"


def outcome_in_fork(case):
    """Return the outcome of a case in a forked process, because kernels with bugs may write out of bounds."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        for cached in (launch._prepared, plans.forward_kernels, plans.backward_kernels, plans.address):
            getattr(cached, "cache_clear", getattr(cached, "clear", None))()  # look up the kernels again
        os.write(writer, outcome(case).encode()[:4096])
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        text = file.read().decode(errors="replace")
    _, status = os.waitpid(child, 0)
    return "ended by a signal" if os.WIFSIGNALED(status) else text
