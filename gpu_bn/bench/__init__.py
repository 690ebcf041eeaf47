"""``gpu-bn bench``: check each case, then time it beside other installed libraries (:mod:`gpu_bn.bench.run`)."""
