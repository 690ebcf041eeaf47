"""The packets that the processes of a SyncBatchNorm exchange.

A packet is ``HEADER + ROOM`` float64 numbers: a header and data. The size is the same for every layer, pass and
process, also for an error report, so that an all-gather always completes. A longer vector takes several packets. The
header is an error flag, then :data:`FIELDS`. If the flag is 1, the data are the text of an error. Every process
compares the headers and raises if they differ or if one reports an error. On CPUs all raise in the same call, before
anything has changed. On GPUs nothing waits for packets: the results become NaN, and a later call raises.
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
"""The fields of a header; those from ``residual`` to ``counter`` are 1 if the call has such an argument.

``call`` is the number of the exchange in its group, ``forward call`` that of its forward pass. ``packet`` is the index
of the packet, ``layer`` the layer's place in the group's order of first calls. ``pass``, ``dtype``, ``activation`` and
``gradient`` are indices of :data:`PASSES`, :data:`DTYPES`, the activations and :data:`GRADIENTS`.
"""
PASSES = ("forward", "backward", "second derivative", "a layer's first call", "end of the forward")
"""The purpose of a packet. The last one ends a forward call on CPUs: it says that nothing has failed."""
FORWARD, BACKWARD, SECOND, FIRST, END = map(float, range(len(PASSES)))
GRADIENTS = ("not needed", "of parameters only", "of the input")
HEADER, ROOM = 1 + len(FIELDS), 2 + 2 * 512
"""The lengths of a packet's header and data; a layer with up to 512 channels needs one packet."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
UNKNOWN, NONE = -1.0, -2.0
"""``UNKNOWN``: compiled code cannot know the value, or the momentum is a tensor. ``NONE``: the momentum is ``None``."""

CALLS: Counter[str] = Counter()
"""The number of exchanges of each group. After an error all its processes continue from the same number."""
ARRIVALS: deque[tuple[Callable[[], bool], Tensor, str]] = deque()
"""Packets that are being copied from a GPU: a function that tells whether they have arrived, the packets, the group."""
FAULTS: dict[str, tuple[Exception, int]] = {}
"""This process's error, by group, and the number of its packets that are not yet compared."""


