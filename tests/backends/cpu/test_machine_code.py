"""The machine code of the CPU kernels: packed inner loops, for this processor and for others."""

import os
import platform
import re
import subprocess
import sys

import pytest

from gpu_bn.activations import ROWS

pytest.importorskip("numba", reason="Numba compiles the kernels for CPUs: pip install -e '.[cpu]'")
import llvmlite.binding as llvm

from gpu_bn.kernels.cpu import channels, compiler, rows
from gpu_bn.kernels.cpu.compiler import codegen
from gpu_bn.kernels.cpu.vector import FLOAT16, FLOAT32, FLOAT64

ARM, ARM_CPUS = "aarch64-unknown-linux-gnu", ("generic", "neoverse-n1", "neoverse-v1", "apple-m1")
RELU, SILU = (list(ROWS).index(name) for name in ("relu", "silu"))


def machine_code(kernel):
    return codegen()._tm.emit_assembly(kernel.module(("p",)))


def code_for(kernel, triple, cpu=""):
    """Return the assembly that LLVM generates for another processor from the vectors of a kernel."""
    machine = target(triple).create_target_machine(cpu=cpu, opt=3)
    code = re.sub(r"target triple = .*", f'target triple = "{triple}"', str(kernel.module(("p",))))
    code = re.sub(r"target datalayout = .*", f'target datalayout = "{machine.target_data}"', code)
    return machine.emit_assembly(llvm.parse_assembly(re.sub(r'"target-(cpu|features)"="[^"]*"', "", code)))


def target(triple):
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    try:
        return llvm.Target.from_triple(triple)
    except RuntimeError as error:
        pytest.skip(f"this llvmlite has no LLVM for {triple}: {error}")


def blocks_of(assembly):
    """Split assembly into basic blocks, which are lists of lines; also return the indices of the successors of each."""
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
    """Return the bodies of the innermost loops."""
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
    whole = [body for body in loops if not re.search(by_mask % "vblendmp[sd]", body)]  # others read partial vectors
    assert whole
    assert not [body for body in whole if re.search(by_mask % "vmovup[sd]", body)]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86-64 instructions")
def test_float16_is_converted_by_the_processor():
    text = machine_code(channels.writer(FLOAT16, RELU, False, False, True, False))
    assert any("vcvtph2ps" in body and "vcvtps2ph" in body for body in inner_loops(text))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("code", [FLOAT32, FLOAT64, FLOAT16], ids=["float32", "float64", "float16"])
@pytest.mark.parametrize("cpu", ARM_CPUS)
@pytest.mark.one_in(13)
def test_inner_loops_are_packed_for_arm(name, code, cpu):
    make, instruction = KERNELS[name][0], "fdiv" if KERNELS[name][1] == "vdiv" else "fmla"
    text = code_for(make(code), ARM, cpu)
    packed = rf"{instruction}\s+v\d+\.{'2d' if code == FLOAT64 else '4s'}"  # a NEON vector has 16 bytes
    loops = [body for body in inner_loops(text) if re.search(packed, body)]
    assert loops, f"no inner loop with {packed}"
    scalar = [re.findall(r"\b(?:fadd|fsub|fmul|fdiv|fn?m(?:add|sub))\s+[sdh]\d+", body) for body in loops]
    if code != FLOAT16:
        assert not any(scalar)
        return
    assert not all(scalar)  # a loop may be merged with the loop around it, which adds float64 sums
    reads = name in ("moments", "rows' deviations", "rows' products")  # these write float64
    assert any("fcvtl" in body and (reads or "fcvtn" in body) for body in loops)
    assert not re.search(r"__extendhfsf2|__truncsfhf2", text)


@pytest.mark.parametrize("cpu", ARM_CPUS)
def test_arm_has_float16_and_no_masked_stores(cpu, monkeypatch):
    target(ARM)  # registers ARM in LLVM
    monkeypatch.setattr(codegen(), "magic_tuple", lambda: (ARM, cpu, ""))
    assert compiler.supports_float16.__wrapped__()  # every 64-bit ARM processor converts it
    assert not compiler.stores_by_mask()


SHOWS_FEATURES = """
from gpu_bn.kernels.cpu import channels
from gpu_bn.kernels.cpu.compiler import codegen, supports_float16
from gpu_bn.kernels.cpu.vector import MASKS
text = codegen()._tm.emit_assembly(channels.moments(2).module())
print("zmm" in text, "ymm" in text, "vfmadd" in text, supports_float16(), MASKS)
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="compiles for x86-64 processors")
@pytest.mark.parametrize(
    ("cpu", "found"),
    [
        ("haswell", "False True True True False"),  # AVX2
        ("skylake-avx512", "True True True True True"),
        ("x86-64", "False False False False False"),
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
