"""Write the PTX files of this directory: the reference kernels, as compilers that CI does not install make them.

    pip install nvidia-cuda-nvrtc==13.0.88 numpy pytest && python tests/emulator/ptx/make.py
    pip install triton==3.7.1 numpy pytest && python tests/emulator/ptx/make.py        # and with 3.8.0

Each run writes the files of the compiler that it finds. `tests/test_emulator_ptx.py` runs them.
"""

import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

from emulator.compile import compile_cuda, compile_triton, triton_version
from emulator.fixtures import load_triton
from emulator.nvrtc import nvrtc, nvrtc_library

KERNELS = HERE.parent / "kernels"
SIGNATURE = {"x": "*fp16", "y": "*fp16", "weight": "*fp32", "bias": "*fp32", "save_mean": "*fp64",
             "save_var": "*fp64", "n": "i32", "c": "i32", "s": "i32", "eps": "fp64"}  # fmt: skip


def write(name: str, made_by: str, compiled) -> None:
    ptx = re.sub(r"(?m)^\s*//.*\n|^\s*\.loc.*\n|^\s*\$L__\w+:\s*\n(?=\s*\.)|\s*//.*$", "", compiled.ptx)
    ptx = re.sub(r"(?ms)^\s*\.section.*?^\s*\}\s*$|^\s*\.file.*?$", "", ptx)
    ptx = re.sub(r"\n\s*\n+", "\n", ptx).strip()
    launch = f"threads {compiled.threads}, dynamic shared bytes {compiled.dynamic_shared_bytes}"
    (HERE / f"{name}.ptx").write_text(f"// {made_by}; {launch}\n{ptx}\n")


if nvrtc_library():
    version = "{}.{}".format(*nvrtc().version)
    kernels = compile_cuda((KERNELS / "bn_forward_reference.cu").read_text(), 90, resources=False)
    for variant in ("f32_v4_staged", "bf16_v8"):
        write(f"nvrtc{version}_{variant}", f"NVRTC {version}", kernels[f"bn_forward_{variant}"])
elif triton_version():
    function = load_triton(KERNELS / "bn_forward_reference_triton.py")
    for ctas in (1, 2):
        try:
            made = compile_triton(function, 90, SIGNATURE, {"BLOCK": 512},
                                  aligned=("x", "y"), num_ctas=ctas, resources=False)  # fmt: skip
        except RuntimeError as error:  # Triton 3.7 fails with two blocks per program
            print(error)
            continue
        write(f"triton{triton_version()}_f16_ctas{ctas}", f"Triton {triton_version()}", made)
