"""The command ``gpu-bn``."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 130 if Ctrl-C comes while it is imported."""
    try:
        from gpu_bn.cli.commands import main
    except KeyboardInterrupt:
        print("gpu-bn: interrupted", file=sys.stderr)
        return 130
    return main(arguments)
