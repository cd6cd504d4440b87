"""The adapter of timm's ConvNeXt block."""

import copy
import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastblocks
from fastblocks.convert.timm import ConvNeXtBlock as Ours
from tests.integration.converted import assert_follows
from tests.modules.harness import check, randomized


class LayerNorm(nn.LayerNorm):
    pass


class Mlp(nn.Module):
    def __init__(self, dim, hidden, drop=0.0):
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(drop)
        self.norm, self.fc2, self.drop2 = nn.Identity(), nn.Linear(hidden, dim), nn.Dropout(drop)

    def forward(self, x):
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class ConvNeXtBlock(nn.Module):
    """Names, state_dict and formula of timm's block."""

    def __init__(self, in_chs, kernel_size=7, conv_bias=True, ls_init_value=1e-6, mlp_ratio=4):
        super().__init__()
        self.use_conv_mlp = False
        self.conv_dw = nn.Conv2d(in_chs, in_chs, kernel_size, padding=kernel_size // 2, groups=in_chs, bias=conv_bias)
        self.norm, self.mlp = LayerNorm(in_chs, eps=1e-6), Mlp(in_chs, mlp_ratio * in_chs)
        self.gamma = None if ls_init_value is None else nn.Parameter(torch.full((in_chs,), float(ls_init_value)))
        self.shortcut, self.drop_path = nn.Identity(), nn.Identity()

    def forward(self, x):
        y = self.mlp(self.norm(self.conv_dw(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        y = y if self.gamma is None else y.mul(self.gamma.reshape(1, -1, 1, 1))
        return self.drop_path(y) + self.shortcut(x)


def theirs():
    try:
        return importlib.import_module("timm.models.convnext").ConvNeXtBlock
    except ImportError as missing:
        pytest.skip(f"timm is not installed (the extra `adapters`): {missing}")


@pytest.mark.parametrize("settings", [{}, {"ls_init_value": None, "kernel_size": 5}, {"conv_bias": False}])
@pytest.mark.parametrize("package", ["copy", "timm"])
def test_blocks_are_swapped(package, settings):
    cls = ConvNeXtBlock if package == "copy" else theirs()
    model = nn.Sequential(*(randomized(cls(8, **settings)) for _ in range(2)))
    parameters, keys, before = dict(model.named_parameters()), list(model.state_dict()), copy.deepcopy(model)
    fastblocks.convert(model)
    assert all(type(block) is Ours for block in model) and list(model.state_dict()) == keys
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert_follows(model, before, torch.randn(2, 8, 9, 11))


@pytest.mark.parametrize("eps", [1e-12, 0.3])
def test_the_norm_may_have_any_eps(eps):
    model = nn.Sequential(randomized(ConvNeXtBlock(8)))
    model[0].norm.eps = eps
    before = copy.deepcopy(model)
    fastblocks.convert(model)
    assert type(model[0]) is Ours
    assert_follows(model, before, torch.randn(2, 8, 4, 5))


def reference(state, x):
    y = F.conv2d(x, state["conv_dw.weight"], state.get("conv_dw.bias"), padding=3, groups=x.shape[1]).movedim(1, -1)
    y = F.layer_norm(y, y.shape[-1:], state["norm.weight"], state["norm.bias"], 1e-6)
    y = F.gelu(F.linear(y, state["mlp.fc1.weight"], state["mlp.fc1.bias"]))
    y = F.linear(y, state["mlp.fc2.weight"], state["mlp.fc2.bias"])
    return x + (state["gamma"] * y if "gamma" in state else y).movedim(-1, 1)


@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_numbers_and_gradients(backend, dtype, scale):
    block = randomized(Ours(16, 24, ls_init_value=scale)).to(dtype)
    with fastblocks.use_backend(backend):
        check(block, reference, torch.randn(2, 16, 5, 6, dtype=dtype), terms=256)


CHILDREN = [
    "conv_dw",
    "norm",
    "mlp",
    "shortcut",
    "drop_path",
    *(f"mlp.{name}" for name, _ in Mlp(8, 8).named_children()),
]


@pytest.mark.parametrize("child", CHILDREN)
def test_children_with_hooks_are_called(child):
    block, x, called = randomized(Ours(8, 20)), torch.randn(1, 8, 9, 9), []
    want = block(x)
    block.get_submodule(child).register_forward_hook(lambda *_: called.append(child))
    torch.testing.assert_close(block(x), want)
    assert called == [child]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda block: setattr(block, "use_conv_mlp", True), "conv_mlp"),
        (lambda block: setattr(block.conv_dw, "stride", (2, 2)), "changes size"),
        (lambda block: setattr(block, "shortcut", nn.Conv2d(8, 8, 1)), "changes size or channels"),
        (lambda block: setattr(block, "drop_path", nn.Dropout(0.1)), "drop_path"),
        (lambda block: setattr(block.mlp, "grn", nn.Identity()), "GlobalResponseNorm"),
    ],
)
def test_what_is_not_covered_is_left_alone_with_a_reason(change, why):
    model = nn.Sequential(ConvNeXtBlock(8))
    change(model[0])
    kept = model[0]
    fastblocks.convert(model)
    assert model[0] is kept and why in fastblocks.conversion_report(model).left["0"]


@pytest.mark.parametrize(
    "change",
    [
        lambda block: setattr(block.mlp, "act", nn.GELU(approximate="tanh")),
        lambda block: setattr(block.mlp, "drop1", nn.Dropout(0.1)),
        lambda block: setattr(block, "conv_dw", nn.Conv2d(8, 8, 7, padding=6, dilation=2, groups=8)),
    ],
)
def test_what_computes_something_else_is_named(change):
    model = nn.Sequential(ConvNeXtBlock(8))
    change(model[0])
    block = model[0]
    with pytest.raises(ValueError, match="ConvNeXtBlock at '0': "):
        fastblocks.convert(model)
    assert model[0] is block
