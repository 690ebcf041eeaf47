"""``--train``: time a training step of ResNet-18 with torch's and with our batch norm, eager and compiled.

Also read the profiler of torch: which operations of a call launch kernels, and how much memory its tensors take.
"""

from __future__ import annotations

import copy
import gc
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

import torch
from torch import nn

from gpu_bn import nn as ours
from gpu_bn.bench.timing import CpuTimer, GpuTimer, TimedCall, Timer, Timing, describe_error, take_samples, torch_gpu
from gpu_bn.cli.console import Table, megabytes, milliseconds, progress

Make = Callable[[nn.Module], Any]
"""A function that returns a variant of a model."""
AGREEMENT, NOISE = 1e-3, 2.0
"""The error allowed to the first layer's gradient, as a share of its norm in float64, is ``AGREEMENT + NOISE * error``,
where ``error`` is that of torch's own layers: up to 0.3 % in float32, 12 to 16 % with autocast in float16."""
LAUNCH_NOTHING = {
    "empty", "empty_strided", "empty_like", "new_empty", "view", "unbind", "split", "select", "slice", "as_strided",
    "detach", "alias", "to", "expand", "permute",
}  # fmt: skip
"""Operations that launch no kernel. ``to`` is among them because a conversion calls another operation, which counts."""
SIZES = {"cpu": (8, 64), "cuda": (128, 224)}
"""The number of images in a batch and their side in pixels, by the kind of device."""


def _convolution(inputs: int, outputs: int, size: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs)]


class Block(nn.Module):
    """A residual block: two convolutions, a sum and ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        first, second = _convolution(inputs, outputs, 3, stride), _convolution(outputs, outputs, 3, 1)
        self.inner = nn.Sequential(*first, nn.ReLU(), *second)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Sequential(*([] if same else _convolution(inputs, outputs, 1, stride)))
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.relu(self.inner(x) + self.shortcut(x)))


def resnet18(width: int = 64, classes: int = 1000) -> nn.Module:
    """Return a ResNet-18, which has 20 normalisations, 8 of them before a sum."""
    layers = [*_convolution(3, width, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inputs = width
    for outputs, stride in ((width, 1), (2 * width, 2), (4 * width, 2), (8 * width, 2)):
        layers += [Block(inputs, outputs, stride), Block(outputs, outputs, 1)]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, classes))


LAYERS: dict[str, Make] = {
    "torch": lambda model: model,
    "gpu_bn": lambda model: ours.convert(model),
    "gpu_bn, fused": lambda model: ours.convert(model, fuse=True),
}
"""Functions that give a model its layers, by the name of the layers."""


def variants(eager: bool) -> dict[str, Make]:
    """Return the timed variants by name: of all layers eager and, unless ``eager``, compiled."""
    makes: dict[str, Make] = {}
    for name, make in LAYERS.items():
        makes[f"{name}, eager"] = make
        if not eager:
            makes[f"{name}, compiled"] = lambda model, make=make: torch.compile(make(model))  # type: ignore[misc]
    return makes


@dataclass(frozen=True)
class TrainingResult:
    """The time of a variant's training step and its peak memory in bytes; or why the variant was refused."""

    name: str
    timing: Timing | None
    peak_bytes: int | None
    refused: str


def train(kind: str, seconds: float, eager: bool) -> list[TrainingResult]:
    """Check and time all variants on ``kind``, cpu or cuda."""
    number, side = SIZES[kind]
    torch.manual_seed(0)
    model, images = resnet18().to(kind), torch.randn(number, 3, side, side, device=kind)
    if kind == "cuda":
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(number, device=kind)
    makes = variants(eager)
    with progress(f"Training steps of ResNet-18: {len(makes)} variants", len(makes)) as advance:
        steps, peaks, refused = check_gradients(makes, model, images, labels, advance)
        timer: Timer = CpuTimer(batch=0) if kind == "cpu" else GpuTimer(torch_gpu(torch), row=3)
        samples = take_samples(steps, timer, "wall", seconds)
    refused |= samples.errors
    timings = {name: Timing.from_samples(times) for name, times in samples.seconds.items()}
    return [TrainingResult(name, timings.get(name), peaks.get(name), refused.get(name, "")) for name in makes]


