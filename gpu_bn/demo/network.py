"""The demo's network: linear layers and sigmoids, with or without batch normalisation between them.

A layer has the methods ``forward``, ``backward`` and ``parameters`` and the dict ``grad``, like
:class:`gpu_bn.BatchNorm`. ``xp`` is the module of the arrays: NumPy, or CuPy with the same interface.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from gpu_bn import BatchNorm, batch_norm

Array = Any

SIZES = (64, 100, 100, 10)
"""Pixels, units of h1, units of h2, classes."""
WEIGHT_SD = 0.1
VARIANTS = {"none": "no BN", "fixed": "BN, weight = 1, bias = 0", "learned": "BN, learned pair"}


class Linear:
    """A linear layer, ``y = x @ weight + bias``: x (N, inputs), weight (inputs, outputs), bias (outputs,)."""

    def __init__(self, weight: Array, bias: Array) -> None:
        self.weight, self.bias = weight, bias
        self.grad: dict[str, Array] = {}

    def forward(self, x: Array) -> Array:
        self._x = x
        return x @ self.weight + self.bias

    def backward(self, dy: Array) -> Array:
        self.grad = {"weight": self._x.T @ dy, "bias": dy.sum(0)}
        return dy @ self.weight.T

    def parameters(self) -> dict[str, Array]:
        return {"weight": self.weight, "bias": self.bias}


class Sigmoid:
    """The layer ``y = 1 / (1 + exp(-x))`` for any shape."""

    def __init__(self, xp: Any) -> None:
        self.xp = xp
        self.grad: dict[str, Array] = {}

    def forward(self, x: Array) -> Array:
        self._y = sigmoid(self.xp, x)
        return self._y

    def backward(self, dy: Array) -> Array:
        return dy * self._y * (1 - self._y)

    def parameters(self) -> dict[str, Array]:
        return {}


class HiddenValues(NamedTuple):
    """The values in a hidden layer, (N, units) each.

    Attributes:
        raw: the output of the linear layer.
        sigmoid_input: the input of the sigmoid: ``raw``, or its normalisation.
        output: the output of the sigmoid, which is the input of the next layer.
    """

    raw: Array
    sigmoid_input: Array
    output: Array


class Network:
    """A network of linear, sigmoid, linear, sigmoid, linear. BN, if any, normalises the inputs of the sigmoids."""

    def __init__(self, linears: list[Linear], hidden: list[Any], xp: Any = np) -> None:
        self.xp = xp
        self.hidden = hidden
        self.layers: list[Any] = [linears[0], hidden[0], linears[1], hidden[1], linears[2]]

    @classmethod
    def create(cls, variant: str, rng: np.random.Generator, xp: Any = np, backend: str | None = None) -> Network:
        """Create one of :data:`VARIANTS`. All get the same weights from generators with the same seed."""
        linears = [
            Linear(
                xp.asarray(rng.normal(0, WEIGHT_SD, (inputs, outputs)).astype(np.float32)),
                xp.zeros(outputs, np.float32),
            )
            for inputs, outputs in pairwise(SIZES)
        ]
        if variant == "none":
            return cls(linears, [Sigmoid(xp) for _ in SIZES[1:-1]], xp)
        norms = [_norm(units, backend, affine=variant == "learned") for units in SIZES[1:-1]]
        return cls(linears, norms, xp)

    def with_identity_norms(self, x: Array, backend: str | None = None) -> Network:
        """Return this network (without BN) with BN inserted that is the identity on the batch ``x`` (N, pixels)."""
        norms = [_norm(values.raw.shape[1], backend).init_identity_(values.raw) for values in self.watch(x)]
        return Network(self.layers[::2], norms, self.xp)

    def forward(self, x: Array) -> Array:
        """Return the scores (N, classes) of images (N, pixels)."""
        for layer in self.layers:
            x = layer.forward(x)
        return x

    def backward(self, dy: Array) -> Array:
        """Compute the gradients of all parameters from that of the scores. Return the gradient of the images."""
        for layer in reversed(self.layers):
            layer.grad.clear()
            dy = layer.backward(dy)
        return dy

    def descend(self, rate: float) -> None:
        """Make one step of gradient descent with the learning rate ``rate``."""
        for layer in self.layers:
            for name, parameter in layer.parameters().items():
                parameter -= rate * layer.grad[name]

    def train(self, mode: bool = True) -> Network:
        """Set the mode of BN: the batch's statistics in training, the running ones otherwise."""
        for layer in self.hidden:
            if isinstance(layer, BatchNorm):
                layer.train(mode)
        return self

    def watch(self, x: Array) -> Iterator[HiddenValues]:
        """Yield the values in each hidden layer for a batch in training, without changing the layers."""
        for linear, hidden in zip(self.layers[:-1:2], self.hidden, strict=True):
            raw = sigmoid_input = x @ linear.weight + linear.bias
            if isinstance(hidden, BatchNorm):
                sigmoid_input = batch_norm(raw, None, None, hidden.weight, hidden.bias, True, eps=hidden.eps)
            x = sigmoid(self.xp, sigmoid_input)
            yield HiddenValues(raw, sigmoid_input, x)


def sigmoid(xp: Any, x: Array) -> Array:
    """Compute ``1 / (1 + exp(-x))`` without overflow."""
    return 0.5 + 0.5 * xp.tanh(0.5 * x)


def softmax(xp: Any, scores: Array) -> Array:
    """Return the probabilities (N, classes) for scores of the same shape."""
    powers = xp.exp(scores - scores.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def cross_entropy(xp: Any, scores: Array, labels: Array) -> tuple[float, Array]:
    """Return the mean loss in nats, and its gradient (N, classes); ``labels`` (N,) are class numbers."""
    shifted = scores - scores.max(1, keepdims=True)
    log_sum = xp.log(xp.exp(shifted).sum(1, keepdims=True))
    rows = xp.arange(len(labels))
    loss = float((log_sum[:, 0] - shifted[rows, labels]).mean())
    gradient = xp.exp(shifted - log_sum)
    gradient[rows, labels] -= 1
    return loss, gradient / len(labels)


def _norm(units: int, backend: str | None, affine: bool = True) -> BatchNorm:
    """Return BN with a sigmoid, on the GPU for the backend ``cupy``."""
    device = "cuda" if backend == "cupy" else None
    return BatchNorm(units, affine=affine, device=device, activation="sigmoid", backend=backend)
