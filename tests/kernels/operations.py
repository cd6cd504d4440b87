"""The operations for tests that run over all of them: leaves of a small case, the kernels, the float64 formula."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastblocks import functional
from tests.reference import activations, attention, blocks, convnext, recurrent, rows, spectral


@dataclass(frozen=True)
class Operation:
    """`run` and `exact` take the leaves by name, x (B, T, C) among them, and return what has x's shape."""

    sizes: dict[str, tuple[int, ...]]
    run: Callable[..., Tensor]
    exact: Callable[..., Tensor]
    dtype: torch.dtype = torch.float32

    def leaves(self, device) -> dict[str, Tensor]:
        """Standard normal, weights by their fan-in."""
        return {
            name: (torch.randn(size, device=device) / (size[-1] ** 0.5 if name.startswith("weight") else 1)).to(
                self.dtype
            )
            for name, size in self.sizes.items()
        }


def _attention(length: int, window: int, dtype: torch.dtype = torch.float32) -> Operation:
    batch, heads, dim, registers = 2, 1, 8, 2
    rope = functional.rope_table(registers + length, dim)
    width = heads * dim

    def run(x, weight, registers):
        return functional.rope_attention(
            x @ weight.mT, rope.to(x.device), heads, window=window, register_qkv=registers @ weight.mT
        )

    def exact(x, weight, registers):
        return attention.rope_attention(x @ weight.mT, rope, heads, window, registers @ weight.mT)[0]

    sizes = {"x": (batch, length, width), "weight": (3 * width, width), "registers": (1, registers, width)}
    return Operation(sizes, run, exact, dtype)


def _recurrent(gates: int, units: int, bias: bool, dtype: torch.dtype = torch.float32) -> Operation:
    batch, length, groups = 2, 3, 2
    weight = (1, groups, gates * units, units)
    sizes = {"x": (batch, length, groups * units), "weight_ih": weight, "weight_hh": weight}
    if bias:
        sizes |= dict.fromkeys(("bias_ih", "bias_hh"), weight[:3])
    sizes |= dict.fromkeys(("h", "c")[: gates - 2], (1, batch, groups * units))

    def run(x, weight_ih, weight_hh, bias_ih=None, bias_hh=None, h=None, c=None):
        if gates == 3:
            return functional.grouped_gru(x, weight_ih, weight_hh, bias_ih, bias_hh, state=h)[0]
        return functional.grouped_lstm(x, weight_ih, weight_hh, bias_ih, bias_hh, state=(h, c))[0]

    return Operation(sizes, run, lambda **leaves: recurrent.grouped_rnn(**leaves)[0], dtype)


