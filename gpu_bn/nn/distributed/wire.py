"""The packets that the processes of a SyncBatchNorm exchange; every process compares their headers.

A packet is ``HEADER + ROOM`` float64 numbers. Its size is the same for every layer, pass, process and mistake, so that
an all-gather always completes. A longer vector takes several packets. A header is a flag, then :data:`FIELDS`. The flag
is 1 for a mistake; the packet then holds its text. If headers differ, or one reports a mistake, every process raises.
On CPUs all raise in the same call, before anything has changed. On GPUs nothing waits for packets: the results become
NaN, and a later call raises.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gpu_bn import registry
from gpu_bn.activations import ROWS
from gpu_bn.nn.operators.library import register

FIELDS = (
    "call", "packet", "pass", "forward call", "layer", "channels", "dtype", "activation", "parameter", "eps",
    "momentum", "residual", "mask", "weight", "bias", "running statistics", "counter", "gradient",
)  # fmt: skip
"""The fields of a header. ``call`` counts the exchanges of a group, ``layer`` its layers by their first calls.

A backward pass names the call of its forward pass. ``gradient`` is an index of :data:`GRADIENTS`.
"""
PASSES = ("forward", "backward", "second derivative", "a layer's first call", "end of the forward")
"""What a packet is for. The last one ends a forward call on CPUs: it says that nothing has failed."""
FORWARD, BACKWARD, SECOND, FIRST, END = map(float, range(len(PASSES)))
GRADIENTS = ("of nothing", "of parameters only", "of the input")
HEADER, ROOM = 1 + len(FIELDS), 2 + 2 * 512
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
UNKNOWN, NONE = -1.0, -2.0
"""``UNKNOWN``: compiled code cannot know the value, or the momentum is a tensor. ``NONE``: the momentum is ``None``."""

CALLS: Counter[str] = Counter()
"""The number of exchanges of each group. Processes that have raised continue from the same number."""
ARRIVALS: deque[tuple[Callable[[], bool], Tensor, str]] = deque()
"""Packets on their way from a GPU: a function that tells whether they have arrived, the packets, the group."""
FAULTS: dict[str, tuple[Exception, int]] = {}
"""Errors of this process's operators, by group, and how many of their packets are still to be compared."""


