"""The ConvNeXt block of timm, PyTorch Image Models."""

import torch
from torch import Tensor, nn

from fastblocks import functional
from fastblocks.convert.adapter import Adapter, Arguments, Block, Call, Foreign, torch_computes
from fastblocks.generator._layers import is_plain, may_fuse


class Mlp(nn.Module):
    """Linear, exact GELU, Dropout, Linear, Dropout: (…, C) -> (…, C).

    Args:
        in_features: C.
        hidden_features: channels between the two Linears.
        drop: p of both Dropouts.
    """

    def __init__(self, in_features: int, hidden_features: int, drop: float = 0.0):
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(drop)
        self.norm = nn.Identity()
        self.fc2 = nn.Linear(hidden_features, in_features)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class ConvNeXtBlock(nn.Module):
    """timm's ConvNeXt block of stride 1 with Linears: (B, C, H, W) -> (B, C, H, W), with the original's state_dict.

    Depthwise convolution, LayerNorm, Linear, exact GELU, Linear, times `gamma`, plus x. The scale gamma is multiplied
    into the second Linear at each call, and stays a parameter of its own.

    Source: Liu et al., "A ConvNet for the 2020s", 2022.

    Args:
        in_chs: C.
        hidden: channels between the two Linears.
        kernel_size: of the convolution, odd.
        conv_bias: whether it has a bias.
        ls_init_value: what gamma starts at; None: there is none.
        eps: of the LayerNorm.
    """

    def __init__(
        self,
        in_chs: int,
        hidden: int,
        kernel_size: int = 7,
        conv_bias: bool = True,
        ls_init_value: float | None = 1e-6,
        eps: float = 1e-6,
    ):
        super().__init__()
        self.use_conv_mlp = False
        self.conv_dw = nn.Conv2d(in_chs, in_chs, kernel_size, padding=kernel_size // 2, groups=in_chs, bias=conv_bias)
        self.norm = nn.LayerNorm(in_chs, eps=eps)
        self.mlp = Mlp(in_chs, hidden)
        self.gamma = None if ls_init_value is None else nn.Parameter(ls_init_value * torch.ones(in_chs))
        self.shortcut = nn.Identity()
        self.drop_path = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self._normed_convolution(x)
        ends = {"shortcut": nn.Identity, "drop_path": nn.Identity, "mlp": Mlp}
        layers = {"fc1": nn.Linear, "act": nn.GELU, "norm": nn.Identity, "fc2": nn.Linear}
        drops = all(is_plain(drop, nn.Dropout, None) and not drop.p for drop in (self.mlp.drop1, self.mlp.drop2))
        if not (drops and may_fuse("convnext_mlp", self, **ends) and may_fuse("convnext_mlp", self.mlp, **layers)):
            y = self.mlp(y).permute(0, 3, 1, 2)
            y = y if self.gamma is None else y * self.gamma[:, None, None]
            return self.drop_path(y) + self.shortcut(x)
        first, second = self.mlp.fc1, self.mlp.fc2
        weight, bias = second.weight, second.bias
        if self.gamma is not None:
            weight, bias = self.gamma[:, None] * weight, self.gamma * bias
        return functional.convnext_mlp(y, first.weight, first.bias, weight, bias, residual=x)

    def _normed_convolution(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, H, W, C)."""
        conv, norm = self.conv_dw, self.norm
        if not may_fuse("depthwise_conv_layer_norm", self, conv_dw=nn.Conv2d, norm=nn.LayerNorm):
            return norm(conv(x).permute(0, 2, 3, 1))
        return functional.depthwise_conv_layer_norm(
            x, conv.weight, conv.bias, norm.weight, norm.bias, stride=(1, 1), eps=norm.eps
        )


def _is_timms(module: nn.Module) -> bool:
    return module._modules.keys() >= {"conv_dw", "norm", "mlp", "drop_path"}


def _convnext(block: Block) -> Arguments:
    module = block.module
    if module.use_conv_mlp:
        raise Foreign("its MLP is made of 1 × 1 convolutions (conv_mlp)")
    if tuple(module.conv_dw.stride) != (1, 1) or not isinstance(module.shortcut, nn.Identity):
        raise Foreign("it changes size or channels")
    if not isinstance(module.drop_path, nn.Identity):
        raise Foreign("it drops paths (drop_path), and fastblocks does not")
    if "fc1" not in module.mlp._modules or hasattr(module.mlp, "grn"):
        raise Foreign("its MLP is another (ConvNeXt V2's has a GlobalResponseNorm)")
    channels, _, kernel, _ = block.shape("conv_dw.weight")
    return {
        "in_chs": block.says("in_chs", channels),
        "hidden": block.says("hidden", block.shape("mlp.fc1.weight")[0]),
        "kernel_size": block.says("kernel_size", kernel),
        "conv_bias": "conv_dw.bias" in block.state,
        "ls_init_value": 1.0 if "gamma" in block.state else None,
        "eps": module.norm.eps,
    }


def _image(arguments: Arguments) -> list[Call]:
    return [("forward", (2, arguments["in_chs"], arguments["kernel_size"] + 2, 5))]


_PRODUCTS = torch_computes("convolutions and matrix products")
ADAPTERS = {"ConvNeXtBlock": [Adapter(ConvNeXtBlock, _convnext, _image, claims=_is_timms, no_gain=_PRODUCTS)]}
