"""Calls on torch tensors: the operators ``torch.ops.gpu_bn.*``, their derivatives, and shorter ways to the kernels."""
