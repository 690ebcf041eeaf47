"""A group of processes, and what they send each other."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gpu_bn.nn.distributed import wire

_COLLECTIVES = torch.ops._c10d_functional
"""What ``torch.compile`` takes into a graph."""


def several(group: Any) -> bool:
    """Whether a group has more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


class Group(NamedTuple):
    """A process group as compiled code can hold it."""

    name: str
    size: int
    rank: int

    @staticmethod
    def of(group: Any) -> Group:
        """Of a group of :mod:`torch.distributed`; ``None`` is all processes."""
        group = dist.group.WORLD if group is None else group
        return Group(group.group_name, dist.get_world_size(group), dist.get_rank(group))


def gather(vector: Tensor, group: Group) -> Tensor:
    """(W, L) the (L,) vectors of a group's processes, in the order of their ranks."""
    return _exchange(_COLLECTIVES.all_gather_into_tensor, vector, group.size, group.name).view(group.size, -1)


def exchange(packets: Tensor, group: Group) -> list[Tensor]:
    """What a group's processes send (:mod:`gpu_bn.nn.distributed.wire`), which must be in the same pass of calls alike.

    Args:
        packets: (P, L), those of this process.
        group: the group.

    Returns:
        P times (W, L), of all processes in the order of their ranks.

    Raises:
        ValueError: on every process, if they are not alike.
    """
    return [wire.compare(gather(packet, group), group.name) for packet in packets.unbind()]


def total(tensor: Tensor, group: Group) -> Tensor:
    """The sum of a group's tensors, which nothing is compared of."""
    return _exchange(_COLLECTIVES.all_reduce, tensor, "sum", group.name)


def _exchange(collective: Any, *arguments: Any) -> Tensor:
    try:
        return _COLLECTIVES.wait_tensor(collective(*arguments))  # type: ignore[no-any-return]
    except RuntimeError as error:
        raise RuntimeError(
            f"SyncBatchNorm: a process of the group has ended, or did not answer within its timeout ({error})"
        ) from error
