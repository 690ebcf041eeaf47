"""What the planner chooses for the batch norms of known networks, as lines of text.

``python tests/plan_snapshot.py`` writes them to ``tests/data/plans.txt``; ``git diff`` then shows what has changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gpu_bn.activations import Activation
from gpu_bn.explanation import ITEMSIZES, geometry_of, works
from gpu_bn.plan import DEVICES, Device, Work, plan

FILE = Path(__file__).parent / "data" / "plans.txt"
RELU = Activation("relu")
HEADER = (
    "# Choices of gpu_bn.plan in float16, written by python tests/plan_snapshot.py. Read the diff before a commit.",
    "# tier, blocks of a strip, groups in progress, share in positions, vector, lanes, shared bytes a block, launches",
)


def _square(batch: int, *maps: tuple[int, int]) -> list[tuple[int, ...]]:
    return [(batch, c, size, size) for c, size in maps]


RESIDUAL = _square(32, (256, 56), (512, 28), (1024, 14), (2048, 7))
"""ResNet-50's batch norms to whose output the shortcut is added."""
SHAPES = {
    "resnet50": _square(
        32, (64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28),
        (256, 28), (256, 14), (1024, 14), (512, 14), (512, 7), (2048, 7),
    ),
    "mobilenetv2": _square(
        32, (32, 112), (16, 112), (96, 56), (24, 56), (144, 28), (192, 14), (576, 14), (160, 7), (960, 7),
    ),
    "unet": _square(4, (64, 256), (128, 128), (256, 64), (512, 32), (1024, 16)),
    "unet3d": [(2, 32, 128, 128, 128), (2, 64, 64, 64, 64), (2, 128, 32, 32, 32), (2, 256, 16, 16, 16)],
    "mlp": [(512, 1024), (64, 4096), (8192, 256)],
}  # fmt: skip


def calls() -> Iterator[tuple[str, tuple[Work, Work]]]:
    """Return each call's name, and what its two directions have to do."""
    for network, shapes in SHAPES.items():
        for shape in shapes:
            for layout in ("nc",) if len(shape) == 2 else ("nchw", "nhwc"):
                for residual in (False, True) if network == "resnet50" and shape in RESIDUAL else (False,):
                    geometry = geometry_of(shape, layout)
                    name = f"{network} {'x'.join(map(str, shape))} {layout}{' +residual' if residual else ''}"
                    yield name, works(*geometry, ITEMSIZES["float16"], RELU, residual)


def choice(work: Work, device: Device) -> str:
    """Put a plan into one line."""
    found = plan(work, device)
    tiling = found.tiling
    return (
        f"{found.tier} blocks={found.blocks} groups={found.in_flight} share={found.share} vector={tiling.vector} "
        f"lanes={tiling.lanes} shared={found.shared_bytes} launches={found.launches}"
    )


def text() -> str:
    """Return the whole snapshot."""
    lines = list(HEADER)
    for name, directions in calls():
        lines += ["", name]
        for device in DEVICES.values():
            for direction, work in zip(("forward", "backward"), directions, strict=True):
                lines.append(f"  {device.name:8} {direction:8} {choice(work, device)}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    FILE.write_text(text())
