"""Make plain calls in few steps. A plain call has tensors that kernels can read without a copy or a conversion.

Its launches are prepared once for all calls with the same signature: types, dtypes, shapes, strides, devices, options.
A guard of torch's compiler compares all tensors of a call with a signature in one step. Addresses are checked in every
call. For any other call, ``None`` is returned and nothing is done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import starmap
from typing import Any

import torch
from torch import Tensor

from gpu_bn.activations import Activation
from gpu_bn.backends.protocol import Moments, Saved
from gpu_bn.backends.triton.launch import ClusterError, Launches, Recent
from gpu_bn.backends.triton.signatures import Backward, Forward, prepare_backward, prepare_forward
from gpu_bn.call import Call, Options
from gpu_bn.plan import VECTOR_BYTES
from gpu_bn.spec import BatchNormSpec

VARIANTS = 16
"""The most signatures that are kept for one shape, dtype and set of options."""
Record = tuple["PlainCalls", Forward, Tensor, float, float]
"""A forward call, for its backward call: the object that made it, its prepared call, saved rows (4, C) of mean,
variance, weight and bias, eps, and the activation's parameter."""
Optionals = tuple[Tensor | None, ...]
_address = Tensor.data_ptr
_grad_enabled, _increment_version = torch.is_grad_enabled, torch._C._increment_version


class PlainCalls:
    """The plain calls of a backend.

    Args:
        engine: the backend, a ``TritonBackend``.
        most: the most shapes, with their dtypes and options, whose prepared calls are kept.
    """

    def __init__(self, engine: Any, most: int) -> None:
        self.engine = engine
        self.known = Recent(most)

    def forward(
        self, call: Call, options: Options, inspect: Callable[[Call, Options], Any], record: Callable[..., Tensor]
    ) -> Tensor | None:
        """Return the output, or ``None`` if the call is not plain.

        Args:
            call: the tensors.
            options: the options.
            inspect: called for a new signature; returns ``None`` if it is not plain, or else a sequence whose last item
                tells whether a gradient is needed.
            record: called if a gradient is needed, with x, weight, bias, residual, and a tuple of the :data:`Record`,
                the output and the tensors to save; registers the call with autograd, and returns the output.
        """
        x, weight, bias, residual, mean, var, counter, _, _ = call
        training, momentum, eps, activation, _, _, _ = options
        key = (
            x.shape, x.dtype, training, _grad_enabled(), activation.name, weight is None, bias is None,
            residual is None, mean is None, var is None, counter is None,
        )  # fmt: skip
        prepared: Forward | None
        for prepared in self.known.get(key, ()):
            given = prepared.select(call)
            if prepared.guard(*given):
                break
        else:
            found = inspect(call, options)
            prepared = None if found is None else prepare_forward(self.engine, call, options, found[-1])
            if prepared is None:
                return None
            self.known[key] = (prepared, *self.known.get(key, ())[: VARIANTS - 1])
            given = prepared.select(call)
        addresses = tuple(map(_address, given))
        if addresses not in prepared.accepted and not prepared.accepts(addresses):
            return None
        parameter, launches = activation.parameter, prepared.launches
        new: list[Tensor] = [*starmap(prepared.allocate, prepared.layouts)]
        if launches.compiled:
            values = [*addresses, *map(_address, new), momentum, eps, parameter, *launches.constants]
            for step, arguments in launches.steps:
                step.run(*arguments(values))
        elif not self._compile_and_launch(launches, (*given, *new, momentum, eps, parameter)):
            return None
        if prepared.first_written:
            _increment_version(given[prepared.first_written :])
        if not prepared.needs_grad:
            return new[0]
        to_save = prepared.select_saved((x, weight, bias, residual, *new))
        return record(x, weight, bias, residual, ((self, prepared, new[1], eps, parameter), new[0], to_save))

    def backward(self, record: Record, tensors: tuple[Tensor, ...], need: Sequence[bool]) -> Optionals | None:
        """Return the gradients in ``need``, of x, weight, bias, residual and one more argument, which has none.

        Return ``None`` if the call is not plain. ``tensors``: dy, and the tensors that the forward call saved.
        """
        _, forward, saved_rows, eps, parameter = record
        prepared: Backward | None
        for prepared in forward.backward.get(need, ()):
            given = prepared.select(tensors)
            if prepared.guard(*given):
                break
        else:
            prepared = prepare_backward(self.engine, forward, tensors, need, lambda: self.saved(record, tensors))
            if prepared is None:
                return None
            forward.backward[need] = (prepared, *forward.backward.get(need, ())[: VARIANTS - 1])
            given = prepared.select(tensors)
        addresses = tuple(map(_address, given))
        if (addresses[0] | addresses[1] | addresses[-1]) % VECTOR_BYTES:
            return None
        launches = prepared.launches
        new = [*starmap(prepared.allocate, prepared.layouts)]
        if launches.compiled:
            start, row_bytes = saved_rows.data_ptr(), forward.row_bytes
            rows = range(start, start + 4 * row_bytes, row_bytes)
            values = [*addresses, *rows, *map(_address, new), eps, parameter, *launches.constants]
            for step, arguments in launches.steps:
                step.run(*arguments(values))
        elif not self._compile_and_launch(launches, (*given, *saved_rows.unbind(), *new, eps, parameter)):
            return None
        return prepared.select_gradients([*new, given[1], None])

    def _compile_and_launch(self, launches: Launches, values: tuple[Any, ...]) -> bool:
        """Launch steps that may have to be compiled; return ``False`` if they must be planned without clusters."""
        try:
            launches.launch_all(self.engine.launch, values)
        except ClusterError:
            self.engine.do_without_clusters()
            return False
        return True

    @staticmethod
    def saved(record: Record, tensors: tuple[Tensor, ...]) -> Saved:
        """Return what a forward call saved, for any backward call; ``tensors``: dy, and the tensors that it saved."""
        _, forward, saved_rows, eps, parameter = record
        mean, var, weight, bias = saved_rows.unbind()
        has_weight, has_bias, has_residual = (name in forward.names for name in ("weight", "bias", "residual"))
        named = dict(zip(forward.saved_names, tensors, strict=True))
        x = named["x"]
        return Saved(
            x,
            named.get("residual"),
            Moments(x.numel() // x.shape[1], mean, var),
            weight if has_weight else None,
            bias if has_bias else None,
            forward.gradient_layouts["dweight"][2] if has_weight else None,
            forward.gradient_layouts["dbias"][2],
            has_residual,
            BatchNormSpec(1, forward.training, 0.0, eps, Activation(forward.activation, parameter)),
            named.get("mask"),
        )
