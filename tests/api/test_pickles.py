"""Pickles and saved models that earlier versions wrote load, and give the same results as then.

``arrays.pkl`` and ``layers.pt`` were written before modules moved (version 0.1.0, torch 2.13); they are never renewed.
"""

import pickle

import numpy as np
import pytest
from support.paths import DATA

import gpu_bn

PICKLES = DATA / "pickles"


def test_a_layer_for_arrays():
    with (PICKLES / "arrays.pkl").open("rb") as file:
        held = pickle.load(file)
    np.testing.assert_allclose(held["layer"](held["x"]), held["y"], rtol=1e-6)
    fresh = gpu_bn.BatchNorm(3, activation=gpu_bn.leaky_relu(0.2))
    fresh.load_state_dict(held["state"])
    fresh.eval()
    np.testing.assert_allclose(fresh(held["x"]), held["y"], rtol=1e-6)
    assert held["activation"] == gpu_bn.elu(0.5)


@pytest.fixture(scope="module")
def layers():
    torch = pytest.importorskip("torch")
    return torch.load(PICKLES / "layers.pt", weights_only=False)


@pytest.mark.parametrize("kind", ["converted", "fused", "folded"])
def test_whole_models(layers, kind):
    torch = pytest.importorskip("torch")
    torch.testing.assert_close(layers[kind](layers["t"]), layers["y"])


def test_states(layers):
    nn, kept = pytest.importorskip("torch").nn, gpu_bn.nn.convert
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2), nn.LeakyReLU(0.1)
    )
    model = kept(model, fuse=True).eval()
    model.load_state_dict(layers["state"])
    pytest.importorskip("torch").testing.assert_close(model(layers["t"]), layers["y"])


def test_every_layer_of_nn(layers):
    names = [
        "BatchNorm",
        "BatchNorm1d",
        "BatchNorm2d",
        "BatchNorm3d",
        "LazyBatchNorm2d",
        "FrozenBatchNorm2d",
        "SyncBatchNorm",
    ]
    assert [type(layer) for layer in layers["every"]] == [getattr(gpu_bn.nn, name) for name in names]
