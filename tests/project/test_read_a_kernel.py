"""The test that docs/read-a-kernel.md shows: compare a Triton kernel with the equation, and count its bytes."""

import numpy as np
import pytest
from emulator import Device

import gpu_bn

torch = pytest.importorskip("torch", reason="the Triton backend serves torch tensors: pip install torch")
pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from support.triton_backends import EmulatedBackend

pytestmark = pytest.mark.compile


def test_the_kernel_computes_the_equation_and_moves_each_byte_once(compile_triton):
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    weight, bias = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([0.0, -1.0, 3.0])
    device = Device()  # every check on: bounds, races, uninitialised reads
    backend = EmulatedBackend(device, compile_triton, arch=80, tier="cta")
    y = gpu_bn.batch_norm(x, None, None, weight, bias, training=True, activation="relu", backend=backend)

    wide = x.double().numpy()  # the equation, in float64
    mean, var = wide.mean((0, 2, 3), keepdims=True), wide.var((0, 2, 3), keepdims=True)
    column = (1, 3, 1, 1)
    z = weight.numpy().reshape(column) * (wide - mean) / np.sqrt(var + 1e-5) + bias.numpy().reshape(column)
    np.testing.assert_allclose(y.numpy(), np.maximum(z, 0), rtol=1e-5, atol=1e-6)

    (report,) = device.reports  # one launch
    assert report.kernel.name == "bn_forward_kernel"
    assert report.buffer("x", "load").bytes == x.nbytes == 12288
    assert report.buffer("y", "store").bytes == y.nbytes == 12288
