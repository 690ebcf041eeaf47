"""The compiled kernels: what the machine code is, that results do not depend on threads, and that bugs are noticed."""

import ctypes
import inspect
import linecache
import mmap
import os
import platform
import re
import subprocess
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
import llvmlite.binding as llvm

from gpu_bn.backends.cpu import launch, pages, plans, threads
from gpu_bn.kernels.cpu import calls_channels, calls_rows, channels, compiler, rows
from gpu_bn.kernels.cpu.compiler import codegen, cold
from gpu_bn.kernels.cpu.vector import FLOAT16, FLOAT32, FLOAT64

ARM = "aarch64-unknown-linux-gnu"
RELU, SILU = (list(ROWS).index(name) for name in ("relu", "silu"))


# -------------------------------------------------------------------------------------------------------- machine code
def machine_code(kernel):
    return codegen()._tm.emit_assembly(kernel.module(("p",)))


def code_for(kernel, triple, cpu=""):
    """What LLVM makes of a kernel's vectors for another processor."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, opt=3)
    code = re.sub(r"target triple = .*", f'target triple = "{triple}"', str(kernel.module(("p",))))
    code = re.sub(r"target datalayout = .*", f'target datalayout = "{machine.target_data}"', code)
    return machine.emit_assembly(llvm.parse_assembly(re.sub(r'"target-(cpu|features)"="[^"]*"', "", code)))


def arm_code(kernel):
    """For a 64-bit Arm processor, whose vectors (NEON) have 16 bytes."""
    return code_for(kernel, ARM)


def blocks_of(assembly):
    """Basic blocks, each a list of lines, and the places of each one's successors."""
    blocks, places, ended = [], {}, True
    for line in map(str.strip, assembly.splitlines()):
        label = re.fullmatch(r"([\w.$]+):.*", line)
        if not label and not re.match(r"\w", line):  # a directive or a comment
            continue
        if label or ended:
            blocks.append([])
        if label:
            places[label[1]] = len(blocks) - 1
        blocks[-1].append(line)
        ended = re.match(r"(?:j|b\.|b\s|cb|tb|ret)", line)
    successors = []
    for at, block in enumerate(blocks):
        last = block[-1]
        jump = re.match(r"(?:j|b\.|b\s|cb|tb)\S*\s+(?:.*, )?(\.L\w+)", last)
        falls = [] if re.match(r"(?:jmp|b\s|ret|ud2)", last) or at + 1 == len(blocks) else [at + 1]
        successors.append([*falls, places[jump[1]]] if jump else falls)
    return blocks, successors


def inner_loops(assembly):
    """The bodies of loops that have no loop within."""
    blocks, successors = blocks_of(assembly)
    before = [[at for at, after in enumerate(successors) if to in after] for to in range(len(blocks))]
    everything = set(range(len(blocks)))
    dominators, found = [], [everything if sources else {at} for at, sources in enumerate(before)]
    while dominators != found:
        dominators = found
        found = [
            {at}.union(set.intersection(*[dominators[one] for one in sources]) if sources else ())
            for at, sources in enumerate(before)
        ]
    loops = []
    for head in everything:
        for end in before[head]:
            if head in dominators[end]:
                body, ahead = {head}, [end]
                while ahead:
                    at = ahead.pop()
                    ahead += [] if at in body else before[at]
                    body.add(at)
                loops.append(body)
    inner = [body for body in loops if not any(other < body for other in loops)]
    return ["\n".join(line for at in sorted(body) for line in blocks[at]) for body in inner]


