"""Where pickles of fused models made before 0.2 look for these names."""

from gpu_bn.nn.fx.forward import Forward, Plan, normalise

__all__ = ["Forward", "Plan", "normalise"]
