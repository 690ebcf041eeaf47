"""The digits: 1,797 handwritten ones of 8 x 8 pixels that scikit-learn ships (UCI ML, optical recognition)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from sklearn.datasets import load_digits

Array = Any
TRAINING_IMAGES = 1320
"""22 batches of 60; the other 477 images are for testing."""


class Digits(NamedTuple):
    """Return images (N, 64), float32 grey values from 0 to 1, and labels (N,), 0 to 9."""

    train_x: Array
    train_y: Array
    test_x: Array
    test_y: Array


def digits(seed: int, xp: Any = np) -> Digits:
    """Split the images at random into training and test images."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng([seed, 0]).permutation(len(x))
    x, y = xp.asarray((x[order] / 16).astype(np.float32)), xp.asarray(y[order])
    return Digits(x[:TRAINING_IMAGES], y[:TRAINING_IMAGES], x[TRAINING_IMAGES:], y[TRAINING_IMAGES:])
