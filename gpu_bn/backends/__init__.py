"""Backends: each module serves one array library and alone imports it; :mod:`gpu_bn.registry` chooses."""
