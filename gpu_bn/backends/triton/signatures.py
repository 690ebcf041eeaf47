"""Prepare plain calls: the guard of a signature, the launches, and the layouts of new tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import compress
from operator import add, attrgetter, itemgetter, le, or_
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from gpu_bn.backends.alike import (
    Guard,
    Layout,
    Selector,
    contiguous_layout,
    empty_like_layout,
    make_guard,
    make_selector,
)
from gpu_bn.backends.protocol import Saved
from gpu_bn.backends.triton.arguments import backward_call, mask_size, work_of
from gpu_bn.backends.triton.launch import Launches
from gpu_bn.backends.triton.steps import BackwardSteps, ForwardSteps, scratch_of
from gpu_bn.backends.triton.strides import view_of
from gpu_bn.call import Call, Options
from gpu_bn.plan import VECTOR_BYTES
from gpu_bn.spec import MAX_RANK, MIN_RANK, BatchNormSpec

ADDRESSES = 256
"""The most sets of addresses that are kept for a signature."""
ALIGNMENTS = {"x": VECTOR_BYTES, "residual": VECTOR_BYTES, "counter": 8}
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
GIVEN = ("x", "weight", "bias", "residual", "mean", "var", "counter")
"""The names of a call's tensors, in order."""
GRADIENTS: tuple[str, ...] = ("dx", "dweight", "dbias", "dresidual")
_form = attrgetter("dtype", "shape", "device", "layout")


@dataclass(slots=True, eq=False)
class Forward:
    """A prepared forward call, for all calls of one signature. The given tensors are those that are not ``None``."""

    guard: Guard  # tells whether a call's tensors have this signature
    select: Selector  # selects the given tensors from those of a call
    names: list[str]  # names of the given tensors
    sizes: list[int]  # bytes of the given tensors
    accepted: set[tuple[int, ...]] = field(default_factory=set)  # addresses that ``accepts`` has accepted
    first_written: int = 0  # index of the first given tensor that is written; 0 if none is
    launches: Any = None  # take given and new tensors, momentum, eps, the activation's parameter; None: not plain
    allocate: Any = None  # allocates a new tensor of a layout
    layouts: tuple[Layout, ...] = ()  # of the new tensors: output, saved rows, mask, partial results
    needs_grad: bool = False  # whether a backward call may follow
    select_saved: Any = None  # selects the tensors to save from x, weight, bias, residual and the new tensors
    saved_names: tuple[str, ...] = ()  # "dy" and the names of the saved tensors
    training: bool = False
    activation: str = ""
    row_bytes: int = 0  # bytes of a saved row
    form: Any = None  # dtype, device, shape and strides of the input
    gradient_layouts: dict[str, Layout] = field(default_factory=dict)  # of dweight and dbias
    backward: dict[Sequence[bool], tuple[Backward, ...]] = field(default_factory=dict)  # by the gradients needed

    def accepts(self, addresses: tuple[int, ...]) -> bool:
        """Tell whether the given tensors are aligned, and do not overlap if the call writes one of them."""
        if self.launches is None:  # the calls are not plain
            return False
        if any(start % ALIGNMENTS.get(name, 1) for name, start in zip(self.names, addresses, strict=True)):
            return False
        ends = sorted(map(add, addresses, self.sizes))
        if self.first_written and not all(map(le, ends, sorted(addresses)[1:])):  # each must end before the next begins
            return False
        if len(self.accepted) >= ADDRESSES:
            self.accepted.clear()
        self.accepted.add(addresses)
        return True


@dataclass(slots=True, eq=False)
class Backward:
    """A prepared backward call, for all that follow forward calls of one signature and return the same gradients."""

    guard: Guard  # tells whether a call's tensors have this signature
    select: Selector  # selects x, dy, residual and mask, those that kernels read, from dy and the saved tensors
    launches: Launches  # take these tensors, saved rows, new tensors, eps and the activation's parameter
    allocate: Any  # allocates a new tensor of a layout
    layouts: tuple[Layout, ...]  # of the new tensors: gradients, partial results
    select_gradients: Selector  # selects the results from the new tensors, dy and None


