"""Prepare plain calls: the guards of their signatures, their launches, and the layouts of new tensors."""

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
"""Sets of addresses that are remembered of a signature."""
ALIGNMENTS = {"x": VECTOR_BYTES, "residual": VECTOR_BYTES, "counter": 8}
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
GIVEN = ("x", "weight", "bias", "residual", "mean", "var", "counter")
"""The tensors of a call, in its order."""
GRADIENTS: tuple[str, ...] = ("dx", "dweight", "dbias", "dresidual")
_form = attrgetter("dtype", "shape", "device", "layout")


@dataclass(slots=True, eq=False)
class Forward:
    """Hold what forward calls of one signature have in common.

    Attributes:
        guard, given: the signature; the tensors that there are of a call's.
        names: of these tensors.
        sizes: their bytes.
        served: sets of their addresses that kernels can read and write.
        written: the place of the first that is written; 0 if none is.
        launches: take the given and the new tensors, the momentum, eps and the activation's parameter.
        new, layouts: makes the new tensors, of these: the output, what is kept, the mask, partial results.
        grows: whether a backward call may follow.
        saves: chooses what that needs of x, weight, bias, residual and the new tensors.
        saved: the names of dy and of these.
        training, activation: options.
        row: bytes of a row of what is kept.
        form: dtype, device, shape and strides of the input.
        parameters: the layouts of the gradients of weight and bias.
        backward: the backward calls that have followed, by what was needed.
    """

    guard: Guard
    given: Selector
    names: list[str]
    sizes: list[int]
    served: set[tuple[int, ...]] = field(default_factory=set)
    written: int = 0
    launches: Any = None
    new: Any = None
    layouts: tuple[Layout, ...] = ()
    grows: bool = False
    saves: Any = None
    saved: tuple[str, ...] = ()
    training: bool = False
    activation: str = ""
    row: int = 0
    form: Any = None
    parameters: dict[str, Layout] = field(default_factory=dict)
    backward: dict[Sequence[bool], tuple[Backward, ...]] = field(default_factory=dict)

    def serves(self, where: tuple[int, ...]) -> bool:
        """Tell whether tensors begin where kernels can read them, and lie apart where a call writes some of them."""
        if self.launches is None:  # such calls go another way
            return False
        if any(start % ALIGNMENTS.get(name, 1) for name, start in zip(self.names, where, strict=True)):
            return False
        ends = sorted(map(add, where, self.sizes))
        if self.written and not all(map(le, ends, sorted(where)[1:])):  # each ends before the next begins
            return False
        if len(self.served) >= ADDRESSES:
            self.served.clear()
        self.served.add(where)
        return True


@dataclass(slots=True, eq=False)
class Backward:
    """Hold what backward calls have in common that follow forward calls of one signature and return the same gradients.

    Attributes:
        guard, given: as of a forward call; of x, dy, residual and mask.
        launches: take these, the rows that were kept, the new tensors, eps and the activation's parameter.
        new, layouts: as of a forward call; of gradients, partial results.
        results: puts the gradients in their places, of the new tensors, dy and ``None``.
    """

    guard: Guard
    given: Selector
    launches: Launches
    new: Any
    layouts: tuple[Layout, ...]
    results: Selector


def prepare_forward(engine: Any, call: Call, options: Options, grows: bool) -> Forward | None:
    """Prepare calls like this one, or note that they go another way; ``None`` if their tensors have no strides."""
    names = [name for name, one in zip(GIVEN, call, strict=False) if one is not None]
    choose = make_selector(GIVEN, names)
    given = choose(call)
    if any(one.layout is not torch.strided for one in given):
        return None
    way = Forward(make_guard(given), choose, names, [one.nbytes for one in given])
    x, training, activation = call.x, options.training, options.activation
    if not _is_plain(call, given) or (training and x.numel() == x.shape[1]):
        return way
    view, channels = view_of(x, 1), x.shape[1]
    y = empty_like_layout(x)
    if not (view.dense and y[1] == x.stride()):
        return way
    reads, bits = 1 + (call.residual is not None), 0
    if reads > 1 and (grows or training):
        bits = mask_size(view, 1, x.element_size(), activation.name, 1)
    work = work_of(view.layout, x, VECTOR_BYTES, reads=reads, sign_bits=bits > 0, ragged=True)
    spec = BatchNormSpec(1, training, options.momentum, options.eps, activation)
    key = "plain", training, activation.name, bits > 0, *names, *map(_form, given), *[one.stride() for one in given]
    steps = engine.prepare(key, lambda: engine.builder.forward(work, spec, x, False))
    new = {"y": y, "kept": contiguous_layout((4, channels), torch.float64)}
    if bits:
        new["mask"] = contiguous_layout((bits,), torch.uint8)
    new |= _scratch(steps, x)

    def run(launch: Any, at: Any) -> None:
        tensors, vectors = ("x", "residual", "y", "mask", ""), ("weight", "bias", "kept", "")
        pairs = [(None, None), (at("mean"), at("var"))]
        frozen, tracked = pairs if training else pairs[::-1]
        rest = at("counter"), at("momentum"), None, at("eps"), at("parameter")
        scratch = at("partials"), at("table")
        steps.run(launch, [*map(at, tensors)], [*map(at, vectors)], scratch, frozen, tracked, rest)

    way.launches = Launches([*names, *new, "momentum", "eps", "parameter"], run)
    way.new, way.layouts, way.grows = engine.allocator(x.device), tuple(new.values()), grows
    unread = {"bias", "residual"} if activation.is_identity else {"residual" if bits else ""}
    saved = [name for name in (*GIVEN[:4], "mask") if name in {*names, *new} - unread]
    way.saves, way.saved = make_selector((*GIVEN[:4], *new), saved), ("dy", *saved)
    way.training, way.activation = training, activation.name
    way.written = next((place for place, name in enumerate(names) if name in GIVEN[4:]), 0) if training else 0
    way.row, way.form = 8 * channels, (x.dtype, x.device, list(x.shape), list(x.stride()))
    for name, one in (("dweight", call.weight), ("dbias", call.bias)):
        way.parameters[name] = contiguous_layout((channels,), x.dtype if one is None else one.dtype)
    return way