KERNELS = {
    "moments": (lambda code: channels.moments(code), "vfmadd"),
    "products": (lambda code: channels.products(code, RELU, True, True), "vfmadd"),
    "y": (lambda code: channels.writer(code, RELU, False, False, True, False), "vfmadd"),
    "y of silu": (lambda code: channels.writer(code, SILU, False, False, True, False), "vdiv"),
    "dx": (lambda code: channels.writer(code, RELU, True, True, True, True), "vfmadd"),
    "rows' deviations": (lambda code: rows.deviations(code), "vfmadd"),
    "rows' products": (lambda code: rows.products(code, RELU, False, False), "vfmadd"),
    "rows' y": (lambda code: rows.writer(code, RELU, False, False, True, False), "vfmadd"),
    "rows' dx": (lambda code: rows.writer(code, RELU, False, True, True, False), "vfmadd"),
}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86-64 instructions")
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("code", [FLOAT32, FLOAT64], ids=["float32", "float64"])
@pytest.mark.one_in(4)
def test_inner_loops_are_packed(name, code):
    make, instruction = KERNELS[name]
    suffix = "pd" if code == FLOAT64 else "ps"
    loops = [body for body in inner_loops(machine_code(make(code))) if re.search(rf"{instruction}\w*{suffix}", body)]
    assert loops, f"no inner loop with packed {instruction}"
    for body in loops:
        assert re.search(r"%[yz]mm", body), f"no long vectors in\n{body}"
        scalar = re.findall(r"v(?:add|sub|mul|div|fmadd\d+)s[sd]", body)
        assert not scalar, f"{scalar} in\n{body}"


@pytest.mark.parametrize("name", ["products", "dx", "rows' products", "rows' dx"])
def test_loads_of_dy_do_not_wait_for_the_activation(name):
    text = code_for(KERNELS[name][0](FLOAT32), "x86_64-unknown-linux-gnu", "skylake-avx512")
    by_mask = r"%s\s+-?\w*\(.*%%zmm\d+ \{%%k\d\}"
    loops = [body for body in inner_loops(text) if "%zmm" in body and "vcmp" in body]
    whole = [body for body in loops if not re.search(by_mask % "vblendmp[sd]", body)]  # others read parts of vectors
    assert whole
    assert not [body for body in whole if re.search(by_mask % "vmovup[sd]", body)]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86-64 instructions")
def test_float16_is_converted_by_the_processor():
    text = machine_code(channels.writer(FLOAT16, RELU, False, False, True, False))
    assert any("vcvtph2ps" in body and "vcvtps2ph" in body for body in inner_loops(text))


@pytest.mark.parametrize("name", ["moments", "y", "dx", "rows' deviations"])
@pytest.mark.one_in(2)
def test_inner_loops_are_packed_for_arm(name):
    bodies = inner_loops(arm_code(KERNELS[name][0](FLOAT32)))
    loops = [body for body in bodies if re.search(r"fmla\s+v\d+\.4s", body)]
    assert loops, "no inner loop with packed fmla"
    for body in loops:
        scalar = re.findall(r"\b(?:fadd|fsub|fmul|fn?madd)\s+[sd]\d+", body)
        assert not scalar, f"{scalar} in\n{body}"


def test_arm_converts_float16_by_itself():
    text = arm_code(channels.writer(FLOAT16, RELU, False, False, True, False))
    assert any("fcvtl" in body and "fcvtn" in body for body in inner_loops(text))
    assert "__extendhfsf2" not in text
    assert "__truncsfhf2" not in text


