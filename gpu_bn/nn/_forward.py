"""Names that pickles of fused models hold which were made before the modules moved."""

from gpu_bn.nn.fx.forward import Forward, Plan, normalise

__all__ = ["Forward", "Plan", "normalise"]
