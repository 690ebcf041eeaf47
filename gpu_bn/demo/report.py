"""Build the tables that the demo prints."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gpu_bn.cli.console import Table
from gpu_bn.demo.checks import Capacity, Identity
from gpu_bn.demo.claims import Runs, spread
from gpu_bn.demo.network import VARIANTS
from gpu_bn.demo.training import EVERY

ROWS = 7
"""The most rows of the table of training."""
KINDS = {"raw": "before BN", "sigmoid_input": "into the sigmoid", "output": "out of the sigmoid, into h2"}


def training_table(runs: Runs) -> Table:
    """Return the table of loss and test accuracy over the steps."""
    steps = runs["none"][0].steps
    shown = sorted({*np.geomspace(1, len(steps) - 1, ROWS - 1).astype(int).tolist(), 0}) if len(steps) > 1 else [0]
    rows = []
    for i in shown:
        losses = [spread([history.loss[i] for history in runs[variant]], 3) for variant in VARIANTS]
        accuracies = [spread([history.accuracy[i] for history in runs[variant]], 1) for variant in VARIANTS]
        rows.append([str(steps[i]), *losses, *accuracies])
    header = ["step", *(f"loss: {v}" for v in VARIANTS), *(f"acc.: {v}" for v in VARIANTS)]
    caption = (
        "Loss: cross-entropy of the training images in nats; acc.: accuracy on the test images in per cent; both in "
        "evaluation mode, mean ± SD over the seeds. " + "; ".join(f"{key}: {text}" for key, text in VARIANTS.items())
    )
    return Table("Training", header, rows, caption + ".")


def drift_table(runs: Runs) -> Table:
    """Return the table of the drift of the mean and SD of h1's units."""
    rows = [
        [KINDS[kind], moment, *(spread([h.drift(kind)[i] for h in runs[variant]], 4) for variant in VARIANTS)]
        for kind in KINDS
        for i, moment in enumerate(("mean", "SD"))
    ]
    caption = (
        f"Mean and SD of each unit of h1 over the test images, compared with those {EVERY} steps before. Drift of the "
        "mean: |mean' - mean| / SD; of the SD: |ln(SD' / SD)|; averaged over units and training; mean ± SD over the "
        "seeds. BN normalises by the statistics of the test images here, as it does by those of the batch in training. "
        "With weight = 1 and bias = 0, the input of the sigmoid therefore has mean 0 and SD 1, and no drift. "
        "Without BN, the first two places are the same."
    )
    return Table(
        'Drift of h1 (the "covariate shift" that h2 sees)', ["at", "of the", *VARIANTS.values()], rows, caption
    )


def identity_table(identities: Sequence[Identity]) -> Table:
    """Return the table of BN as standardisation and as the identity."""
    rows = [[i.dtype, f"{i.standardised:.3g}", f"{i.restored:.2g}", f"{i.ulps:.2g}"] for i in identities]
    header = ["dtype", "max |BN(x) - x|, weight = 1, bias = 0", "weight = SD, bias = mean", "in ulp of max |x|"]
    return Table("Identity check: x are h1's pre-activations of all training images", header, rows)


def capacity_table(capacities: Sequence[Capacity]) -> Table:
    """Return the table that compares trained networks before and after BN is inserted."""
    rows = [
        [str(seed), f"{c.scores:.2g}", f"{c.largest:.3g}", f"{c.probabilities:.2g}", f"{c.agree} of {c.images}"]
        for seed, c in enumerate(capacities)
    ]
    header = ["seed", "max |difference| of scores", "max |score|", "max |difference| of probabilities", "same label"]
    caption = (
        "Networks trained without BN, compared on the test images with themselves after BN with weight = SD and bias = "
        "mean of the training images' activations has been put in (evaluation mode, float32)."
    )
    return Table("Capacity check", header, rows, caption)
