"""Run the command ``gpu-bn``, as ``python -m gpu_bn``."""

import sys

from gpu_bn.cli import main

if __name__ == "__main__":
    sys.exit(main())
