"""Attention and feed-forward layer of BS-RoFormer and Mel-Band RoFormer: the package bs-roformer, and copies of it."""

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastblocks import backend, functional
from fastblocks.convert.adapter import Adapter, Arguments, Block, Call, Foreign, torch_computes
from fastblocks.eager.attention import rotate
from fastblocks.generator._layers import is_plain, may_fuse, require_channels_last_dim

LENGTH = 11  # tokens, for the comparison


class RMSNorm(nn.Module):
    """`x / max(‖x‖, 1e-12) · √C · gamma` over the last dimension, (…, C) -> (…, C).

    Args:
        dim: C.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.scale = dim**0.5
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * self.scale * self.gamma


def _normed_linears(x: Tensor, norm: RMSNorm, linears: list[nn.Linear]) -> list[Tensor]:
    """`linear(norm(x))` of each, with the norm's factors multiplied into the weights: two passes over x fewer."""
    x, factors = F.normalize(x, dim=-1), norm.gamma * norm.scale
    return [F.linear(x, linear.weight * factors, linear.bias) for linear in linears]


class RotaryEmbedding(nn.Module):
    """The frequencies of a rotary position embedding, one for each pair of channels.

    Args:
        dim: D, channels of a head.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.freqs = nn.Parameter(1.0 / 10000 ** (torch.arange(0, dim, 2) / dim), requires_grad=False)

    def table(self, length: int, dtype: torch.dtype) -> Tensor:
        """(length, D/2, 2), cosines and sines. Positions are rounded to the dtype of q and angles to that of `freqs`,
        as in the original: in bfloat16 positions 256 and 257 are the same."""
        positions = torch.arange(length, dtype=dtype, device=self.freqs.device)
        angle = positions.to(self.freqs.dtype)[:, None] * self.freqs.detach()
        table = torch.stack((angle.cos(), angle.sin()), dim=-1)
        return table.to(torch.promote_types(table.dtype, torch.float32))


class Attention(nn.Module):
    """Multi-head self-attention of bs-roformer with rotary positions and a gate a head: (B, T, C) -> (B, T, C), with
    the original's state_dict.

    RMSNorm, q, k and v in one Linear, attention, times the sigmoid of a gate for each token and head, Linear. With
    dropout, training takes PyTorch's attention.

    Source: Lu et al., "Music Source Separation with Band-Split RoPE Transformer", 2023.

    Args:
        dim: C.
        heads: H.
        dim_head: D, channels of a head, even.
        dropout: of the attention's weights and of the output, in training.
    """

    def __init__(self, dim: int, heads: int, dim_head: int, dropout: float = 0.0):
        super().__init__()
        self._build(dim, heads, dim_head, dropout, mixes=False)

    def _build(self, dim: int, heads: int, dim_head: int, dropout: float, mixes: bool) -> None:
        inner = heads * dim_head
        self.dim, self.heads, self.scale, self.dropout = dim, heads, dim_head**-0.5, dropout
        self.rotary_embed = RotaryEmbedding(dim_head)
        self.norm = RMSNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * inner, bias=False)
        self.to_value_residual_mix = nn.Linear(dim, heads) if mixes else None
        self.to_gates = nn.Linear(dim, heads)
        self.to_out = nn.Sequential(nn.Linear(inner, dim, bias=False), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(x, None)[0]

    def _forward(self, x: Tensor, value_residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """The output, and v (B, H, T, D) before a residual is mixed into it."""
        require_channels_last_dim(x, self.dim, type(self).__name__)
        qkv, gates, *mix = self._projections(x)
        qk, v = qkv.split((2 * qkv.shape[-1] // 3, qkv.shape[-1] // 3), dim=-1)
        v = v.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        if mix:
            if value_residual is None:
                raise ValueError("this Attention mixes values with those of an earlier layer: value_residual is None")
            mixed = self._mixed(v, value_residual, mix[0])
            qkv = torch.cat((qk, mixed.transpose(1, 2).flatten(2)), dim=-1)
        return self.to_out(self._attend(qkv, gates)), v

    def _mixed(self, v: Tensor, value_residual: Tensor, mix: Tensor) -> Tensor:
        """(B, H, T, D), twice, and what `_projections` gives -> (B, H, T, D)."""
        return v.lerp(value_residual, mix.sigmoid().transpose(1, 2).unsqueeze(-1))

    def _projections(self, x: Tensor) -> list[Tensor]:
        """(B, T, 3HD), and (B, T, H) of the gates and, where there is one, of the mix."""
        names = ["to_qkv", "to_gates", *(["to_value_residual_mix"] if self.to_value_residual_mix is not None else [])]
        linears = [getattr(self, name) for name in names]
        if may_fuse("norm and linear", self, norm=RMSNorm, **dict.fromkeys(names, nn.Linear)):
            return _normed_linears(x, self.norm, linears)
        x = self.norm(x)
        return [linear(x) for linear in linears]

    def _attend(self, qkv: Tensor, gates: Tensor) -> Tensor:
        """(B, T, 3HD), (B, T, H) -> (B, T, HD)."""
        rope = self.rotary_embed.table(qkv.shape[1], qkv.dtype)
        if not (self.training and self.dropout):
            return functional.rope_attention(qkv, rope, self.heads, gate=gates)
        backend.declined("rope_attention", f"dropout {self.dropout} in training")
        qk, v = qkv.unflatten(-1, (3, self.heads, -1)).split((2, 1), dim=2)
        q, k = rotate(qk, rope).unbind(2)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v.squeeze(2)))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout).transpose(1, 2)
        return (y * gates.sigmoid().unsqueeze(-1)).flatten(2)


class ValueResidualAttention(Attention):
    """`Attention` as of the versions that hand values on: (B, T, C) -> (B, T, C) and v (B, H, T, D).

    Source: Zhou et al., "Value Residual Learning", 2024.

    Args:
        dim, heads, dim_head, dropout: as for `Attention`.
        learned_value_residual_mix: mix v with an earlier layer's, by a sigmoid for each token and head.

    Raises:
        ValueError: in forward, if it mixes and there is no `value_residual`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        dim_head: int,
        dropout: float = 0.0,
        learned_value_residual_mix: bool = False,
    ):
        nn.Module.__init__(self)
        self._build(dim, heads, dim_head, dropout, learned_value_residual_mix)

    def forward(self, x: Tensor, value_residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._forward(x, value_residual)


class HeadsFirst(nn.Module):
    """(B, T, H) -> (B, H, T, 1)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).unsqueeze(-1)


class MelBandAttention(ValueResidualAttention):
    """`ValueResidualAttention` of Mel-Band RoFormer's layers behind the first, which mixes as the original does: a
    sigmoid for each token and head is what v goes to, and the earlier layer's values say how far.

    Args:
        dim, heads, dim_head, dropout: as for `Attention`.

    Raises:
        ValueError: in forward, if there is no `value_residual`.
    """

    def __init__(self, dim: int, heads: int, dim_head: int, dropout: float = 0.0):
        super().__init__(dim, heads, dim_head, dropout)
        self.learned_value_residual_mix = nn.Sequential(nn.Linear(dim, heads), HeadsFirst(), nn.Sigmoid())
        self._modules["to_out"] = self._modules.pop("to_out")  # behind it, as in the original's state_dict

    def _mixed(self, v: Tensor, value_residual: Tensor, mix: Tensor) -> Tensor:
        return v.lerp(mix, value_residual)

    def _projections(self, x: Tensor) -> list[Tensor]:
        """(B, T, 3HD), of the gates (B, T, H), of the mix (B, H, T, 1)."""
        mix, kinds = self.learned_value_residual_mix, {"0": nn.Linear, "1": HeadsFirst, "2": nn.Sigmoid}
        own = {"norm": RMSNorm, "to_qkv": nn.Linear, "to_gates": nn.Linear, "learned_value_residual_mix": nn.Sequential}
        if may_fuse("norm and linear", self, **own) and may_fuse("norm and linear", mix, **kinds):
            qkv, gates, mixing = _normed_linears(x, self.norm, [self.to_qkv, self.to_gates, mix[0]])
            return [qkv, gates, mix[1:](mixing)]
        x = self.norm(x)
        return [self.to_qkv(x), self.to_gates(x), mix(x)]


class FeedForward(nn.Module):
    """RMSNorm, Linear, exact GELU, Dropout, Linear, Dropout: (…, C) -> (…, C), with the original's state_dict.

    Args:
        dim: C.
        dim_inner: channels between the two Linears.
        dropout: p of both.
    """

    def __init__(self, dim: int, dim_inner: int, dropout: float = 0.0):
        super().__init__()
        self.net = nn.Sequential(
            RMSNorm(dim),
            nn.Linear(dim, dim_inner),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(dim_inner, dim),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        plain = is_plain(self.net, nn.Sequential, None)
        if not (plain and may_fuse("norm and linear", self.net, **{"0": RMSNorm, "1": nn.Linear})):
            return self.net(x)
        norm, first, *rest = self.net
        (x,) = _normed_linears(x, norm, [first])
        for layer in rest:
            x = layer(x)
        return x


# --- how they are read


def _is_attention(module: nn.Module) -> bool:
    """Many models have an `Attention`; this one is known by its children."""
    children = module._modules.keys() >= {"attend", "norm", "to_qkv", "to_gates", "to_out"}
    return children and hasattr(module, "rotary_embed") and hasattr(module.norm, "gamma")


def _hands_values_on(module: nn.Module) -> bool:
    return _is_attention(module) and "value_residual" in inspect.signature(module.forward).parameters


def _mixes_to_a_sigmoid(module: nn.Module) -> bool:
    return _hands_values_on(module) and getattr(module, "learned_value_residual_mix", None) is not None


def _is_linear_attention(module: nn.Module) -> bool:
    return module._modules.keys() >= {"attend", "norm", "to_qkv", "to_out"} and hasattr(module, "temperature")


def _is_feed_forward(module: nn.Module) -> bool:
    kinds = [type(child).__name__ for child in getattr(module, "net", ())]
    return kinds == ["RMSNorm", "Linear", "GELU", "Dropout", "Linear", "Dropout"] and hasattr(module.net[0], "gamma")


def _linear_attention(block: Block) -> Arguments:
    raise Foreign("it is linear attention (over channels), and fastblocks has none")


def _attention(block: Block) -> Arguments:
    module, (rows, dim) = block.module, block.shape("to_qkv.weight")
    heads = block.attribute("heads")
    head = rows // 3 // heads
    if difference := _other_positions(module, head) or _other_attention(module, head):
        raise Foreign(difference)
    return {
        "dim": block.says("dim", dim),
        "heads": heads,
        "dim_head": block.says("dim_head", head),
        "dropout": block.says("dropout", module.to_out[1].p),
    }


def _value_residual_attention(block: Block) -> Arguments:
    mixes = "to_value_residual_mix.weight" in block.state
    name = "learned_value_residual_mix"
    return _attention(block) | {name: block.says(name, mixes)}


def _other_positions(module: nn.Module, head: int) -> str:
    """What is unlike interleaved rotation of all channels of a head by fixed frequencies."""
    rotary = module.rotary_embed
    if getattr(module, "pope_embed", None) is not None:
        return "its positions are PoPE's, and fastblocks has rotary ones"
    if rotary is None:
        return "it has no rotary positions"
    if 2 * len(rotary.freqs) != head:
        return f"its rotary embedding turns {2 * len(rotary.freqs)} of {head} channels"
    for name, usual in (("learned_freq", False), ("use_xpos", False), ("interpolate_factor", 1)):
        if (value := getattr(rotary, name, usual)) != usual:
            return f"its rotary embedding has {name}={value}"
    if rotary.freqs.requires_grad:
        return "its rotary embedding learns its frequencies"
    if getattr(rotary, "default_seq_dim", -2) != -2:
        return "its rotary embedding takes tokens before heads"
    return ""


def _other_attention(module: nn.Module, head: int) -> str:
    """What is unlike softmax attention with the usual scale."""
    if (kind := type(module.attend).__name__) != "Attend":
        return f"it attends by {kind}, whose numbers are others"
    if getattr(module.attend, "scale", None) not in (None, head**-0.5):
        return f"its scores are scaled by {module.attend.scale}, not by 1/√{head}"
    return ""


def _adopt_dropout(original: nn.Module, replacement: nn.Module) -> None:
    """The attention's own, which may have been changed since."""
    replacement.dropout = original.attend.dropout


def _feed_forward(block: Block) -> Arguments:
    rows, dim = block.shape("net.1.weight")
    return {
        "dim": block.says("dim", dim),
        "dim_inner": block.says("dim_inner", rows),
        "dropout": block.says("dropout", block.module.net[3].p),
    }


def _tokens(arguments: Arguments) -> list[Call]:
    call = ("forward", (2, LENGTH, arguments["dim"]))
    return _tokens_and_values(arguments) if arguments.get("learned_value_residual_mix") else [call]


def _tokens_and_values(arguments: Arguments) -> list[Call]:
    generator = torch.Generator("cpu").manual_seed(2)
    size = (2, arguments["heads"], LENGTH, arguments["dim_head"])
    values = torch.randn(size, generator=generator, dtype=torch.float64)
    return [("forward", (2, LENGTH, arguments["dim"]), values)]


_FREQUENCIES = frozenset({"rotary_embed.freqs"})  # the original holds angles that it has computed before
ADAPTERS = {
    "Attention": [
        Adapter(
            MelBandAttention,
            _attention,
            _tokens_and_values,
            claims=_mixes_to_a_sigmoid,
            adopt=_adopt_dropout,
            fixed=_FREQUENCIES,
        ),
        Adapter(
            ValueResidualAttention,
            _value_residual_attention,
            _tokens,
            claims=_hands_values_on,
            adopt=_adopt_dropout,
            fixed=_FREQUENCIES,
        ),
        Adapter(Attention, _attention, _tokens, claims=_is_attention, adopt=_adopt_dropout, fixed=_FREQUENCIES),
    ],
    "LinearAttention": [Adapter(Attention, _linear_attention, _tokens, claims=_is_linear_attention)],
    "FeedForward": [
        Adapter(
            FeedForward,
            _feed_forward,
            _tokens,
            claims=_is_feed_forward,
            # The MLP kernels of convnext_mlp, without their transpose, are predicted to take 1300 µs forward and
            # backward of 42476 rows of 256 channels on an H100, PyTorch's products and GELU by their bytes 400.
            no_gain=torch_computes("matrix products", with_kernels=True),
        )
    ],
}
