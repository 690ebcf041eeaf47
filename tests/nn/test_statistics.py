"""Test statistics over a data set and over micro-batches in one process. test_sync.py tests several processes."""

import sys

import pytest
from support import rng

torch = pytest.importorskip("torch")

from torch.testing import assert_close

from gpu_bn import nn


def batch(*shape, seed=0):
    return torch.from_numpy(rng(seed).standard_normal(shape)) * 2 + 5


def network(norm=nn.BatchNorm1d):
    torch.manual_seed(0)
    layers = [norm(3), torch.nn.Linear(3, 4), norm(4), torch.nn.Dropout(0.5)]
    return torch.nn.Sequential(*layers).double().eval()


def other_state(model):
    """Return copies of all state of a model except its running means and variances."""
    state = {name: value.clone() for name, value in model.state_dict().items() if "running" not in name}
    return (
        state,
        [(layer.training, len(layer._forward_hooks)) for layer in model.modules()],
        [getattr(layer, "track_running_stats", None) for layer in model.modules()],
    )


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, torch.nn.BatchNorm1d, nn.SyncBatchNorm])
@pytest.mark.parametrize("far", [0, 1e6])
def test_population_statistics_are_those_of_the_data_set(norm, far):
    model = network(norm)
    before = other_state(model)
    batches = [batch(size, 3, seed=size) + far for size in (5, 2, 7, 3)]
    nn.update_population_stats(model, iter([(part, "label") for part in batches]))
    assert_close(other_state(model), before, rtol=0, atol=0)
    whole = torch.cat(batches)
    assert_close(model[0].running_mean, whole.mean(0), rtol=1e-14, atol=0)
    assert_close(model[0].running_var, (whole - whole.mean(0)).square().mean(0), rtol=1e-9 if far else 1e-14, atol=0)
    inside = torch.cat([model[1](torch.nn.functional.batch_norm(part, None, None, training=True)) for part in batches])
    assert_close(model[2].running_mean, inside.mean(0).detach(), rtol=0, atol=1e-8)
    assert_close(model[2].running_var, inside.var(0, correction=0).detach(), rtol=1e-8, atol=0)


def test_it_makes_no_difference_how_the_data_are_cut():
    x = batch(60, 3, 7).float() + 1e4
    found = []
    for size in (60, 7, 2):
        layer = nn.BatchNorm1d(3)
        nn.update_population_stats(layer, x.split(size))
        found.append(layer.running_var)
    assert_close(found[1], found[0], rtol=2e-7, atol=0)
    assert_close(found[2], found[0], rtol=2e-7, atol=0)
    assert_close(found[0], x.double().var((0, 2), correction=0).float(), rtol=2e-7, atol=0)


def test_layers_that_keep_nothing_of_their_own_are_left_alone():
    layers = nn.freeze(nn.BatchNorm1d(3)), nn.BatchNorm1d(3, track_running_stats=False), nn.BatchNorm1d(3)
    model = torch.nn.Sequential(*layers)
    nn.update_population_stats(model, [batch(4, 3).float()])
    assert_close(layers[0].state_dict(), nn.BatchNorm1d(3).state_dict())
    assert layers[1].running_mean is None
    assert not layers[1].track_running_stats
    assert layers[2].running_mean.abs().max() > 0


def test_a_failure_changes_nothing():
    model = network()
    before, state = other_state(model), {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="elements"):
        nn.update_population_stats(model, [batch(4, 3), batch(4, 5)])
    with pytest.raises(ValueError, match="no layer with running statistics saw any data"):
        nn.update_population_stats(model, [])
    with pytest.raises(RuntimeError, match="elements"), nn.accumulate_statistics(model.train()):
        model(torch.cat([model(batch(4, 3))] * 2))
    assert_close(other_state(model.eval()), before, rtol=0, atol=0)
    assert_close(model.state_dict(), state, rtol=0, atol=0)


def test_how_the_model_is_called_and_how_often():
    layer = nn.BatchNorm1d(3).double()
    parts = [{"x": batch(4, 3, seed=seed)} for seed in range(3)]
    nn.update_population_stats(layer, parts, steps=2, call=lambda model, part: model(input=part["x"]))
    assert_close(layer.running_mean, torch.cat([part["x"] for part in parts[:2]]).mean(0))


