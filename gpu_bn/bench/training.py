"""``--train``: time a training step of ResNet-18, with torch's batch norm and with ours, eager and compiled."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from gpu_bn import nn as ours
from gpu_bn.bench.gpus import TorchGpu
from gpu_bn.bench.timing import CpuTimer, GpuTimer, TimedCall, Timer, Timing, in_words, take_samples
from gpu_bn.bench.torch_profile import peak_bytes
from gpu_bn.cli.console import Table, megabytes, milliseconds, progress

AGREEMENT, NOISE = 1e-3, 2.0
"""How far a first gradient may be from that of torch's layers in float32: ``AGREEMENT`` of its norm, and ``NOISE``
times as far as torch's own with autocast, which was off by 12 to 16 % in float16 in such networks."""


class Sizes(NamedTuple):
    """A batch: the number of images, and their sides in pixels."""

    images: int
    side: int


SIZES = {"cpu": Sizes(8, 64), "cuda": Sizes(128, 224)}


class Block(nn.Module):
    """A block of two convolutions and a sum."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum, after ReLU."""
        inner = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return cast(torch.Tensor, self.relu2(inner + self.shortcut(x)))


def resnet18(width: int = 64, classes: int = 1000) -> nn.Module:
    """Make a ResNet-18: 20 normalisations, 8 of them before a sum."""
    layers = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inputs = width
    for outputs, stride in ((width, 1), (2 * width, 2), (4 * width, 2), (8 * width, 2)):
        layers += [Block(inputs, outputs, stride), Block(outputs, outputs, 1)]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, classes))


class TrainingResult(NamedTuple):
    """A variant's time for a step and the most memory that a step took, in bytes; or why it was refused."""

    name: str
    timing: Timing | None
    peak_bytes: int | None
    refused: str

    @property
    def ours(self) -> bool:
        """Whether the layers are this library's."""
        return self.name.startswith("gpu_bn")

    @property
    def how(self) -> str:
        """Eager or compiled."""
        return self.name.rpartition(", ")[2]


def variants(eager: bool) -> dict[str, Callable[[nn.Module], Any]]:
    """Return what is made of the model, by name; the others are compared with the first."""
    makes: dict[str, Callable[[nn.Module], Any]] = {
        "torch": lambda model: model,
        "gpu_bn": ours.convert,
        "gpu_bn, fused": lambda model: ours.convert(model, fuse=True),
    }
    found = {}
    for name, make in makes.items():
        found[f"{name}, eager"] = make
        if not eager:
            found[f"{name}, compiled"] = partial(_compiled, make)
    return found


def _compiled(make: Callable[[nn.Module], Any], model: nn.Module) -> Any:
    return torch.compile(make(model))


def train(kind: str, seconds: float, eager: bool, sizes: Sizes | None = None) -> list[TrainingResult]:
    """Check and time all variants; ``kind`` is cpu or cuda."""
    sizes = sizes or SIZES[kind]
    torch.manual_seed(0)
    model, images = resnet18().to(kind), torch.randn(sizes.images, 3, sizes.side, sizes.side, device=kind)
    if kind == "cuda":
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(sizes.images, device=kind)
    makes = variants(eager)
    with progress(f"Training steps of ResNet-18: {len(makes)} variants", len(makes)) as advance:
        steps, peaks, refused = check(makes, model, images, labels, advance)
        timer: Timer = CpuTimer(batch=0) if kind == "cpu" else GpuTimer(TorchGpu(), row=3)
        samples = take_samples(steps, timer, "wall", seconds)
    refused |= samples.errors
    timings = {name: Timing.of(found) for name, found in samples.seconds.items()}
    return [TrainingResult(name, timings.get(name), peaks.get(name), refused.get(name, "")) for name in makes]


def check(
    makes: Mapping[str, Callable[[nn.Module], Any]],
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    advance: Callable[[int], None],
) -> tuple[dict[str, TimedCall], dict[str, int], dict[str, str]]:
    """Compare the first gradient of each variant with that of ``model``; the first variant has torch's layers.

    Returns:
        The training steps of those that agree, the memory that each takes, and why the others are refused.
    """
    steps, peaks, refused = {}, {}, {}
    _, expected = prepare(copy.deepcopy(model), images, labels, autocast=False)
    allowed: float | None = None
    for name, make in makes.items():
        try:
            step, gradient = prepare(make(copy.deepcopy(model)), images, labels)
            error = float((gradient - expected).norm() / expected.norm())
            allowed = AGREEMENT + NOISE * error if allowed is None else allowed
            if not error <= allowed:
                refused[name] = f"wrong: the first gradient is off by {error:.2g} of its norm"
            else:
                steps[name], peaks[name] = step, peak_bytes(step, images.device.type)
        except Exception as error:
            refused[name] = in_words(error)
        advance(1)
    return steps, peaks, refused


def prepare(
    model: Any, images: torch.Tensor, labels: torch.Tensor, autocast: bool = True
) -> tuple[Callable[[], Any], torch.Tensor]:
    """Return a training step, and the first layer's gradient after it has run once; ``autocast`` is for a GPU."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.float16) if autocast and images.is_cuda else nullcontext():
            loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()

    step()
    gradient = next(iter(model.parameters())).grad
    assert gradient is not None
    return step, gradient.detach().double().clone()


def failures(rows: list[TrainingResult]) -> list[str]:
    """Return what is wrong with ours, unless torch's own layers fail too, as without a C++ compiler."""
    failing = {row.how for row in rows if row.refused and not row.ours}
    return [f"{row.name}: {row.refused}" for row in rows if row.refused and row.ours and row.how not in failing]


def training_table(rows: list[TrainingResult], kind: str) -> tuple[Table, list[Any]]:
    """Return the table, and what goes into the JSON."""
    sizes = SIZES[kind]
    base = rows[0].timing
    lines = []
    for row in rows:
        timing, spread = row.timing, row.timing.spread if row.timing else None
        lines.append([
            row.name,
            milliseconds(timing.median) if timing else f"not timed: {row.refused}",
            "-" if spread is None else milliseconds(spread),
            f"{timing.median / base.median:.2f}" if timing and base else "-",
            "-" if row.peak_bytes is None else megabytes(row.peak_bytes),
        ])  # fmt: skip
    how = "float16 by autocast, channels-last" if kind == "cuda" else "float32"
    agrees = f"agrees with that of torch's layers in float32{', as far as autocast lets it' * (kind == 'cuda')}"
    caption = (
        f"{sizes.images} images of {sizes.side} x {sizes.side}, {how}. The first gradient of each variant {agrees}. "
        "Peak memory: what torch's tensors take in a step beyond what they took before it."
    )
    header = ["layers", "a step (ms)", "IQR", "/ torch, eager", "peak memory (MB)"]
    return Table(f"Training step of ResNet-18 on the {kind}", header, lines, caption), [
        {**row._asdict(), "timing": row.timing._asdict() if row.timing else None} for row in rows
    ]
