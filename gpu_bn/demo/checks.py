"""Measure how close BN can be to the identity, and how little it changes a trained network that it is put into."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpu_bn import batch_norm, identity_affine
from gpu_bn.demo.network import Network, softmax
from gpu_bn.demo.training import host

Array = Any


class Identity:
    """The distance of ``BN(x)`` from ``x`` (N, C) in one dtype, where BN uses the statistics of ``x``.

    Attributes:
        dtype: the name of the dtype.
        standardised: max ``|BN(x) - x|`` with weight = 1 and bias = 0.
        restored: max ``|BN(x) - x|`` with weight = SD and bias = mean.
        ulps: ``restored`` in units in the last place of max ``|x|``.
    """

    def __init__(self, x: Array, dtype: Any, backend: str) -> None:
        x = x.astype(dtype)
        weight, bias = identity_affine(x, backend=backend)
        self.dtype = np.dtype(dtype).name
        self.standardised = float(abs(batch_norm(x, training=True, backend=backend) - x).max())
        self.restored = float(abs(batch_norm(x, None, None, weight, bias, True, backend=backend) - x).max())
        self.ulps = self.restored / float(np.spacing(host(abs(x).max())))


class Capacity:
    """The difference that BN makes when it is inserted into a trained network, in evaluation mode on test images.

    BN is initialised to be the identity on the network's activations for the training images.

    Attributes:
        scores: the largest absolute difference of scores.
        probabilities: the largest absolute difference of probabilities.
        largest: the largest absolute value of a score.
        agree: the number of images whose predicted label is the same.
        images: the number of images.
    """

    def __init__(self, trained: Network, train_x: Array, test_x: Array, backend: str) -> None:
        with_norms = trained.with_identity_norms(train_x, backend).train(False)
        before, after = trained.forward(test_x), with_norms.forward(test_x)
        self.scores = float(abs(after - before).max())
        self.probabilities = float(abs(softmax(trained.xp, after) - softmax(trained.xp, before)).max())
        self.largest = float(abs(before).max())
        self.agree, self.images = int((before.argmax(1) == after.argmax(1)).sum()), len(test_x)
