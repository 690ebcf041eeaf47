"""Running statistics from several batches at once: those of a whole data set, or of the micro-batches of one step.

The count, the mean and the squared deviations of each layer's inputs are merged exactly (:mod:`gpu_bn.merge`), so the
result does not depend on how the data are divided into batches. The inputs are recorded by hooks, which compiled models
do not call: use the model itself, not the result of ``torch.compile``.
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
from gpu_bn.nn.distributed.group import Group, gather, has_peers, sum_over_group
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

    They are the statistics of each layer's input while the layers before it normalise by each batch's statistics, as in
    training. The variance is biased. Every position has the same weight, also in a shorter last batch. With several
    processes, the data of all processes are used.

    The function sets normalisation layers, ours and torch's, to training mode while it runs, except frozen layers and
    those without running statistics. All other modules keep their mode: call ``model.eval()`` first to turn off
    dropout. Only running means and variances change; after an error nothing has changed.

    Args:
        model: a model that is neither compiled nor frozen.
        loader: the batches; in a process group, this process's share of them.
        steps: the maximum number of batches to use; ``None`` uses all.
        call: a function that calls the model with a batch. By default the model is called with the batch, or with its
            first element if it is a tuple or list.
        process_group: a group of :mod:`torch.distributed`; ``None`` is all processes.
        progress: whether to show a progress bar, if rich is installed.

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
    layers = _tracking_layers(model)
    distributed = has_peers(process_group)
    in_step = distributed and any(isinstance(layer, SyncBatchNorm) for layer in layers)
    with in_mode(layers, True), torch.no_grad(), _record_inputs(layers) as pools:
        batches = _first_batches(loader, steps, progress)
        for batch in _batches_in_step(batches, layers, Group.of(process_group)) if in_step else batches:
            call(model, batch) if call else model(batch[0] if isinstance(batch, tuple | list) else batch)
    if distributed:
        pools = _merge_over_processes(layers, pools, Group.of(process_group))
    filled = [(_buffers(layer), pool) for layer, pool in pools.items() if bool(pool.count > 0)]
    if not filled:
        raise ValueError("no layer with running statistics saw any data (was the loader empty, the model compiled?)")
    values = [value for _, pool in filled for value in (pool.mean, pool.var)]
    torch._foreach_copy_([buffer for buffers, _ in filled for buffer in buffers], values)  # for all layers or none


@contextmanager
def accumulate_statistics(model: torch.nn.Module) -> Iterator[None]:
    """Update running statistics once for all micro-batches of a step of gradient accumulation.

    Each micro-batch is still normalised by its own statistics. At the end of the ``with`` block, each layer that was
    called in training mode is updated as by one call with all its inputs: its running statistics move once, by its
    momentum, towards the mean and the unbiased variance of these inputs, and its counter increases by one. For a
    :class:`SyncBatchNorm` these are the inputs of all processes. If an exception leaves the block, nothing is updated.
    The layers' inputs are read one additional time.

    Args:
        model: a model that is not compiled.

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
    layers = _tracking_layers(model)
    with _record_inputs(layers) as pools:
        yield
    synchronised: dict[Any, list[_BatchNorm]] = {}
    for layer in layers:
        if layer in pools and isinstance(layer, SyncBatchNorm) and has_peers(layer.process_group):
            synchronised.setdefault(layer.process_group, []).append(layer)
    for group, members in synchronised.items():
        pools |= _merge_over_processes(members, pools, Group.of(group))
    for layer, pool in pools.items():
        update_running((*_buffers(layer), layer.num_batches_tracked), layer.momentum, pool)


def _tracking_layers(model: torch.nn.Module) -> list[_BatchNorm]:
    """Return the layers that update running statistics in training; raise if one is lazy and has no channels yet."""
    tracking = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        and module.track_running_stats
        and module.running_mean is not None
        and not getattr(module, "frozen", False)
    }
    lazy = [(name, module) for name, module in tracking.items() if isinstance(module, _LazyNormBase)]
    require_channels(name for name, module in lazy if module.has_uninitialized_params())
    return list(tracking.values())


def _buffers(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return layer.running_mean, layer.running_var


@contextmanager
def _record_inputs(layers: list[_BatchNorm]) -> Iterator[Pools]:
    """Turn off the layers' updates within a block, and collect the merged statistics of their inputs in training."""
    pools: Pools = {}

    def record(layer: Any, arguments: tuple[Any, ...], options: dict[str, Any], _: Any) -> None:
        if layer.training and not updates.off:
            x = arguments[0] if arguments else options["input"]
            mask = arguments[3] if len(arguments) > 3 else options.get("mask")
            valid = None if mask is None else algorithm.valid_positions(mask, x.shape, 1)
            _, count, mean, var = sync_operators.report(x.detach(), valid).split((1, 1, x.shape[1], x.shape[1]))
            pool = Pool(count, mean, var.abs() * count)
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


def _merge_over_processes(layers: list[_BatchNorm], pools: Pools, group: Group) -> Pools:
    """Merge the layers' pools over a group's processes, by one collective; a process may lack the pool of a layer."""
    if not layers:
        return {}
    device = _buffers(layers[0])[0].device
    lengths = [n for layer in layers for n in (1, layer.num_features, layer.num_features)]
    vectors = [
        torch.cat(pools[layer]).to(device)
        if layer in pools
        else torch.zeros(1 + 2 * layer.num_features, dtype=torch.float64, device=device)
        for layer in layers
    ]
    parts = gather(torch.cat(vectors), group).split(lengths, dim=1)
    return {layer: merge(Pool(*parts[3 * i : 3 * i + 3])) for i, layer in enumerate(layers)}


def _batches_in_step(batches: Iterable[Any], layers: list[_BatchNorm], group: Group) -> Iterator[Any]:
    """Yield the batches, and check by a collective before each one that all processes of a group have a batch."""
    device = _buffers(layers[0])[0].device
    iterator = iter(batches)
    while True:
        batch = list(islice(iterator, 1))
        ready = int(sum_over_group(torch.tensor([float(len(batch))], device=device), group))
        if 0 < ready < group.size:
            raise ValueError(
                f"a SyncBatchNorm needs the same number of batches on every process, but {group.size - ready} of "
                f"{group.size} processes have no more"
            )
        if not batch:
            return
        yield batch[0]


def _first_batches(loader: Iterable[Any], steps: int | None, progress: bool) -> Iterable[Any]:
    """Return the first ``steps`` batches of a loader; with ``progress``, show a progress bar while they are read."""
    batches = loader if steps is None else islice(loader, steps)
    if not progress or find_spec("rich") is None:
        return batches
    from rich.console import Console
    from rich.progress import track

    length = len(loader) if isinstance(loader, Sized) else steps
    total = length if steps is None or length is None else min(length, steps)
    return track(batches, "population statistics", total, console=Console(stderr=True), transient=True)
