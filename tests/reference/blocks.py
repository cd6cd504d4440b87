"""The generators' blocks as functions of a state_dict, from their formulas, in the dtype they are given.

Attention is a dense matrix with a mask, a recurrence is a loop over time, a convolution is a loop over taps.
"""

import itertools
import math

import torch
from torch import Tensor

from tests.reference import attention as attention_by_rows
from tests.reference import recurrent, rows

State = dict[str, Tensor]


def part(state: State, prefix: str) -> State:
    """The entries below `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def mlp(state: State, x: Tensor) -> Tensor:
    return rows.swiglu_mlp(x, state["c_fc1.weight"], state["c_fc2.weight"], state["c_proj.weight"])


# --- attention


def rotate(x: Tensor, base: float) -> Tensor:
    """(B, H, T, D): the pair of channels (2i, 2i+1) at position t is turned by t · base^(-2i/D).

    The angle is a float32 number by contract, so it is one here too, and its cosine and sine are rounded to float32.
    """
    length, dim = x.shape[-2:]
    frequency = 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    angle = torch.arange(length, dtype=torch.float32)[:, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def sees(length: int, registers: int, window: int) -> Tensor:
    """(R + T, R + T): who (row) sees whom (column); registers stand first."""
    tokens = [[window == -1 or abs(s - t) <= window // 2 for t in range(length)] for s in range(length)]
    mask = torch.ones(registers + length, registers + length, dtype=torch.bool)
    mask[registers:, registers:] = torch.tensor(tokens)
    return mask


def attention(state: State, x: Tensor, n_head: int, base: float, mask: Tensor) -> Tensor:
    """(B, S, C) -> (B, S, C); positions count from the first of the sequence."""
    batch, length, width = x.shape
    q, k, v = (
        piece.reshape(batch, length, n_head, width // n_head).transpose(1, 2)
        for piece in (x @ state["c_attn.weight"].T).split(width, dim=-1)
    )
    scores = rotate(q, base) @ rotate(k, base).transpose(-1, -2) / math.sqrt(width // n_head)
    weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
    return (weights @ v).transpose(1, 2).reshape(batch, length, width) @ state["c_proj.weight"].T


def roformer_block(
    state: State, x: Tensor, carried: Tensor | None = None, *, n_head: int, base: float = 10000.0, window: int = -1
) -> tuple[Tensor, Tensor]:
    """RoFormerBlock, and with `registers` in the state AttentionRegisterRoFormerBlock: (tokens, registers)."""
    registers = 0
    if "registers" in state:
        registers = len(state["registers"])
        memory = state["registers"].expand(len(x), -1, -1)
        x = torch.cat([memory if carried is None else memory + carried, x], dim=1)
    mask = sees(x.shape[1] - registers, registers, window)
    x = x + attention(part(state, "att."), rows.rms_norm(x, state["att_norm.scale"]), n_head, base, mask)
    x = x + mlp(part(state, "mlp."), rows.rms_norm(x, state["ffn_norm.scale"]))
    return x[:, registers:], x[:, :registers]


def roformer_block_of(
    x: Tensor, weight_qkv: Tensor, weight_out: Tensor, weight_gate: Tensor, weight_up: Tensor, weight_down: Tensor,
    scale_attention: Tensor, scale_mlp: Tensor, rope: Tensor, n_head: int, *, window: int = -1,
    registers: Tensor | None = None, eps_attention: float = 1e-6, eps_mlp: float = 1e-6,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same as a function of tensors: (tokens, registers); the registers (B or 1, R, C)."""
    count = 0 if registers is None else registers.shape[1]
    if registers is not None:
        x = torch.cat([registers.expand(len(x), -1, -1), x], dim=1)
    qkv = rows.rms_norm(x, scale_attention, eps_attention) @ weight_qkv.T
    attended = attention_by_rows.rope_attention(qkv[:, count:], rope, n_head, window, qkv[:, :count] if count else None)
    x = x + torch.cat(attended[::-1], dim=1) @ weight_out.T
    x = x + rows.swiglu_mlp(rows.rms_norm(x, scale_mlp, eps_mlp), weight_gate, weight_up, weight_down)
    return x[:, count:], x[:, :count]


