"""The proof of the Triton kernels can fail: kernels with one bug each, and what notices it."""

from __future__ import annotations

import importlib
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from emulator import Device, EmulatorError

from gpu_bn.plan import DEVICES
from gpu_bn.testing import Case, check

pytest.importorskip("torch", reason="the Triton backend serves torch tensors: pip install torch")
pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from triton_backends import EmulatedBackend

from gpu_bn.backends import triton as backend_module
from gpu_bn.backends import triton_programs

pytestmark = pytest.mark.compile

KERNELS = Path(__file__).parents[1] / "kernels"
PLAIN = Case((5, 3, 37), activation="relu")
LONG = Case((3, 2, 2732), activation="relu", residual=True)
LARGE_MEAN = Case((12, 8, 10, 11), mean=1e4, std=1.0)
COLUMNS = Case((70, 24), "float16", activation="relu", residual=True)
CHAINS = Case((5, 2, 5000), activation="relu")
WITHOUT_WEIGHT = Case((5, 3, 37), activation="relu", affine="none")
SLOPED = Case((4, 6, 16, 2), "float16", activation="leaky_relu", residual=True)
FROZEN = Case((4, 6, 5, 7), mode="eval", mean=1e4, std=1.0, param_dtype="float64")
KINKS = Case((4, 6, 5), activation="relu6", affine="kinks")
MASKED = Case((5, 3, 36), mask="random", activation="relu")


@dataclass(frozen=True)
class Bug:
    """A text of one file and what replaces it; the case, the tier and the chains that show it, and what is said."""

    name: str
    file: str
    right: str
    wrong: str
    noticed: str
    case: Case = LONG
    tier: str = "split"
    more: tuple[tuple[str, str], ...] = ()
    chain: int = triton_programs.CHAIN


COMMON, FORWARD, BACKWARD, ACTIVATIONS = (
    f"{name}_triton.py" for name in ("common", "bn_forward", "bn_backward", "activations")
)
BUGS = [
    Bug(
        "mask of the tail dropped",
        COMMON,
        "known = (position < last)[:, None]",
        "known = (position < position + 1)[:, None]",
        "out of bounds",
        PLAIN,
        "cta",
    ),
    Bug(
        "mask of the channels dropped",
        COMMON,
        "tl.arange(0, LANES * VEC) // VEC < row)",
        "tl.arange(0, LANES * VEC) // VEC < row + LANES)",
        "out of bounds",
        COLUMNS,
        "cta",
    ),
    Bug(
        "mask dropped in the backward sums",
        BACKWARD,
        "if there is not None:\n        known = there",
        "if there is not None:\n        known = known",
        "dx[",
        MASKED,
    ),
    Bug(
        "last position of a share forgotten",
        COMMON,
        "tl.minimum(first + share, positions)",
        "tl.minimum(first + share - 1, positions)",
        "y[",
    ),
    Bug(
        "last block not merged",
        COMMON,
        "there = i < blocks\n            place = i * channels + channel\n        means",
        "there = i < blocks - 1\n            place = i * channels + channel\n        means",
        "y[",
    ),
    Bug(
        "sums of the last block not merged",
        COMMON,
        "there = i < blocks\n            place = i * channels + channel\n        sum_dz",
        "there = i < blocks - 1\n            place = i * channels + channel\n        sum_dz",
        "dx[",
    ),
    Bug("spread between blocks forgotten", COMMON, "n * (variances + apart * apart)", "n * variances", "y["),
    Bug(
        "sums of raw numbers",
        COMMON,
        'return tl.where(tl.abs(mean) < float("inf"), mean, 0.0)',
        "return mean * 0.0",
        "y[",
        LARGE_MEAN,
        "split",
        (("(apart * apart > TRUSTED_SHIFT * spread)", "(apart != apart)"),),
    ),
    Bug(
        "overflow not noticed",
        COMMON,
        "overflow = whole &",
        "overflow = (whole == 0) & whole &",
        "y[",
        Case((3, 2, 2052), mean=1e18, std=1e18),
    ),
    Bug(
        "underflow not noticed",
        COMMON,
        "underflow = whole &",
        "underflow = (whole == 0) & whole &",
        "y[",
        Case((3, 2, 111), mean=1e-22, std=1e-22, eps=1e-50),
    ),
    Bug(
        "mean rounded to float32", COMMON, "rest = mean - centre.to(tl.float64)", "rest = mean * 0.0", "y[", LARGE_MEAN
    ),
    Bug(
        "biased running variance",
        FORWARD,
        "moved(old_var, var * bessel, momentum)",
        "moved(old_var, var, momentum)",
        "running_var[",
    ),
    Bug(
        "running statistics unordered",
        FORWARD,
        "        tl.debug_barrier()\n        keep_statistics",
        "        keep_statistics",
        "data race",
    ),
    Bug("all blocks write the running statistics", FORWARD, "if block == 0:", "if block >= 0:", "data race"),
    Bug(
        "bias forgotten in the sign",
        BACKWARD,
        "bias_c = load_wide(bias, channel, known_channels, 0.0)",
        "bias_c = load_wide(None, channel, known_channels, 0.0)",
        "dx[",
        PLAIN,
        "cta",
    ),
    Bug(
        "bits in the wrong order",
        COMMON,
        ">> tl.arange(0, VEC)[None, None, :]",
        ">> (VEC - 1 - tl.arange(0, VEC))[None, None, :]",
        "dx[",
    ),
    Bug(
        "dx without the mean's term",
        BACKWARD,
        "offset = -sum_dz * inverse_count - slope * rest",
        "offset = -slope * rest",
        "dx[",
    ),
    Bug(
        "dx without the projection",
        BACKWARD,
        "slope = -sum_dz_xhat * rstd * inverse_count",
        "slope = sum_dz_xhat * 0.0",
        "dx[",
    ),
    Bug(
        "dweight without rstd",
        BACKWARD,
        "dz_xhat_c = (product_c - rest * dz_c) * rstd",
        "dz_xhat_c = product_c - rest * dz_c",
        "dx[",
    ),
    Bug(
        "a tile not written",
        FORWARD,
        "for back in range(tiles):",
        "for back in range(1, tiles):",
        "nobody has written",
    ),
    Bug(
        "chains that overlap",
        COMMON,
        "end = tl.minimum(begin + CHAIN * POSITIONS, last)",
        "end = last",
        "y[",
        CHAINS,
        chain=1,
    ),
    Bug(
        "chains that overlap, backward",
        BACKWARD,
        "end = tl.minimum(begin + CHAIN * POSITIONS, last)",
        "end = last",
        "dx[",
        CHAINS,
        chain=1,
    ),
    Bug(
        "absent weight is 0",
        FORWARD,
        "weight_c = load_wide(weight, channel, known_channels, 1.0)",
        "weight_c = load_wide(weight, channel, known_channels, 0.0)",
        "y[",
        WITHOUT_WEIGHT,
        "cta",
    ),
    Bug(
        "slope forgotten where bits decide",
        ACTIVATIONS,
        "dy * where(keep, 1, {code.slope})",
        "dy * where(keep, 1, 0)",
        "dx[",
        SLOPED,
        "cta",
    ),
    Bug(
        "rest of the mean forgotten in dweight",
        BACKWARD,
        "write_sums(dweight, dbias, sum_dz, (sum_product - rest * sum_dz) * rstd, channel, known)",
        "write_sums(dweight, dbias, sum_dz, sum_product * rstd, channel, known)",
        "dweight[",
        FROZEN,
    ),
    Bug(
        "the other side of a kink",
        ACTIVATIONS,
        "where({code.drop}, {code.dropped}, dy)",
        "where({code.drop.replace('=', '')}, {code.dropped}, dy)",
        "dweight[",
        KINKS,
        "cta",
    ),
]