@pytest.mark.parametrize("installed", [True, False])
def test_a_bar_if_rich_is_installed(installed, monkeypatch, capsys):
    pytest.importorskip("rich")
    monkeypatch.setenv("FORCE_COLOR", "1")
    if not installed:
        monkeypatch.setattr("gpu_bn.nn.statistics.find_spec", lambda _: None)
        monkeypatch.setitem(sys.modules, "rich.progress", None)
    nn.update_population_stats(nn.BatchNorm1d(3).double(), [batch(4, 3)], progress=True)
    assert ("population statistics" in capsys.readouterr().err) == installed


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, torch.nn.BatchNorm1d])
@pytest.mark.parametrize("momentum", [0.3, None])
def test_micro_batches_make_one_update(norm, momentum):
    layer, whole = (norm(3, momentum=momentum).double() for _ in range(2))
    for step in range(3):
        x = batch(12, 3, 2, seed=step)
        whole(x)
        with nn.accumulate_statistics(torch.nn.Sequential(layer)):
            for part in x.split((5, 1, 6)):
                assert_close(layer(part), torch.nn.functional.batch_norm(part, None, None, training=True))
        assert_close(layer.state_dict(), whole.state_dict(), rtol=1e-13, atol=1e-13)


def test_renormalisation_reads_the_running_statistics_meanwhile():
    layer, whole = (nn.BatchNorm1d(3, renorm=(1.5, 0.5)).double() for _ in range(2))
    x = batch(12, 3, 2)
    whole(x)
    with nn.no_tracking():
        expected = [layer(part) for part in x.split(4)]
    with nn.accumulate_statistics(layer):
        for part, y in zip(x.split(4), expected, strict=True):
            assert torch.equal(layer(part), y)
    assert_close(layer.state_dict(), whole.state_dict(), rtol=1e-13, atol=1e-13)
    nn.update_population_stats(layer, x.split(4))
    assert_close(layer.running_mean, x.mean((0, 2)))


def test_micro_batches_in_evaluation_do_not_count():
    layer, whole = (nn.BatchNorm1d(3).double() for _ in range(2))
    x = batch(12, 3)
    whole(x)
    with nn.accumulate_statistics(layer):
        layer(x[:4])
        layer.eval()(x)
        layer.train()(x[4:])
        with nn.no_tracking():
            layer(x)
    assert_close(layer.state_dict(), whole.state_dict())


def test_checkpointed_micro_batches_count_once():
    layer, whole = (nn.BatchNorm1d(3).double() for _ in range(2))
    x = batch(12, 3)
    whole(x)
    with nn.accumulate_statistics(layer):
        for part in x.split(6):
            part.requires_grad_()
            checkpoint = torch.utils.checkpoint.checkpoint
            y = checkpoint(layer, part, use_reentrant=False, context_fn=nn.checkpoint_contexts)
            y.square().sum().backward()
    assert_close(layer.state_dict(), whole.state_dict())


def test_a_block_with_no_call_updates_nothing():
    layer = nn.BatchNorm1d(3)
    with nn.accumulate_statistics(layer):
        pass
    assert_close(layer.state_dict(), nn.BatchNorm1d(3).state_dict())


@pytest.mark.parametrize("norm", [nn.LazyBatchNorm1d, torch.nn.LazyBatchNorm1d])
@pytest.mark.parametrize("affine", [True, False])
def test_lazy_layers_are_refused_until_their_first_input(norm, affine):
    model = torch.nn.Sequential(nn.BatchNorm1d(3), norm(affine=affine)).double()
    before, x = other_state(model[0]), batch(4, 3)
    text = "lazy layers do not know their channels yet: run a batch through '1' first"
    with pytest.raises(ValueError, match=text), nn.accumulate_statistics(model):
        model(x)
    with pytest.raises(ValueError, match=text):
        nn.update_population_stats(model, [x])
    assert_close(other_state(model[0]), before, rtol=0, atol=0)
    model(x)
    with nn.accumulate_statistics(model):
        model(x)
    assert model[1].num_batches_tracked == 2
