"""Modules stay modules: what is put in the place of a child, or hooked to it, takes part."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize

import fastblocks
from tests.compare import assert_close
from tests.modules.harness import randomized, tensors

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.ao.nn.quantized.dynamic import Linear as QuantizedLinear


class Bands(nn.Module):
    """Band with a forward: there and back."""

    def __init__(self):
        super().__init__()
        self.band = fastblocks.Band(8000, 64, 9, 2, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.band.unsplit(self.band.split(x))


def convnext(dimensions: int, mode: str = "normal", stride: int = 1, **options) -> Callable[[], nn.Module]:
    kind = {1: fastblocks.ConvNeXt1DBlock, 2: fastblocks.ConvNeXt2DBlock}[dimensions]
    return lambda: kind(3, stride, 6, 6, mode, **options)


BLOCKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "roformer": (lambda: fastblocks.RoFormerBlock(16, 2, 12), (2, 9, 16)),
    "gru": (lambda: fastblocks.RNNBlock(16, 2, 2, "gru", True), (2, 9, 16)),
    "lstm": (lambda: fastblocks.RNNBlock(16, 2, 4, "lstm"), (2, 9, 16)),
    "convnext1d": (convnext(1), (2, 6, 11)),
    "convnext1d-transposed": (convnext(1, "transposed", 2), (2, 6, 5)),
    "convnext2d": (convnext(2, stride=2), (2, 6, 7, 5)),
    "convnext2d-transposed": (convnext(2, "transposed", 2), (2, 6, 4, 3)),
    "msrkit": (convnext(1, variant="msrkit"), (2, 6, 11)),
    "bands": (Bands, (2, 33, 3, 2)),
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    make, shape = BLOCKS[name]
    return randomized(make()), torch.randn(shape)


def leaves(module: nn.Module) -> list[str]:
    """Paths of the children that hold parameters themselves."""
    return [path for path, child in module.named_modules() if path and list(child.parameters(recurse=False))]


def replace(module: nn.Module, path: str, child: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, child)


EVERY_CHILD = [(name, path) for name in BLOCKS for path in leaves(BLOCKS[name][0]())]
EVERY_LINEAR = [(name, path) for name, path in EVERY_CHILD if type(BLOCKS[name][0]().get_submodule(path)) is nn.Linear]
every_child = pytest.mark.parametrize("name, path", EVERY_CHILD)
every_linear = pytest.mark.parametrize("name, path", EVERY_LINEAR)


class LoRA(nn.Module):
    """As peft.tuners.lora.Linear does it: the base layer stays inside, its weight is shown, two matrices are added."""

    def __init__(self, base_layer: nn.Linear):
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(3, base_layer.in_features))
        self.lora_B = nn.Parameter(torch.randn(base_layer.out_features, 3))

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + x @ self.lora_A.T @ self.lora_B.T


@every_linear
def test_lora_computes_and_trains(name, path):
    module, x = made(name)
    merged = copy.deepcopy(module)
    adapter = LoRA(module.get_submodule(path))
    replace(module, path, adapter)
    with torch.no_grad():
        merged.get_submodule(path).weight += adapter.lora_B @ adapter.lora_A
    got, want = module(x), merged(x)
    assert_close(got, want, 256)
    assert (torch.autograd.grad(got.square().sum(), adapter.lora_B)[0] != 0).any()


@every_child
def test_forward_hooks_run(name, path):
    """A hook sees what the child gives, and may change it."""
    module, x = made(name)
    child, want = module.get_submodule(path), module(x)
    seen = []
    with torch.no_grad():
        hooks = [
            child.register_forward_pre_hook(lambda *_: seen.append("before")),
            child.register_forward_hook(lambda *_: seen.append("after")),
        ]
        assert_close(module(x), want, 256)
        assert seen[:2] == ["before", "after"]
        hooks.append(child.register_forward_hook(lambda _, __, out: squared(out)))
        assert not torch.allclose(module(x), want)
    for hook in hooks:
        hook.remove()
    assert torch.equal(module(x), want)


def squared(out):
    """Not doubled: the norm after a convolution takes that back."""
    return out.square() if isinstance(out, Tensor) else (out[0].square(), *out[1:])


@every_child
def test_gradients_are_the_same_with_a_hook(name, path):
    module, x = made(name)
    results = []
    for hook in (None, lambda *_: None):
        if hook is not None:
            module.get_submodule(path).register_forward_hook(hook)
        leaf = x.clone().requires_grad_()
        loss = module(leaf).square().sum()
        results.append(torch.autograd.grad(loss, [leaf, *module.parameters()]))
    for plain, hooked in zip(*results, strict=True):
        assert_close(hooked, plain, 1024)


@every_child
@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_run(name, path, register):
    module, x = made(name)
    seen = []
    getattr(module.get_submodule(path), register)(lambda *_: seen.append(path))
    module(x.requires_grad_()).square().sum().backward()
    assert seen


@every_child
def test_a_forward_of_its_own_is_called(name, path):
    module, x = made(name)
    child, seen = module.get_submodule(path), []
    inherited = child.forward
    child.forward = lambda *arguments, **keywords: (seen.append(path), inherited(*arguments, **keywords))[1]
    module(x)
    assert seen


@pytest.mark.parametrize("name", BLOCKS)
def test_global_hooks_see_every_child(name):
    module, x = made(name)
    want, seen = module(x), []
    hook = torch_module.register_module_forward_hook(lambda child, *_: seen.append(child))
    try:
        assert_close(module(x), want, 256)
    finally:
        hook.remove()
    assert {path for path in leaves(module) if all(module.get_submodule(path) is not child for child in seen)} == set()


@every_linear
def test_quantized_linear(name, path):
    module, x = made(name)
    linear = module.get_submodule(path)
    quantized = QuantizedLinear(linear.in_features, linear.out_features, linear.bias is not None)
    quantized.set_weight_bias(torch.quantize_per_tensor(linear.weight.detach(), 0.01, 0, torch.qint8), linear.bias)
    want = module(x)
    replace(module, path, quantized)
    error = (module(x) - want).norm() / want.norm()
    assert 0 < error < 0.1


@every_linear
def test_a_linear_with_or_without_a_bias(name, path):
    """An ordinary Linear, but not the one that was built."""
    module, x = made(name)
    linear = module.get_submodule(path)
    other = nn.Linear(linear.in_features, linear.out_features, linear.bias is None)
    other.weight = linear.weight
    if other.bias is not None:
        nn.init.ones_(other.bias)
    want = module(x)
    replace(module, path, other)
    assert not torch.allclose(module(x), want)


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


@every_child
def test_parametrizations(name, path):
    module, x = made(name)
    child = module.get_submodule(path)
    parameter = next(key for key, _ in child.named_parameters(recurse=False) if "weight" in key or key == "scale")
    halved = copy.deepcopy(module)
    with torch.no_grad():
        getattr(halved.get_submodule(path), parameter).div_(2)
    parametrize.register_parametrization(child, parameter, Halved())
    assert_close(module(x), halved(x), 256)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@every_child
def test_old_style_weight_norm(name, path):
    """A forward pre-hook makes the weight of two parameters; both train, and their changes are seen."""
    module, x = made(name)
    child = module.get_submodule(path)
    parameter = next(key for key, _ in child.named_parameters(recurse=False) if "weight" in key or key == "scale")
    want = module(x)
    nn.utils.weight_norm(child, parameter)
    assert_close(module(x), want, 256)
    with torch.no_grad():
        getattr(child, f"{parameter}_g").mul_(2)
    got = module(x)
    assert not torch.allclose(got, want)
    (gradient,) = torch.autograd.grad(got.square().sum(), getattr(child, f"{parameter}_g"))
    assert (gradient != 0).any()


@pytest.mark.parametrize("name", ["convnext1d", "convnext2d"])
def test_a_convolution_that_was_changed(name):
    module, x = made(name)
    want = module(x)
    module.dwconv.padding_mode = "circular"
    module.dwconv._reversed_padding_repeated_twice = [1, 1] * (x.dim() - 2)
    got = module(x)
    assert not torch.allclose(got, want)
    y = module.norm(module.dwconv(x).movedim(1, -1))
    y = module.pwconv2(F.gelu(module.pwconv1(y))).movedim(-1, 1)
    assert_close(got, y + module._residual(x, tuple(y.shape[2:])), 64)


def test_groups_may_be_torchs_own():
    """torch.nn.GRU and LSTM have the groups' parameters, and the groups their `forward`."""
    for kind, make in (("gru", nn.GRU), ("lstm", nn.LSTM)):
        for both in (False, True):
            rnn = randomized(fastblocks.GroupedRNN(12, 2, 3, kind, both))
            twin, x = copy.deepcopy(rnn), torch.randn(2, 7, 12)
            for g, group in enumerate(rnn.rnns):
                library = make(4, 2 if both else 4, 2, bias=False, batch_first=True, bidirectional=both)
                library.load_state_dict(group.state_dict())
                twin.rnns[g] = library
                for got, want in zip(tensors(group(x[..., :4])), tensors(library(x[..., :4])), strict=True):
                    assert_close(got, want, 64)
            state = rnn(x, return_state=True)[1]
            for given in (None, state):
                got, want = (m(x, given, return_state=True) for m in (twin, rnn))
                for g, w in zip(tensors(got), tensors(want), strict=True):
                    assert_close(g, w, 64)


