"""A recurrent block: RMSNorm, grouped GRU or LSTM, RMSNorm, SwiGLU."""

import torch
from torch import Tensor, nn

from benchmarks.original.generator._layers import MLP, RMSNorm


class GroupedRNN(nn.Module):
    """(B, T, C) -> (B, T, C): one torch.nn RNN for each group of C / G channels."""

    def __init__(self, n_embd: int, n_layer: int, n_groups: int, rnn_type: str = "gru", bidirectional: bool = False):
        super().__init__()
        width = n_embd // n_groups
        kind = {"gru": nn.GRU, "lstm": nn.LSTM}[rnn_type.lower()]
        self.n_groups = n_groups
        self.rnns = nn.ModuleList(
            kind(
                width,
                width // 2 if bidirectional else width,
                n_layer,
                bias=False,
                batch_first=True,
                bidirectional=bidirectional,
            )
            for _ in range(n_groups)
        )

    def forward(self, x: Tensor) -> Tensor:
        groups = x.chunk(self.n_groups, dim=-1)
        return torch.cat([rnn(group)[0] for rnn, group in zip(self.rnns, groups, strict=True)], dim=-1)


class RNNBlock(nn.Module):
    """(B, T, C) -> (B, T, C)."""

    def __init__(self, n_embd: int, n_layer: int, n_groups: int, rnn_type: str = "gru", bidirectional: bool = False):
        super().__init__()
        self.rnn_norm = RMSNorm(n_embd)
        self.rnn = GroupedRNN(n_embd, n_layer, n_groups, rnn_type, bidirectional)
        self.ffn_norm = RMSNorm(n_embd)
        self.mlp = MLP(n_embd)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.rnn(self.rnn_norm(x))
        return x + self.mlp(self.ffn_norm(x))
