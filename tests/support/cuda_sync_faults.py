"""List faults to plant in the CUDA kernels of SyncBatchNorm, for ``backends/test_gpu_sync.py``."""

FAULTS = {
    "no barrier before a sum is written": ("__syncthreads();  // the sum before has been read", "", "data race"),
    "no barrier before a sum is read": ("% LANES] = own;\n    __syncthreads();", "% LANES] = own;", "data race"),
    "a process is left out": ("process < processes; process += WARPS", "process + 1 < processes; process += WARPS",
                              "not close"),
    "means do not differ": ("(packets.get(i, channels + at) + apart * apart)", "packets.get(i, channels + at)",
                            "not close"),
    "only one field is compared": ("place < parts * header", "place < 1", "isnan"),
    "the counter is written too early": ("  __syncthreads();\n  if (counter", "  if (counter", "data race"),
    "an empty batch counts": ("n > 0 && channel", "channel", "not close"),
    "the variance is biased": ("n / fmax(n - 1., 1.)", "1.", "not close"),
}  # fmt: skip
"""A text of the kernels, what replaces it, and what says so."""
