"""What the generator's blocks share."""

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastblocks import backend, functional


class RMSNorm(nn.Module):
    """Root-mean-square normalization over the last dimension, (…, C) -> (…, C), statistics in float32.

    Args:
        n_embd: C.
        eps: added to the mean square.
    """

    def __init__(self, n_embd: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(n_embd))

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.scale, self.eps)

    def extra_repr(self) -> str:
        return f"{self.scale.shape[0]}, eps={self.eps}"


class SwiGLU(nn.Module):
    """`c_proj(silu(c_fc1(x)) * c_fc2(x))`, (…, C) -> (…, C), hidden width int(2 · 4C / 3), no biases.

    Args:
        n_embd: C.
    """

    def __init__(self, n_embd: int):
        super().__init__()
        hidden = int(2 * 4 * n_embd / 3)
        self.c_fc1 = nn.Linear(n_embd, hidden, bias=False)
        self.c_fc2 = nn.Linear(n_embd, hidden, bias=False)
        self.c_proj = nn.Linear(hidden, n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if plain_mlp("swiglu_mlp", self):
            return functional.swiglu_mlp(x, self.c_fc1.weight, self.c_fc2.weight, self.c_proj.weight)
        return self.c_proj(functional.swiglu(self.c_fc1(x), self.c_fc2(x)))


def plain_mlp(operation: str, mlp: SwiGLU) -> bool:
    """True if an operation may read the layer's weights; `explain` hears of a layer that it may not."""
    return may_fuse(operation, mlp, c_fc1=nn.Linear, c_fc2=nn.Linear, c_proj=nn.Linear, bias=False)


def may_fuse(operation: str, parent: nn.Module, *, bias: bool | None = None, **children: type[nn.Module]) -> bool:
    """True if a fused operation may read the children's parameters directly; False: call the children as modules.

    It may only where calling them would do nothing else. A child that was replaced (LoRA, quantization, FSDP) or has
    hooks (weight_norm is one), parametrizations or a `forward` of its own is called, because otherwise those would
    silently do nothing. `explain` then names it.

    Args:
        operation: the fused operation, for `explain`.
        parent: the module.
        bias: whether the children must or must not have one; None: no matter.
        **children: the class of each child, by name.
    """
    modules, anywhere = parent._modules, _has_any_global_hook()
    others = [name for name, kind in children.items() if anywhere or not is_plain(modules[name], kind, bias)]
    if others:
        called_as_modules(operation, others)
    return not others


def called_as_modules(operation: str, names: list[str]) -> None:
    """Tell `explain` that an operation is not fused, because of these children."""
    backend.declined(operation, f"replaced, hooked or changed, so called as modules: {', '.join(names)}")


def is_plain(module: nn.Module, kind: type[nn.Module], bias: bool | None) -> bool:
    """True if a call of the module is `kind.forward`, with a bias or without as asked for, and nothing more."""
    return (
        type(module) is kind
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and "forward" not in module.__dict__
        and (bias is None or (module._parameters.get("bias") is not None) is bias)
    )


def require_channels_last_dim(x: Tensor, n_embd: int, block: str) -> None:
    """Raise a ValueError unless x is (B, T, n_embd)."""
    if x.dim() != 3 or x.shape[-1] != n_embd:
        raise ValueError(f"{block} needs x of shape (B, T, {n_embd}), got {tuple(x.shape)}")