def check_gradients(
    makes: Mapping[str, Make],
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    advance: Callable[[int], None] = lambda _: None,
) -> tuple[dict[str, TimedCall], dict[str, int], dict[str, str]]:
    """Compare the first layer's gradient of each variant with that of ``model`` in float64.

    The first variant must have torch's layers. Return the training steps and the peak memory in bytes of the variants
    that agree, and why the others are refused.
    """
    steps, peaks, refused = {}, {}, {}
    _, expected = training_step(copy.deepcopy(model).double(), images.double(), labels, autocast=False)
    allowed: float | None = None
    for name, make in makes.items():
        try:
            step, gradient = training_step(make(copy.deepcopy(model)), images, labels)
            error = float((gradient - expected).norm() / expected.norm())
            allowed = AGREEMENT + NOISE * error if allowed is None else allowed
            if not error <= allowed:
                refused[name] = f"wrong: the first gradient is off by {error:.2g} of its norm"
            else:
                steps[name], peaks[name] = step, peak_bytes(step, images.device.type)
        except Exception as error:
            refused[name] = describe_error(error)
        advance(1)
    return steps, peaks, refused


def training_step(
    model: Any, images: torch.Tensor, labels: torch.Tensor, autocast: bool = True
) -> tuple[TimedCall, torch.Tensor]:
    """Return a training step, and the first layer's gradient after its first run; ``autocast`` acts on a GPU only."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.float16) if autocast and images.is_cuda else nullcontext():
            loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()

    step()
    gradient = next(iter(model.parameters())).grad
    return step, gradient.detach().double().clone()


def failures(rows: list[TrainingResult]) -> list[str]:
    """Return the failures of our layers, but not where torch's own layers fail too, such as without a C++ compiler."""
    theirs = {row.name: row.refused for row in rows if row.name.startswith("torch")}
    failing = [row for row in rows if row.refused and row.name not in theirs]
    return [f"{row.name}: {row.refused}" for row in failing if not theirs[f"torch, {row.name.rpartition(', ')[2]}"]]


def training_table(rows: list[TrainingResult], kind: str) -> Table:
    """Return the table of times and memory."""
    (number, side), base, lines = SIZES[kind], rows[0].timing, []
    for row in rows:
        times = [f"not timed: {row.refused}", "-", "-"]
        if row.timing:
            ratio = f"{row.timing.median / base.median:.2f}" if base else "-"
            times = [milliseconds(row.timing.median), milliseconds(row.timing.spread), ratio]
        lines.append([row.name, *times, megabytes(row.peak_bytes)])
    how = "float16 by autocast, channels-last" if kind == "cuda" else "float32"
    agrees = f"agrees with that of torch's layers in float64{', as far as autocast lets it' * (kind == 'cuda')}"
    caption = (
        f"{number} images of {side} x {side}, {how}. The first gradient of each variant {agrees}. "
        "Peak memory: what torch's tensors take in a step beyond what they took before it."
    )
    header = ["layers", "a step (ms)", "IQR", "/ torch, eager", "peak memory (MB)"]
    return Table(f"Training step of ResNet-18 on the {kind}", header, lines, caption)


# ----------------------------------------------------------------------------------------------------- profiler
def count_operations(call: TimedCall) -> Counter[str]:
    """Count the torch operations of a call that would launch a kernel, also in the thread of autograd."""
    names = [event.name.removeprefix("aten::") for event in _profiled(call).events() if event.name.startswith("aten::")]
    return Counter(name for name in names if name not in LAUNCH_NOTHING)


def peak_bytes(call: TimedCall, kind: str) -> int:
    """Measure the peak memory of torch tensors in a call, in bytes beyond the memory before it."""
    gc.collect()
    if kind == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    events = _profiled(call, profile_memory=True).profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(accumulate(nbytes for _, nbytes in changes), default=0)


def _profiled(call: TimedCall, **options: Any) -> Any:
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, acc_events=True, **options) as profile:
        call()
    return profile
