"""A block of grouped recurrent networks and SwiGLU, each behind an RMSNorm."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastblocks import functional
from fastblocks.generator._layers import RMSNorm, SwiGLU, may_fuse, plain_mlp, require_channels_last_dim

State = Tensor | tuple[Tensor, Tensor]
GATES = {"gru": 3, "lstm": 4}


class GroupParameters(nn.Module):
    """One group: parameters named and initialised like those of torch.nn.GRU or torch.nn.LSTM without biases.

    Args:
        rnn_type: 'gru' or 'lstm'.
        width: channels of the group.
        hidden: H, the hidden size.
        n_layer: how many layers.
        bidirectional: weights for both directions; layers above the first read both.
    """

    def __init__(self, rnn_type: str, width: int, hidden: int, n_layer: int, bidirectional: bool):
        super().__init__()
        self.rnn_type, self.n_layer, self.bidirectional = rnn_type, n_layer, bidirectional
        self.input_size, self.hidden_size, self.num_layers = width, hidden, n_layer  # as torch.nn.GRU calls them
        gates = GATES[rnn_type]
        bound = 1 / math.sqrt(hidden)
        for layer in range(n_layer):
            for suffix in _suffixes(self):
                for name, columns in (("weight_ih", width), ("weight_hh", hidden)):
                    weight = nn.Parameter(torch.empty(gates * hidden, columns).uniform_(-bound, bound))
                    self.register_parameter(f"{name}_l{layer}{suffix}", weight)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """x (B, T, width) -> (B, T, directions · hidden) and the state; GroupedRNN runs all of its groups at once."""
        return _run([self], x, state)


def _suffixes(group: GroupParameters) -> tuple[str, ...]:
    """What the parameters' names end in, a direction each."""
    return ("", "_reverse") if group.bidirectional else ("",)


def _weights(groups: Sequence[GroupParameters], name: str) -> Tensor:
    """The weights of all layers, directions and groups: (L, N, G, rows, columns)."""
    suffixes, layers = _suffixes(groups[0]), range(groups[0].n_layer)
    names = [f"{name}_l{layer}{suffix}" for layer in layers for suffix in suffixes]
    weights = torch.stack([getattr(group, name) for name in names for group in groups])
    return weights.unflatten(0, (len(layers), len(suffixes), -1))


def _run(groups: Sequence[GroupParameters], x: Tensor, state: State | None) -> tuple[Tensor, State]:
    """All layers of groups of one kind: x (B, T, G·I) -> (B, T, G·N·H) and the state, as GroupedRNN takes it."""
    first = groups[0]
    lstm = first.rnn_type == "lstm"
    recurrence = functional.grouped_lstm if lstm else functional.grouped_gru
    suffixes = _suffixes(first)

    def stacked(name: str) -> Tensor:
        """The weights of all directions and groups: (N, G, rows, columns)."""
        weights = [getattr(group, f"{name}{suffix}") for suffix in suffixes for group in groups]
        return torch.stack(weights).unflatten(0, (len(suffixes), -1))

    given = [None] * first.n_layer
    if state is not None:
        by_layer = zip(*(part.split(len(suffixes)) for part in (state if lstm else (state,))), strict=True)
        given = list(by_layer) if lstm else [h for (h,) in by_layer]
    final = []
    for layer in range(first.n_layer):
        x, last = recurrence(x, stacked(f"weight_ih_l{layer}"), stacked(f"weight_hh_l{layer}"), state=given[layer])
        final.append(last)
    return x, (tuple(torch.cat(part) for part in zip(*final, strict=True)) if lstm else torch.cat(final))


