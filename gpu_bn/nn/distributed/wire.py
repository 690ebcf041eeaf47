"""What the processes of a SyncBatchNorm send each other: packets of one size, each with a header that all compare.

A packet is ``HEADER + ROOM`` float64 numbers. Its size is the same for every layer, pass, process and mistake, so that
a gathering always completes; a longer vector goes in several. The header holds :data:`FIELDS` after a flag: 1 for a
mistake, whose text is then in place of the vector. Where headers differ, or one is of a mistake, every process raises:
with tensors on a CPU in the same call, before anything has changed; on GPUs, where nothing waits for packets, what was
exchanged becomes NaN and a later call raises.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gpu_bn.activations import ROWS
from gpu_bn.nn.operators.library import LIBRARY, TAGS

FIELDS = (
    "call", "packet", "pass", "forward call", "layer", "channels", "dtype", "activation", "parameter", "eps",
    "momentum", "residual", "mask", "weight", "bias", "running statistics", "counter", "gradient",
)  # fmt: skip
"""What a header says. Exchanges of a group are counted as calls, its layers in the order of their first ones.

A backward pass names the call of its forward pass. The gradient is of nothing, of parameters, or of the input too.
"""
PASSES = ("forward", "backward", "second derivative", "a layer's first call", "end of the forward")
"""What is sent: forward, reports; at the end of it, with tensors on a CPU, that nothing has failed since."""
FORWARD, BACKWARD, SECOND, FIRST, END = map(float, range(len(PASSES)))
GRADIENTS = ("of nothing", "of parameters only", "of the input")
HEADER, ROOM = 1 + len(FIELDS), 2 + 2 * 512
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
UNKNOWN, NONE = -1.0, -2.0
"""What compiled code cannot know, of a layer or an earlier call, and a momentum that is a tensor; one of ``None``."""

for _schema in (
    "sync_pack(Tensor vector, str group, float[] signature) -> Tensor",
    "sync_mistake(Tensor like, str group, str text) -> Tensor",
    "sync_compare(Tensor packets, str group) -> Tensor",
    "sync_unpack(Tensor[] packets, int channels) -> Tensor",
    "sync_sum(Tensor[] packets, int length) -> Tensor",
    "sync_refuse(Tensor like, Tensor packets, str text) -> Tensor",
):
    LIBRARY.define(_schema, tags=TAGS)

CALLS: Counter[str] = Counter()
"""How many calls a group has had. Processes that have raised go on from the same number."""
ARRIVALS: deque[tuple[Callable[[], bool], Tensor, str]] = deque()
"""Packets on their way from a GPU: whether they have arrived, where, and of which group."""
FAULTS: dict[str, tuple[Exception, int]] = {}
"""What has failed in an operator of this process, by group, and how many packets of it are still to be compared."""


def packets_of(length: int) -> int:
    """How many packets a vector takes."""
    return -(-length // ROOM)


# ------------------------------------------------------------------------------------------------- what they compute
def packed(vector: Tensor, group: str, signature: Sequence[float]) -> Tensor:
    """(P, HEADER + ROOM) of a (L,) vector."""
    if vector.is_cuda and not torch.cuda.is_current_stream_capturing():
        look_at_arrivals()
    FAULTS.pop(group, None)  # which an exchange that ended early has left
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
        packets[:, :HEADER] = torch.tensor(heads, dtype=torch.float64)


def _mistake(like: Tensor, group: str, text: str) -> Tensor:
    """(HEADER + ROOM,) of a process that will not take part, for the reason ``text``."""
    letters = list(text.encode()[:ROOM])
    head = [1.0, _next_call(group), *[0.0] * (HEADER - 2)]
    if group:
        CALLS[group] += 1
    packet = torch.tensor(head + letters + [0] * (ROOM - len(letters)), dtype=torch.float64)
    return packet.to(like.device)


def fault(error: Exception, like: Tensor, group: str, length: int) -> Tensor:
    """(P, HEADER + ROOM) in place of those of a (L,) vector; what has failed is raised when all have them."""
    count = packets_of(length)
    packets = _mistake(like, group, told(error)).repeat(count, 1)
    FAULTS[group] = error, count
    return packets


def told(error: Exception) -> str:
    """What the other processes are told of an error."""
    return f"{type(error).__name__}: {' '.join([str(part) for part in error.args])}"


def _next_call(group: str) -> float:
    return float(CALLS[group]) if group else 0.0


def _compare(packets: Tensor, group: str) -> Tensor:
    """(W, HEADER + ROOM) packets as they are, unless one is of a mistake, or headers differ."""
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
    """(W, 2 + 2 C) reports; with a 1 in the first column if they must not be used."""
    reports = torch.cat([packet[:, HEADER:] for packet in packets], 1)[:, : 2 + 2 * channels].contiguous()
    reports[:, 0] = _wrong(packets)
    return reports


def _sum(packets: Sequence[Tensor], length: int) -> Tensor:
    """(L,) the sum of all processes' vectors, in the order of their ranks; NaN if they must not be used."""
    vectors = torch.cat([packet[:, HEADER:] for packet in packets], 1)[:, :length]
    return torch.where(_wrong(packets), torch.nan, vectors.sum(0))