def packet_count(length: int) -> int:
    """Return the number of packets of a vector."""
    return -(-length // ROOM)


def make_packets(vector: Tensor, group: str, signature: Sequence[float]) -> Tensor:
    """Return the packets of an (L,) vector, (P, HEADER + ROOM); ``signature`` are the fields from ``pass`` on."""
    if vector.is_cuda and not torch.cuda.is_current_stream_capturing():
        check_arrivals()
    FAULTS.pop(group, None)  # an exchange that ended early may have left one
    count = packet_count(len(vector))
    packets = vector.new_zeros((count, HEADER + ROOM))
    headers = [[0.0, _next_call(group), float(index), *signature] for index in range(count)]
    write_headers(packets, headers, by_arguments=not packets.is_cpu)
    body = torch.nn.functional.pad(vector, (0, count * ROOM - len(vector)))
    packets[:, HEADER:] = body.view(count, ROOM)
    if group:
        CALLS[group] += 1
    return packets


def write_headers(packets: Tensor, headers: list[list[float]], by_arguments: bool) -> None:
    """Write P headers, lists of HEADER numbers, to packets of zeros; on a GPU ``by_arguments`` of a kernel.

    A copy from the host would wait for the GPU, and it fails while a CUDA graph is captured.
    """
    if by_arguments:
        cells = [cell for packet in packets for cell in packet[:HEADER].unbind()]
        torch._foreach_add_(cells, [number for header in headers for number in header])
    else:
        packets[:, :HEADER] = torch.tensor(headers, dtype=torch.float64, device="cpu")


def _make_error_packet(like: Tensor, group: str, text: str) -> Tensor:
    """Return a packet that reports an error, (HEADER + ROOM,), on the device of ``like``."""
    letters = list(text.encode()[:ROOM])
    header = [1.0, _next_call(group), *[0.0] * (HEADER - 2)]
    if group:
        CALLS[group] += 1
    packet = torch.tensor(header + letters + [0] * (ROOM - len(letters)), dtype=torch.float64, device="cpu")
    return packet.to(like.device)


def make_error_packets(error: Exception, like: Tensor, group: str, length: int) -> Tensor:
    """Return packets that report an error in place of an (L,) vector; the error is raised after the exchange."""
    count = packet_count(length)
    packets = _make_error_packet(like, group, describe_error(error)).repeat(count, 1)
    FAULTS[group] = error, count
    return packets


def describe_error(error: Exception) -> str:
    """Return the type and the arguments of an error, for the other processes."""
    return f"{type(error).__name__}: {' '.join([str(part) for part in error.args])}"


def _next_call(group: str) -> float:
    return float(CALLS[group]) if group else 0.0


def _compare(packets: Tensor, group: str) -> Tensor:
    """Return a copy of (W, HEADER + ROOM) packets; raise if headers differ or report an error, on GPUs later."""
    if packets.is_cpu:
        try:
            require_equal_headers(packets, group)
        except ValueError as raised:
            raise raised from FAULTS.pop(group, (None,))[0]
    elif packets.is_cuda and not torch.cuda.is_current_stream_capturing():
        ARRIVALS.append(_copy_to_host(packets, group))
    if group in FAULTS:  # on a GPU: this process takes part in the whole exchange, then raises its error
        error, left = FAULTS.pop(group)
        if left == 1:
            raise error
        FAULTS[group] = error, left - 1
    return packets.clone()


def extract_reports(packets: Sequence[Tensor], channels: int) -> Tensor:
    """Return the reports in packets, (W, 2 + 2 C); their first column is 1 if headers differ or report an error."""
    reports = torch.cat([packet[:, HEADER:] for packet in packets], 1)[:, : 2 + 2 * channels].contiguous()
    reports[:, 0] = _are_invalid(packets)
    return reports


def _sum(packets: Sequence[Tensor], length: int) -> Tensor:
    """Sum (L,) vectors over the processes, in one order on all; NaN if headers differ or report an error."""
    fused = getattr(registry.backend_for(packets[0]), "sum_packets", None)
    if fused is not None:
        return fused(packets, length, HEADER, ROOM, UNKNOWN)  # type: ignore[no-any-return]
    vectors = torch.cat([packet[:, HEADER:] for packet in packets], 1)[:, :length]
    return torch.where(_are_invalid(packets), torch.nan, vectors.sum(0))


def _are_invalid(packets: Sequence[Tensor]) -> Tensor:
    """Tell, as a 0-d tensor, whether headers differ or report an error."""
    headers = [packet[:, :HEADER] for packet in packets]
    return torch.stack([(header[:, 0] != 0).any() | differing_columns(header).any() for header in headers]).any()


def _refuse(like: Tensor, packets: Tensor, text: str) -> Tensor:
    """Raise an error on this process, after the others have received it in ``packets``."""
    del like, packets
    raise ValueError(text)


def differing_columns(headers: Tensor) -> Tensor:
    """Tell for each column of (W, n) headers whether its known values differ."""
    known = headers != UNKNOWN
    least, most = (torch.where(known, headers, other) for other in (torch.inf, -torch.inf))
    return ~(most.amax(0) <= least.amin(0))  # NaN differs too


def require_equal_headers(packets: Tensor, group: str) -> None:
    """Raise on every process if headers differ or one reports an error; then give the next call the same number."""
    headers = packets[:, :HEADER]
    failed, different = (flags.nonzero().flatten().tolist() for flags in (headers[:, 0], differing_columns(headers)))
    if not (failed or different):
        return
    CALLS[group] = 1 + int(headers[:, 1].max())
    if failed:
        rank = failed[0]
        letters = [int(letter) for letter in packets[rank, HEADER:].tolist() if letter]
        raise ValueError(f"SyncBatchNorm, process {rank} of {len(headers)}: {bytes(letters).decode(errors='replace')}")
    raise_difference({FIELDS[column - 1]: headers[:, column].tolist() for column in different})


def raise_difference(fields: dict[str, list[float]]) -> None:
    """Raise an error that gives each process's values of fields that differ."""
    size, reasons = len(next(iter(fields.values()))), [_difference(field, values) for field, values in fields.items()]
    raise ValueError(f"SyncBatchNorm, the {size} processes of a group made different calls: {'; '.join(reasons)}")


def _difference(field: str, values: list[float]) -> str:
    """Return a text that lists the ranks that have each value of a field."""
    ranks_of: dict[str, list[str]] = {}
    for rank, value in enumerate(values):
        ranks_of.setdefault(_format_value(field, value), []).append(str(rank))
    return f"{field} " + ", ".join(f"{value} on {' and '.join(ranks)}" for value, ranks in ranks_of.items())


def _format_value(field: str, value: float) -> str:
    """Return the text of a field's value."""
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


def check_arrivals() -> None:
    """Check the packets of earlier calls on a GPU that have arrived on the host; raise the error of such a call."""
    while ARRIVALS and ARRIVALS[0][0]():
        require_equal_headers(*ARRIVALS.popleft()[1:])


def _copy_to_host(packets: Tensor, group: str) -> tuple[Callable[[], bool], Tensor, str]:
    """Start to copy packets from a GPU, and return an entry of :data:`ARRIVALS`."""
    host = torch.empty(packets.shape, dtype=packets.dtype, device="cpu", pin_memory=True)
    host.copy_(packets, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(packets.device))
    return event.query, host, group


def make_packets_fake(vector: Tensor, group: str, signature: Sequence[float]) -> Tensor:
    """Return an uninitialised tensor with the shape and dtype that :func:`make_packets` returns, for compilers."""
    del group, signature
    return vector.new_empty((packet_count(vector.shape[0]), HEADER + ROOM))


pack = register("sync_pack(Tensor vector, str group, float[] signature) -> Tensor", make_packets, make_packets_fake)
error_packet = register(
    "sync_mistake(Tensor like, str group, str text) -> Tensor",
    _make_error_packet,
    lambda like, *_: like.new_empty(HEADER + ROOM, dtype=torch.float64),
)
compare = register(
    "sync_compare(Tensor packets, str group) -> Tensor", _compare, lambda packets, _: torch.empty_like(packets)
)
unpack = register(
    "sync_unpack(Tensor[] packets, int channels) -> Tensor",
    extract_reports,
    lambda packets, channels: packets[0].new_empty((packets[0].shape[0], 2 + 2 * channels)),
)
add = register(
    "sync_sum(Tensor[] packets, int length) -> Tensor", _sum, lambda packets, length: packets[0].new_empty(length)
)
refuse = register(
    "sync_refuse(Tensor like, Tensor packets, str text) -> Tensor", _refuse, lambda like, *_: torch.empty_like(like)
)