def prepare_forward(engine: Any, call: Call, options: Options, needs_grad: bool) -> Forward | None:
    """Prepare calls like this one, without launches if they are not plain; ``None`` if a tensor is not strided."""
    names = [name for name, tensor in zip(GIVEN, call, strict=False) if tensor is not None]
    select = make_selector(GIVEN, names)
    given = select(call)
    if any(tensor.layout is not torch.strided for tensor in given):
        return None
    prepared = Forward(make_guard(given), select, names, [tensor.nbytes for tensor in given])
    x, training, activation = call.x, options.training, options.activation
    if not _is_plain(call, given) or (training and x.numel() == x.shape[1]):
        return prepared
    view, channels = view_of(x, 1), x.shape[1]
    y = empty_like_layout(x)
    if not (view.dense and y[1] == x.stride()):
        return prepared
    reads, bits = 1 + (call.residual is not None), 0
    if reads > 1 and (needs_grad or training):
        bits = mask_size(view, 1, x.element_size(), activation.name, 1)
    work = work_of(view.layout, x, VECTOR_BYTES, reads=reads, sign_bits=bits > 0, ragged=True)
    spec = BatchNormSpec(1, training, options.momentum, options.eps, activation)
    strides = [tensor.stride() for tensor in given]
    key = "plain", training, activation.name, bits > 0, *names, *map(_form, given), *strides
    steps = engine.prepare(key, lambda: engine.builder.forward(work, spec, x, False))
    new = {"y": y, "rows": contiguous_layout((4, channels), torch.float64)}
    if bits:
        new["mask"] = contiguous_layout((bits,), torch.uint8)
    new |= _scratch(steps, x)

    def run(launch: Any, slot: Any) -> None:
        tensors, vectors = ("x", "residual", "y", "mask", ""), ("weight", "bias", "rows", "")
        pairs = [(None, None), (slot("mean"), slot("var"))]
        frozen, tracked = pairs if training else pairs[::-1]
        rest = slot("counter"), slot("momentum"), None, slot("eps"), slot("parameter")
        scratch = slot("partials"), slot("table")
        steps.run(launch, [*map(slot, tensors)], [*map(slot, vectors)], scratch, frozen, tracked, rest)

    prepared.launches = Launches([*names, *new, "momentum", "eps", "parameter"], run)
    prepared.allocate, prepared.layouts = engine.allocator(x.device), tuple(new.values())
    prepared.needs_grad = needs_grad
    unread = {"bias", "residual"} if activation.is_identity else {"residual" if bits else ""}
    saved = [name for name in (*GIVEN[:4], "mask") if name in {*names, *new} - unread]
    prepared.select_saved, prepared.saved_names = make_selector((*GIVEN[:4], *new), saved), ("dy", *saved)
    prepared.training, prepared.activation = training, activation.name
    if training:
        prepared.first_written = next((index for index, name in enumerate(names) if name in GIVEN[4:]), 0)
    prepared.row_bytes, prepared.form = 8 * channels, (x.dtype, x.device, list(x.shape), list(x.stride()))
    for name, vector in (("dweight", call.weight), ("dbias", call.bias)):
        layout = contiguous_layout((channels,), x.dtype if vector is None else vector.dtype)
        prepared.gradient_layouts[name] = layout
    return prepared


