"""Make plain calls in few steps: of tensors that kernels read as they lie, prepared once for all calls of a signature.

A signature is all that two calls alike have in common: types, dtypes, shapes, strides, devices, options. A guard of
torch's, made for compiled code, compares all tensors of a call with it in one step. Addresses are looked at in every
call. Where something has to be copied, converted or refused, nothing is done here: ``None`` is returned.
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
"""Signatures that are remembered of one shape, dtype and options."""
Made = tuple["PlainCalls", Forward, Tensor, float, float]
"""Who has made a forward call, and what is kept: its signature, (4, C) of mean, variance, weight and bias, eps, the
parameter."""
Optionals = tuple[Tensor | None, ...]
_address = Tensor.data_ptr
_grad_enabled, _increment_version = torch.is_grad_enabled, torch._C._increment_version


class PlainCalls:
    """Make plain calls for a backend.

    Args:
        engine: the backend, a ``TritonBackend``.
        most: shapes, with their dtypes and options, that are remembered.
    """

    def __init__(self, engine: Any, most: int) -> None:
        self.engine = engine
        self.known = Recent(most)

    def forward(
        self, call: Call, options: Options, parts: Callable[[Call, Options], Any], tell: Callable[..., Tensor]
    ) -> Tensor | None:
        """Return the output.

        ``parts`` looks at a signature that is new: it returns ``None`` if that is not plain, or else three things, of
        which the last tells whether something is differentiated. If so, ``tell`` tells autograd and returns the output.
        It is given x, weight, bias, residual; and what a backward call needs, the output, the tensors to save.
        """
        x, weight, bias, residual, mean, var, counter, _, _ = call
        training, momentum, eps, activation, _, _, _ = options
        key = (
            x.shape, x.dtype, training, _grad_enabled(), activation.name, weight is None, bias is None,
            residual is None, mean is None, var is None, counter is None,
        )  # fmt: skip
        way: Forward | None
        for way in self.known.get(key, ()):
            given = way.given(call)
            if way.guard(*given):
                break
        else:
            found = parts(call, options)
            way = None if found is None else prepare_forward(self.engine, call, options, found[-1])
            if way is None:
                return None
            self.known[key] = (way, *self.known.get(key, ())[: VARIANTS - 1])
            given = way.given(call)
        where = tuple(map(_address, given))
        if where not in way.served and not way.serves(where):
            return None
        parameter, launches = activation.parameter, way.launches
        new: list[Tensor] = [*starmap(way.new, way.layouts)]
        if launches.compiled:
            values = [*where, *map(_address, new), momentum, eps, parameter, *launches.constants]
            for step, arguments in launches.steps:
                step.run(*arguments(values))
        elif not self._first(launches, (*given, *new, momentum, eps, parameter)):
            return None
        if way.written:
            _increment_version(given[way.written :])
        if not way.grows:
            return new[0]
        to_save = way.saves((x, weight, bias, residual, *new))
        return tell(x, weight, bias, residual, ((self, way, new[1], eps, parameter), new[0], to_save))

    def backward(self, made: Made, tensors: tuple[Tensor, ...], need: Sequence[bool]) -> Optionals | None:
        """Return the gradients that are needed of x, weight, bias, residual and one more argument, which has none.

        ``tensors``: dy, and those that the signature saves.
        """
        _, forward, kept, eps, parameter = made
        way: Backward | None
        for way in forward.backward.get(need, ()):
            given = way.given(tensors)
            if way.guard(*given):
                break
        else:
            way = prepare_backward(self.engine, forward, tensors, need, lambda: self.saved(made, tensors))
            if way is None:
                return None
            forward.backward[need] = (way, *forward.backward.get(need, ())[: VARIANTS - 1])
            given = way.given(tensors)
        where = tuple(map(_address, given))
        if (where[0] | where[1] | where[-1]) % VECTOR_BYTES:
            return None
        launches = way.launches
        new = [*starmap(way.new, way.layouts)]
        if launches.compiled:
            start, row = kept.data_ptr(), forward.row
            rows = range(start, start + 4 * row, row)
            values = [*where, *rows, *map(_address, new), eps, parameter, *launches.constants]
            for step, arguments in launches.steps:
                step.run(*arguments(values))
        elif not self._first(launches, (*given, *kept.unbind(), *new, eps, parameter)):
            return None
        return way.results([*new, given[1], None])

    def _first(self, launches: Launches, values: tuple[Any, ...]) -> bool:
        """Launch steps that may have to be compiled; ``False`` if they are to be planned again."""
        try:
            launches.first(self.engine.launch, values)
        except ClusterError:
            self.engine.do_without_clusters()
            return False
        return True

    @staticmethod
    def saved(made: Made, tensors: tuple[Tensor, ...]) -> Saved:
        """Return what was kept, for a backward call that is not plain; ``tensors`` are its own."""
        _, forward, kept, eps, parameter = made
        mean, var, weight, bias = kept.unbind()
        has_weight, has_bias, has_residual = (name in forward.names for name in ("weight", "bias", "residual"))
        named = dict(zip(forward.saved, tensors, strict=True))
        x = named["x"]
        return Saved(
            x,
            named.get("residual"),
            Moments(x.numel() // x.shape[1], mean, var),
            weight if has_weight else None,
            bias if has_bias else None,
            forward.parameters["dweight"][2] if has_weight else None,
            forward.parameters["dbias"][2],
            has_residual,
            BatchNormSpec(1, forward.training, 0.0, eps, Activation(forward.activation, parameter)),
            named.get("mask"),
        )
