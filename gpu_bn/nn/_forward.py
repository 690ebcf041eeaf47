"""The names by which pickles of fused models from earlier versions refer to :mod:`gpu_bn.nn.fx.forward`."""

from gpu_bn.nn.fx.forward import Forward, Plan, normalise

__all__ = ["Forward", "Plan", "normalise"]