def mutated(bug: Bug, folder: Path, monkeypatch) -> None:
    """Give the backend kernels of its own with the bug in them."""
    package = folder / "mutant_kernels"
    shutil.copytree(KERNELS, package, ignore=shutil.ignore_patterns("__pycache__"))
    for file in package.glob("*_triton.py"):
        text = file.read_text()
        if file.name == bug.file:
            for right, wrong in ((bug.right, bug.wrong), *bug.more):
                assert right in text, f"{bug.name}: the text to replace is gone"
                text = text.replace(right, wrong)
        file.write_text(text.replace("from gpu_bn.kernels", "from mutant_kernels"))
    monkeypatch.syspath_prepend(folder)
    for name in [name for name in sys.modules if name.split(".")[0] == "mutant_kernels"]:
        monkeypatch.delitem(sys.modules, name)
    for module in ("bn_forward_triton", "bn_backward_triton"):
        monkeypatch.setattr(backend_module, module, importlib.import_module(f"mutant_kernels.{module}"))
    monkeypatch.setattr(
        backend_module, "functions", importlib.import_module("mutant_kernels.activations_triton").functions
    )


def trial(bug: Bug, compile_triton) -> None:
    check(bug.case, EmulatedBackend(Device(), compile_triton, 80, DEVICES["a100"], tier=bug.tier))


@pytest.mark.parametrize(
    "bug",
    [pytest.param(bug, marks=[pytest.mark.slow] if index % 2 else []) for index, bug in enumerate(BUGS)],
    ids=lambda bug: bug.name.replace(" ", "-"),
)
def test_the_proof_notices(bug, tmp_path, monkeypatch, compile_triton, caught_faults):
    mutated(bug, tmp_path, monkeypatch)
    monkeypatch.setattr(triton_programs, "CHAIN", bug.chain)
    with pytest.raises((AssertionError, EmulatorError)) as caught:
        trial(bug, compile_triton)
    message = str(caught.value)
    assert bug.noticed in message
    caught_faults[f"triton: {bug.name}"] = (
        message if isinstance(caught.value, EmulatorError) else f"conformance: {message}"
    )


@pytest.mark.parametrize(("case", "tier"), sorted({(bug.case, bug.tier) for bug in BUGS}, key=str), ids=str)
def test_without_a_bug_the_same_cases_pass(case, tier, compile_triton):
    assert check(case, EmulatedBackend(Device(), compile_triton, 80, DEVICES["a100"], tier=tier))
