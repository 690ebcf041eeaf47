"""List faults to plant in the kernels of SyncBatchNorm, for ``backends/test_gpu_sync.py``."""

CUDA = {
    "no barrier before a sum is written": ("__syncthreads();  // the previous sum has been read", "", "data race"),
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
"""The faults in the CUDA kernels: a part of the source, its replacement, and the message that reports the fault."""
TRITON = {
    "a process's report is left out": ("mean_c += tl.sum(tl.load(place, mask=present",
                                       "mean_c += tl.sum(tl.load(place, mask=present & (process > 0)[:, None]",
                                       "not close"),
    "means do not differ": ("(variance + apart * apart)", "variance", "not close"),
    "only the first part's headers are compared": ("for part in range(parts):", "for part in range(1):", "isnan"),
    "a process's sums are left out": ("total += tl.sum(tl.load(place, mask=present",
                                      "total += tl.sum(tl.load(place, mask=present & (process > 0)[:, None]",
                                      "not close"),
    "sums of the first 16 processes are forgotten": ("total += tl.sum(", "total = tl.sum(", "not close"),
    "the last sum is left out": ("(at < length)[None, :]", "(at + 1 < length)[None, :]", "not close"),
    "headers that differ are not noticed": ("(least < most)", "(least < most - most)", "isnan"),
    "a mistake is none": ("(head != 0.0))", "(head != head))", "isnan"),
    "the counter is written too early": ("tl.debug_barrier()\n        tl.store(", "tl.store(", "data race"),
    "an empty batch counts": ("(channel < channels) & (total > 0.0)", "channel < channels", "not close"),
    "the variance is biased": ("(var_c * bessel)", "var_c", "not close"),
}  # fmt: skip
"""The faults in the Triton kernels: a part of the source, its replacement, and the message that reports the fault."""
