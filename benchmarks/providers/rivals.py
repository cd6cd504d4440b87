"""The rivals: the strongest that there are for one operation each, with the baseline's inputs and weights."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.original.functional import apply_rope
from benchmarks.providers.runner import Skipped


def flex_attention(n_head: int, window: int, registers: int, device: torch.device, compiler: str) -> Callable:
    """FlexAttention with the rotation in front, compiled as one; window and registers as a block mask."""
    try:
        from torch.nn.attention.flex_attention import create_block_mask
        from torch.nn.attention.flex_attention import flex_attention as attend
    except ImportError as problem:
        raise Skipped(f"this PyTorch has no FlexAttention: {problem}") from None
    masks: dict[int, object] = {}

    def allowed(batch, head, query, key):
        return (query < registers) | (key < registers) | ((query - key).abs() <= window // 2)

    def run(qkv: Tensor, rope: Tensor, register_qkv: Tensor | None, mask) -> Tensor:
        if register_qkv is not None:
            qkv = torch.cat([register_qkv.expand(qkv.shape[0], -1, -1), qkv], dim=1)
        batch, total, width = qkv.shape
        q, k, v = (p.view(batch, total, n_head, -1).transpose(1, 2) for p in qkv.split(width // 3, dim=-1))
        y = attend(apply_rope(q, rope[:total]), apply_rope(k, rope[:total]), v, block_mask=mask)
        return y.transpose(1, 2).reshape(batch, total, width // 3)[:, registers:]

    torch._dynamo.reset()
    fast = torch.compile(run, dynamic=False, backend=compiler)

    def call(qkv: Tensor, rope: Tensor, register_qkv: Tensor | None = None) -> Tensor:
        total = registers + qkv.shape[1]
        if window != -1 and total not in masks:
            options = {"_compile": True} if total > 8192 else {}  # else it holds every pair of tokens for a moment
            masks[total] = create_block_mask(allowed, None, None, total, total, device=device, **options)
        return fast(qkv, rope, register_qkv, masks.get(total))

    return call


def liger(kind: str) -> Callable:
    """Liger's RMSNorm, SwiGLU, or SwiGLU between two products."""
    from liger_kernel.transformers.functional import liger_rms_norm, liger_swiglu

    return {
        "norm": lambda x, scale: liger_rms_norm(x, scale, 1e-6, in_place=False),
        "swiglu": liger_swiglu,
        "mlp": lambda x, gate, up, down: F.linear(liger_swiglu(F.linear(x, gate), F.linear(x, up)), down),
    }[kind]


class BlockDiagonal(nn.Module):
    """All groups as one nn.GRU or nn.LSTM, whose weights are zero between groups; made from the original's layers."""

    def __init__(self, layers: nn.Module):
        super().__init__()
        one, self.groups = layers.rnns[0], len(layers.rnns)
        hidden, self.directions = one.hidden_size, 1 + one.bidirectional
        options = {"bias": False, "batch_first": True, "bidirectional": one.bidirectional}
        self.rnn = type(one)(self.groups * one.input_size, self.groups * hidden, one.num_layers, **options)
        with torch.no_grad():
            for name, dense in self.rnn.named_parameters():
                parts = [getattr(rnn, name) for rnn in layers.rnns]
                dense.zero_()
                deep = name.startswith("weight_ih") and "_l0" not in name  # reads all groups of each direction
                lanes = self.directions if deep else 1
                width = parts[0].shape[1] // lanes
                blocks = dense.view(-1, self.groups, hidden, lanes, self.groups, width)
                for g, part in enumerate(parts):
                    blocks[:, g, :, :, g] = part.view(-1, hidden, lanes, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.rnn(x)[0]
        if self.directions == 1:
            return y
        return y.unflatten(-1, (self.directions, self.groups, -1)).transpose(-3, -2).flatten(-3)


class FlashRNN(nn.Module):
    """FlashRNN's Triton backend with the input's product in front of it, one layer of LSTM.

    Source: Pöppel et al., "FlashRNN: I/O-Aware Optimization of Traditional RNNs on modern hardware", 2024.
    """

    def __init__(self, layers: nn.Module):
        super().__init__()
        width = layers.rnns[0].hidden_size
        if not isinstance(layers.rnns[0], nn.LSTM):
            raise Skipped("its GRU multiplies the reset gate in another place")
        if width > 64:
            raise Skipped(f"its Triton backend takes heads of up to 64, these have {width}")
        inputs = torch.stack([rnn.weight_ih_l0.detach().view(4, width, width) for rnn in layers.rnns], 1)
        hidden = torch.stack([rnn.weight_hh_l0.detach().view(4, width, width) for rnn in layers.rnns], 1)
        self.weight_ih = nn.Parameter(inputs)  # (gates i f g o, groups, out, in)
        self.weight_hh = nn.Parameter(hidden)

    def forward(self, x: Tensor) -> Tensor:
        from flashrnn import flashrnn

        gates, groups, width, _ = self.weight_ih.shape
        pre = torch.einsum("btgi,kgoi->btkgo", x.unflatten(-1, (groups, -1)), self.weight_ih)
        bias = pre.new_zeros(gates, groups, width)
        states, _ = flashrnn(pre, self.weight_hh.to(pre.dtype), bias, function="lstm", backend="triton_fused")
        return states[0].flatten(-2)
