"""The ConvNeXt block of Vocos, and of the vocoders and codecs that took it over."""

import torch
from torch import Tensor, nn

from fastblocks import functional
from fastblocks.convert.adapter import Adapter, Arguments, Block, Call, Foreign, torch_computes
from fastblocks.generator._layers import may_fuse

KERNEL = 7


class ConvNeXtBlock(nn.Module):
    """Vocos' ConvNeXt block without condition: (B, C, T) -> (B, C, T), with the original's state_dict.

    Depthwise convolution of 7, LayerNorm (eps 1e-6), Linear, exact GELU, Linear, times `gamma`, plus x. The scale gamma
    is multiplied into the second Linear at each call, C · H products, and stays a parameter of its own.

    Source: Siuzdak, "Vocos", 2023.

    Args:
        dim: C.
        intermediate_dim: H, channels between the two Linears.
        layer_scale_init_value: what gamma starts at; None or 0: there is none.
    """

    gamma: nn.Parameter | None

    def __init__(self, dim: int, intermediate_dim: int, layer_scale_init_value: float | None = None):
        super().__init__()
        self.dwconv = nn.Conv1d(dim, dim, KERNEL, padding=KERNEL // 2, groups=dim)
        self.adanorm = False
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, intermediate_dim)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(intermediate_dim, dim)
        self.gamma = nn.Parameter(layer_scale_init_value * torch.ones(dim)) if layer_scale_init_value else None

    def forward(self, x: Tensor, cond_embedding_id: Tensor | None = None) -> Tensor:
        """x (B, C, T) -> (B, C, T); `cond_embedding_id` is of no effect, as in the original's unconditional block."""
        y = self._normed_convolution(x)
        if not may_fuse("convnext_mlp", self, pwconv1=nn.Linear, act=nn.GELU, pwconv2=nn.Linear):
            y = self.pwconv2(self.act(self.pwconv1(y)))
            return x + (y if self.gamma is None else self.gamma * y).transpose(1, 2)
        first, second = self.pwconv1, self.pwconv2
        weight, bias = second.weight, second.bias
        if self.gamma is not None:
            weight, bias = self.gamma[:, None] * weight, self.gamma * bias
        return functional.convnext_mlp(y, first.weight, first.bias, weight, bias, residual=x)

    def _normed_convolution(self, x: Tensor) -> Tensor:
        """(B, C, T) -> (B, T, C)."""
        conv, norm = self.dwconv, self.norm
        if not may_fuse("depthwise_conv_layer_norm", self, dwconv=nn.Conv1d, norm=nn.LayerNorm):
            return norm(conv(x).transpose(1, 2))
        return functional.depthwise_conv_layer_norm(
            x, conv.weight, conv.bias, norm.weight, norm.bias, stride=(1,), eps=norm.eps
        )


def _convnext(block: Block) -> Arguments:
    if getattr(block.module, "adanorm", False):
        raise Foreign("its norm is conditional (adanorm), and fastblocks has none")
    rows, columns = block.shape("pwconv1.weight")
    return {
        "dim": block.says("dim", columns),
        "intermediate_dim": block.says("intermediate_dim", rows),
        "layer_scale_init_value": 1.0 if "gamma" in block.state else None,
    }


def _clip(arguments: Arguments) -> list[Call]:
    return [("forward", (2, arguments["dim"], 2 * KERNEL + 1))]


_PRODUCTS = torch_computes("convolutions and matrix products")
ADAPTERS = {"ConvNeXtBlock": [Adapter(ConvNeXtBlock, _convnext, _clip, no_gain=_PRODUCTS)]}
