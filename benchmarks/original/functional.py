"""The operations of `fastblocks.functional` as an ordinary model computes them, with the same arguments."""

import torch
import torch.nn.functional as F
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """float32, or float64 where x is: the reference of every error is this code in float64."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """(…, C) -> (…, C)."""
    return (wide(x) * torch.rsqrt(wide(x).pow(2).mean(-1, keepdim=True) + eps)).type_as(x) * scale


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """(…, F), (…, F) -> (…, F)."""
    return F.silu(gate) * up


def swiglu_mlp(x: Tensor, weight_gate: Tensor, weight_up: Tensor, weight_down: Tensor) -> Tensor:
    """(…, C) -> (…, C_out)."""
    return F.linear(swiglu(F.linear(x, weight_gate), F.linear(x, weight_up)), weight_down)


def rope_table(length: int, head_dim: int, base: float = 10000.0) -> Tensor:
    """Cosines and sines, (length, D/2, 2) float32."""
    frequency = 1.0 / (base ** (torch.arange(0, head_dim, 2).float() / head_dim))
    angle = torch.outer(torch.arange(length).float(), frequency)
    return torch.stack([angle.cos(), angle.sin()], dim=-1)


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate the interleaved channel pairs of x (B, H, T, D) by the angles of rope (T, D/2, 2)."""
    pairs = wide(x).reshape(*x.shape[:-1], -1, 2)
    cos, sin = rope[..., 0], rope[..., 1]
    rotated = torch.stack(
        [pairs[..., 0] * cos - pairs[..., 1] * sin, pairs[..., 1] * cos + pairs[..., 0] * sin], dim=-1
    )
    return rotated.flatten(-2).type_as(x)


def window_mask(length: int, registers: int, window: int, device: torch.device) -> Tensor:
    """True where attention is allowed: (R + T, R + T), the registers first; window is in tokens."""
    position = torch.arange(length, device=device)
    mask = torch.ones(registers + length, registers + length, dtype=torch.bool, device=device)
    mask[registers:, registers:] = (position[:, None] - position[None, :]).abs() <= window // 2
    return mask


