"""The Triton backend, for torch tensors on a GPU."""