@pytest.mark.parametrize(
    "name, path, operation",
    [
        ("roformer", "mlp.c_fc2", "swiglu_mlp"),
        ("gru", "rnn.rnns.1", "grouped_gru"),
        ("lstm", "rnn.rnns.3", "grouped_lstm"),
        ("convnext1d", "norm", "depthwise_conv_layer_norm"),
        ("convnext2d", "pwconv1", "convnext_mlp"),
        ("bands", "band.pre_bandnet", "band_split"),
        ("bands", "band.post_bandnet", "band_unsplit"),
    ],
)
def test_explain_names_the_child(name, path, operation):
    if torch.cuda.is_available():
        module, x = made(name)
        module, x = module.cuda(), x.cuda()
    else:
        fastblocks.use_backend("triton")  # under "auto" the reason is that there is no GPU
        module, x = made(name)
    module.get_submodule(path).register_forward_hook(lambda *_: None)
    line = next(line for line in fastblocks.explain(module, x).splitlines() if line.startswith(operation))
    assert "called as modules" in line and path.rpartition(".")[2] in line


@pytest.mark.parametrize("name", ["roformer", "gru", "convnext2d-transposed", "bands"])
def test_compiles_without_a_graph_break(name):
    """With adapters in it, and with a hook on a child."""
    torch.compiler.reset()
    module, x = made(name)
    for path in leaves(module):
        if type(child := module.get_submodule(path)) is nn.Linear:
            replace(module, path, LoRA(child))
        else:
            child.register_forward_hook(lambda *_: None)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), module(x), 256)
