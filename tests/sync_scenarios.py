"""What the processes of ``test_nn_sync.py`` do; the test compares it with one process on the whole batch."""

import torch
import torch.distributed as dist

from gpu_bn import nn

BATCH = 12
SPLITS = ((12,), (6, 6), (11, 1), (0, 12), (4, 4, 4), (7, 0, 5), (3, 3, 3, 3), (5, 6, 0, 1))


class Net(torch.nn.Module):
    """Two layers with activations, the second with a residual."""

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


def train(net, part, add, steps=20):
    """SGD steps on a part of each batch; outputs and gradients of the last step, and the state after it."""
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
    """Trainings over process groups of every size, for every split of the batch; ``None`` outside the group."""
    groups = {size: dist.new_group(range(size)) for size in range(1, world + 1)}
    results = {}
    for sizes in SPLITS:
        if rank < len(sizes):
            group = groups[len(sizes)]
            part = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
            net = Net(nn.SyncBatchNorm, process_group=group)
            results[sizes] = train(net, part, lambda tensor, group=group: dist.all_reduce(tensor, group=group))
    return results
