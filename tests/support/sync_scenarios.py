"""Run SyncBatchNorm in the processes of ``nn/test_sync.py``, which compares them with one process for all data."""

import torch
import torch.distributed as dist

from gpu_bn import nn
from support.networks import BasicBlock

BATCH = 12
SPLITS = ((12,), (6, 6), (11, 1), (0, 12), (4, 4, 4), (7, 0, 5), (3, 3, 3, 3), (5, 6, 0, 1))


class Net(torch.nn.Module):
    """A network of two layers with activations, the second with a residual."""

    def __init__(self, norm, dtype=torch.float64, **options):
        super().__init__()
        torch.manual_seed(5)
        self.first = torch.nn.Conv2d(3, 4, 3, padding=1, dtype=dtype)
        self.second = torch.nn.Conv2d(4, 4, 3, padding=1, dtype=dtype)
        self.a = norm(4, dtype=dtype, activation="relu", **options)
        self.b = norm(4, dtype=dtype, activation="silu", momentum=None, **options)

    def forward(self, x):
        h = self.a(self.first(x))
        return self.b(self.second(h), h)


def data(step, *shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(dtype)


def train(net, part, add, steps=8):
    """Train on a part of each batch. ``add`` sums a tensor over processes.

    Return the outputs and gradients of the last step, and the state after it.
    """
    for step in range(steps):
        x = data(step, BATCH, 3, 5, 4)[part].mul(3).add(7).requires_grad_()
        y = net(x)
        net.zero_grad()
        (y * data(100 + step, *y.shape[1:])).square().sum().div(BATCH).backward()
        gradients = torch.nn.utils.parameters_to_vector([parameter.grad for parameter in net.parameters()])
        add(gradients)
        torch.nn.utils.vector_to_parameters(gradients, [parameter.grad for parameter in net.parameters()])
        with torch.no_grad():
            for parameter in net.parameters():
                parameter -= 0.01 * parameter.grad
    gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, "gradients": gradients, "state": net.state_dict()}


def equality(rank, world):
    """Train in process groups of every size for every split of the batch. Return the results of this process."""
    groups = {size: dist.new_group(range(size)) for size in range(1, world + 1)}
    results = {}
    for sizes in SPLITS:
        if rank < len(sizes):
            group = groups[len(sizes)]
            part = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
            net = Net(nn.SyncBatchNorm, process_group=group)
            results[sizes] = train(net, part, lambda tensor, group=group: dist.all_reduce(tensor, group=group))
    return results


def split_batch(rank, world, *shape, seed=0, dtype=torch.float64, size=6):
    """Return the part of this process of a random batch of ``size``, and the whole batch."""
    whole = data(seed, size, *shape, dtype=dtype).mul(2).add(3)
    return whole.tensor_split(world)[rank].clone(), whole


def numerics(rank, world):
    """Run half precision, memory formats, all ranks of input, one position per process, and an empty batch."""
    results = {}
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        layer = nn.SyncBatchNorm(3, activation="relu")
        x = split_batch(rank, world, 3, 9, 7, dtype=dtype)[0].to(memory_format=torch.channels_last).requires_grad_()
        y = layer(x)
        (dx,) = torch.autograd.grad(y, x, y.detach())
        results[dtype] = y.detach(), dx, layer.running_var
    for shape in ((3,), (3, 5), (3, 2, 3, 4)):
        results[len(shape)] = nn.SyncBatchNorm(3, dtype=torch.float64)(split_batch(rank, world, *shape)[0]).detach()
    layer = nn.SyncBatchNorm(3, dtype=torch.float64)
    results["one each"] = layer(split_batch(rank, world, 3, size=world)[0]).detach(), layer.state_dict()
    layer = nn.SyncBatchNorm(3, dtype=torch.float64)
    x = torch.empty(0, 3, 4, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    results["nothing"] = y.detach(), x.grad, layer.weight.grad, layer.state_dict()
    layer = nn.SyncBatchNorm(3)
    wide = layer(split_batch(rank, world, 3, 64, dtype=torch.float32)[0] * (1e25 if rank else 1e20))
    results["wide"] = wide.detach()
    frozen = nn.freeze(nn.SyncBatchNorm(3, dtype=torch.float64))
    results["frozen"] = frozen(split_batch(rank, world, 3)[0]).detach() if rank == 0 else None  # no exchange
    return results


def penalty(norm, x, residual, dy):
    """Return the gradients of a function of the first gradients."""
    x, residual, dy = (tensor.clone().requires_grad_() for tensor in (x, residual, dy))
    inputs = (x, residual, norm.weight, norm.bias)
    firsts = torch.autograd.grad((norm(x, residual) * dy).sum(), inputs, create_graph=True)
    value = (firsts[0].sin() + firsts[1] ** 2).sum()
    return torch.autograd.grad(value, (x, residual, norm.weight, norm.bias, dy), materialize_grads=True)


def second(rank, world):
    """Return second derivatives with and without an activation."""
    results = {}
    for activation in ("identity", "silu"):
        norm = nn.SyncBatchNorm(3, dtype=torch.float64, activation=activation)
        parts = [split_batch(rank, world, 3, 4, seed=seed)[0] for seed in range(3)]
        results[activation] = penalty(norm, *parts)
    return results


def by_inductor(rank, world):
    return compiled(rank, world, "inductor")


def compiled(rank, world, backend="aot_eager"):
    """Run a layer without and with ``torch.compile``, for parts of different sizes."""
    results = []
    x = split_batch(rank, world, 3, 4, dtype=torch.float32)[0]
    for wrap in (lambda layer: layer, lambda layer: torch.compile(layer, fullgraph=True, backend=backend)):
        layer = nn.SyncBatchNorm(3, activation="relu", momentum=None)
        call = wrap(layer)
        for size in (3, 3, 2):
            part, residual = (x[:size].clone().requires_grad_() for _ in range(2))
            y = call(part, residual)
            layer.zero_grad()
            (y * y).sum().backward()
        grads = part.grad, residual.grad, layer.weight.grad, layer.bias.grad
        results.append((y.detach(), grads, layer.state_dict()))
    return results


def in_ddp(rank, world):
    """Make two forward calls before one backward call, while DistributedDataParallel writes to the buffers."""
    gradients = []
    for norm in (nn.BatchNorm1d, nn.SyncBatchNorm):
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), norm(4, activation="relu")).double()
        model = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=True)
        parts = [split_batch(rank, world, 3, seed=seed)[0] for seed in range(2)]
        sum((model(part) ** 2).sum() for part in parts).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    return gradients