def _wrong(packets: Sequence[Tensor]) -> Tensor:
    heads = [packet[:, :HEADER] for packet in packets]
    return torch.stack([(head[:, 0] != 0).any() | differing(head).any() for head in heads]).any()


def _refuse(like: Tensor, packets: Tensor, text: str) -> Tensor:
    """Raise what a process that will not take part raises, when it has told the others and they have not raised."""
    del like, packets
    raise ValueError(text)


def differing(heads: Tensor) -> Tensor:
    """Which columns of (W, n) headers are not the same wherever they are known."""
    known = heads != UNKNOWN
    least, most = (torch.where(known, heads, other) for other in (torch.inf, -torch.inf))
    return ~(most.amax(0) <= least.amin(0))  # also of NaN


def require_alike(packets: Tensor, group: str) -> None:
    """Raise what every process raises, if one has made a mistake or their calls differ; calls are counted anew then."""
    heads = packets[:, :HEADER]
    wrong, different = heads[:, 0] != 0, differing(heads)
    if not (bool(wrong.any()) or bool(different.any())):
        return
    CALLS[group] = 1 + int(heads[:, 1].max())
    if bool(wrong.any()):
        rank = int(wrong.to(torch.int8).argmax())
        raise ValueError(f"SyncBatchNorm, process {rank} of {len(heads)}: {_text(packets[rank, HEADER:])}")
    raise_different({FIELDS[at - 1]: heads[:, at].tolist() for at in different.nonzero().flatten().tolist()})


def raise_different(found: dict[str, list[float]]) -> None:
    """Raise what every process raises where fields of a header, these, are not the same on all."""
    size, reasons = len(next(iter(found.values()))), [_difference(field, values) for field, values in found.items()]
    raise ValueError(f"SyncBatchNorm, the {size} processes of a group made different calls: {'; '.join(reasons)}")


def _text(letters: Tensor) -> str:
    return bytes(int(letter) for letter in letters.tolist() if letter).decode(errors="replace")


def _difference(field: str, values: list[float]) -> str:
    """What a field is on which processes."""
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
    """Raise what an earlier call would have raised, had it waited for its packets."""
    while ARRIVALS and ARRIVALS[0][0]():
        require_alike(*ARRIVALS.popleft()[1:])


def _send(packets: Tensor, group: str) -> tuple[Callable[[], bool], Tensor, str]:
    host = torch.empty(packets.shape, dtype=packets.dtype, pin_memory=True)
    host.copy_(packets, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(packets.device))
    return event.query, host, group


# ------------------------------------------------------------------------------------------ what they would return
def packed_fake(vector: Tensor, group: str, signature: Sequence[float]) -> Tensor:
    del group, signature
    return vector.new_empty((packets_of(vector.shape[0]), HEADER + ROOM))


def _mistake_fake(like: Tensor, group: str, text: str) -> Tensor:
    del group, text
    return like.new_empty(HEADER + ROOM, dtype=torch.float64)


def _compare_fake(packets: Tensor, group: str) -> Tensor:
    del group
    return torch.empty_like(packets)


def _unpack_fake(packets: Sequence[Tensor], channels: int) -> Tensor:
    return packets[0].new_empty((packets[0].shape[0], 2 + 2 * channels))


def _sum_fake(packets: Sequence[Tensor], length: int) -> Tensor:
    return packets[0].new_empty(length)


def _refuse_fake(like: Tensor, packets: Tensor, text: str) -> Tensor:
    del packets, text
    return torch.empty_like(like)


for _name, _kernel, _fake in (
    ("sync_pack", packed, packed_fake),
    ("sync_mistake", _mistake, _mistake_fake),
    ("sync_compare", _compare, _compare_fake),
    ("sync_unpack", unpacked, _unpack_fake),
    ("sync_sum", _sum, _sum_fake),
    ("sync_refuse", _refuse, _refuse_fake),
):
    for _key in ("CPU", "CUDA"):
        LIBRARY.impl(_name, _kernel, _key)
    torch.library.register_fake(f"gpu_bn::{_name}", _fake, lib=LIBRARY)

pack = torch.ops.gpu_bn.sync_pack.default
mistake = torch.ops.gpu_bn.sync_mistake.default
compare = torch.ops.gpu_bn.sync_compare.default
unpack = torch.ops.gpu_bn.sync_unpack.default
add = torch.ops.gpu_bn.sync_sum.default
refuse = torch.ops.gpu_bn.sync_refuse.default
