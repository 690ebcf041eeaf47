"""Compare models that were converted, fused, folded and reverted with torch's own layers; make the record and the page.

:func:`examine` counts the layers that were merged and folded, and those that a recording of the plain model shows could
be. The allowed difference is measured too: it is that of torch's own model after each of its numbers was changed to a
neighbouring one.
"""

from __future__ import annotations

import copy
import datetime
import json
import random
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support.model_zoo import batch, declare_operators, make, names
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from gpu_bn import nn
from gpu_bn.nn.modules import FrozenBatchNorm2d, Fused

# ------------------------------------------------------------------------- layers that could be merged and folded
ACTIVATIONS = {"relu", "relu_", "relu6", "silu", "silu_", "hardswish", "sigmoid", "sigmoid_", "tanh", "tanh_", "gelu",
               "leaky_relu", "leaky_relu_", "elu", "elu_", "hardtanh", "hardtanh_"}  # fmt: skip
SUMS = {"add", "add_", "__add__", "__iadd__", "__radd__"}
FOLDABLE = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d, torch.nn.ConvTranspose1d,
            torch.nn.ConvTranspose2d, torch.nn.ConvTranspose3d)  # fmt: skip


class Recording(TorchFunctionMode):
    """Record all calls of torch functions, foldable layers and normalisations, with their inputs and results."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.calls: list[tuple[Any, list[int], int]] = []
        self.keep: list[Any] = []
        self.inside = 0
        self.handles = []
        for module in model.modules():
            if type(module) in FOLDABLE or is_norm(module):
                self.handles += [
                    module.register_forward_pre_hook(self._enter),
                    module.register_forward_hook(self._leave),
                ]

    def _enter(self, *_: Any) -> None:
        self.inside += 1

    def _leave(self, module: Any, inputs: Any, result: Any) -> None:
        self.inside -= 1
        if not self.inside:
            self._record(module, inputs, result)

    def _record(self, what: Any, inputs: Any, result: Any) -> None:
        tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
        self.keep += [tensors, result]
        if isinstance(result, (torch.Tensor, tuple, list)):
            self.calls.append((what, list(map(id, tensors)), id(result)))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.inside:
            self._record(func, (args, kwargs), result)
        return result


def is_norm(module: torch.nn.Module) -> bool:
    """Tell whether a module is a batch normalisation, also a frozen one."""
    names = {"weight", "bias", "running_mean", "running_var"}
    frozen = set(module._buffers) == names and not module._parameters and not module._modules
    return isinstance(module, _BatchNorm) or frozen or "FrozenBatchNorm" in type(module).__name__


def possible(model: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[set[str], list[set[str]], set[str]]:
    """Return the names of the normalisations that are called, that could be merged, and that could be folded.

    Those that could be merged are one set for each activation, with two names if it follows a sum of two layers.
    """
    labels = {module: name for name, module in model.named_modules()}
    recording = Recording(model)
    with torch.no_grad(), recording:
        result = model(*inputs)
    for handle in recording.handles:
        handle.remove()
    readers: dict[int, list[tuple[int, Any, int]]] = defaultdict(list)
    for at, (what, given, made) in enumerate(recording.calls):
        for source in set(given):
            readers[source].append((at, what, made))
    final = {id(leaf) for leaf in pytree.tree_leaves(result)}
    called, followed, foldable = Counter(), set(), set()
    made_by = {}
    for at, (what, given, made) in enumerate(recording.calls):
        if isinstance(what, torch.nn.Module) and is_norm(what):
            called[labels[what]] += 1
            if len(given) == 1 and given[0] in made_by and len(readers[given[0]]) == 1 and given[0] not in final:
                foldable.add(labels[what])
            if _activated(at, made, readers, final, set()):
                followed.add((_end(at, made, readers), labels[what]))
        elif isinstance(what, torch.nn.Module):
            made_by[made] = what
    ends: dict[int, set[str]] = defaultdict(set)
    for end, name in followed:
        ends[end].add(name)
    return set(called), list(ends.values()), {name for name in foldable if called[name] == 1}


def _next(at: int, tensor: int, readers: Any) -> list[tuple[int, Any, int]]:
    """Return the calls that read a tensor after the call ``at``, up to one that overwrites it."""
    found = []
    for call in readers[tensor]:
        if call[0] > at:
            found.append(call)
            if call[2] == tensor:
                break
    return found


def _activated(at: int, tensor: int, readers: Any, final: set[int], sums: set[int]) -> bool:
    """Tell whether an activation alone reads a tensor, directly or through one sum."""
    following = _next(at, tensor, readers)
    if len(following) != 1 or (tensor in final and following[0][2] != tensor):
        return False
    when, what, made = following[0]
    name = getattr(what, "__name__", "")
    if name in ACTIVATIONS:
        return True
    if name in SUMS and not sums:
        return _activated(when, made, readers, final, {made})
    return False


def _end(at: int, tensor: int, readers: Any) -> int:
    """Return the index of the call of the activation that follows a tensor."""
    when, what, made = _next(at, tensor, readers)[0]
    return when if getattr(what, "__name__", "") in ACTIVATIONS else _end(when, made, readers)


# ------------------------------------------------------------------------------------------------------- the proof
def tensors(result: Any) -> list[torch.Tensor]:
    """Return all floating-point tensors of a result."""
    if hasattr(result, "to_tuple"):
        result = result.to_tuple()
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def seeded(model: torch.nn.Module, inputs: tuple[Any, ...]) -> list[torch.Tensor]:
    """Call a model with seeded random numbers; return its floating-point outputs."""
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    return tensors(model(*inputs))


def furthest(mine: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """Return the greatest difference, as a share of the tensor's greatest number, or of a millionth of that of all."""
    pairs = [(_numbers(a), _numbers(b)) for a, b in zip(mine, other, strict=True)]
    if any(a.shape != b.shape for a, b in pairs):
        return float("inf")
    floor = 1e-6 * max((float(b.abs().max()) for _, b in pairs if b.numel()), default=0.0) + 1e-30
    return max(
        (float((a - b).abs().max() / b.abs().max().clamp(min=floor)) for a, b in pairs if not torch.equal(a, b)),
        default=0.0,
    )


