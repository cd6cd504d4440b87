"""The fused operations as functions: each checks its arguments, asks `backend` who runs it, and calls that one.

Below this file everything may assume that shapes fit together. B is the batch, T the sequence length, C the channels,
H heads or hidden units, D = C / H, R registers, G groups. Floating-point inputs are float32, bfloat16, float16 or
float64; the statistics of norms, softmax and recurrent states are kept in float32 (float64 for float64).
"""

import torch
from torch import Tensor

from fastblocks import backend
from fastblocks.eager import attention as eager_attention
from fastblocks.eager import convnext as eager_convnext
from fastblocks.eager import mlp as eager_mlp
from fastblocks.eager import norm as eager_norm
from fastblocks.eager import recurrent as eager_recurrent

__all__ = [
    "convnext_mlp",
    "depthwise_conv_layer_norm",
    "grouped_gru",
    "grouped_lstm",
    "rms_norm",
    "rope_attention",
    "rope_table",
    "swiglu",
    "swiglu_mlp",
]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def rms_norm(x: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """Root-mean-square layer normalization: `scale * x * rsqrt(mean(x²) + eps)` over the last dimension.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.

    Args:
        x: (…, C).
        scale: (C,).
        eps: added to the mean square.

    Returns:
        (…, C), in the promoted dtype of x and scale; the statistics are float32 or better.

    Raises:
        ValueError: if scale is not (C,).
    """
    _require(
        x.dim() > 0 and _shape(scale) == _shape(x)[-1:],
        f"rms_norm: scale must have the shape of x's last dimension, got x {_shape(x)} and scale {_shape(scale)}",
    )
    backend.decide("rms_norm", x)
    return eager_norm.rms_norm(x, scale, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Swish-gated linear unit, the pointwise part: `silu(gate) * up`.

    Source: Shazeer, "GLU Variants Improve Transformer", 2020.

    Args:
        gate, up: the same shape (…, F).

    Returns:
        (…, F).

    Raises:
        ValueError: if the shapes differ.
    """
    _require(gate.shape == up.shape, f"swiglu: gate {_shape(gate)} and up {_shape(up)} must have one shape")
    backend.decide("swiglu", gate)
    return eager_mlp.swiglu(gate, up)


def swiglu_mlp(x: Tensor, weight_gate: Tensor, weight_up: Tensor, weight_down: Tensor) -> Tensor:
    """The whole SwiGLU layer: `(silu(x Wgᵀ) * (x Wuᵀ)) Wdᵀ`, no biases.

    Source: Shazeer, "GLU Variants Improve Transformer", 2020.

    Args:
        x: (…, C).
        weight_gate, weight_up: (F, C).
        weight_down: (C_out, F).

    Returns:
        (…, C_out); under autocast in its dtype.

    Raises:
        ValueError: if the weights do not fit x or each other.
    """
    _require(
        weight_gate.dim() == 2
        and weight_gate.shape == weight_up.shape
        and weight_gate.shape[1] == x.shape[-1]
        and weight_down.dim() == 2
        and weight_down.shape[1] == weight_gate.shape[0],
        f"swiglu_mlp: x {_shape(x)} needs weight_gate and weight_up (F, {x.shape[-1]}) and weight_down (C_out, F), "
        f"got {_shape(weight_gate)}, {_shape(weight_up)} and {_shape(weight_down)}",
    )
    backend.decide("swiglu_mlp", x)
    return eager_mlp.swiglu_mlp(x, weight_gate, weight_up, weight_down)


def rope_table(length: int, head_dim: int, base: float = 10000.0) -> Tensor:
    """Cosines and sines of rotary position embedding: angle = position · base^(-2i/D), computed in float32.

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.

    Args:
        length: how many positions.
        head_dim: D, even.
        base: of the geometric series of frequencies.

    Returns:
        (length, D/2, 2) float32 on the CPU: `[..., 0]` the cosines, `[..., 1]` the sines.

    Raises:
        ValueError: if D is odd or not positive, or length is negative.
    """
    _require(
        head_dim > 0 and head_dim % 2 == 0,
        f"rope_table: rotation works on pairs of channels, so the head size must be even, got {head_dim}",
    )
    _require(length >= 0, f"rope_table: length must not be negative, got {length}")
    frequency = 1.0 / base ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float32, device="cpu"), frequency)
    return torch.stack([angle.cos(), angle.sin()], dim=-1)


def rope_attention(
    qkv: Tensor,
    rope: Tensor,
    n_head: int,
    *,
    window: int = -1,
    register_qkv: Tensor | None = None,
    return_registers: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Multi-head self-attention, not causal, with rotary positions, an optional sliding window and register tokens.

    q and k are rotated over interleaved channel pairs (0,1), (2,3), … by their position's angles, in float32, and
    rounded back to their dtype. Scores are scaled by 1/sqrt(D). Token s sees token t when |s - t| <= window // 2, and
    every register; a register sees everything. Register i stands at position i, token t at position R + t.
    Cost and memory grow with T · (window + R), forward and backward.

    Sources: Su et al., "RoFormer", 2021; Beltagy et al., "Longformer" (window and global tokens), 2020; Darcet et
    al., "Vision Transformers Need Registers", 2023.

    Args:
        qkv: (B, T, 3C): q, k and v in that order, each n_head heads of D = C / n_head consecutive channels.
        rope: (at least R + T, D/2, 2) float32, as `rope_table` makes it.
        n_head: H.
        window: how many tokens around itself a token sees (an even number sees one more); -1: all of them.
        register_qkv: (B, R, 3C), or (1, R, 3C) for registers that are the same for the whole batch.
        return_registers: also compute what the registers see. Left out, nothing of it is computed.

    Returns:
        (B, T, C), or with return_registers a pair of it and (B, R, C).

    Raises:
        ValueError: if shapes do not fit, the table is too short, or the window is 0 or below -1.
    """
    _require(
        qkv.dim() == 3 and n_head > 0 and qkv.shape[-1] % (6 * n_head) == 0,
        f"rope_attention: qkv must be (B, T, 3·H·D) with an even D, got {_shape(qkv)} for {n_head} heads",
    )
    batch, length, width = qkv.shape
    registers = 0
    if register_qkv is not None:
        _require(
            register_qkv.dim() == 3 and register_qkv.shape[0] in (1, batch) and register_qkv.shape[2] == width,
            f"rope_attention: register_qkv must be ({batch} or 1, R, {width}), got {_shape(register_qkv)}",
        )
        registers = register_qkv.shape[1]
    _require(window == -1 or window > 0, f"rope_attention: window must be positive, or -1 for all, got {window}")
    _require(not return_registers or registers > 0, "rope_attention: return_registers=True, but there are no registers")
    half = width // (6 * n_head)
    _require(
        rope.dim() == 3 and _shape(rope)[1:] == (half, 2) and rope.shape[0] >= registers + length,
        f"rope_attention: {registers} registers and {length} tokens need a rope table of at least "
        f"({registers + length}, {half}, 2), got {_shape(rope)}",
    )
    backend.decide("rope_attention", qkv)
    if registers == 0:
        register_qkv = None
    if window >= 2 * length - 2 > 0:
        window = -1  # a window that reaches from end to end
    return eager_attention.rope_attention(qkv, rope, n_head, window, register_qkv, return_registers)


def grouped_gru(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    state: Tensor | None = None,
    keep_gates: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """One layer of G independent GRUs side by side, in one or both directions.

    With gates in torch.nn.GRU's order and equations: `r = σ(W_r x + U_r h)`, `z = σ(W_z x + U_z h)`,
    `n = tanh(W_n x + r * (U_n h))`, `h = n + z * (h - n)`; biases, where given, as in torch.nn.GRU.

    Source: Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder", 2014, in cuDNN's form.

    Args:
        x: (B, T, G·I): group g reads its channels g·I … (g+1)·I - 1.
        weight_ih: (N, G, 3H, I), N = 1 for one direction, 2 for both (the second runs backward in time).
        weight_hh: (N, G, 3H, H).
        bias_ih, bias_hh: (N, G, 3H), both or none.
        state: (N, B, G·H), the hidden state before the first step; None: zeros.
        keep_gates: of the Triton kernels: keep every step's gates for the backward pass (four values a unit and step)
            instead of making them again. None: only where they are in memory anyway (I or H over 32; float32: 16).

    Returns:
        y: (B, T, G·N·H): for every group its forward, then its backward hidden units; under autocast in its dtype.
        state: (N, B, G·H), the hidden state after the last step of each direction.

    Raises:
        ValueError: if shapes do not fit.
    """
    _check_recurrent("grouped_gru", 3, x, weight_ih, weight_hh, bias_ih, bias_hh, state)
    if backend.decide("grouped_gru", x, lambda: _recurrent_obstacle(x, weight_ih, weight_hh, bias_ih, bias_hh, state)):
        from fastblocks.kernels import recurrent

        return recurrent.grouped_gru(x, weight_ih, weight_hh, bias_ih, bias_hh, state, keep_gates)
    return eager_recurrent.grouped_gru(x, weight_ih, weight_hh, bias_ih, bias_hh, state)


def grouped_lstm(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    state: tuple[Tensor, Tensor] | None = None,
    keep_gates: bool | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One layer of G independent LSTMs side by side, in one or both directions.

    With gates in torch.nn.LSTM's order and equations: `i, f, o = σ(…)`, `g = tanh(…)`, `c = f * c + i * g`,
    `h = o * tanh(c)`.

    Source: Hochreiter and Schmidhuber, "Long Short-Term Memory", 1997, in cuDNN's form.

    Args:
        x: (B, T, G·I): group g reads its channels g·I … (g+1)·I - 1.
        weight_ih: (N, G, 4H, I), N = 1 for one direction, 2 for both (the second runs backward in time).
        weight_hh: (N, G, 4H, H).
        bias_ih, bias_hh: (N, G, 4H), both or none.
        state: the pair (h, c), each (N, B, G·H), before the first step; None: zeros.
        keep_gates: of the Triton kernels: keep every step's gates for the backward pass (four values a unit and step)
            instead of making them again. None: only where they are in memory anyway (I or H over 32; float32: 16).

    Returns:
        y: (B, T, G·N·H): for every group its forward, then its backward hidden units; under autocast in its dtype.
        state: the pair (h, c) after the last step of each direction.

    Raises:
        ValueError: if shapes do not fit.
    """
    _require(
        state is None or (isinstance(state, tuple | list) and len(state) == 2),
        f"grouped_lstm: state must be a pair (h, c), got {type(state).__name__}",
    )
    for part in state or (None,):
        _check_recurrent("grouped_lstm", 4, x, weight_ih, weight_hh, bias_ih, bias_hh, part)
    parts = state or ()
    if backend.decide(
        "grouped_lstm", x, lambda: _recurrent_obstacle(x, weight_ih, weight_hh, bias_ih, bias_hh, *parts)
    ):
        from fastblocks.kernels import recurrent

        return recurrent.grouped_lstm(x, weight_ih, weight_hh, bias_ih, bias_hh, state, keep_gates)
    return eager_recurrent.grouped_lstm(x, weight_ih, weight_hh, bias_ih, bias_hh, state)


def _recurrent_obstacle(*tensors: Tensor | None) -> str:
    from fastblocks.kernels import recurrent

    return recurrent.obstacle(*tensors)


def _check_recurrent(name, gates, x, weight_ih, weight_hh, bias_ih, bias_hh, state) -> None:
    _require(
        x.dim() == 3 and weight_ih.dim() == 4 and weight_hh.dim() == 4,
        f"{name}: x must be (B, T, G·I), weight_ih (N, G, {gates}H, I), weight_hh (N, G, {gates}H, H), "
        f"got {_shape(x)}, {_shape(weight_ih)}, {_shape(weight_hh)}",
    )
    directions, groups, rows, hidden = weight_hh.shape
    _require(
        directions in (1, 2)
        and rows == gates * hidden
        and _shape(weight_ih)[:3] == (directions, groups, rows)
        and groups * weight_ih.shape[3] == x.shape[2],
        f"{name}: weights do not fit x {_shape(x)} or each other: weight_ih {_shape(weight_ih)}, "
        f"weight_hh {_shape(weight_hh)}",
    )
    _require((bias_ih is None) == (bias_hh is None), f"{name}: give both biases or none")
    for bias in (bias_ih, bias_hh):
        _require(
            bias is None or _shape(bias) == (directions, groups, rows),
            f"{name}: biases must be {(directions, groups, rows)}, got {bias is not None and _shape(bias)}",
        )
    wanted = (directions, x.shape[0], groups * hidden)
    _require(
        state is None or _shape(state) == wanted,
        f"{name}: state must be {wanted}, got {state is not None and _shape(state)}",
    )


def depthwise_conv_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    stride: tuple[int, ...],
    transposed: bool = False,
    output_size: tuple[int, ...] | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Depthwise convolution in 1-D or 2-D, then layer normalization over channels; channels first in, last out.

    Padding is kernel // 2, so a stride of 1 keeps the size. Sizes become ceil(L / stride), or, transposed,
    (L - 1) · stride + 1 up to L · stride, as output_size says.

    Source: Liu et al., "A ConvNet for the 2020s", 2022.

    Args:
        x: (B, C, L) or (B, C, H, W).
        weight: (C, 1, *kernel), odd sizes.
        bias: (C,), or None.
        norm_weight, norm_bias: (C,).
        stride: one number a spatial dimension.
        transposed: the transposed convolution.
        output_size: spatial sizes of the transposed convolution's output; None: the smallest.
        eps: added to the variance.

    Returns:
        (B, *sizes, C), contiguous, in the convolution's dtype (under autocast: its dtype); statistics are float32 or
        better.

    Raises:
        ValueError: if shapes do not fit, a kernel size is even, or no such convolution gives output_size.
    """
    name, spatial = "depthwise_conv_layer_norm", x.dim() - 2
    _require(spatial in (1, 2), f"{name}: x must be (B, C, L) or (B, C, H, W), got {_shape(x)}")
    channels = x.shape[1]
    kernel = _shape(weight)[2:]
    _require(
        len(kernel) == spatial and _shape(weight)[:2] == (channels, 1) and all(k % 2 == 1 for k in kernel),
        f"{name}: x {_shape(x)} needs a weight ({channels}, 1, *kernel) with {spatial} odd sizes, got {_shape(weight)}",
    )
    for vector in (bias, norm_weight, norm_bias):
        _require(
            vector is None or _shape(vector) == (channels,),
            f"{name}: biases and norm_weight must be ({channels},), got {vector is not None and _shape(vector)}",
        )
    _require(
        len(stride) == spatial and all(s > 0 for s in stride),
        f"{name}: stride must be {spatial} positive numbers, got {stride}",
    )
    sizes = conv_output_size(_shape(x)[2:], stride, transposed, output_size)
    backend.decide(name, x)
    return eager_convnext.depthwise_conv_layer_norm(
        x, weight, bias, norm_weight, norm_bias, tuple(stride), transposed, sizes, eps
    )


def conv_output_size(
    sizes: tuple[int, ...], stride: tuple[int, ...], transposed: bool, wanted: tuple[int, ...] | None = None
) -> tuple[int, ...]:
    """Spatial sizes after a "same"-padded convolution (odd kernel, padding kernel // 2).

    Args:
        sizes: before it.
        stride: one number a dimension.
        transposed: the transposed convolution.
        wanted: what a transposed convolution shall give; None: the smallest it can.

    Raises:
        ValueError: if a size is not positive, or no such convolution gives the wanted sizes.
    """
    _require(all(size > 0 for size in sizes), f"spatial sizes must be positive, got {sizes}")
    if not transposed:
        result = tuple(-(-size // s) for size, s in zip(sizes, stride, strict=True))
        _require(
            wanted in (None, result), f"a convolution of stride {stride} turns {sizes} into {result}, not {wanted}"
        )
        return result
    smallest = tuple((size - 1) * s + 1 for size, s in zip(sizes, stride, strict=True))
    largest = tuple(size * s for size, s in zip(sizes, stride, strict=True))
    if wanted is None:
        return smallest
    _require(
        len(wanted) == len(sizes) and all(a <= w <= b for a, w, b in zip(smallest, wanted, largest, strict=True)),
        f"a transposed convolution of stride {stride} turns {sizes} into sizes from {smallest} to {largest}, "
        f"not {wanted}",
    )
    return tuple(wanted)


def convnext_mlp(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, *, residual: Tensor | None = None
) -> Tensor:
    """The pointwise half of a ConvNeXt block: Linear, exact (erf) GELU, Linear, back to channels first, residual.

    Sources: Liu et al., "A ConvNet for the 2020s", 2022; Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016.

    Args:
        x: (B, *sizes, C), channels last.
        weight1, bias1: (F, C) and (F,).
        weight2, bias2: (C_out, F) and (C_out,).
        residual: (B, C_out, *sizes), channels first, added at the end; or None.

    Returns:
        (B, C_out, *sizes), channels first, in the promoted dtype of the product and the residual.

    Raises:
        ValueError: if shapes do not fit.
    """
    hidden, out = weight1.shape[0], weight2.shape[0]
    _require(
        x.dim() >= 3
        and _shape(weight1) == (hidden, x.shape[-1])
        and _shape(bias1) == (hidden,)
        and _shape(weight2) == (out, hidden)
        and _shape(bias2) == (out,),
        f"convnext_mlp: x {_shape(x)} needs weights (F, {x.shape[-1]}) and (C_out, F) with biases (F,) and (C_out,), "
        f"got {_shape(weight1)}, {_shape(weight2)}, {_shape(bias1)} and {_shape(bias2)}",
    )
    wanted = (x.shape[0], out, *x.shape[1:-1])
    _require(
        residual is None or _shape(residual) == wanted,
        f"convnext_mlp: residual must be {wanted}, got {residual is not None and _shape(residual)}",
    )
    backend.decide("convnext_mlp", x)
    return eager_mlp.convnext_mlp(x, weight1, bias1, weight2, bias2, residual)
