"""Serve torch tensors on a GPU by Triton kernels."""
