"""The two facts about capacity: BN can be the identity, and so it can be put into a trained network."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpu_bn import batch_norm, identity_affine
from gpu_bn.demo.network import Network, softmax
from gpu_bn.demo.training import host

Array = Any


class Identity:
    """How far ``BN(x)`` is from ``x`` (N, C) in a dtype, by the statistics of ``x`` itself.

    Attributes:
        dtype: its name.
        standardised: max ``|BN(x) - x|`` with weight = 1 and bias = 0, in the units of ``x``.
        restored: the same with weight = SD and bias = mean.
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
    """A network trained without BN against the same with BN inserted, in evaluation mode on test images (N, pixels).

    BN is the identity by the network's activations on the training images.

    Attributes:
        scores, probabilities: largest absolute difference.
        largest: the largest score's absolute value.
        agree, images: images with the same predicted label, and all.
    """

    def __init__(self, trained: Network, train_x: Array, test_x: Array, backend: str) -> None:
        with_norms = trained.with_identity_norms(train_x, backend).train(False)
        before, after = trained.forward(test_x), with_norms.forward(test_x)
        self.scores = float(abs(after - before).max())
        self.probabilities = float(abs(softmax(trained.xp, after) - softmax(trained.xp, before)).max())
        self.largest = float(abs(before).max())
        self.agree, self.images = int((before.argmax(1) == after.argmax(1)).sum()), len(test_x)
