"""What the generator's blocks share."""

import torch
from torch import Tensor, nn

from fastblocks import functional


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
        return functional.swiglu_mlp(x, self.c_fc1.weight, self.c_fc2.weight, self.c_proj.weight)


def require_channels_last_dim(x: Tensor, n_embd: int, block: str) -> None:
    """Raise a ValueError unless x is (B, T, n_embd)."""
    if x.dim() != 3 or x.shape[-1] != n_embd:
        raise ValueError(f"{block} needs x of shape (B, T, {n_embd}), got {tuple(x.shape)}")