# --- recurrence


def gru_step(gates_x: Tensor, weight_hh: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    (xr, xz, xn), (hr, hz, hn) = gates_x.chunk(3, -1), (h @ weight_hh.T).chunk(3, -1)
    r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
    n = (xn + r * hn).tanh()
    return (1 - z) * n + z * h, c


def lstm_step(gates_x: Tensor, weight_hh: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = (gates_x + h @ weight_hh.T).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def rnn(state: State, x: Tensor, n_layer: int, rnn_type: str, bidirectional: bool) -> Tensor:
    """One torch.nn.GRU or LSTM without biases, batch first, from zeros."""
    step = {"gru": gru_step, "lstm": lstm_step}[rnn_type]
    for layer in range(n_layer):
        outputs = []
        for suffix in ("", "_reverse")[: 1 + bidirectional]:
            weight_ih, weight_hh = state[f"weight_ih_l{layer}{suffix}"], state[f"weight_hh_l{layer}{suffix}"]
            h = c = x.new_zeros(len(x), weight_hh.shape[1])
            steps = []
            for t in reversed(range(x.shape[1])) if suffix else range(x.shape[1]):
                h, c = step(x[:, t] @ weight_ih.T, weight_hh, h, c)
                steps.append(h)
            outputs.append(torch.stack(steps[::-1] if suffix else steps, dim=1))
        x = torch.cat(outputs, dim=-1)
    return x


def grouped_rnn(
    state: State, x: Tensor, *, n_groups: int, n_layer: int, rnn_type: str = "gru", bidirectional: bool = False
) -> Tensor:
    pieces = x.chunk(n_groups, dim=-1)
    return torch.cat(
        [rnn(part(state, f"rnns.{g}."), piece, n_layer, rnn_type, bidirectional) for g, piece in enumerate(pieces)], -1
    )


def rnn_block(state: State, x: Tensor, **arguments) -> Tensor:
    x = x + grouped_rnn(part(state, "rnn."), rows.rms_norm(x, state["rnn_norm.scale"]), **arguments)
    return x + mlp(part(state, "mlp."), rows.rms_norm(x, state["ffn_norm.scale"]))


def rnn_block_of(
    x: Tensor, weight_ih: Tensor, weight_hh: Tensor, weight_gate: Tensor, weight_up: Tensor, weight_down: Tensor,
    scale_rnn: Tensor, scale_mlp: Tensor, *, eps_rnn: float = 1e-6, eps_mlp: float = 1e-6,
) -> Tensor:  # fmt: skip
    """The same as a function of tensors, weights (L, N, G, rows, columns)."""
    y = rows.rms_norm(x, scale_rnn, eps_rnn)
    for input_weight, state_weight in zip(weight_ih, weight_hh, strict=True):
        y = recurrent.grouped_rnn(y, input_weight, state_weight)[0]
    x = x + y
    return x + rows.swiglu_mlp(rows.rms_norm(x, scale_mlp, eps_mlp), weight_gate, weight_up, weight_down)


# --- ConvNeXt


def conv(x: Tensor, weight: Tensor, bias: Tensor, stride: tuple[int, ...], pad_end: tuple[int, ...]) -> Tensor:
    """(B, I, *sizes) with weight (O, I, *kernel), or depthwise with (I, 1, *kernel); padding kernel // 2, and
    `pad_end` more zeros at each dimension's end."""
    kernel = weight.shape[2:]
    padding = [n for k, more in zip(reversed(kernel), reversed(pad_end), strict=True) for n in (k // 2, k // 2 + more)]
    padded = torch.nn.functional.pad(x, padding)
    sizes = [(n - k) // s + 1 for n, k, s in zip(padded.shape[2:], kernel, stride, strict=True)]
    result = 0
    for tap in itertools.product(*map(range, kernel)):
        seen = padded[(..., *(slice(i, i + (n - 1) * s + 1, s) for i, n, s in zip(tap, sizes, stride, strict=True)))]
        at = weight[(..., *tap)]
        depthwise = weight.shape[1] == 1 and x.shape[1] > 1
        result = result + (
            at.view(-1, *[1] * len(kernel)) * seen if depthwise else torch.einsum("oi,bi...->bo...", at, seen)
        )
    return result + bias.view(-1, *[1] * len(kernel))


def conv_transposed(x: Tensor, weight: Tensor, bias: Tensor, stride: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
    """Zeros between the inputs, then a convolution with the kernel turned round. weight (I, O or 1, *kernel)."""
    smallest = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True)]
    apart = x.new_zeros(*x.shape[:2], *smallest)
    apart[(..., *(slice(None, None, s) for s in stride))] = x
    turned = weight.flip(*range(2, weight.dim()))
    if weight.shape[1] > 1:
        turned = turned.transpose(0, 1)
    more = tuple(want - least for want, least in zip(sizes, smallest, strict=True))
    return conv(apart, turned, bias, (1,) * len(stride), more)


def pool(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The mean of each stride window; the last window of a dimension may be partial."""
    sizes = [-(-n // s) for n, s in zip(x.shape[2:], stride, strict=True)]
    means = [
        x[(..., *(slice(i * s, (i + 1) * s) for i, s in zip(at, stride, strict=True)))].flatten(2).mean(-1)
        for at in itertools.product(*map(range, sizes))
    ]
    return torch.stack(means, dim=-1).unflatten(-1, sizes)


def repeat(x: Tensor, stride: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
    """Each position `stride` times, cropped to `sizes`."""
    for dim, (s, n) in enumerate(zip(stride, sizes, strict=True), start=2):
        x = x.index_select(dim, torch.arange(n) // s)
    return x


def convnext_sizes(x: Tensor, stride: tuple[int, ...], mode: str, sizes: tuple[int, ...] | None) -> tuple[int, ...]:
    if mode == "normal":
        return tuple(math.ceil(n / s) for n, s in zip(x.shape[2:], stride, strict=True))
    return tuple(sizes or ((n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True)))


def convnext_block(
    state: State, x: Tensor, *, stride: tuple[int, ...], mode: str = "normal", original_shape=None, variant="convnext"
) -> Tensor:
    """ConvNeXt1DBlock and ConvNeXt2DBlock, both variants: `stride` and `original_shape` have a number a dimension."""
    sizes = convnext_sizes(x, stride, mode, original_shape)

    def convolve(name: str) -> Tensor:
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        if mode == "normal":
            return conv(x, weight, bias, stride, (0,) * len(stride))
        return conv_transposed(x, weight, bias, stride, sizes)

    y = convolve("dwconv").movedim(1, -1)
    if variant == "msrkit":
        y = rows.rms_norm(y, state["norm.scale"])
    else:
        y = rows.layer_norm(y, state["norm.weight"], state["norm.bias"])
    y = y @ state["pwconv1.weight"].T + state["pwconv1.bias"]
    y = rows.swiglu(*y.chunk(2, -1)) if variant == "msrkit" else rows.gelu(y)
    y = (y @ state["pwconv2.weight"].T + state["pwconv2.bias"]).movedim(-1, 1)

    if variant == "msrkit":
        return y + convolve("residual_conv")
    if "residual_conv.weight" not in state:
        return y + x
    residual = pool(x, stride) if mode == "normal" else repeat(x, stride, sizes)
    weight = state["residual_conv.weight"].flatten(1)
    return y + (residual.movedim(1, -1) @ weight.T + state["residual_conv.bias"]).movedim(-1, 1)
