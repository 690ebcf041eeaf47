"""Test the gradients, the measurements and the claims of the demo, and run it once for a few steps."""

import sys
from itertools import islice

import numpy as np
import pytest

for _module in ("sklearn", "matplotlib", "threadpoolctl"):
    pytest.importorskip(_module, reason=f"the demo needs {_module}: pip install -e '.[demo]'")

from gpu_bn.cli import main
from gpu_bn.demo import report
from gpu_bn.demo.checks import Capacity, Identity
from gpu_bn.demo.claims import Claim, claims, spread
from gpu_bn.demo.data import digits
from gpu_bn.demo.figure import typical_unit
from gpu_bn.demo.network import VARIANTS, Network, cross_entropy, softmax
from gpu_bn.demo.training import BATCH, EVERY, History, shuffled_batches, train


def network(variant, dtype=np.float32):
    net = Network.create(variant, np.random.default_rng(0))
    for layer in net.layers:
        for name, parameter in layer.parameters().items():
            setattr(layer, name, parameter.astype(dtype))
    return net


def train_without_bn(steps=100):
    data, net = digits(0), network("none")
    return net, data, train(net, data, steps, 3.0, 0, lambda _: None)


def test_demo_runs(tmp_path, capsys):
    path = tmp_path / "figure.png"
    assert main(["demo", "--seeds", "2", "--steps", "40", "--out", str(path), "--backend", "numpy"]) == 0
    out = capsys.readouterr().out
    for title in ("Training", "Drift of h1", "Identity check", "Capacity check", "What these runs show"):
        assert f"\n{title}" in out
    assert not [c for c in out if ord(c) < 32 and c != "\n"]
    assert max(map(len, out.replace(str(path), "").splitlines())) <= 120
    png = path.read_bytes()
    assert png.startswith(b"\x89PNG")
    assert int.from_bytes(png[16:20], "big") == 1196


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_finite_differences(variant):
    net = network(variant, np.float64)
    rng = np.random.default_rng(1)
    x, labels = rng.uniform(0, 1, (12, 64)), rng.integers(0, 10, 12)

    def loss():
        return cross_entropy(np, net.forward(x), labels)[0]

    _, gradient = cross_entropy(np, net.forward(x), labels)
    dx = net.backward(gradient)
    pairs = [(p, layer.grad[name]) for layer in net.layers for name, p in layer.parameters().items()]
    assert len(pairs) == 6 + 4 * (variant == "learned")
    for array, exact in [*pairs, (x, dx)]:
        for _ in range(4):
            at = tuple(rng.integers(0, array.shape))
            kept, step = array[at], 1e-5
            array[at] = kept + step
            above = loss()
            array[at] = kept - step
            below = loss()
            array[at] = kept
            assert exact[at] == pytest.approx((above - below) / (2 * step), rel=1e-5, abs=1e-8)


def test_all_variants_start_with_the_same_weights():
    nets = [network(variant) for variant in VARIANTS]
    for layers in zip(*(net.layers[::2] for net in nets), strict=True):
        for layer in layers[1:]:
            np.testing.assert_array_equal(layer.weight, layers[0].weight)


@pytest.mark.parametrize("variant", VARIANTS)
def test_watching_sees_what_training_computes_and_leaves_no_trace(variant):
    net, x = network(variant), digits(0).test_x
    before = [layer.state_dict() for layer in net.hidden if variant != "none"]
    h1, h2 = net.watch(x)
    for state, layer in zip(before, net.hidden, strict=False):
        for name, value in layer.state_dict().items():
            np.testing.assert_array_equal(value, state[name])
    last = net.layers[-1]
    np.testing.assert_allclose(h2.output @ last.weight + last.bias, net.forward(x), atol=1e-5)
    assert (h1.raw is h1.sigmoid_input) == (variant == "none")


def test_softmax_and_cross_entropy_do_not_overflow():
    scores = np.array([[1e4, 0.0], [0.0, 1e4]], np.float32)
    np.testing.assert_array_equal(softmax(np, scores), np.eye(2))
    assert cross_entropy(np, scores, np.array([0, 1]))[0] == 0
    assert cross_entropy(np, scores, np.array([1, 1]))[0] == 5e3


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_identity_check(dtype):
    x = 3 + 2 * np.random.default_rng(0).standard_normal((500, 7))
    found = Identity(x, dtype, "numpy")
    assert found.dtype == np.dtype(dtype).name
    assert found.standardised > 1
    assert found.ulps <= 4
    assert found.restored == pytest.approx(found.ulps * np.spacing(dtype(abs(x).max())))


def test_a_trained_network_is_the_same_with_identity_norms():
    net, data, _ = train_without_bn()
    found = Capacity(net, data.train_x, data.test_x, "numpy")
    assert found.agree == found.images == len(data.test_x)
    assert found.scores <= 1e-5 * max(found.largest, 1)
    assert found.probabilities <= 1e-5