def _numbers(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor as float64, with numbers in place of NaN and infinity."""
    tensor = tensor.detach().double()
    return tensor if bool(tensor.isfinite().all()) else tensor.nan_to_num(0, 1e30, -1e30)


def stepped(model: torch.nn.Module, inputs: tuple[Any, ...]) -> list[list[torch.Tensor]]:
    """Train for a step; return outputs, gradients and state."""
    model.train()
    outputs = seeded(model, inputs)
    sum(output.square().mean() for output in outputs if output.requires_grad).backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 1e-3 * parameter.grad
                parameter.grad = None
    return [outputs, gradients, tensors(list(model.state_dict().values()))]


def perturbed(model: torch.nn.Module) -> torch.nn.Module:
    """Return a copy of a model with each number replaced by the next greater or smaller one, as rounding may do."""
    copied = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for tensor in tensors(list(copied.state_dict().values())):
            up = torch.randint(2, tensor.shape, generator=generator).bool()
            tensor.copy_(torch.nextafter(tensor, torch.where(up, torch.inf, -torch.inf).to(tensor)))
    return copied


def examine(name: str) -> dict[str, Any]:
    """Convert, fuse, fold and revert a model; return counts of layers, and differences from torch's own layers."""
    plain = make(name).double()
    inputs = batch(name, plain)
    trains = "detr" not in name.lower()
    kinds = [type(module) for module in plain.modules()]
    plain.eval()
    with torch.no_grad():
        for module in plain.modules():
            if is_norm(module):
                for value in (module.weight, module.bias, module.running_mean, module.running_var):
                    if value is not None:
                        value += 0.2 * torch.rand_like(value)
    called, followed, foldable = possible(plain, inputs)
    norms = {label for label, module in plain.named_modules() if is_norm(module)}
    result: dict[str, Any] = {"norms": len(norms), "called": len(called), "mergeable": len(followed)}

    converted, fused = nn.Report(), nn.Report()
    one, two = copy.deepcopy(plain), copy.deepcopy(plain)
    nn.convert(one, report=converted)
    nn.convert(two, fuse=True, report=fused)
    result["converted"] = len(norms & set(converted.converted))
    own = {
        label
        for label, module in one.named_modules()
        if isinstance(module, (Fused, FrozenBatchNorm2d)) and not module.activation.is_identity
    }
    missed = [sorted(norms)[0] for norms in followed if norms.isdisjoint(fused.merged.keys() | own)]
    result["merged"] = len(followed) - len(missed)
    result["missed"] = {label: fused.left.get(label, "") for label in sorted(missed)}
    expected = seeded(plain, inputs)
    differences = {"convert": furthest(seeded(one, inputs), expected), "fuse": furthest(seeded(two, inputs), expected)}
    rounded = perturbed(plain)
    control = {"evaluation": furthest(seeded(rounded, inputs), expected)}
    for kind, given in (("fold", ()), ("fold with a batch", inputs)):
        folding = nn.Report()
        folded = nn.fold(two, *given, report=folding)
        result["folded" if not given else "folded_batch"] = len(foldable & set(folding.folded))
        if given:
            result["unfolded"] = {
                label: folding.left.get(label, "") for label in sorted(foldable - set(folding.folded))
            }
        differences[kind] = furthest(seeded(folded, inputs), expected)
        assert type(folded) is type(plain)
    result["foldable"] = len(foldable)
    if trains:
        torchs = copy.deepcopy(plain)
        trained = stepped(torchs, inputs)
        control["training"] = max(map(furthest, stepped(rounded, inputs), trained))
        for kind, model in (("convert, training", one), ("fuse, training", two)):
            differences[kind] = max(map(furthest, stepped(model, inputs), trained))
    for model in (one, two):
        nn.revert(model)
        assert [type(module) for module in model.modules()] == kinds
    if trains:
        expected = seeded(torchs.eval(), inputs)
        control["evaluation after training"] = furthest(seeded(rounded.eval(), inputs), expected)
    differences["revert"] = max(furthest(seeded(model.eval(), inputs), expected) for model in (one, two))
    return result | {"differences": differences, "control": control}


RECORD = Path(__file__).parent / "data" / "models.jsonl"
HEADER = """# Models of other libraries

{models} models of torchvision, timm, transformers, segmentation-models-pytorch (smp), monai and ultralytics: {counts}.
They have random weights and small inputs, in float64 with torch {torch} on a CPU; recorded on {date}. Each model is
converted, fused, folded and reverted. Its outputs, gradients and state after a step are compared with those of
torch's own layers.

- *Converted*: all normalisations of the model, and how many of them became layers of gpu_bn.
- *Merged*: the normalisations that an activation follows, directly or after a sum, and how many include it after
  `convert(model, fuse=True)`. Only activations that gpu_bn has count, and only if they are not part of the layer.
- *Folded*: the normalisations that are the only reader of a convolution or a linear layer, and how many were folded by
  `fold(model)`; *with a batch* by `fold(model, batch)`.
- *Difference*: the greatest difference in all comparisons, as a share of the tensor's greatest number.
- *To rounding*: this difference divided by the effect of rounding, which is how much the results of torch's own model
  change if each of its numbers is replaced by the next greater or smaller one. Networks with random weights amplify
  rounding. The tests ask for at most {limit}.

For deployment: `nn.convert(model, fuse=True)`, train, `nn.fold(model, batch)`, then export the folded model.

| model | converted | merged | folded | with a batch | difference | to rounding |
|---|---|---|---|---|---|---|
"""
COUNTS = (("converted", "norms"), ("merged", "mergeable"), ("folded", "foldable"), ("folded_batch", "foldable"))
LIMIT = 32.0
"""The largest allowed quotient of a difference and that of the control."""
FLOOR = 1e-15
"""Added to the difference of the control, which may happen to be 0."""
CONTROL = {"convert, training": "training", "fuse, training": "training", "revert": "evaluation after training"}
"""The difference of the control for each difference of ours; for all others that of ``evaluation``."""


def of_rounding(one: dict[str, Any]) -> float:
    """Return the greatest quotient of a model's differences in the record and those of its control."""
    control = one["control"]
    return max(
        value / (control.get(CONTROL.get(kind, ""), control["evaluation"]) + FLOOR)
        for kind, value in one["differences"].items()
    )


def table(lines: list[str]) -> str:
    """Return the page of a record. Its first line has the date and the version of torch, each other line a model."""
    first, *models = map(json.loads, lines)
    rows = []
    for one in models:
        cells = [f"{one[done]} of {one[possible]}" for done, possible in COUNTS]
        cells += [f"{max(one['differences'].values()):.0e}", f"{of_rounding(one):.1f}"]
        rows.append(f"| {one['name']} | {' | '.join(cells)} |")
    sums = {key: sum(one[key] for one in models) for pair in COUNTS for key in pair}
    counts = ", ".join(
        f"{sums[done]:,} of {sums[possible]:,} {done.replace('_batch', ' with a batch')}" for done, possible in COUNTS
    )
    head = HEADER.format(models=len(models), counts=counts, limit=f"{LIMIT:.0f}", **first)
    return head + "\n".join(rows) + "\n"


def main() -> None:
    """Examine the models whose names contain an argument, or all, and print their lines of the record."""
    declare_operators()
    torch.set_num_threads(1)
    print(json.dumps({"date": str(datetime.date.today()), "torch": torch.__version__.partition("+")[0]}), flush=True)
    for name in [name for name in names() if not sys.argv[1:] or any(part in name for part in sys.argv[1:])]:
        print(json.dumps({"name": name, **examine(name)}), flush=True)


if __name__ == "__main__":
    main()