SHOWS_FEATURES = """
from gpu_bn.kernels.cpu import channels
from gpu_bn.kernels.cpu.compiler import codegen, supports_float16
text = codegen()._tm.emit_assembly(channels.moments(2).module())
print("zmm" in text, "ymm" in text, "vfmadd" in text, supports_float16())
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="compiles for x86-64 processors")
@pytest.mark.parametrize(
    ("cpu", "found"),
    [
        ("haswell", "False True True True"),  # AVX2
        ("skylake-avx512", "True True True True"),
        ("x86-64", "False False False False"),
    ],
)
@pytest.mark.one_in(3)
def test_other_processors(cpu, found):
    environment = os.environ | {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": ""}
    done = subprocess.run([sys.executable, "-c", SHOWS_FEATURES], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    got = done.stdout.split()
    assert got[1:] == found.split()[1:]


def test_float16_is_refused_where_llvm_would_end_the_process():
    code = "import numpy as np, gpu_bn\ngpu_bn.batch_norm(np.ones((4, 3), np.float16), training=True, backend='cpu')"
    environment = os.environ | {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert "BackendUnavailableError: float16 with backend 'cpu' needs a processor that converts it" in done.stderr


# ------------------------------------------------------------------------------------------------------------- threads
SHAPES = [
    Case((16, 24, 40, 40), activation="relu", residual=True),  # groups of channels
    Case((2, 3, 420, 420), activation="relu"),  # few channels: parts of them
    Case((1, 2, 2700, 200), activation="silu"),
    Case((12, 24, 40, 40), layout="channels_last", activation="relu", residual=True),  # rows
    Case((5000, 300)),
    Case((3001, 7, 5), activation="relu"),
    Case((16, 24, 40, 40), "float16", mode="eval", activation="relu", residual=True),
]


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_threads_do_not_change_a_bit(case, monkeypatch):
    monkeypatch.setattr(threads, "WORTH", 1)
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
    engine.backward_input(dy, saved, engine.backward_reduce(dy, saved, dz), dx)  # computes them twice
    assert same_bits(kept.dx, dx)
    assert kept.dresidual is None or same_bits(kept.dresidual, dz)


def test_which_gradients_the_sums_keep():
    def keeps(code, which, adds=False):
        return plans.backward_kernels(False, code, which, False, True, True, adds)[0]

    assert keeps(FLOAT32, SILU)
    assert not keeps(FLOAT32, RELU)
    assert keeps(FLOAT32, RELU, adds=True)
    assert keeps(FLOAT16, RELU, adds=True)
    assert not keeps(FLOAT16, SILU)  # which would round them
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
    assert (np.abs(y - exact) <= (8 + z**2 / 2) * eps * np.abs(exact))[tail].all()  # z**2 is rounded, in exp(-z**2 / 2)


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
    """Others end the process."""
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
    "a swapped stride": (channels, "moments", "places(run, steps, first)", "places(first, steps, run)", CHANNELS),
    "runs that are lost": (channels, "moments", "range(0, runs if count", "range(0, min(runs, 8) if count", RUNS),
    "a lost float64 sum": (rows, "deviations", "add_to(products, c, None, tile[1], beside)", "pass", ROW),
    "a dropped column": (rows, "products", "add_to(sums, c, columns - c, tile[0], beside)", "pass", ROW),
    "a dropped last row": (rows, "deviations", "min(ROWS, high - first)", "min(ROWS, high - first - 1)", ROW),
    "a wrong Bessel factor": (calls_channels, "forward", "count / max(count - 1.0, 1.0)", "1.0", TINY),
    "an unmerged part": (calls_channels, "forward", "for at in range(parts):", "for at in range(parts - 1):", PARTS),
    "an unmerged chunk": (calls_rows, "forward", "for chunk in range(chunks):", "for chunk in range(1):", CHUNKS),
    "a lost shorter row": (calls_rows, "backward", "if rest and at ==", "if rest < 0 and at ==", Case((301, 3, 7))),
}  # fmt: skip


@pytest.mark.slow  # each compiles a kernel of its own
@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_noticed(bug, monkeypatch):
    module, name, before, after, case = BUGS[bug]
    text = inspect.getsource(module)
    assert before in text
    monkeypatch.setattr(plans, "PART", 256)  # so that small tensors have several
    monkeypatch.setattr(plans, "LARGE", 1024)
    monkeypatch.setattr(plans, "CHUNK", 4096)
    monkeypatch.setattr(launch, "_prepared", {})
    assert outcome(case) == "as expected"
    monkeypatch.setattr(compiler, "kernel", cold)  # without the cache, which takes one source for the other
    changed, text = {"__name__": module.__name__}, text.replace(before, after)
    monkeypatch.setitem(linecache.cache, "<planted>", (len(text), None, text.splitlines(True), "<planted>"))
    exec(compile(text, "<planted>", "exec"), changed)
    monkeypatch.setattr(module, name, changed[name])
    assert outcome_apart(case) in ("elements wrong", "ended by a signal")


def outcome(case):
    try:
        with np.errstate(all="ignore"):  # what bugs leave in memory may be infinite
            check(case, "cpu")
    except AssertionError as error:
        return "elements wrong" if "elements wrong" in str(error) else repr(error)
    except BaseException as error:
        return repr(error)
    return "as expected"


def outcome_apart(case):
    """What comes of a case in a process of its own: kernels with bugs may write where they should not."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        for cached in (launch._prepared, plans.forward_kernels, plans.backward_kernels, plans.address):
            getattr(cached, "cache_clear", getattr(cached, "clear", None))()  # kernels are looked up anew
        os.write(writer, outcome(case).encode()[:4096])
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        text = file.read().decode(errors="replace")
    _, status = os.waitpid(child, 0)
    return "ended by a signal" if os.WIFSIGNALED(status) else text
