"""A group of processes, and its collectives."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gpu_bn.nn.distributed import wire

_COLLECTIVES = torch.ops._c10d_functional
"""The collectives that ``torch.compile`` takes into a graph."""


def several(group: Any) -> bool:
    """Tell whether a group has more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


class Group(NamedTuple):
    """A process group as compiled code can hold it."""

    name: str
    size: int
    rank: int

    @staticmethod
    def of(group: Any) -> Group:
        """Describe a group of :mod:`torch.distributed`; ``None`` is all processes."""
        group = dist.group.WORLD if group is None else group
        return Group(group.group_name, dist.get_world_size(group), dist.get_rank(group))


def gather(vector: Tensor, group: Group) -> Tensor:
    """Gather the (L,) vectors of a group's processes to (W, L), in the order of their ranks."""
    return _exchange(_COLLECTIVES.all_gather_into_tensor, vector, group.size, group.name).view(group.size, -1)


def exchange(packets: Tensor, group: Group) -> list[Tensor]:
    """Exchange packets (:mod:`gpu_bn.nn.distributed.wire`) of processes that must be in the same pass of a call.

    Args:
        packets: (P, L), of this process.
        group: the group.

    Returns:
        P times (W, L), of all processes in the order of their ranks.

    Raises:
        ValueError: on every process, if their headers differ.
    """
    return [wire.compare(gather(packet, group), group.name) for packet in packets.unbind()]


def total(tensor: Tensor, group: Group) -> Tensor:
    """Sum the tensors of a group's processes; nothing is compared."""
    return _exchange(_COLLECTIVES.all_reduce, tensor, "sum", group.name)


def _exchange(collective: Any, *arguments: Any) -> Tensor:
    try:
        return _COLLECTIVES.wait_tensor(collective(*arguments))  # type: ignore[no-any-return]
    except RuntimeError as error:
        raise RuntimeError(
            f"SyncBatchNorm: a process of the group has ended, or did not answer within its timeout ({error})"
        ) from error
