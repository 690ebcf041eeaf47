"""Running statistics from more than one batch at a time: of a whole data set, or of the micro-batches of one step.

Both look at what each layer is given and merge its count, mean and squared deviations exactly (:mod:`gpu_bn.merge`), so
that it makes no difference how the data are cut. They watch layers through hooks, which ``torch.compile`` does not see:
use the model itself, not what ``torch.compile`` made of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase

from gpu_bn import algorithm
from gpu_bn.merge import Pool, merge
from gpu_bn.nn.distributed.group import Group, gather, several, total
from gpu_bn.nn.fx.trace import in_mode
from gpu_bn.nn.modules import require_channels
from gpu_bn.nn.operators import sync as sync_operators
from gpu_bn.nn.running import update_running, updates
from gpu_bn.nn.sync import SyncBatchNorm

Pools = dict[_BatchNorm, Pool]


def update_population_stats(
    model: torch.nn.Module,
    loader: Iterable[Any],
    *,
    steps: int | None = None,
    call: Callable[[torch.nn.Module, Any], Any] | None = None,
    process_group: Any = None,
    progress: bool = False,
) -> None:
    """Set running statistics to the mean and the variance over a data set, exact to rounding.

    They are those of each layer's input while the layers before it normalise by each batch's statistics, as in
    training. The variance is that of the data set as it is (biased), and every position counts alike, in a short last
    batch too. Where there are several processes, all data of all of them count.

    Normalisation layers, ours and torch's, are in training mode meanwhile; frozen ones, and those without running
    statistics, are left alone. All other modules stay as they are: call ``model.eval()`` first to have no dropout. Only
    running means and variances have changed afterwards, and after an error nothing has.

    Args:
        model: not compiled, not frozen.
        loader: batches; this process's share of them.
        steps: how many batches to use at most; ``None`` uses all.
        call: calls the model with a batch. Without it the model is given the batch, or the first part of a tuple or
            list.
        process_group: of :mod:`torch.distributed`; ``None`` is all processes, if there are several.
        progress: whether to show a bar, if rich is installed.

    Raises:
        ValueError: no layer saw any data; a lazy layer has not seen its first input yet; or, with a
            :class:`SyncBatchNorm` in the model, the processes have different numbers of batches.

    Examples:
        >>> import torch
        >>> from gpu_bn import nn
        >>> layer = nn.BatchNorm1d(1)
        >>> nn.update_population_stats(layer, [torch.tensor([[0.0], [2.0]]), torch.tensor([[4.0], [6.0]])])
        >>> layer.running_mean.item(), layer.running_var.item()
        (3.0, 5.0)

    Source: Wu & Johnson 2021, "PreciseBN".
    """
    layers = _tracking(model)
    several_processes = several(process_group)
    together = several_processes and any(isinstance(layer, SyncBatchNorm) for layer in layers)
    with in_mode(layers, True), torch.no_grad(), _recording(layers) as pools:
        batches = _shown(loader, steps, progress)
        for batch in _alike(batches, layers, Group.of(process_group)) if together else batches:
            call(model, batch) if call else model(batch[0] if isinstance(batch, tuple | list) else batch)
    if several_processes:
        pools = _over_processes(layers, pools, Group.of(process_group))
    if not any(bool(pool.count > 0) for pool in pools.values()):
        raise ValueError("no layer with running statistics saw any data (was the loader empty, the model compiled?)")
    found = [(_buffers(layer), pool) for layer, pool in pools.items() if bool(pool.count > 0)]
    values = [value for _, pool in found for value in (pool.mean, pool.var)]
    torch._foreach_copy_([buffer for buffers, _ in found for buffer in buffers], values)  # all layers' or none


@contextmanager
def accumulate_statistics(model: torch.nn.Module) -> Iterator[None]:
    """Update running statistics once for all micro-batches of a step of gradient accumulation.

    Each micro-batch is still normalised by its own statistics. When the block ends, the running statistics of each
    layer that was called in training mode move once, by the layer's momentum, towards the mean and the unbiased
    variance of all its inputs in the block, and its counter grows by one: as after one call with all of them. A
    :class:`SyncBatchNorm` counts the inputs of all processes. A block that an error ends updates nothing. Each layer's
    input is read once more.

    Args:
        model: not compiled.

    Returns:
        A context manager.

    Raises:
        ValueError: a lazy layer has not seen its first input yet.

    Examples:
        >>> import torch
        >>> from gpu_bn import nn
        >>> layer = nn.BatchNorm1d(1, momentum=1.0)
        >>> with nn.accumulate_statistics(layer):
        ...     for part in (torch.tensor([[0.0], [2.0]]), torch.tensor([[4.0], [6.0]])):
        ...         y = layer(part)
        >>> layer.running_mean.item(), layer.num_batches_tracked.item()
        (3.0, 1)

    Source: Chan, Golub & LeVeque 1983, for the merged variance.
    """
    layers = _tracking(model)
    with _recording(layers) as pools:
        yield
    shared: dict[Any, list[_BatchNorm]] = {}
    for layer in layers:
        if layer in pools and isinstance(layer, SyncBatchNorm) and several(layer.process_group):
            shared.setdefault(layer.process_group, []).append(layer)
    for group, theirs in shared.items():
        pools |= _over_processes(theirs, pools, Group.of(group))
    for layer, pool in pools.items():
        update_running((*_buffers(layer), layer.num_batches_tracked), layer.momentum, pool)


def _tracking(model: torch.nn.Module) -> list[_BatchNorm]:
    """List the layers that keep running statistics."""
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        and module.track_running_stats
        and module.running_mean is not None
        and not getattr(module, "frozen", False)
    }
    lazy = [(name, module) for name, module in found.items() if isinstance(module, _LazyNormBase)]
    require_channels(name for name, module in lazy if module.has_uninitialized_params())
    return list(found.values())


def _buffers(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return layer.running_mean, layer.running_var


@contextmanager
def _recording(layers: list[_BatchNorm]) -> Iterator[Pools]:
    """Let layers update nothing in a block; merge the statistics of their inputs in training mode instead."""
    pools: Pools = {}

    def record(layer: Any, arguments: tuple[Any, ...], options: dict[str, Any], _: Any) -> None:
        if layer.training and not updates.off:
            given = arguments[0] if arguments else options["input"]
            mask = arguments[3] if len(arguments) > 3 else options.get("mask")
            pool = _pool_of(given.detach(), mask)
            if layer in pools:
                pool = merge(Pool(*map(torch.stack, zip(pools[layer], pool, strict=True))))
            pools[layer] = pool

    hooks = [layer.register_forward_hook(record, with_kwargs=True) for layer in layers]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield pools
    finally:
        for layer, hook in zip(layers, hooks, strict=True):
            hook.remove()
            layer.track_running_stats = True


def _pool_of(x: Tensor, mask: Tensor | None) -> Pool:
    report = sync_operators.report(x, None if mask is None else algorithm.valid_positions(mask, x.shape, 1))
    _, count, mean, var = report.split((1, 1, x.shape[1], x.shape[1]))
    return Pool(count, mean, var.abs() * count)


def _over_processes(layers: list[_BatchNorm], pools: Pools, group: Group) -> Pools:
    """Merge the layers' pools over a group's processes, by one collective; a layer may be missing on some."""
    if not layers:
        return {}
    device = _buffers(layers[0])[0].device
    lengths = [n for layer in layers for n in (1, layer.num_features, layer.num_features)]
    mine = [
        torch.cat(pools[layer]).to(device)
        if layer in pools
        else torch.zeros(1 + 2 * layer.num_features, dtype=torch.float64, device=device)
        for layer in layers
    ]
    parts = gather(torch.cat(mine), group).split(lengths, dim=1)
    return {layer: merge(Pool(*parts[3 * at : 3 * at + 3])) for at, layer in enumerate(layers)}


def _alike(batches: Iterable[Any], layers: list[_BatchNorm], group: Group) -> Iterator[Any]:
    """Yield the batches as long as all processes of a group have one; they tell each other before each."""
    device = _buffers(layers[0])[0].device
    given = iter(batches)
    while True:
        batch = list(islice(given, 1))
        ready = int(total(torch.tensor([float(len(batch))], device=device), group))
        if 0 < ready < group.size:
            raise ValueError(
                f"a SyncBatchNorm needs as many batches on every process, but {group.size - ready} of {group.size} "
                "have no more"
            )
        if not batch:
            return
        yield batch[0]


def _shown(loader: Iterable[Any], steps: int | None, progress: bool) -> Iterable[Any]:
    batches = loader if steps is None else islice(loader, steps)
    if not progress or find_spec("rich") is None:
        return batches
    from rich.console import Console
    from rich.progress import track

    length = len(loader) if isinstance(loader, Sized) else steps
    total = length if steps is None or length is None else min(length, steps)
    return track(batches, "population statistics", total, console=Console(stderr=True), transient=True)