def packets_of(length: int) -> int:
    """Count the packets of a vector."""
    return -(-length // ROOM)


def packed(vector: Tensor, group: str, signature: Sequence[float]) -> Tensor:
    """Make the packets of an (L,) vector, (P, HEADER + ROOM)."""
    if vector.is_cuda and not torch.cuda.is_current_stream_capturing():
        look_at_arrivals()
    FAULTS.pop(group, None)  # an exchange that ended early may have left one
    count = packets_of(len(vector))
    packets = vector.new_zeros((count, HEADER + ROOM))
    heads = [[0.0, _next_call(group), float(at), *signature] for at in range(count)]
    write_heads(packets, heads, by_arguments=not packets.is_cpu)
    body = torch.nn.functional.pad(vector, (0, count * ROOM - len(vector)))
    packets[:, HEADER:] = body.view(count, ROOM)
    if group:
        CALLS[group] += 1
    return packets


def write_heads(packets: Tensor, heads: list[list[float]], by_arguments: bool) -> None:
    """Write (P, HEADER) numbers to packets of zeros, on a GPU as arguments of a kernel.

    A copy from the host would wait for the GPU, and a CUDA graph that is being captured refuses it.
    """
    if by_arguments:
        cells = [cell for packet in packets for cell in packet[:HEADER].unbind()]
        torch._foreach_add_(cells, [number for head in heads for number in head])
    else:
        packets[:, :HEADER] = torch.tensor(heads, dtype=torch.float64, device="cpu")


def _mistake(like: Tensor, group: str, text: str) -> Tensor:
    """Make the packet of a process that does not take part, (HEADER + ROOM,); ``text`` is the reason."""
    letters = list(text.encode()[:ROOM])
    head = [1.0, _next_call(group), *[0.0] * (HEADER - 2)]
    if group:
        CALLS[group] += 1
    packet = torch.tensor(head + letters + [0] * (ROOM - len(letters)), dtype=torch.float64, device="cpu")
    return packet.to(like.device)


def fault(error: Exception, like: Tensor, group: str, length: int) -> Tensor:
    """Make packets that report an error in place of an (L,) vector; the error is raised after the exchange."""
    count = packets_of(length)
    packets = _mistake(like, group, told(error)).repeat(count, 1)
    FAULTS[group] = error, count
    return packets


def told(error: Exception) -> str:
    """Describe an error for the other processes."""
    return f"{type(error).__name__}: {' '.join([str(part) for part in error.args])}"


def _next_call(group: str) -> float:
    return float(CALLS[group]) if group else 0.0


def _compare(packets: Tensor, group: str) -> Tensor:
    """Return (W, HEADER + ROOM) packets as they are; raise if one reports a mistake or headers differ."""
    if packets.is_cpu:
        try:
            require_alike(packets, group)
        except ValueError as raised:
            raise raised from FAULTS.pop(group, (None,))[0]
    elif packets.is_cuda and not torch.cuda.is_current_stream_capturing():
        ARRIVALS.append(_send(packets, group))
    if group in FAULTS:  # on a GPU, where this process alone raises now, but takes part in all of the exchange
        error, left = FAULTS.pop(group)
        if left == 1:
            raise error
        FAULTS[group] = error, left - 1
    return packets.clone()


def unpacked(packets: Sequence[Tensor], channels: int) -> Tensor:
    """Take the reports out of packets, (W, 2 + 2 C); the first column is 1 if they must not be used."""
    reports = torch.cat([packet[:, HEADER:] for packet in packets], 1)[:, : 2 + 2 * channels].contiguous()
    reports[:, 0] = _wrong(packets)
    return reports


def _sum(packets: Sequence[Tensor], length: int) -> Tensor:
    """Sum all processes' vectors, (L,), on each in the same order; NaN if they must not be used.

    It is one launch where the backend has a kernel for it.
    """
    fused = getattr(registry.backend_for(packets[0]), "sum_packets", None)
    if fused is not None:
        return fused(packets, length, HEADER, ROOM, UNKNOWN)  # type: ignore[no-any-return]
    vectors = torch.cat([packet[:, HEADER:] for packet in packets], 1)[:, :length]
    return torch.where(_wrong(packets), torch.nan, vectors.sum(0))


def _wrong(packets: Sequence[Tensor]) -> Tensor:
    heads = [packet[:, :HEADER] for packet in packets]
    return torch.stack([(head[:, 0] != 0).any() | differing(head).any() for head in heads]).any()


def _refuse(like: Tensor, packets: Tensor, text: str) -> Tensor:
    """Raise on a process that does not take part, after the others have been told and have not raised."""
    del like, packets
    raise ValueError(text)


def differing(heads: Tensor) -> Tensor:
    """Tell for each column of (W, n) headers whether its known values differ."""
    known = heads != UNKNOWN
    least, most = (torch.where(known, heads, other) for other in (torch.inf, -torch.inf))
    return ~(most.amax(0) <= least.amin(0))  # NaN differs too


def require_alike(packets: Tensor, group: str) -> None:
    """Raise on every process if one reports a mistake or their calls differ; then count the calls anew."""
    heads = packets[:, :HEADER]
    wrong, different = heads[:, 0].nonzero().flatten().tolist(), differing(heads).nonzero().flatten().tolist()
    if not (wrong or different):
        return
    CALLS[group] = 1 + int(heads[:, 1].max())
    if wrong:
        rank = wrong[0]
        letters = [int(letter) for letter in packets[rank, HEADER:].tolist() if letter]
        raise ValueError(f"SyncBatchNorm, process {rank} of {len(heads)}: {bytes(letters).decode(errors='replace')}")
    raise_different({FIELDS[at - 1]: heads[:, at].tolist() for at in different})


def raise_different(found: dict[str, list[float]]) -> None:
    """Raise on every process because these fields of the headers differ."""
    size, reasons = len(next(iter(found.values()))), [_difference(field, values) for field, values in found.items()]
    raise ValueError(f"SyncBatchNorm, the {size} processes of a group made different calls: {'; '.join(reasons)}")


def _difference(field: str, values: list[float]) -> str:
    """Say which processes have which value of a field."""
    ranks: dict[str, list[str]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(_shown(field, value), []).append(str(rank))
    return f"{field} " + ", ".join(f"{value} on {' and '.join(who)}" for value, who in ranks.items())


def _shown(field: str, value: float) -> str:
    if value == UNKNOWN:
        return "a tensor" if field == "momentum" else "unknown"
    if field == "dtype":
        return str(DTYPES[int(value)]).removeprefix("torch.")
    names = {"activation": list(ROWS), "pass": PASSES, "gradient": GRADIENTS}.get(field)
    if names is not None:
        return names[int(value)]
    if FIELDS.index(field) >= FIELDS.index("residual"):
        return "yes" if value else "no"
    return "None" if value == NONE else f"{value:g}"


def look_at_arrivals() -> None:
    """Raise for an earlier call on a GPU, which did not wait for its packets."""
    while ARRIVALS and ARRIVALS[0][0]():
        require_alike(*ARRIVALS.popleft()[1:])


def _send(packets: Tensor, group: str) -> tuple[Callable[[], bool], Tensor, str]:
    host = torch.empty(packets.shape, dtype=packets.dtype, device="cpu", pin_memory=True)
    host.copy_(packets, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(packets.device))
    return event.query, host, group


def packed_fake(vector: Tensor, group: str, signature: Sequence[float]) -> Tensor:
    """Return packets as :func:`packed` makes them, for compilers."""
    del group, signature
    return vector.new_empty((packets_of(vector.shape[0]), HEADER + ROOM))


pack = register("sync_pack(Tensor vector, str group, float[] signature) -> Tensor", packed, packed_fake)
mistake = register(
    "sync_mistake(Tensor like, str group, str text) -> Tensor",
    _mistake,
    lambda like, *_: like.new_empty(HEADER + ROOM, dtype=torch.float64),
)
compare = register(
    "sync_compare(Tensor packets, str group) -> Tensor", _compare, lambda packets, _: torch.empty_like(packets)
)
unpack = register(
    "sync_unpack(Tensor[] packets, int channels) -> Tensor",
    unpacked,
    lambda packets, channels: packets[0].new_empty((packets[0].shape[0], 2 + 2 * channels)),
)
add = register(
    "sync_sum(Tensor[] packets, int length) -> Tensor", _sum, lambda packets, length: packets[0].new_empty(length)
)
refuse = register(
    "sync_refuse(Tensor like, Tensor packets, str text) -> Tensor", _refuse, lambda like, *_: torch.empty_like(like)
)
