"""Run the demo: train the networks, check them, print tables and draw the figure."""

from __future__ import annotations

from argparse import Namespace
from importlib import import_module
from time import perf_counter
from typing import NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from gpu_bn import registry
from gpu_bn.cli.console import paragraph, progress
from gpu_bn.demo import report
from gpu_bn.demo.checks import Capacity, Identity
from gpu_bn.demo.claims import claims
from gpu_bn.demo.data import Digits, digits
from gpu_bn.demo.figure import draw
from gpu_bn.demo.network import VARIANTS, Network
from gpu_bn.demo.training import BATCH, History, train


class Results(NamedTuple):
    """The results that the tables and the figure show."""

    runs: dict[str, list[History]]
    identities: list[Identity]
    capacities: list[Capacity]


def demo(options: Namespace) -> None:
    """Train all networks, print the tables and write the figure. ``options`` are those of the command.

    Raises:
        BackendUnavailableError: the requested backend is not available.
    """
    start = perf_counter()
    backend = choose_backend(options.backend)
    print("A network of two hidden layers, h1 and h2, of 100 sigmoids each, trained on scikit-learn's digits:")
    print(f"{options.steps} steps, batches of {BATCH}, learning rate {options.rate:g}, ", end="")
    print(f"{options.seeds} seed{'s' if options.seeds > 1 else ''}, backend {backend}.\n", flush=True)
    with threadpool_limits(1, "blas"):  # for matrices this small, threads cost more than they gain
        results = run(options, backend)
    print(report.training_table(results.runs))
    print(report.drift_table(results.runs))
    print(report.identity_table(results.identities))
    print(report.capacity_table(results.capacities))
    print(f"What these runs show, at learning rate {options.rate:g}")
    for claim in claims(results.runs):
        print("\n".join(paragraph(str(claim))))
    draw(results.runs, results.identities, results.capacities, options.rate, options.out)
    print(f"\nFigure: {options.out}   ({perf_counter() - start:.0f} s)")


def run(options: Namespace, backend: str) -> Results:
    """Train every variant with every seed, and check the networks without BN."""
    xp = import_module(backend)
    results = Results({variant: [] for variant in VARIANTS}, [], [])
    with progress("Training", options.seeds * len(VARIANTS) * options.steps) as tick:
        for seed in range(options.seeds):
            data = digits(seed, xp)
            for variant in VARIANTS:
                net = Network.create(variant, np.random.default_rng([seed, 1]), xp, backend)
                results.runs[variant].append(train(net, data, options.steps, options.rate, seed, tick))
                if variant == "none":
                    check(net, data, backend, results)
    return results


def check(net: Network, data: Digits, backend: str, results: Results) -> None:
    """Append the checks of a network without BN to the results. BN as the identity is checked for the first only."""
    if not results.identities:
        raw = next(net.watch(data.train_x)).raw
        results.identities.extend(Identity(raw, dtype, backend) for dtype in (np.float32, np.float64))
    results.capacities.append(Capacity(net, data.train_x, data.test_x, backend))


def choose_backend(name: str | None) -> str:
    """Return the requested backend, which must be available; for ``None`` ``cupy`` if available, else ``numpy``."""
    try:
        registry.load(name or "cupy")
    except registry.BackendUnavailableError:
        if name is not None:
            raise
        return "numpy"
    return name or "cupy"
