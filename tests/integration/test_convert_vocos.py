"""The adapter of Vocos' ConvNeXt block."""

import copy
import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastblocks
from fastblocks.convert.vocos import ConvNeXtBlock as Ours
from tests.integration.converted import assert_follows
from tests.modules.harness import check, randomized


class ConvNeXtBlock(nn.Module):
    """Names, state_dict and formula of Vocos' block."""

    def __init__(self, dim, intermediate_dim, layer_scale_init_value, adanorm_num_embeddings=None):
        super().__init__()
        self.dwconv = nn.Conv1d(dim, dim, 7, padding=3, groups=dim)
        self.adanorm = adanorm_num_embeddings is not None
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1, self.act = nn.Linear(dim, intermediate_dim), nn.GELU()
        self.pwconv2 = nn.Linear(intermediate_dim, dim)
        scale = layer_scale_init_value
        self.gamma = nn.Parameter(torch.full((dim,), float(scale))) if scale > 0 else None

    def forward(self, x, cond_embedding_id=None):
        y = self.pwconv2(self.act(self.pwconv1(self.norm(self.dwconv(x).mT))))
        return x + (y if self.gamma is None else self.gamma * y).mT


def theirs():
    try:
        return importlib.import_module("vocos.modules").ConvNeXtBlock
    except ImportError as missing:
        pytest.skip(f"vocos is not installed: {missing}")


@pytest.mark.parametrize("scale", [0, 0.125])
@pytest.mark.parametrize("package", ["copy", "vocos"])
def test_a_backbone_is_swapped(package, scale):
    cls = ConvNeXtBlock if package == "copy" else theirs()
    model = nn.Sequential(*(randomized(cls(8, 20, scale)) for _ in range(2)))
    parameters, keys, before = dict(model.named_parameters()), list(model.state_dict()), copy.deepcopy(model)
    fastblocks.convert(model)
    assert all(type(block) is Ours for block in model) and list(model.state_dict()) == keys
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert_follows(model, before, torch.randn(2, 8, 30))
    assert_follows(model[0], before[0], torch.randn(2, 8, 30), call=lambda block, x: block(x, cond_embedding_id=None))


def reference(state, x):
    y = F.conv1d(x, state["dwconv.weight"], state["dwconv.bias"], padding=3, groups=x.shape[1]).mT
    y = F.layer_norm(y, y.shape[-1:], state["norm.weight"], state["norm.bias"], 1e-6)
    y = F.gelu(F.linear(y, state["pwconv1.weight"], state["pwconv1.bias"]))
    y = F.linear(y, state["pwconv2.weight"], state["pwconv2.bias"])
    return x + (state["gamma"] * y if "gamma" in state else y).mT


@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_numbers_and_gradients(backend, dtype, scale):
    block = randomized(Ours(16, 24, scale)).to(dtype)
    with fastblocks.use_backend(backend):
        check(block, reference, torch.randn(2, 16, 19, dtype=dtype), terms=256)


@pytest.mark.parametrize("child", ["dwconv", "norm", "pwconv1", "act", "pwconv2"])
def test_children_with_hooks_are_called(child):
    block = randomized(Ours(8, 20, 0.5))
    x, called = torch.randn(1, 8, 30), []
    want = block(x)
    getattr(block, child).register_forward_hook(lambda *_: called.append(child))
    torch.testing.assert_close(block(x), want)
    assert called == [child]


def test_conditional_blocks_are_left_alone():
    model = nn.Sequential(ConvNeXtBlock(8, 20, 0.5, 4))
    fastblocks.convert(model)
    assert "conditional (adanorm)" in fastblocks.conversion_report(model).left["0"]


@pytest.mark.parametrize(
    "change",
    [
        lambda block: setattr(block.norm, "eps", 1e-5),
        lambda block: setattr(block, "act", nn.GELU(approximate="tanh")),
        lambda block: setattr(block, "act", nn.SiLU()),
        lambda block: setattr(block, "dwconv", nn.Conv1d(8, 8, 7, padding=6, dilation=2, groups=8)),
        lambda block: setattr(block, "dwconv", nn.Conv1d(8, 8, 7, padding=3, padding_mode="reflect", groups=8)),
    ],
)
def test_what_is_not_vocos_is_named(change):
    model = nn.Sequential(ConvNeXtBlock(8, 20, 1e-6))  # a scale so small that the branch hardly shows
    change(model[0])
    block = model[0]
    with pytest.raises(ValueError, match="ConvNeXtBlock at '0': "):
        fastblocks.convert(model)
    assert model[0] is block


def test_another_kernel_is_foreign():
    model = nn.Sequential(ConvNeXtBlock(8, 20, 0.5))
    model[0].dwconv = nn.Conv1d(8, 8, 5, padding=2, groups=8)
    fastblocks.convert(model)
    assert "'dwconv.weight' is (8, 1, 5), not (8, 1, 7)" in fastblocks.conversion_report(model).left["0"]
