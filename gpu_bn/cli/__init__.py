"""The command ``gpu-bn``."""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    from gpu_bn.cli.commands import main

    return main(arguments)
