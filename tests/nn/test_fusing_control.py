"""Test fused models with branches, and fused models that are distributed, copied or compiled."""

import copy

import pytest

torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
from support.fusing import Block, agree, calls_of_relu, fused_with, rows, saved_and_loaded
from torch.nn import functional as F
from torch.testing import assert_close

from gpu_bn import nn


class Kinds(Block):
    def forward(self, x, scale=None):
        if isinstance(x, (list, tuple)):
            x = torch.cat(x, 1)
        y = self.act(self.norm(self.linear(x)))
        return y if scale is None else y * scale


class OnResult(Block):
    """A module that depends on the type of the result of another module."""

    def __init__(self):
        super().__init__()
        self.inner = Block()

    def forward(self, x):
        y = self.inner(x)
        y = self.norm(y if isinstance(y, torch.Tensor) else y[0])
        return self.act(y)


def test_branches_on_inputs():
    plain = Kinds()
    fused, _ = fused_with(plain, "norm")
    agree(fused, plain, rows())
    agree(fused, plain, rows(), rows(1))
    agree(fused, plain, rows(), scale=3.0)
    parts = list(rows().split(2, 1))
    assert_close(fused(parts), plain(parts))
    assert_close(fused(x=rows()), plain(x=rows()))
    assert calls_of_relu(fused, rows()) == 0
    with pytest.raises(TypeError, match="unexpected keyword argument 'other'"):
        fused(rows(), other=1)


def test_branches_on_the_results_of_modules():
    plain = OnResult()
    fused, report = fused_with(plain, "inner.norm")
    assert "kind of a value" in report.left["norm"]
    agree(fused, plain, rows())


class Adds(Block):
    def __init__(self, in_place=False):
        super().__init__()
        self.in_place = in_place

    def forward(self, x, other):
        y = self.norm(self.linear(x))
        if self.in_place:
            y += other
        else:
            y = other + y
        return self.act(y)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("other", [rows(1), rows(1, 1), rows(1)[:, :1], rows(1).float(), rows(1, 6).half()])
def test_terms_that_broadcast_or_have_another_dtype(in_place, other):
    plain = Adds(in_place)
    fused, _ = fused_with(plain, "norm")
    agree(fused, plain, rows(), other)
    plain.float()
    agree(nn.convert(copy.deepcopy(plain), fuse=True), plain, rows().float(), other.float())


class Excited(torch.nn.Module):
    """A module with a term of shape (N, C, 1, 1), and a convolution to which autocast gives another dtype."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU()
        self.gate = torch.nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.act(self.norm(self.conv(x).float()) + self.gate(x.mean((2, 3), keepdim=True)))


@pytest.mark.parametrize("enabled", [True, False])
def test_squeeze_and_excite_under_autocast(enabled):
    plain = Excited()
    fused, _ = fused_with(plain, "norm")
    x = torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        mine, other = fused(x), plain(x)
    assert mine.dtype == other.dtype
    assert_close(mine, other)


class Tail(torch.nn.Module):
    """A module that calls another one which ends with the layer. The sum and the activation are outside of that one."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Sequential(Block(), NoActivation())
        self.act = torch.nn.ReLU()

    def forward(self, x):
        return self.act(self.layer(x) + x)


class NoActivation(Block):
    def forward(self, x):
        return self.norm(self.linear(x))


def test_layers_at_the_end_of_a_module():
    plain = Tail()
    fused, _ = fused_with(plain, "layer.0.norm", "layer.1.norm")
    agree(fused, plain, rows())
    agree(fused.layer, plain.layer, rows())
    for model in (fused, plain):
        model.layer.register_forward_hook(lambda _module, _inputs, y: y + 1)
    agree(fused, plain, rows())