class GroupedRNN(nn.Module):
    """G independent GRUs or LSTMs, each on its C / G consecutive channels: (B, T, C) -> (B, T, C), no biases.

    The parameters are named as those of G modules torch.nn.GRU or torch.nn.LSTM (`rnns.{g}.weight_ih_l{k}`, …), each
    with a hidden size of C / G, or C / G / 2 per direction. Layers never mix groups.

    Args:
        n_embd: C, the channels.
        n_layer: how many layers deep.
        n_groups: G.
        rnn_type: 'gru' or 'lstm', in any case.
        bidirectional: run each layer in both directions.

    Raises:
        ValueError: if C is not divisible by G, C / G is odd and bidirectional, n_layer < 1, or rnn_type is unknown.
    """

    def __init__(self, n_embd: int, n_layer: int, n_groups: int, rnn_type: str = "gru", bidirectional: bool = False):
        super().__init__()
        self.rnn_type = str(rnn_type).lower()
        if self.rnn_type not in GATES:
            raise ValueError(f"rnn_type must be 'gru' or 'lstm', got {rnn_type!r}")
        if n_groups < 1 or n_embd % n_groups:
            raise ValueError(f"n_embd must be divisible by n_groups, got n_embd={n_embd} and n_groups={n_groups}")
        width = n_embd // n_groups
        if bidirectional and width % 2:
            raise ValueError(
                f"a bidirectional group needs an even number of channels, got n_embd / n_groups = {width} "
                f"(n_embd={n_embd}, n_groups={n_groups})"
            )
        if n_layer < 1:
            raise ValueError(f"n_layer must be positive, got {n_layer}")
        self.n_embd, self.n_layer, self.bidirectional = n_embd, n_layer, bidirectional
        self.n_groups, self.group_size = n_groups, width
        hidden = width // 2 if bidirectional else width
        self.rnns = nn.ModuleList(
            GroupParameters(self.rnn_type, width, hidden, n_layer, bidirectional) for _ in range(n_groups)
        )

    def forward(self, x: Tensor, state: State | None = None, return_state: bool = False) -> Tensor | tuple:
        """Run all layers.

        Args:
            x: (B, T, C).
            state: what an earlier call returned, to go on from there (of use in one direction only); None: zeros.
                A GRU's is h (n_layer · N, B, C / N) with N directions, in torch.nn.GRU's order of layers; an LSTM's is
                the pair (h, c) of such tensors.
            return_state: also return the state after the last step.

        Returns:
            (B, T, C), or with return_state a pair of it and the state.
        """
        require_channels_last_dim(x, self.n_embd, "GroupedRNN")
        self._check_state(x, state)
        groups = dict.fromkeys(self.rnns._modules, GroupParameters)
        together = may_fuse(f"grouped_{self.rnn_type}", self.rnns, **groups)
        y, last = _run(self.rnns, x, state) if together else self._group_by_group(x, state)
        return (y, last) if return_state else y

    def _group_by_group(self, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        """Each group by a call of its module."""
        lstm, groups = self.rnn_type == "lstm", len(self.rnns)
        states = [None] * groups
        if state is not None:
            parts = [part.chunk(groups, -1) for part in (state if lstm else (state,))]
            states = list(zip(*parts, strict=True)) if lstm else parts[0]
        results = [rnn(part, own) for rnn, part, own in zip(self.rnns, x.chunk(groups, -1), states, strict=True)]
        y, last = zip(*results, strict=True)
        last = tuple(torch.cat(part, -1) for part in zip(*last, strict=True)) if lstm else torch.cat(last, -1)
        return torch.cat(y, -1), last

    def _check_state(self, x: Tensor, state: State | None) -> None:
        if state is None:
            return
        directions = 2 if self.bidirectional else 1
        wanted = (self.n_layer * directions, x.shape[0], self.n_embd // directions)
        parts = state if self.rnn_type == "lstm" else (state,)
        if not isinstance(parts, tuple | list) or any(tuple(part.shape) != wanted for part in parts):
            raise ValueError(
                f"the state of this {self.rnn_type.upper()} must be "
                + (f"a pair of tensors {wanted}" if self.rnn_type == "lstm" else f"a tensor {wanted}")
                + f", got {[tuple(part.shape) for part in parts]}"
            )


class RNNBlock(nn.Module):
    """`x = x + rnn(rnn_norm(x))`, then `x = x + mlp(ffn_norm(x))`: (B, T, C) -> (B, T, C).

    Args:
        n_embd: C, the channels.
        n_layer: how many recurrent layers deep.
        n_groups: G, independent recurrences of C / G channels each.
        rnn_type: 'gru' or 'lstm', in any case.
        bidirectional: run each layer in both directions.

    Raises:
        ValueError: as GroupedRNN.
    """

    def __init__(self, n_embd: int, n_layer: int, n_groups: int, rnn_type: str = "gru", bidirectional: bool = False):
        super().__init__()
        self.rnn_norm = RMSNorm(n_embd)
        self.rnn = GroupedRNN(n_embd, n_layer, n_groups, rnn_type, bidirectional)
        self.ffn_norm = RMSNorm(n_embd)
        self.mlp = SwiGLU(n_embd)

    def forward(self, x: Tensor) -> Tensor:
        require_channels_last_dim(x, self.rnn.n_embd, "RNNBlock")
        if self._is_plain():
            groups, mlp = self.rnn.rnns, self.mlp
            return functional.rnn_block(
                x, _weights(groups, "weight_ih"), _weights(groups, "weight_hh"), mlp.c_fc1.weight, mlp.c_fc2.weight,
                mlp.c_proj.weight, self.rnn_norm.scale, self.ffn_norm.scale, eps_rnn=self.rnn_norm.eps,
                eps_mlp=self.ffn_norm.eps,
            )  # fmt: skip
        x = x + self.rnn(self.rnn_norm(x))
        return x + self.mlp(self.ffn_norm(x))

    def _is_plain(self) -> bool:
        children = {"rnn_norm": RMSNorm, "rnn": GroupedRNN, "ffn_norm": RMSNorm, "mlp": SwiGLU}
        return (
            may_fuse("rnn_block", self, **children)
            and may_fuse("rnn_block", self.rnn, rnns=nn.ModuleList)
            and may_fuse("rnn_block", self.rnn.rnns, **dict.fromkeys(self.rnn.rnns._modules, GroupParameters))
            and plain_mlp("rnn_block", self.mlp)
        )