def test_a_run_is_recorded_and_reproduced():
    _, _, history = train_without_bn()
    assert history.steps == list(range(0, 101, EVERY))
    assert all(len(series) == 6 for series in (history.loss, history.accuracy, history.bands, history.moments["raw"]))
    assert history.loss[-1] < history.loss[0]
    assert train_without_bn()[2].loss == history.loss


def test_an_epoch_has_every_image_once():
    epoch = np.concatenate(list(islice(shuffled_batches(22 * BATCH, 0), 22)))
    np.testing.assert_array_equal(np.sort(epoch), np.arange(22 * BATCH))
    data = digits(0)
    assert len(data.train_x) == 22 * BATCH
    assert len(data.train_x) + len(data.test_x) == 1797


def make_history(accuracy=(10, 50, 95), loss=(2, 1, 0.5), sd=1.0):
    """Return a history of three records. h1 has two units, whose means move by 1 and whose SDs double."""
    history = History([0, 20, 40], list(loss), list(accuracy))
    for values in history.moments.values():
        values.extend(np.array([[i, -i], [sd * 2**i, sd * 2**i]]) for i in range(3))
    return history


def test_drift():
    mean_drift, sd_drift = make_history().drift("raw")
    assert mean_drift == (1 + 1 / 2) / 2
    assert sd_drift == pytest.approx(np.log(2))
    assert np.isnan(make_history(sd=0.0).drift("raw")).all()


def test_steps_to():
    assert make_history().steps_to(50) == 20
    assert make_history().steps_to(96) == np.inf


def test_a_claim_holds_in_every_seed_or_is_not_made():
    assert str(Claim("A is lower", [1, 2], [3, 4])) == "In every seed: A is lower (2 ± 1 against 4 ± 1)."
    assert str(Claim("A is lower", [1, 4], [3, 4])).startswith("Not claimed, for it holds in 1 of 2 seeds: A is lower")
    assert Claim("", [np.nan, np.inf], [1, np.inf]).seeds == 0
    assert Claim("", [40], [np.inf]).seeds == 1


def test_spread():
    assert spread([1.0, 3.0], 2) == "2.00 ± 1.41"
    assert spread([1.0], 2) == "1.00"
    assert spread([1.0, np.inf], 0) == "never in 1 of 2 seeds"
    assert spread([1.0, np.nan], 0) == "undefined in 1 of 2 seeds"


def test_claims_are_about_the_runs():
    good, bad = make_history((10, 95, 98), (2, 0.1, 0.1)), make_history()
    held = {claim.text: claim.seeds for claim in claims({"none": [bad], "fixed": [bad], "learned": [good]})}
    assert held["BN with the learned pair takes fewer steps to 90 % test accuracy than no BN"] == 1
    assert held["BN with the fixed pair takes fewer steps to 90 % test accuracy than no BN"] == 0
    assert held["the learned pair ends with a lower training loss than the fixed pair"] == 1
    assert held["the learned pair ends with fewer test errors in per cent than no BN"] == 1
    assert sum("drifts less" in text and not seeds for text, seeds in held.items()) == 3


def test_tables_have_a_row_for_the_first_and_the_last_record():
    lines = str(report.training_table({variant: [make_history()] for variant in VARIANTS})).splitlines()
    assert lines[3].split() == ["0", *["2.000"] * 3, *["10.0"] * 3]
    assert any(line.split() == ["40", *["0.500"] * 3, *["95.0"] * 3] for line in lines)


def test_the_typical_unit_wanders_the_median_way():
    medians = np.array([[0, 0, 0], [5, 1, 2], [5, 2, 4]])
    assert typical_unit(np.stack([medians] * 3, 1)) == 2


@pytest.mark.compile
def test_networks_can_be_on_a_gpu(make_gpu):
    """Layers with CuPy arrays agree with those of NumPy."""
    make_gpu(80)
    cupy, x = sys.modules["cupy"], np.random.default_rng(0).uniform(0, 1, (12, 64)).astype(np.float32)
    cupy.tanh = np.tanh
    for variant in VARIANTS:
        ours, theirs = (Network.create(variant, np.random.default_rng(0), *options) for options in ((), (cupy, "cupy")))
        if variant == "none":
            ours, theirs = ours.with_identity_norms(x), theirs.with_identity_norms(cupy.asarray(x), "cupy")
        scores = theirs.forward(cupy.asarray(x))
        np.testing.assert_allclose(scores.get(), ours.forward(x), atol=1e-4)
        np.testing.assert_allclose(theirs.backward(scores).get(), ours.backward(ours.forward(x)), atol=1e-4)
        theirs.descend(0.1)