class Dense(torch.nn.Module):
    """A module whose layers get lists, as in DenseNet."""

    class Layer(torch.nn.Module):
        def __init__(self, count):
            super().__init__()
            self.norm, self.act, self.linear = (
                torch.nn.BatchNorm1d(4 * count), torch.nn.ReLU(inplace=True), torch.nn.Linear(4 * count, 4)
            )  # fmt: skip

        def forward(self, inputs):
            inputs = [inputs] if isinstance(inputs, torch.Tensor) else inputs
            return self.linear(self.act(self.norm(torch.cat(inputs, 1))))

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([self.Layer(count) for count in (1, 2, 3)]).double()

    def forward(self, x):
        features = [x]
        for layer in self.layers:
            features.append(layer(features))
        return torch.cat(features, 1)


def test_layers_that_are_given_lists():
    plain = Dense()
    fused, _ = fused_with(plain, *(f"layers.{i}.norm" for i in range(3)))
    agree(fused, plain, rows())
    assert calls_of_relu(fused, rows()) == 0


def test_layers_that_a_function_holds():
    class Closed(Block):
        def __init__(self):
            super().__init__()
            self.function = lambda x: self.act(self.norm(self.linear(x)))

        def forward(self, x):
            return self.function(x)

    plain, fused = Closed(), Closed()  # a copy would share the function
    fused.load_state_dict(plain.state_dict())
    report = nn.Report()
    assert nn.convert(fused, fuse=True, report=report).norm is fused.norm
    assert report.merged == {"norm": "relu"}
    agree(fused, plain, rows())
    assert calls_of_relu(fused, rows()) == 0


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("options", [{}, {"static_graph": True}, {"find_unused_parameters": True}], ids=str)
def test_distributed_data_parallel(options):
    plain = torch.nn.Sequential(Block(), Tail(), Untraced())
    fused, _ = fused_with(plain, "0.norm", "1.layer.0.norm", "1.layer.1.norm", "2.norm")
    models = [torch.nn.parallel.DistributedDataParallel(model, **options) for model in (fused, plain)]
    for step in range(2):
        losses = [model(rows(step)).sin().sum() for model in models]
        for loss in losses:
            loss.backward()
    gradients = [[parameter.grad for parameter in model.parameters()] for model in models]
    assert_close(*losses)
    assert_close(*gradients)
    assert_close(fused.state_dict(), plain.state_dict())
    assert calls_of_relu(fused, rows()) == 0


class Untraced(Block):
    """A module that cannot be traced and is fused by its text."""

    def forward(self, x):
        x = x if int(x.shape[0]) > 0 else x + 1
        return self.act(self.norm(self.linear(x)))


@pytest.mark.parametrize(
    "change", [copy.deepcopy, saved_and_loaded, lambda model: copy.deepcopy(saved_and_loaded(model))]
)
@pytest.mark.parametrize("kind", [Block, Tail, Kinds])
def test_copies_and_files_are_fused_and_apart(change, kind):
    plain = kind()
    fused = nn.convert(copy.deepcopy(plain), fuse=True)
    copied = change(fused)
    assert calls_of_relu(copied, rows(2)) == 0
    plain(rows(2))
    agree(copied, plain, rows())
    assert all(a is not b for a, b in zip(copied.parameters(), fused.parameters(), strict=True))
    nn.revert(copied)
    assert calls_of_relu(fused, rows()) == 0


def test_converting_again_and_reverting_a_part():
    plain = Tail()
    fused = nn.convert(nn.convert(copy.deepcopy(plain), fuse=True), fuse=True)
    agree(fused, plain, rows())
    nn.revert(fused.layer)
    assert type(fused.layer[0].norm) is torch.nn.BatchNorm1d
    agree(fused, plain, rows())


def test_tracers_and_compilers_see_a_fused_model():
    plain = Tail().eval()
    fused = nn.convert(copy.deepcopy(plain), fuse=True)
    x = rows()
    want = plain(x)
    assert_close(torch.fx.symbolic_trace(fused)(x), want)
    assert_close(torch.jit.trace(fused, x)(x), want)
    assert_close(torch.export.export(fused, (x,)).module()(x), want)
    for mode in (True, False):
        compiled = torch.compile(fused.train(mode), backend="aot_eager", fullgraph=True)
        assert_close(compiled(x), plain.train(mode)(x))
    torch._dynamo.reset()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [Block, Tail, Untraced])