def two_blocks():
    torch.manual_seed(2)
    return torch.nn.Sequential(BasicBlock(3, 8, 2), BasicBlock(8, 8, 1)).double()


def steps_of_blocks(model, *parts):
    """Train for one step per part and return the last outputs, gradients and state."""
    for part in parts:
        model.zero_grad()
        y = model(part)
        y.square().mean().backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
    return y.detach(), gradients, list(model.state_dict().values())


def fused_in_ddp(rank, world):
    """Train a model with torch's layers, a fused one, and one with SyncBatchNorm, in DistributedDataParallel."""
    parts = [data(step, 6, 3, 8, 8).chunk(world)[rank] for step in range(2)]
    plain, fused, shared = two_blocks(), nn.convert(two_blocks(), fuse=True), nn.convert(two_blocks(), fuse=True)
    nn.SyncBatchNorm.convert_sync_batchnorm(shared)
    models = map(torch.nn.parallel.DistributedDataParallel, (plain, fused, shared))
    return [steps_of_blocks(model, *parts) for model in models]


def masked_inputs(dtype=torch.float64):
    """Return x, residual, dy and a mask for a batch of 6. Masked elements are NaN; the second half has one position."""
    x, residual, dy = (data(seed, 6, 3, 5, dtype=dtype) for seed in range(3))
    mask = torch.rand((6, 5), generator=torch.Generator().manual_seed(3)) < 0.6
    mask[3:] = False
    mask[4, 2] = True
    for tensor in (x, residual, dy):
        tensor.masked_fill_(~mask[:, None], torch.nan)
    return x, residual, dy, mask


def masked_step(norm, x, residual, dy, mask):
    """Return the outputs, first and second derivatives, and the state."""
    x, residual = (tensor.clone().requires_grad_() for tensor in (x, residual))
    inputs = (x, residual, norm.weight, norm.bias)
    y = norm(x, residual, mask=mask)
    firsts = torch.autograd.grad(y, inputs, dy)
    again = torch.autograd.grad(norm(x, residual, mask=mask), inputs, dy, create_graph=True)
    seconds = torch.autograd.grad(again[0].sin().sum(), inputs, materialize_grads=True)
    return y.detach(), firsts, [tensor.detach() for tensor in again], seconds, norm.state_dict()


def masked(rank, world):
    results = {}
    for activation in ("identity", "silu"):
        norm = nn.SyncBatchNorm(3, dtype=torch.float64, activation=activation)
        parts = [tensor.tensor_split(world)[rank] for tensor in masked_inputs()]
        results[activation] = masked_step(norm, *parts)
    layer = nn.SyncBatchNorm(3, dtype=torch.float64)
    x, _, _, mask = (tensor.tensor_split(world)[rank] for tensor in masked_inputs())
    with nn.accumulate_statistics(layer):
        for part, part_mask in zip(x.split(2), mask.split(2), strict=True):
            layer(part, mask=part_mask)
    results["accumulated"] = layer.state_dict()
    return results


def inside_a_group(rank, world):
    """Call a layer whose group has process 0 only. In other processes it uses the statistics of that process."""
    group = dist.new_group([0])
    layer = nn.SyncBatchNorm(3, process_group=group, dtype=torch.float64)
    return layer(split_batch(rank, world, 3)[0]).detach()


BATCHES = ((5, 3), (2, 4, 1))
"""The sizes of the batches of each process."""


def batches(rank):
    """Yield the batches of this process from a data set, with labels."""
    sizes = [size for sizes in BATCHES[:rank] for size in sizes]
    start = sum(sizes)
    for size in BATCHES[rank]:
        yield data(1, 15, 3, 4)[start : start + size] * 3 + 1e3, "labels"
        start += size


def population(rank, _):
    """Update population statistics with different numbers of batches per process, which SyncBatchNorm refuses."""
    results = {}
    plain = nn.BatchNorm(3, dtype=torch.float64)
    nn.update_population_stats(plain, batches(rank))
    results["plain"] = plain.state_dict()
    layers = [nn.SyncBatchNorm(3, dtype=torch.float64) for _ in range(2)]
    model = torch.nn.Sequential(*layers)
    nn.update_population_stats(model, batches(rank), steps=2)
    results["shared"] = model.state_dict()
    try:
        nn.update_population_stats(model, batches(rank))
    except ValueError as error:
        results["uneven"] = str(error)
    return results


def accumulated(rank, world):
    layer = nn.SyncBatchNorm(3, dtype=torch.float64)
    with nn.accumulate_statistics(layer):
        for part in split_batch(rank, world, 3, 4)[0].split(1):
            layer(part)
    return layer.state_dict()
