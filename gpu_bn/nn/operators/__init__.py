"""Calls with torch tensors: the operators ``torch.ops.gpu_bn.*``, their derivatives, and faster paths to kernels."""