def test_stacked_fused_models(kind, training):
    """Compare outputs, gradients and running statistics of models that ``torch.func`` runs as an ensemble."""
    plain = [kind().train(training) for _ in range(3)]
    results = []
    for models in (plain, [nn.convert(copy.deepcopy(model), fuse=True) for model in plain]):
        parameters, buffers = torch.func.stack_module_state(models)
        base = copy.deepcopy(models[0]).to("meta")

        def loss(parameters, buffers, x, base=base):
            y = torch.func.functional_call(base, (parameters, buffers), (x,))
            return y.sin().sum(), y

        gradients = torch.func.grad(loss, has_aux=True)
        results.append((torch.func.vmap(gradients, in_dims=(0, 0, None))(parameters, buffers, rows()), buffers))
    assert_close(*results)


class Frozen(torch.nn.Module):
    """A frozen layer as in transformers, whose eps is a constant in the code."""

    def __init__(self, channels, scale=1.0):
        super().__init__()
        self.scale = scale
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x):
        weight, bias, mean, var = (
            getattr(self, name).reshape(1, -1, 1, 1) for name in ("weight", "bias", "running_mean", "running_var")
        )
        scale = weight * (var + 1e-3).rsqrt()
        return (x * scale + (bias - mean * scale)) * self.scale


def test_frozen_layers_are_known_by_what_they_hold_and_compute():
    plain = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), Frozen(4), torch.nn.ReLU(), Frozen(4, 2.0)).double()
    fused, report = fused_with(plain, "1")
    assert report.converted == ["1"]
    assert [isinstance(layer, nn.FrozenBatchNorm2d) for layer in fused[1::2]] == [True, False]
    assert all(isinstance(layer, Frozen) for layer in fused[1::2])
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    assert_close(fused(x), plain(x))
    assert_close(nn.fold(plain)(x), plain(x))
    assert type(nn.fold(plain)[1]) is torch.nn.Identity
    names = list(vars(plain[1]))
    assert list(vars(nn.revert(fused)[1])) == names


def test_functional_activations_of_each_mode():
    class Functional(Block):
        def forward(self, x):
            y = F.dropout(F.silu(self.norm(self.linear(x))), 0.5, self.training)
            return torch.sigmoid(self.norm(y)) if self.training else y

    plain = Functional()
    fused, report = fused_with(plain, "norm")
    assert report.merged == {"norm": "sigmoid or silu"} or report.merged == {"norm": "silu"}
    agree(fused, plain, rows())


class Checking(Block):
    """A module that checks the shape of its input, as models in transformers do."""

    def forward(self, x):
        if x.shape[1] != self.linear.in_features:
            raise ValueError(f"expected 4 features, got {x.shape[1]}")
        return self.act(self.norm(self.linear(x)))


class Padding(Block):
    """A module with a branch that depends on the shape of its input."""

    def forward(self, x):
        scale = 1.0 if x.shape[0] % 2 == 0 else 2.0
        return self.act(self.norm(self.linear(x * scale)))


def test_conditions_on_shapes_are_made_sure_of():
    plain = Checking()
    fused, _ = fused_with(plain, "norm")
    agree(fused, plain, rows())
    assert calls_of_relu(fused, rows()) == 0
    with pytest.raises(ValueError, match="expected 4 features, got 5"):
        fused(rows(channels=5))
    plain = Padding()
    fused, _ = fused_with(plain, "norm")
    for count in (6, 7):
        agree(fused, plain, rows(count=count))
    compiled = torch.compile(fused.train(), backend="aot_eager", fullgraph=True)
    assert_close(compiled(rows()), plain.train()(rows()))
    torch._dynamo.reset()
