"""The machine code of the CPU kernels: packed inner loops, on this processor and on others."""

import os
import platform
import re
import subprocess
import sys

import pytest

from gpu_bn.activations import ROWS

pytest.importorskip("numba", reason="Numba compiles the kernels for CPUs: pip install -e '.[cpu]'")
import llvmlite.binding as llvm

from gpu_bn.kernels.cpu import channels, rows
from gpu_bn.kernels.cpu.compiler import codegen
from gpu_bn.kernels.cpu.vector import FLOAT16, FLOAT32, FLOAT64

ARM = "aarch64-unknown-linux-gnu"
RELU, SILU = (list(ROWS).index(name) for name in ("relu", "silu"))


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