def prepare_backward(
    engine: Any, forward: Forward, tensors: tuple[Tensor, ...], need: Sequence[bool], saved: Callable[[], Saved]
) -> Backward | None:
    """Prepare calls like this one; return ``None`` if it is not plain.

    ``tensors``: dy and the saved tensors. ``need``: which of dx, dweight, dbias, dresidual are needed. ``saved``:
    returns what the forward call saved.
    """
    names = [name for name in ("x", "dy", "residual", "mask") if name in forward.saved_names]
    select = make_selector(forward.saved_names, names)
    given = select(tensors)
    guard = _plain_guard(given, forward.form)
    if not guard(*given) or reduce(or_, [tensor.data_ptr() for tensor in given]) % VECTOR_BYTES:
        return None
    needed = list(compress(GRADIENTS, need))
    returns_dy = forward.activation == "identity" and "dresidual" in needed  # dresidual is dy itself
    computed = frozenset(needed) - {"dresidual" if returns_dy else ""}
    new: list[str] = [name for name in ("dx", "dresidual", "dweight", "dbias") if name in computed]
    layouts = tuple(forward.gradient_layouts.get(name, forward.layouts[0]) for name in new)
    values = [*names, "mean", "var", "saved weight", "saved bias", *new]
    indices = [new.index(name) if name in computed else -1 for name in GRADIENTS]
    select_gradients = itemgetter(*indices[:3], -2 if returns_dy else indices[3], -1)
    if not computed:
        launches = Launches(values, lambda *_: None)
        return Backward(guard, select, launches, forward.allocate, layouts, select_gradients)
    call = backward_call(given[1], saved(), computed)
    steps = engine.prepare(("plain", call.key), lambda: engine.builder.backward(call, computed, forward.training))
    scratch = _scratch(steps, given[0])

    def run(launch: Any, slot: Any) -> None:
        weights = [slot(f"saved {name}" if name in forward.names else "") for name in ("weight", "bias")]
        outputs = (slot("dresidual"), slot("dx")), (slot("dweight"), slot("dbias"))
        read, divisor = [*map(slot, ("x", "dy", "residual", "mask", ""))], (1.0 / call.view.layout.count, None)
        numbers = slot("eps"), slot("parameter")
        vectors, partials = [slot("mean"), slot("var"), *weights], (slot("partials"), slot("table"))
        steps.run(launch, read, vectors, partials, outputs, numbers, divisor)

    launches = Launches([*values, *scratch, "eps", "parameter"], run)
    layouts = (*layouts, *scratch.values())
    return Backward(guard, select, launches, forward.allocate, layouts, select_gradients)


def _plain_guard(tensors: Sequence[Tensor], form: Any) -> Guard:
    """Return a guard for plain tensors with the dtype, device, shape and strides of ``form``, and for a mask."""
    dtype, device, shape, strides = form
    models, shapes, all_strides = [], [], []
    for tensor in tensors:
        is_mask, grad = tensor.dtype is torch.uint8, tensor.requires_grad
        model = torch.empty(1, dtype=torch.uint8 if is_mask else dtype, device=device).requires_grad_(grad)
        models.append(Parameter(model, grad) if type(tensor) is Parameter else model)
        shapes.append([tensor.numel()] if is_mask else shape)
        all_strides.append([1] if is_mask else strides)
    return make_guard(models, shapes, all_strides)


def _is_plain(call: Call, given: Sequence[Tensor]) -> bool:
    """Tell whether kernels can read tensors with these dtypes, shapes, strides and devices."""
    x, residual, counter = call.x, call.residual, call.counter
    vectors = [v for v in (call.weight, call.bias, call.running_mean, call.running_var) if v is not None]
    return (
        MIN_RANK <= x.dim() <= MAX_RANK
        and 0 not in x.shape
        and all(tensor.device == x.device for tensor in given)
        and all(tensor.dtype in FLOATS for tensor in (x, *vectors))
        and all(vector.shape == x.shape[1:2] and vector.is_contiguous() for vector in vectors)
        and (residual is None or (_form(residual), residual.stride()) == (_form(x), x.stride()))
        and (counter is None or (counter.dtype is torch.int64 and counter.numel() == 1))
    )


def _scratch(steps: ForwardSteps | BackwardSteps, x: Tensor) -> dict[str, Layout]:
    """Return the layouts of a call's partial results and of the table of merged ones."""
    return {name: contiguous_layout(*form) for name, form in scratch_of(steps, x).items()}