def attend(qkv: Tensor, rope: Tensor, n_head: int, registers: int = 0, window: int = -1) -> Tensor:
    """(B, R + T, 3C) -> (B, R + T, C), the registers first; a window goes through a dense boolean mask."""
    batch, total, width = qkv.shape
    q, k, v = qkv.split(width // 3, dim=-1)
    q, k, v = (part.view(batch, total, n_head, -1).transpose(1, 2) for part in (q, k, v))
    q, k = apply_rope(q, rope[:total]), apply_rope(k, rope[:total])
    mask = None if window == -1 else window_mask(total - registers, registers, window, qkv.device)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return y.transpose(1, 2).reshape(batch, total, width // 3)


def rope_attention(
    qkv: Tensor,
    rope: Tensor,
    n_head: int,
    *,
    window: int = -1,
    register_qkv: Tensor | None = None,
    return_registers: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """(B, T, 3C) -> (B, T, C)."""
    registers = 0
    if register_qkv is not None:
        registers = register_qkv.shape[1]
        qkv = torch.cat([register_qkv.expand(qkv.shape[0], -1, -1), qkv], dim=1)
    y = attend(qkv, rope, n_head, registers, window)
    return (y[:, registers:], y[:, :registers]) if return_registers else y[:, registers:]


def _grouped(name, x, weight_ih, weight_hh, bias_ih, bias_hh, state):
    """One torch.nn RNN a group, called through its own kernel with the weights given."""
    directions, groups, _, hidden = weight_hh.shape
    outputs, states = [], []
    for g, part in enumerate(x.chunk(groups, dim=-1)):
        flat = []
        for n in range(directions):
            flat += [weight_ih[n, g], weight_hh[n, g]] + ([] if bias_ih is None else [bias_ih[n, g], bias_hh[n, g]])
        zeros = part.new_zeros(directions, part.shape[0], hidden)
        if name == "gru":
            start = zeros if state is None else state[..., g * hidden : (g + 1) * hidden].contiguous()
        else:
            start = (
                (zeros, zeros) if state is None else [s[..., g * hidden : (g + 1) * hidden].contiguous() for s in state]
            )
        run = torch.gru if name == "gru" else torch.lstm
        # as torch.nn.GRU in training; cuDNN has a backward pass in no other mode
        train = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (part, *flat))
        y, *last = run(part, start, flat, bias_ih is not None, 1, 0.0, train, directions == 2, True)
        outputs.append(y)
        states.append(last)
    last = [torch.cat(parts, dim=-1) for parts in zip(*states, strict=True)]
    return torch.cat(outputs, dim=-1), last[0] if name == "gru" else tuple(last)


def grouped_gru(x, weight_ih, weight_hh, bias_ih=None, bias_hh=None, *, state=None):
    """(B, T, G·I) -> (B, T, G·N·H) and the last state (N, B, G·H)."""
    return _grouped("gru", x, weight_ih, weight_hh, bias_ih, bias_hh, state)


def grouped_lstm(x, weight_ih, weight_hh, bias_ih=None, bias_hh=None, *, state=None):
    """(B, T, G·I) -> (B, T, G·N·H) and the last states (h, c), each (N, B, G·H)."""
    return _grouped("lstm", x, weight_ih, weight_hh, bias_ih, bias_hh, state)


def depthwise_conv_layer_norm(
    x, weight, bias, norm_weight, norm_bias, *, stride, transposed=False, output_size=None, eps=1e-6
):
    """(B, C, *sizes) -> (B, *sizes, C)."""
    padding = tuple(k // 2 for k in weight.shape[2:])
    if transposed:
        smallest = [(size - 1) * s + 1 for size, s in zip(x.shape[2:], stride, strict=True)]
        extra = tuple(w - size for w, size in zip(output_size or smallest, smallest, strict=True))
        conv = F.conv_transpose1d if x.dim() == 3 else F.conv_transpose2d
        x = conv(x, weight, bias, stride, padding, extra, groups=x.shape[1])
    else:
        conv = F.conv1d if x.dim() == 3 else F.conv2d
        x = conv(x, weight, bias, stride, padding, groups=x.shape[1])
    return F.layer_norm(x.movedim(1, -1), (x.shape[1],), norm_weight, norm_bias, eps)


def convnext_mlp(x, weight1, bias1, weight2, bias2, *, residual=None):
    """(B, *sizes, C) -> (B, C_out, *sizes)."""
    y = F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2).movedim(-1, 1)
    return y if residual is None else y + residual


def bias_leaky_relu(x, bias, slope=0.01):
    """(B, C, …) -> (B, C, …)."""
    return F.leaky_relu(x + bias.view(-1, *[1] * (x.dim() - 2)), slope)


def spectral_norms(weights, us, vs, *, n_power_iterations=1, eps=1e-12):
    """As torch.nn.utils.spectral_norm does it, weight by weight."""
    normed = []
    for weight, u, v in zip(weights, us, vs, strict=True):
        matrix = weight.flatten(1)
        with torch.no_grad():
            for _ in range(n_power_iterations):
                F.normalize(torch.mv(matrix.T, u), dim=0, eps=eps, out=v)
                F.normalize(torch.mv(matrix, v), dim=0, eps=eps, out=u)
        u, v = u.clone(), v.clone()
        normed.append(weight / torch.dot(u, torch.mv(matrix, v)))
    return normed


def weight_norms(vs, gs):
    return [torch._weight_norm(v, g, 0) for v, g in zip(vs, gs, strict=True)]


def discriminator_loss(real, fake):
    return sum((1 - r).square().mean() + f.square().mean() for r, f in zip(real, fake, strict=True)) / len(real)


def adversarial_loss(fake):
    return sum((1 - f).square().mean() for f in fake) / len(fake)


def feature_matching(real, fake):
    pairs = [(r.detach(), f) for rs, fs in zip(real, fake, strict=True) for r, f in zip(rs, fs, strict=True)]
    return sum((r - f).abs().mean() / (r.abs().mean() + 1e-5) for r, f in pairs) / len(pairs)
