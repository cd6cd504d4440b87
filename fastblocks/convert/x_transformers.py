"""Self-attention of x-transformers with rotary positions, interleaved (from version 1.31) or in halves (before)."""

import sys
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastblocks import backend, functional
from fastblocks.convert.adapter import Adapter, Arguments, Block, Call, Foreign
from fastblocks.convert.compare import HOOKS
from fastblocks.generator._layers import may_fuse

LENGTH = 11  # tokens, for the comparison
SKIPPED = ("attend", "split_q_heads", "split_k_heads", "split_v_heads", "merge_heads")  # children that fusing skips


class Attention(nn.Module):
    """Multi-head self-attention of x-transformers, (B, T, C) -> (B, T, C), with the original's state_dict.

    q, k and v in one product, rotation of some or all channels of a head, softmax attention, Linear. `convert` makes it
    a subclass of the original's class: any call that is not self-attention with rotary positions and nothing else
    (masks, contexts, caches, biases, value residuals, …) runs the original's own `forward`.

    Rotation in halves (channel i with i + r / 2) is done by interleaved pairs: rows of the q and k weights are
    reordered at each call, parameters stay as they are, and scores do not depend on the order of channels.

    Source: Su et al., "RoFormer", 2021; x-transformers.

    Args:
        dim: C.
        heads: H.
        dim_head: D, channels of a head, even.
        interleaved: which channels make a pair: neighbours, or those half of the rotated channels apart.
        causal: no token sees a later one.
        max_attend_past: how many tokens before it a token sees; None: all of them.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        dim_head: int,
        interleaved: bool = True,
        causal: bool = False,
        max_attend_past: int | None = None,
    ):
        super().__init__()
        self.heads, self.interleaved, self.causal, self.max_attend_past = heads, interleaved, causal, max_attend_past
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, heads * dim_head, bias=False) for _ in range(3))
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(self, x: Tensor, *others, rotary_pos_emb=None, return_intermediates: bool = False, **named):
        """x (B, T, C); `rotary_pos_emb`: angles ((1,) T or more, rotated channels) and a scale.

        Returns:
            (B, T, C); with `return_intermediates` a pair of it and the original's Intermediates, whose `values` are v,
            whose `cached_kv` are k and v (B, H, T, D), not rotated, and whose attention matrices are None.
        """
        if reason := self._reason_against(x, others, rotary_pos_emb, named):
            backend.declined("rope_attention", reason)
            named |= {"rotary_pos_emb": rotary_pos_emb, "return_intermediates": return_intermediates}
            return super().forward(x, *others, **named)
        angles = rotary_pos_emb[0].detach().flatten(0, -2)  # (1, T, r), before version 2 (T, r)
        qkv = self._projections(x, angles.shape[-1])
        window = self.max_attend_past, 0 if self.causal else None
        y = functional.rope_attention(qkv, self._table(angles, x.shape[1]), self.heads, window=window)
        y = self.to_out(y)
        if not return_intermediates:
            return y
        intermediates = self._intermediates()
        _, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in qkv.chunk(3, dim=-1))
        intermediates.values, intermediates.cached_kv = v, (self._as_they_were(k, angles.shape[-1]), v)
        return y, intermediates

    def _reason_against(self, x: Tensor, others: tuple, rotary, named: dict) -> str:
        """Why the original's own forward has to run; empty where the fused one may."""
        if named.get("causal") is self.causal:
            named = {name: value for name, value in named.items() if name != "causal"}
        # `pos` belongs to `rel_pos`, and comes without it, too
        if others or (
            given := [n for n, value in named.items() if n != "pos" and value is not None and value is not False]
        ):
            return "called with " + ("arguments by position" if others else ", ".join(given))
        if rotary is None:
            return "called without rotary positions"
        angles, scale = rotary
        if isinstance(scale, Tensor) or scale != 1:
            return "scaled rotary positions (xpos)"
        if angles.shape[:-2].numel() != 1 or angles.shape[-2] < x.shape[1]:
            return "positions that differ within the batch, or too few"
        if self.training and self.attend.dropout:
            return f"dropout {self.attend.dropout} in training"
        children = [self._modules[name] for name in SKIPPED if name in self._modules]
        if any(module.__dict__.get(name) for child in children for module in child.modules() for name in HOOKS):
            return "a child that would be skipped has hooks"
        return ""

    def _projections(self, x: Tensor, rotated: int) -> Tensor:
        """(B, T, 3HD), pairs of q and k interleaved."""
        if not may_fuse("q, k and v", self, to_q=nn.Linear, to_k=nn.Linear, to_v=nn.Linear, bias=False):
            q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
            q, k = (self._in_pairs(t, rotated, -1) for t in (q, k))
            return torch.cat((q, k, v), dim=-1)
        q, k = (self._in_pairs(linear.weight, rotated, 0) for linear in (self.to_q, self.to_k))
        return F.linear(x, torch.cat((q, k, self.to_v.weight)))

    def _in_pairs(self, t: Tensor, rotated: int, dim: int) -> Tensor:
        """Reorder dimension `dim`, heads of D channels, of which the first `rotated` are."""
        if self.interleaved:
            return t
        heads = t.movedim(dim, 0).unflatten(0, (self.heads, -1))  # (H, D, …)
        halves = heads[:, :rotated].unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
        return torch.cat((halves, heads[:, rotated:]), dim=1).flatten(0, 1).movedim(0, dim)

    def _as_they_were(self, k: Tensor, rotated: int) -> Tensor:
        """(…, D), `_in_pairs` undone."""
        if self.interleaved:
            return k
        return torch.cat((k[..., :rotated].unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2), k[..., rotated:]), -1)

    def _table(self, angles: Tensor, length: int) -> Tensor:
        """(length, D/2, 2), cosines and sines; channels that are not rotated have the angle 0."""
        rotated, head = angles.shape[-1], self.to_q.out_features // self.heads
        angles = angles[-length:, ::2] if self.interleaved else angles[-length:, : rotated // 2]
        angles = F.pad(angles.to(torch.promote_types(angles.dtype, torch.float32)), (0, (head - rotated) // 2))
        return torch.stack((angles.cos(), angles.sin()), dim=-1)

    def __reduce_ex__(self, protocol):
        original = type(self).__mro__[-1 - len(nn.Module.__mro__)]
        if original is Attention:
            return super().__reduce_ex__(protocol)
        return _empty, (original,), self.__dict__


@cache
def _class_of(original: type[nn.Module]) -> type[nn.Module]:
    """`Attention` before the original's class, whose forward and other methods are the fallback."""
    return type(original.__name__, (Attention, original), {"__module__": __name__, "__doc__": Attention.__doc__})


def _empty(original: type[nn.Module]) -> nn.Module:
    """For copy and pickle, which fill it."""
    cls = _class_of(original)
    return cls.__new__(cls)


def _become(original: nn.Module, replacement: nn.Module) -> None:
    """Everything that the original's forward reads is there, too: settings, and children without parameters."""
    twins: dict[nn.Module, nn.Module] = {}
    replacement._modules = {
        name: replacement._modules[name] if name in replacement._modules else child and _without_state(child, twins)
        for name, child in original._modules.items()
    }
    for name, value in original.__dict__.items():
        replacement.__dict__.setdefault(name, value)
    replacement._intermediates = _module_of(original.attend).Intermediates
    replacement.__class__ = _class_of(type(original))


def _without_state(module: nn.Module, twins: dict[nn.Module, nn.Module]) -> nn.Module:
    """A copy, whose modes and dtype do not change the module's own; `twins` holds those that are made."""
    if module not in twins:
        twins[module] = twin = type(module).__new__(type(module))
        twin.__dict__.update(module.__dict__)
        twin._modules = {name: child and _without_state(child, twins) for name, child in module._modules.items()}
    return twins[module]


def _module_of(module: nn.Module):
    return sys.modules[type(module).__module__]


# --- how they are read


def _is_attention(module: nn.Module) -> bool:
    """Many models have an `Attention`; this one is known by its children and its module's functions."""
    children = module._modules.keys() >= {"to_q", "to_k", "to_v", "attend"} and "norm" not in module._modules
    return children and hasattr(_module_of(module), "apply_rotary_pos_emb")


USUAL = {  # attribute -> its value, and what else it would be
    "qk_norm": (False, "it normalizes q and k (qk_norm)"),
    "q_rmsnorm": (None, "it normalizes q and k (qk_rmsnorm)"),
    "k_rmsnorm": (None, "it normalizes k (k_rmsnorm)"),
    "value_rmsnorm": (None, "it normalizes values (value_rmsnorm)"),
    "num_mem_kv": (0, "it has memory keys and values (num_mem_kv)"),
    "head_scale": (False, "it scales heads (head_scale)"),
    "to_v_gate": (None, "it gates values (gate_values)"),
    "to_v_head_gate": (None, "it gates heads (gate_value_heads)"),
    "to_output_gate": (None, "it gates its output (output_gate)"),
    "attn_on_attn": (False, "it has attention on attention (on_attn)"),
    "sparse_topk": (None, "it attends to the largest scores only (sparse_topk)"),
    "laser": (False, "it attends to exponentials (laser)"),
    "use_latent_q": (False, "its queries are latent (use_latent_q)"),
    "use_latent_kv": (False, "its keys are latent (use_latent_kv)"),
    "qkv_receive_diff_residuals": (False, "its q, k and v have inputs of their own (qkv_receive_diff_residuals)"),
    "data_dependent_alibi": (None, "its positions are data-dependent (data_dependent_alibi)"),
    "rel_proj_pos_bias": (None, "its positions are relative (use_rel_proj_pos_bias)"),
    "hybrid_module": (None, "it is a hybrid (hybrid_module)"),
    "orthog_projected_values": (False, "it projects values (orthog_projected_values)"),
    "orthog_projected_values_per_head": (False, "it projects values (orthog_projected_values_per_head)"),
    "sublayer_dropout": (None, "it drops out its output (sublayer_dropout)"),
}
USUAL_ATTEND = {
    "pre_softmax_talking_heads": (None, "its heads talk (pre_talking_heads)"),
    "post_softmax_talking_heads": (None, "its heads talk (post_talking_heads)"),
    "pre_scale_post_talking_heads": (None, "its heads talk (pre_scale_post_talking_heads)"),
    "l2_distance": (False, "its scores are distances (l2_distance)"),
    "softclamp_logits": (False, "it clamps scores (softclamp_logits)"),
    "selective": (False, "it is selective (selective)"),
    "cog_signed": (False, "its attention is signed (cog_signed)"),
    "inverted_attention": (False, "its softmax is over queries (inverted_attention)"),
    "head_learned_sink": (False, "it has a learned sink (head_learned_sink)"),
    "add_zero_kv": (False, "it has a key of zeros (add_zero_kv)"),
    "cope": (None, "its positions are contextual (use_cope)"),
    "flash_pack_seq": (False, "its sequences are packed (flash_pack_seq)"),
}


def _attention(block: Block) -> Arguments:
    module, (rows, dim) = block.module, block.shape("to_q.weight")
    heads = block.attribute("heads")
    head = rows // heads
    if difference := _other_settings(module, heads, head):
        raise Foreign(difference)
    return {
        "dim": block.says("dim", dim),
        "heads": heads,
        "dim_head": block.says("dim_head", head),
        "interleaved": block.says("interleaved", bool(_module_of(module).rotate_half(torch.arange(4.0))[1] == 0)),
        "causal": block.says("causal", module.causal),
        "max_attend_past": block.says("max_attend_past", getattr(module, "max_attend_past", None)),
    }


def _other_settings(module: nn.Module, heads: int, head: int) -> str:
    """What is unlike softmax self-attention with the usual scale, and heads of their own keys and values."""
    for holder, usual in ((module, USUAL), (module.attend, USUAL_ATTEND)):
        for name, (value, words) in usual.items():
            if getattr(holder, name, value) not in (value, False, 0):
                return words
    if (shared := getattr(module, "kv_heads", heads)) != heads:
        return f"its {heads} heads share {shared} heads of keys and values"
    if (turned := getattr(module, "rotate_num_heads", heads)) != heads:
        return f"it rotates {turned} of {heads} heads"
    if head % 2:
        return f"its heads have an odd number of channels, {head}"
    function = module.attend.attn_fn
    if getattr(function, "func", function) is not F.softmax:
        return "its scores go through another function than softmax"
    if getattr(module.attend, "scale", None) not in (None, head**-0.5):
        return f"its scores are scaled by {module.attend.scale}, not by 1/√{head}"
    if not isinstance(module.to_out, nn.Linear):
        return "its output is not that of one Linear"
    return ""


def _tokens(arguments: Arguments) -> list[Call]:
    """All channels of a head rotated, and half of them, which is the package's default."""
    head, calls = arguments["dim_head"], []
    for rotated in {head, max(2, head // 4 * 2)}:
        frequency = 1.0 / 100 ** (torch.arange(0, rotated, 2, dtype=torch.float64) / rotated)
        angles = torch.outer(torch.arange(LENGTH, dtype=torch.float64), frequency)
        angles = angles.repeat_interleave(2, dim=-1) if arguments["interleaved"] else angles.repeat(1, 2)
        calls.append(("forward", (2, LENGTH, arguments["dim"]), {"rotary_pos_emb": (angles[None], 1.0)}))
    return calls


ADAPTERS = {"Attention": [Adapter(Attention, _attention, _tokens, claims=_is_attention, adopt=_become)]}
