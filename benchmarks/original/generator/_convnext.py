"""The ConvNeXt block in 1-D and 2-D, with the layers of torch.nn and permutes between them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.original.generator._layers import RMSNorm

CONV = {1: nn.Conv1d, 2: nn.Conv2d}
CONV_TRANSPOSE = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d}
MSRKIT_EXPANSION = {1: 8, 2: 4}  # thirds of the input's channels


class ConvNeXtBlock(nn.Module):
    """(B, input_dim, *sizes) -> (B, output_dim, *sizes)."""

    spatial: int

    def __init__(self, kernel_size, stride, input_dim, output_dim, mode="normal", *, variant="convnext"):
        super().__init__()
        kernel, self.stride = self._tuple(kernel_size), self._tuple(stride)
        padding = tuple(k // 2 for k in kernel)
        conv = (CONV_TRANSPOSE if mode == "transposed" else CONV)[self.spatial]
        self.transposed, self.variant = mode == "transposed", variant
        if variant == "msrkit":
            self.dwconv = conv(input_dim, input_dim, kernel, self.stride, padding)
            self.residual_conv = conv(input_dim, output_dim, kernel, self.stride, padding)
            self.norm = RMSNorm(input_dim)
            hidden = int(MSRKIT_EXPANSION[self.spatial] * input_dim / 3)
            self.pwconv1 = nn.Linear(input_dim, 2 * hidden)
            self.pwconv2 = nn.Linear(hidden, output_dim)
            return
        self.dwconv = conv(input_dim, input_dim, kernel, self.stride, padding, groups=input_dim)
        self.norm = nn.LayerNorm(input_dim, eps=1e-6)
        self.pwconv1 = nn.Linear(input_dim, 4 * input_dim)
        self.pwconv2 = nn.Linear(4 * input_dim, output_dim)
        if input_dim != output_dim or any(s != 1 for s in self.stride):
            self.residual_conv = CONV[self.spatial](input_dim, output_dim, 1)

    def _tuple(self, value):
        return (value,) * self.spatial if isinstance(value, int) else tuple(value)

    def forward(self, x: Tensor, original_shape=None) -> Tensor:
        if original_shape is not None:
            original_shape = list(self._tuple(original_shape))
        size = {"output_size": original_shape} if self.transposed else {}
        y = self.dwconv(x, **size)
        sizes = y.shape[2:]
        y = self.pwconv1(self.norm(y.movedim(1, -1)))
        if self.variant == "msrkit":
            gate, up = y.chunk(2, dim=-1)
            return self.pwconv2(F.silu(gate) * up).movedim(-1, 1) + self.residual_conv(x, **size)
        y = self.pwconv2(F.gelu(y)).movedim(-1, 1)
        return y + self._residual(x, sizes)

    def _residual(self, x: Tensor, sizes: torch.Size) -> Tensor:
        if not hasattr(self, "residual_conv"):
            return x
        if self.transposed:
            x = self.residual_conv(x)
            for dim, (s, size) in enumerate(zip(self.stride, sizes, strict=True), start=2):
                x = x.repeat_interleave(s, dim=dim).narrow(dim, 0, size)
            return x
        if any(s != 1 for s in self.stride):
            pool = F.avg_pool1d if self.spatial == 1 else F.avg_pool2d
            x = pool(x, self.stride, self.stride, ceil_mode=True)
        return self.residual_conv(x)
