"""Load the digits that scikit-learn ships: 1,797 handwritten ones of 8 x 8 pixels (UCI ML, optical recognition)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from sklearn.datasets import load_digits

Array = Any
TRAINING_IMAGES = 1320
"""The number of training images: 22 batches of 60. The other 477 images are for testing."""


class Digits(NamedTuple):
    """Images ``x`` (N, 64) with grey values from 0 to 1 in float32, and labels ``y`` (N,) from 0 to 9."""

    train_x: Array
    train_y: Array
    test_x: Array
    test_y: Array


def digits(seed: int, xp: Any = np) -> Digits:
    """Load the images and split them at random into training and test images. ``xp`` is the module of the arrays."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng([seed, 0]).permutation(len(x))
    x, y = xp.asarray((x[order] / 16).astype(np.float32)), xp.asarray(y[order])
    return Digits(x[:TRAINING_IMAGES], y[:TRAINING_IMAGES], x[TRAINING_IMAGES:], y[TRAINING_IMAGES:])
