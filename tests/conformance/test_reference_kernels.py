"""The emulator's reference kernels: each serves a case of the conformance suite, and refuses other options."""

from __future__ import annotations

import numpy as np
import pytest
from support.conformance import REFERENCE, reference_backend, trained_cases

import gpu_bn
from gpu_bn.backends.layout import Layout
from gpu_bn.testing.cases import build

pytestmark = pytest.mark.compile


def test_every_cuda_kernel_takes_part(request):
    backend = reference_backend("cuda", 80, request)
    used = set()
    for case in trained_cases():
        x = build(case).x
        layout = Layout.from_array(x, case.channel_axis % x.ndim)
        used |= {backend.choose(layout.n, layout.s, x.dtype, stage)[0] for stage in (False, True)}
    assert used == set(backend.kernels)


@pytest.mark.parametrize("target", REFERENCE, ids=str)
@pytest.mark.parametrize(
    "options",
    [{"training": False}, {"activation": "relu"}, {"residual": np.ones((4, 3, 5), np.float32)}],
    ids=lambda options: next(iter(options)),
)
def test_what_the_kernels_cannot_do_is_refused(options, target, request):
    x, mean, var = np.ones((4, 3, 5), np.float32), np.zeros(3, np.float32), np.ones(3, np.float32)
    arguments = {"training": True, "backend": reference_backend(*target, request)} | options
    with pytest.raises(NotImplementedError, match="without activation and residual"):
        gpu_bn.batch_norm(x, mean, var, **arguments)
