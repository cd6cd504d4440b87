"""What the blocks share: RMSNorm and the SwiGLU layer."""

import torch
from torch import Tensor, nn

from benchmarks.original import functional


class RMSNorm(nn.Module):
    """(…, C) -> (…, C)."""

    def __init__(self, n_embd: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(n_embd))

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.scale)


class MLP(nn.Module):
    """SwiGLU layer, (…, C) -> (…, C), hidden width int(8C / 3)."""

    def __init__(self, n_embd: int):
        super().__init__()
        hidden = int(2 * 4 * n_embd / 3)
        self.c_fc1 = nn.Linear(n_embd, hidden, bias=False)
        self.c_fc2 = nn.Linear(n_embd, hidden, bias=False)
        self.c_proj = nn.Linear(hidden, n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(functional.swiglu(self.c_fc1(x), self.c_fc2(x)))
