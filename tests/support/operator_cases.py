"""Provide references and arguments for the tests of the operators."""

import pytest

from gpu_bn.activations import ROWS
from support.tensors import inputs, running, tensor

torch = pytest.importorskip("torch")
from gpu_bn.nn.operators import (
    composition,
)


def reference(x, mean, var, weight, bias, training, residual=None, activation="identity"):
    """Compute batch normalisation, a sum and an activation by torch's functions."""
    z = torch.nn.functional.batch_norm(x, mean, var, weight, bias, training)
    z = z if residual is None else z + residual
    return composition.activate(z, ROWS[activation].default)


# ------------------------------------------------------------------------------------------- opcheck and compilers
def arguments(name, shape=(3, 2, 4), activation="relu", dtype=torch.float32, momentum=None, optional=True):
    """Return the arguments of the operator ``train``, ``infer`` or ``backward``."""
    x, weight, bias, residual = inputs(shape, dtype)
    if not optional:
        weight = bias = residual = None
    mean, var = running(shape[1], dtype)
    options = (1e-5, activation, 0.0)
    if name == "train":
        return (x, weight, bias, residual, mean, var, torch.tensor(3), momentum, *options)
    if name == "infer":
        return (x, weight, bias, residual, mean, var, *options)
    kept = (None, torch.stack((mean, var)).double(), torch.empty(0, dtype=torch.uint8))
    need = [True, optional, optional, optional and activation != "identity"]
    dy = tensor(*shape, dtype=dtype, seed=5)
    return (dy, x, weight, bias, residual, *kept, dtype, True, *options, 1, False, need)


def train_some(model, x, steps=3):
    """Train some steps and return the outputs, gradients and buffers."""
    results = []
    for step in range(steps):
        leaf = (x + step).requires_grad_()
        model.zero_grad()
        y = model(leaf)
        y.backward(torch.ones_like(y) * leaf.detach().cos())
        results += [y.detach(), leaf.grad, *(p.grad.clone() for p in model.parameters())]
    return [*results, *(buffer.clone() for buffer in model.buffers())]