def _depthwise(spatial: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Operation:
    channels, stride = 6, (1,) * len(spatial)
    sizes = {"x": (2, *spatial, channels), "weight": (channels, 1, *(3,) * len(spatial))}
    sizes |= dict.fromkeys(("bias", "norm_weight", "norm_bias"), (channels,))

    # The default epsilon makes second derivatives of rows that happen to vary little as large as they like.
    def run(x, weight, bias, norm_weight, norm_bias):
        parameters = (weight, bias, norm_weight, norm_bias)
        return functional.depthwise_conv_layer_norm(x.movedim(-1, 1), *parameters, stride=stride, eps=0.1)

    def exact(x, weight, bias, norm_weight, norm_bias):
        parameters = (weight, bias, norm_weight, norm_bias)
        return convnext.depthwise_conv_layer_norm(x.movedim(-1, 1), *parameters, stride, False, spatial, eps=0.1)

    return Operation(sizes, run, exact, dtype)


def _mlp(dtype: torch.dtype = torch.float32) -> Operation:
    batch, length, channels, hidden = 2, 5, 6, 20
    sizes = {"x": (batch, length, channels), "weight1": (hidden, channels), "bias1": (hidden,)}
    sizes |= {"weight2": (channels, hidden), "bias2": (channels,), "residual": (batch, length, channels)}

    def run(residual, **leaves):
        return functional.convnext_mlp(**leaves, residual=residual.movedim(-1, 1)).movedim(1, -1)

    def exact(residual, **leaves):
        return convnext.convnext_mlp(**leaves, residual=residual.movedim(-1, 1)).movedim(1, -1)

    return Operation(sizes, run, exact, dtype)


def _bias_leaky_relu(length: int, channels_last: bool) -> Operation:
    def run(x, bias):
        x = x.movedim(-1, 1)
        return functional.bias_leaky_relu(x if channels_last else x.contiguous(), bias, 0.2).movedim(1, -1)

    def exact(x, bias):
        return activations.bias_leaky_relu(x.movedim(-1, 1), bias, 0.2).movedim(1, -1)

    return Operation({"x": (2, length, 5), "bias": (5,)}, run, exact)


def _rms_norm() -> Operation:
    # The default epsilon makes second derivatives of rows that happen to be short as large as they like.
    def run(x, scale):
        return functional.rms_norm(x, scale, 0.1)

    return Operation({"x": (2, 5, 7), "scale": (7,)}, run, lambda x, scale: rows.rms_norm(x, scale, 0.1))


def _swiglu() -> Operation:
    sizes = dict.fromkeys(("x", "up"), (2, 5, 7))
    return Operation(sizes, lambda x, up: functional.swiglu(x, up), lambda x, up: rows.swiglu(x, up))


def _swiglu_mlp() -> Operation:
    channels, hidden = 6, 21
    sizes = {"x": (2, 5, channels)} | dict.fromkeys(("weight_gate", "weight_up"), (hidden, channels))
    sizes |= {"weight_down": (channels, hidden)}
    return Operation(sizes, functional.swiglu_mlp, rows.swiglu_mlp)


def _roformer_block(dtype: torch.dtype, register_tokens: int = 2) -> Operation:
    batch, length, heads, dim, hidden = 2, 5, 1, 8, 21
    width = heads * dim
    sizes = {"x": (batch, length, width), "weight_qkv": (3 * width, width), "weight_out": (width, width)}
    sizes |= dict.fromkeys(("weight_gate", "weight_up"), (hidden, width)) | {"weight_down": (width, hidden)}
    sizes |= dict.fromkeys(("scale_attention", "scale_mlp"), (width,))
    sizes |= {"registers": (1, register_tokens, width)}
    rope = functional.rope_table(register_tokens + length, dim)
    eps = {"eps_attention": 0.1, "eps_mlp": 0.1}  # as above

    def run(**leaves):
        return functional.roformer_block(rope=rope.to(leaves["x"].device), n_head=heads, **leaves, **eps)

    def exact(**leaves):
        return blocks.roformer_block_of(rope=rope, n_head=heads, **leaves, **eps)[0]

    return Operation(sizes, run, exact, dtype)


def _rnn_block(gates: int, dtype: torch.dtype) -> Operation:
    batch, length, layers, groups, units, hidden = 2, 3, 2, 2, 4, 21
    width = groups * units
    sizes = {"x": (batch, length, width)}
    sizes |= dict.fromkeys(("weight_ih", "weight_hh"), (layers, 1, groups, gates * units, units))
    sizes |= dict.fromkeys(("weight_gate", "weight_up"), (hidden, width)) | {"weight_down": (width, hidden)}
    sizes |= dict.fromkeys(("scale_rnn", "scale_mlp"), (width,))
    eps = {"eps_rnn": 0.1, "eps_mlp": 0.1}  # as above
    return Operation(
        sizes, lambda **leaves: functional.rnn_block(**leaves, **eps),
        lambda **leaves: blocks.rnn_block_of(**leaves, **eps), dtype,
    )  # fmt: skip


def _bands(dtype: torch.dtype = torch.float32, unsplit: bool = False) -> Operation:
    """x: frames of adjacent bins, as a view of an STFT, or of adjacent bands."""
    batch, length, bins, channels, features = 2, 5, 6, 2, 4
    ranges = [(0, 2), (1, 4), (3, 6)]
    filters = torch.zeros(len(ranges), bins)
    for row, (start, end) in zip(filters, ranges, strict=True):
        row[start:end] = 1
    window, lanes = filters.sum(0), 3 * channels
    weight = (len(ranges), features, lanes) if unsplit else (len(ranges), lanes, features)
    sizes = {"x": (batch, length, bins * channels), "weight": weight, "bias": (weight[0], weight[2])}

    def into_bins(y):
        return y.transpose(1, 2).flatten(2)

    def into_bands(y):
        return y.permute(0, 2, 3, 1).flatten(2)

    def run(x, weight, bias):
        if unsplit:
            x = x.unflatten(2, (len(ranges), features)).permute(0, 3, 1, 2)
            return into_bins(functional.band_unsplit(x, weight, bias, ranges, window.to(x)))
        return into_bands(functional.band_split(x.unflatten(2, (bins, channels)).transpose(1, 2), weight, bias, ranges))

    def exact(x, weight, bias):
        net = "post_bandnet" if unsplit else "pre_bandnet"
        state = {"filterbanks": filters, "ola_window": window.to(x), f"{net}.weight": weight, f"{net}.bias": bias}
        if unsplit:
            x = x.unflatten(2, (len(ranges), features)).permute(0, 3, 1, 2)
            return into_bins(spectral.band_unsplit(state, x, channels))
        return into_bands(spectral.band_split(state, x.unflatten(2, (bins, channels)).transpose(1, 2)))

    return Operation(sizes, run, exact, dtype)


OPERATIONS = {
    "attention, short": _attention(9, -1),
    "attention, short, window": _attention(9, 4),
    "attention, long, window": _attention(70, 20),
    "gru": _recurrent(3, 4, False),
    "gru, biases": _recurrent(3, 4, True),
    "lstm": _recurrent(4, 4, False),
    "lstm, biases": _recurrent(4, 4, True),
    "band_split": _bands(),
    "band_split, float16": _bands(torch.float16),
    "band_unsplit": _bands(unsplit=True),
    "bias_leaky_relu": _bias_leaky_relu(40, False),
    "bias_leaky_relu, channels last": _bias_leaky_relu(7, True),
    "depthwise": _depthwise((7,)),
    "depthwise, 2-D": _depthwise((4, 3)),
    "mlp": _mlp(),
    "mlp, fused": _mlp(torch.float16),
    "rms_norm": _rms_norm(),
    "rnn_block": _rnn_block(3, torch.float32),
    "rnn_block, fused": _rnn_block(4, torch.float16),
    "roformer_block": _roformer_block(torch.float32),
    "roformer_block, fused": _roformer_block(torch.float16),
    "swiglu": _swiglu(),
    "swiglu_mlp": _swiglu_mlp(),
}
