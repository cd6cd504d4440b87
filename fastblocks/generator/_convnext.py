"""ConvNeXt blocks in one and two dimensions: everything but the number of dimensions."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from fastblocks import functional
from fastblocks.functional.convnext import conv_output_size, window_means
from fastblocks.generator._layers import RMSNorm, called_as_modules, may_fuse

MODES = ("normal", "transposed")
VARIANTS = ("convnext", "msrkit")
_CONV = {
    (1, False): nn.Conv1d,
    (2, False): nn.Conv2d,
    (1, True): nn.ConvTranspose1d,
    (2, True): nn.ConvTranspose2d,
}


def _geometry(conv: nn.Module) -> tuple:
    """A convolution's settings, to notice later changes, such as circular padding."""
    return conv.stride, conv.padding, conv.output_padding, conv.dilation, conv.groups, conv.padding_mode


class ConvNeXtBlock(nn.Module):
    """A ConvNeXt block over `spatial` dimensions; see ConvNeXt1DBlock and ConvNeXt2DBlock."""

    spatial: int

    def __init__(
        self,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int],
        input_dim: int,
        output_dim: int,
        mode: str = "normal",
        *,
        variant: str = "convnext",
    ):
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {VARIANTS}, got {variant!r}")
        self.kernel_size = self._sizes("kernel_size", kernel_size)
        self.stride = self._sizes("stride", stride)
        if any(k % 2 == 0 for k in self.kernel_size):
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        if input_dim < 1 or output_dim < 1:
            raise ValueError(f"input_dim and output_dim must be positive, got {input_dim} and {output_dim}")
        self.input_dim, self.output_dim = input_dim, output_dim
        self.mode, self.variant = mode, variant
        self.transposed = mode == "transposed"
        self.padding = tuple(k // 2 for k in self.kernel_size)
        if variant == "msrkit":
            self._build_msrkit()
        else:
            self._build_convnext()

    def _sizes(self, name: str, value: int | Sequence[int]) -> tuple[int, ...]:
        sizes = (value,) * self.spatial if isinstance(value, int) else tuple(value)
        if len(sizes) != self.spatial or not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ValueError(f"{name} must be a positive int or {self.spatial} of them, got {value!r}")
        return sizes

    def _conv(self, output_dim: int, groups: int = 1) -> nn.Module:
        """A convolution from input_dim channels with this block's kernel, stride and "same" padding."""
        kind, padding = _CONV[self.spatial, self.transposed], self.padding
        return kind(self.input_dim, output_dim, self.kernel_size, stride=self.stride, padding=padding, groups=groups)

    def _build_convnext(self) -> None:
        self.dwconv = self._conv(self.input_dim, groups=self.input_dim)
        self._geometry = _geometry(self.dwconv)
        self.norm = nn.LayerNorm(self.input_dim, eps=1e-6)
        self.pwconv1 = nn.Linear(self.input_dim, 4 * self.input_dim)
        self.pwconv2 = nn.Linear(4 * self.input_dim, self.output_dim)
        if any(s > 1 for s in self.stride) or self.input_dim != self.output_dim:
            pointwise = nn.Conv1d if self.spatial == 1 else nn.Conv2d
            self.residual_conv = pointwise(self.input_dim, self.output_dim, 1)
        else:
            self.residual_conv = None

    def _build_msrkit(self) -> None:
        self.dwconv = self._conv(self.input_dim)
        self.residual_conv = self._conv(self.output_dim)
        self.norm = RMSNorm(self.input_dim)
        self.n_hidden = int((8 if self.spatial == 1 else 4) * self.input_dim / 3)
        self.pwconv1 = nn.Linear(self.input_dim, 2 * self.n_hidden)
        self.pwconv2 = nn.Linear(self.n_hidden, self.output_dim)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        """As any module; a state_dict of the other variant is named as what it is, beside what does not fit."""
        for variant, key in (("convnext", "norm.weight"), ("msrkit", "norm.scale")):
            if variant != self.variant and prefix + key in state_dict:
                where = f"'{prefix.removesuffix('.')}'" if prefix else "this block"
                errors.append(
                    f"{where} is {type(self).__name__}(…, variant={self.variant!r}), and the state_dict is that of the "
                    f"other variant: build it with variant={variant!r}."
                )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def forward(self, x: Tensor, original_shape: int | Sequence[int] | None = None) -> Tensor:
        """Run the block.

        Args:
            x: (B, input_dim, *sizes), channels first.
            original_shape: spatial sizes that a transposed block shall give; None: (size - 1) · stride + 1.

        Returns:
            (B, output_dim, *sizes), channels first.

        Raises:
            ValueError: if x has another shape, or no such convolution gives original_shape.
        """
        if x.dim() != self.spatial + 2 or x.shape[1] != self.input_dim:
            sizes = ("L",) if self.spatial == 1 else ("H", "W")
            raise ValueError(
                f"{type(self).__name__} needs x of shape (B, {self.input_dim}, {', '.join(sizes)}), "
                f"got {tuple(x.shape)}"
            )
        if isinstance(original_shape, int):
            original_shape = (original_shape,)
        wanted = None if original_shape is None else tuple(int(size) for size in original_shape)
        sizes = conv_output_size(tuple(x.shape[2:]), self.stride, self.transposed, wanted)
        return self._forward_msrkit(x, sizes) if self.variant == "msrkit" else self._forward_convnext(x, sizes)

    def _forward_convnext(self, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        y, residual = self._normed_convolution(x, sizes), self._residual(x, sizes)
        if may_fuse("convnext_mlp", self, pwconv1=nn.Linear, pwconv2=nn.Linear, bias=True):
            first, second = self.pwconv1, self.pwconv2
            return functional.convnext_mlp(y, first.weight, first.bias, second.weight, second.bias, residual=residual)
        return residual + self.pwconv2(F.gelu(self.pwconv1(y))).movedim(-1, 1)

    def _normed_convolution(self, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        conv, norm, name = self.dwconv, self.norm, "depthwise_conv_layer_norm"
        kind = _CONV[self.spatial, self.transposed]
        if may_fuse(name, self, dwconv=kind, norm=nn.LayerNorm, bias=True):
            if _geometry(conv) == self._geometry:
                return functional.depthwise_conv_layer_norm(
                    x,
                    conv.weight,
                    conv.bias,
                    norm.weight,
                    norm.bias,
                    stride=self.stride,
                    transposed=self.transposed,
                    output_size=sizes,
                    eps=norm.eps,
                )
            called_as_modules(name, ["dwconv"])
        return norm(conv(x, **self._output_size(sizes)).movedim(1, -1))

    def _output_size(self, sizes: tuple[int, ...]) -> dict[str, list[int]]:
        """Keyword arguments of the convolution: a transposed one needs its output size."""
        return {"output_size": list(sizes)} if self.transposed else {}

    def _residual(self, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        if self.residual_conv is None:
            return x
        if all(s == 1 for s in self.stride):
            return self.residual_conv(x)
        if not self.transposed:
            return self.residual_conv(window_means(x, self.stride))
        x = self.residual_conv(x)  # a 1×1 convolution commutes with repetition, and is cheaper before it
        for dim, (stride, size) in enumerate(zip(self.stride, sizes, strict=True), start=2):
            x = x.repeat_interleave(stride, dim).narrow(dim, 0, size)
        return x

    def _forward_msrkit(self, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        extra = self._output_size(sizes)
        y = self.pwconv1(self.norm(self.dwconv(x, **extra).movedim(1, -1)))
        y = self.pwconv2(functional.swiglu(*y.chunk(2, dim=-1))).movedim(-1, 1)
        return y + self.residual_conv(x, **extra)

    def extra_repr(self) -> str:
        return (
            f"{self.input_dim}, {self.output_dim}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"mode={self.mode!r}, variant={self.variant!r}"
        )
