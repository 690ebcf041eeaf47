"""The two facts about capacity: BN can be the identity, and so it can be put into a trained network."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from gpu_bn import batch_norm, identity_affine
from gpu_bn.demo.network import Network, softmax
from gpu_bn.demo.training import host

Array = Any


class Identity(NamedTuple):
    """How far ``BN(x)`` is from ``x``.

    Attributes:
        dtype: of ``x``.
        standardised: max ``|BN(x) - x|`` with weight = 1 and bias = 0, in the units of ``x``.
        restored: the same with weight = SD and bias = mean.
        ulps: ``restored`` in units in the last place of max ``|x|``.
    """

    dtype: str
    standardised: float
    restored: float
    ulps: float


class Capacity(NamedTuple):
    """A trained network against the same with identity-initialised BN, in evaluation mode on the test images.

    Attributes:
        scores, probabilities: largest absolute difference.
        largest: the largest score's absolute value.
        agree, images: images with the same predicted label, and all.
    """

    scores: float
    probabilities: float
    largest: float
    agree: int
    images: int


def check_identity(x: Array, dtype: Any, backend: str) -> Identity:
    """Compare ``BN(x)`` with ``x`` (N, C) in a dtype, by the statistics of ``x`` itself."""
    x = x.astype(dtype)
    weight, bias = identity_affine(x, backend=backend)
    plain = batch_norm(x, training=True, backend=backend)
    restored = batch_norm(x, None, None, weight, bias, True, backend=backend)
    error = float(abs(restored - x).max())
    ulp = float(np.spacing(host(abs(x).max())))
    return Identity(np.dtype(dtype).name, float(abs(plain - x).max()), error, error / ulp)


def check_capacity(trained: Network, train_x: Array, test_x: Array, backend: str) -> Capacity:
    """Insert BN into a network trained without it, by its activations on the training images (N, pixels)."""
    with_norms = trained.with_identity_norms(train_x, backend).train(False)
    before, after = trained.forward(test_x), with_norms.forward(test_x)
    same = before.argmax(1) == after.argmax(1)
    return Capacity(
        scores=float(abs(after - before).max()),
        probabilities=float(abs(softmax(trained.xp, after) - softmax(trained.xp, before)).max()),
        largest=float(abs(before).max()),
        agree=int(same.sum()),
        images=len(test_x),
    )
