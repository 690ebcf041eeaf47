"""Groups of processes and their collectives."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gpu_bn.nn.distributed import wire

_COLLECTIVES = torch.ops._c10d_functional
"""The collectives that ``torch.compile`` can record in a graph."""


def has_peers(group: Any) -> bool:
    """Tell whether a group has more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


class Group(NamedTuple):
    """The name and size of a process group and this process's rank, which compiled code can hold as constants."""

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
    """Gather the packets (:mod:`gpu_bn.nn.distributed.wire`) of all processes, and check that they make the same call.

    Args:
        packets: (P, L), those of this process.
        group: the group.

    Returns:
        A list of P tensors (W, L), the packets of W processes in the order of their ranks.

    Raises:
        ValueError: the headers differ, or one reports an error. On CPUs it is raised on every process, on GPUs in a
            later call.
    """
    return [wire.compare(gather(packet, group), group.name) for packet in packets.unbind()]


def sum_over_group(tensor: Tensor, group: Group) -> Tensor:
    """Sum a tensor over a group's processes."""
    return _exchange(_COLLECTIVES.all_reduce, tensor, "sum", group.name)


def _exchange(collective: Any, *arguments: Any) -> Tensor:
    try:
        return _COLLECTIVES.wait_tensor(collective(*arguments))  # type: ignore[no-any-return]
    except RuntimeError as error:
        raise RuntimeError(
            f"SyncBatchNorm: a process of the group has ended, or did not answer within its timeout ({error})"
        ) from error
