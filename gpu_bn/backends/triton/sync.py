"""Statistics of several processes on a GPU: one launch merges packets, another updates running statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gpu_bn.backends.triton.arguments import copy_back
from gpu_bn.backends.triton.launch import Launch, Recent, Step
from gpu_bn.kernels.triton import sync as sync_kernels

Array = Any
AT_ONCE = 16
"""The most processes whose packets a program reads at a time."""
CHANNELS = 32
"""Channels that a program merges, or numbers that it adds up."""
UPDATED = 1024
"""Channels whose running statistics are updated at a time."""


class SharedStatistics:
    """Methods of the Triton backend for :class:`gpu_bn.nn.SyncBatchNorm`, beside the phases."""

    launch: Launch
    _prepared: Recent

    def new(self, shape: tuple[int, ...], strides: tuple[int, ...] | None, dtype: Any, device: Any) -> Array:
        """Return a new tensor that is not initialised."""
        raise NotImplementedError

    @torch.no_grad()
    def merge_packets(
        self, packets: Sequence[Array], channels: int, header: int, room: int, unknown: float
    ) -> tuple[Array, Array, Array]:
        """Return float64 count (1,), mean (C,) and variance (C,) of reports in packets of shape (W, header + room).

        Mean and variance are NaN if headers differ, other than in fields with the value ``unknown``, or if one starts
        with a number that is not 0.
        """
        results = self.new((1 + 2 * channels,), None, torch.float64, packets[0].device)
        count, mean, var = results.split((1, channels, channels))
        self._merge(sync_kernels.bn_sync_merge_kernel, packets, (header, room, unknown), (count, mean, var))
        return count, mean, var

    @torch.no_grad()
    def sum_packets(self, packets: Sequence[Array], length: int, header: int, room: int, unknown: float) -> Array:
        """Return the sums (length,) of all processes' numbers; NaN on the conditions of :meth:`merge_packets`."""
        sums = self.new((length,), None, torch.float64, packets[0].device)
        self._merge(sync_kernels.bn_sync_sum_kernel, packets, (header, room, unknown), (sums,))
        return sums

    def _merge(
        self, kernel: Any, packets: Sequence[Array], form: tuple[int, int, float], results: tuple[Array, ...]
    ) -> None:
        """Launch a kernel that merges packets into results; ``form``: the packets' header, room and unknown."""
        joined = packets[0] if len(packets) == 1 else torch.cat(list(packets))
        parts, size = len(packets), len(results[-1])
        key = (kernel, joined.shape, parts, size, form, joined.device)
        step = self._prepared.get(key)
        if step is None:
            processes = joined.shape[0] // parts
            at_once = min(AT_ONCE, 1 << (processes - 1).bit_length())
            tail = (size, processes, parts, *form, at_once, 1 << (form[0] - 1).bit_length(), CHANNELS)
            step = self._prepared[key] = _step(kernel, -(-size // CHANNELS), tail, joined.device)
        self.launch(step, (joined.contiguous(), *results))

    @torch.no_grad()
    def update_shared(
        self, running_mean: Array | None, running_var: Array | None, counter: Array | None, momentum: float | None,
        momentum_at: Array | None, count: Array, mean: Array, var: Array,
    ) -> None:  # fmt: skip
        """Update running statistics with those of a batch whose count is on the device, and count the batch.

        Without a momentum, 1 / the number of batches is used.
        """
        cumulative = momentum is None and momentum_at is None and counter is not None
        tracked = (running_mean, running_var, counter, momentum_at)
        key = ("update shared", mean.shape, mean.device, cumulative, *[None if t is None else t.dtype for t in tracked])
        step = self._prepared.get(key)
        if step is None:
            tail = (len(mean), cumulative, UPDATED)
            step = self._prepared[key] = _step(sync_kernels.bn_sync_update_kernel, 1, tail, mean.device)
        written = tuple(None if v is None else v.contiguous() for v in (running_mean, running_var))
        self.launch(step, (*written, counter, count, mean, var, momentum or 0.0, momentum_at))
        copy_back(written, (running_mean, running_var))


def _step(kernel: Any, programs: int, tail: tuple[Any, ...], device: torch.device) -> Step:
    return Step(kernel, (programs, 1), tail, 4, device=-1 if device.index is None else device.index)