def prepare_backward(
    engine: Any, forward: Forward, tensors: tuple[Tensor, ...], need: Sequence[bool], saved: Callable[[], Saved]
) -> Backward | None:
    """Prepare calls like this one; ``None`` if it is not plain, whatever came before."""
    names = [name for name in ("x", "dy", "residual", "mask") if name in forward.saved]
    choose = make_selector(forward.saved, names)
    given = choose(tensors)
    guard = _guard_of_plain(given, forward.form)
    if not guard(*given) or reduce(or_, [one.data_ptr() for one in given]) % VECTOR_BYTES:
        return None
    needed = list(compress(GRADIENTS, need))
    passes = forward.activation == "identity" and "dresidual" in needed  # this gradient is dy itself
    wanted = frozenset(needed) - {"dresidual" if passes else ""}
    new = [name for name in (GRADIENTS[0], GRADIENTS[3], *GRADIENTS[1:3]) if name in wanted]
    layouts = tuple(forward.parameters.get(name, forward.layouts[0]) for name in new)
    values = [*names, "mean", "var", "kept weight", "kept bias", *new]
    places = [new.index(name) if name in wanted else -1 for name in GRADIENTS]
    results = itemgetter(*places[:3], -2 if passes else places[3], -1)
    if not wanted:
        return Backward(guard, choose, Launches(values, lambda *_: None), forward.new, layouts, results)
    call = backward_call(given[1], saved(), wanted)
    steps = engine.prepare(("plain", call.key), lambda: engine.builder.backward(call, wanted, forward.training))
    scratch = _scratch(steps, given[0])

    def run(launch: Any, at: Any) -> None:
        weights = [at(f"kept {name}" if name in forward.names else "") for name in ("weight", "bias")]
        outputs = (at("dresidual"), at("dx")), (at("dweight"), at("dbias"))
        read, divisor = [*map(at, ("x", "dy", "residual", "mask", ""))], (1.0 / call.view.layout.count, None)
        numbers = at("eps"), at("parameter")
        vectors, pair = [at("mean"), at("var"), *weights], (at("partials"), at("table"))
        steps.run(launch, read, vectors, pair, outputs, numbers, divisor)

    launches = Launches([*values, *scratch, "eps", "parameter"], run)
    return Backward(guard, choose, launches, forward.new, (*layouts, *scratch.values()), results)


def _guard_of_plain(tensors: Sequence[Tensor], form: Any) -> Guard:
    """Return what tells whether tensors are ordinary ones of a form; masks have another."""
    dtype, device, shape, strides = form
    models, shapes, all_strides = [], [], []
    for one in tensors:
        masks = one.dtype is torch.uint8
        model = torch.empty(1, dtype=torch.uint8 if masks else dtype, device=device).requires_grad_(one.requires_grad)
        models.append(Parameter(model, one.requires_grad) if type(one) is Parameter else model)
        shapes.append([one.numel()] if masks else shape)
        all_strides.append([1] if masks else strides)
    return make_guard(models, shapes, all_strides)


def _is_plain(call: Call, given: Sequence[Tensor]) -> bool:
    """Tell whether kernels can read tensors of such dtypes, shapes, strides and devices."""
    x, residual, counter = call.x, call.residual, call.counter
    vectors = [one for one in (call.weight, call.bias, call.running_mean, call.running_var) if one is not None]
    return (
        MIN_RANK <= x.dim() <= MAX_RANK
        and 0 not in x.shape
        and all(one.device == x.device for one in given)
        and all(one.dtype in FLOATS for one in (x, *vectors))
        and all(one.shape == x.shape[1:2] and one.is_contiguous() for one in vectors)
        and (residual is None or (_form(residual), residual.stride()) == (_form(x), x.stride()))
        and (counter is None or (counter.dtype is torch.int64 and counter.numel() == 1))
    )


def _scratch(steps: ForwardSteps | BackwardSteps, x: Tensor) -> dict[str, Layout]:
    """Return the layouts of the partial results of a call's launches, and of the table of merged ones."""
    return {name: contiguous_layout(*form) for name, form in scratch_of(steps, x).items()}
