"""``gpu-bn bench``: every case is proved, then timed against what else is installed (:mod:`gpu_bn.bench.run`)."""
