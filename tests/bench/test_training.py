"""Test ``gpu-bn bench --train`` and its part of the results page."""

import json
import re
from functools import partial

import pytest
from support.paths import ROOT

torch = pytest.importorskip("torch", reason="the training benchmark is torch's: pip install torch")

from gpu_bn import get_num_threads, nn
from gpu_bn.bench import training
from gpu_bn.bench.cases import NETWORKS
from gpu_bn.cli import main

SMALL = (4, 64)
LINE = ["bench", "--seconds", "0", "--device", "cpu", "--threads", "1", "--train", "--eager"]


@pytest.fixture
def small(monkeypatch):
    """Train a narrow network on small images, and restore torch's number of threads."""
    monkeypatch.setitem(training.SIZES, "cpu", SMALL)
    monkeypatch.setattr(training, "resnet18", partial(training.resnet18, width=8, classes=10))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_it_is_a_resnet_18():
    model = training.resnet18()
    assert sum(p.numel() for p in model.parameters()) == 11_689_512  # as in torchvision
    assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules()) == 20
    report = nn.Report()
    nn.convert(model, fuse=True, report=report)
    assert len(report.converted) == 20
    assert len(report.merged) == 17  # all but those of three shortcuts


@pytest.mark.usefixtures("small")
def test_the_table_and_the_json(capsys, tmp_path):
    page = tmp_path / "page.md"
    line = [*LINE, "--shapes", "4x8", "--ops", "forward"]
    assert main([*line, "--out", str(tmp_path), "--page", str(page)]) == 0
    out = capsys.readouterr().out
    assert "Training step of ResNet-18 on the cpu" in out
    assert "4 images of 64 x 64, float32" in out
    rows = json.loads((tmp_path / "report.json").read_text())["training"]
    assert [row["name"] for row in rows] == ["torch, eager", "gpu_bn, eager", "gpu_bn, fused, eager"]
    for row in rows:
        assert row["refused"] == ""
        assert row["timing"]["samples"] == 1
        assert row["peak_bytes"] is None or row["peak_bytes"] >= 0
    text = page.read_text()
    assert text.index("## Measured on the CPU") < text.index("Training step") < text.index("## Modelled")
    assert "gpu-bn bench --seconds 0 --device cpu --threads 1 --train --eager --shapes 4x8" in text
    assert torch.get_num_threads() == 1
    assert "No GPU table: nobody has run this command on one yet." in text


@pytest.mark.usefixtures("small")
def test_a_wrong_variant_is_not_timed_and_is_a_failure(monkeypatch, capsys, tmp_path):
    def half(model, **_):
        for parameter in model.parameters():
            parameter.data *= 0.5
        return model

    monkeypatch.setattr(training.ours, "convert", half)
    line = [*LINE, "--shapes", "4x8", "--ops", "eval"]
    assert main([*line, "--out", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert re.search(r"gpu_bn, eager +not timed: wrong: the first gradient is off by", out)
    assert not re.search(r"torch, eager +not timed", out)


def test_it_has_the_threads_that_were_asked_for(monkeypatch, tmp_path):
    threads = []

    def train(*_):
        threads.append((torch.get_num_threads(), get_num_threads()))
        return [training.TrainingResult("torch, eager", None, None, "")]

    monkeypatch.setattr(training, "train", train)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert main([*LINE, "--shapes", "4x8", "--ops", "eval", "--peers", "none", "--out", str(tmp_path)]) == 0
        assert threads == [(1, 1)]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_agreement_is_as_close_as_torch_itself_is(monkeypatch):
    """With autocast torch's gradient differs from that in float32. Ours may differ about as much, but not much more."""

    def off_by(share):
        def make(model):
            model[0].weight.register_hook(lambda grad: grad * (1 + share))
            return model

        return make

    monkeypatch.setattr(
        training,
        "variants",
        lambda _: {"torch": off_by(0.1), "gpu_bn": off_by(0.15), "gpu_bn, fused": off_by(0.3)},
    )
    monkeypatch.setattr(training, "resnet18", partial(training.resnet18, width=8, classes=10))
    monkeypatch.setitem(training.SIZES, "cpu", SMALL)
    refused = [row.refused for row in training.train("cpu", 0, True)]
    assert refused == ["", "", "wrong: the first gradient is off by 0.3 of its norm"]


def test_what_fails_for_torch_too_is_no_failure_of_ours():
    def row(name, refused):
        return training.TrainingResult(name, None, None, refused)

    rows = [row("torch, eager", ""), row("torch, compiled", "no C++ compiler"), row("gpu_bn, eager", "wrong"),
            row("gpu_bn, compiled", "no C++ compiler"), row("gpu_bn, fused, eager", "")]  # fmt: skip
    assert training.failures(rows) == ["gpu_bn, eager: wrong"]


def test_the_variants():
    assert list(training.variants(eager=False)) == [
        f"{layers}, {how}" for layers in ("torch", "gpu_bn", "gpu_bn, fused") for how in ("eager", "compiled")
    ]


@pytest.mark.exhaustive  # inductor compiles C++ for some minutes
@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("small")
def test_compiled_variants_agree_too():
    rows = training.train("cpu", 0, eager=False)
    assert len(rows) == 6
    assert [row.refused for row in rows] == [""] * 6


def test_memory_that_a_step_takes_is_seen():
    def step():
        torch.ones(1 << 24).sum()

    assert 4 << 24 <= training.peak_bytes(step, "cpu") < 5 << 24


@pytest.mark.parametrize("path", ["bench/results.md"])
def test_the_results_page_names_its_command_and_no_machine(path):
    text = (ROOT / path).read_text()
    command = re.search(r"```sh\n(gpu-bn bench .*)\n```", text).group(1)
    assert f"--page {path}" in command
    for name in re.findall(r"--shapes (\S+)", command):
        assert set(name.split(",")) <= set(NETWORKS)
    assert "/home" not in text
    assert "/work" not in text
    assert "Modelled: GPUs that are not here" in text
