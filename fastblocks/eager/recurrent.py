"""One layer of grouped GRUs and LSTMs, by the library's recurrences."""

import torch
from torch import Tensor


def grouped_gru(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    y, (h,) = _grouped(torch.gru, 3, x, weight_ih, weight_hh, bias_ih, bias_hh, (state,))
    return y, h


def grouped_lstm(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    state: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    y, (h, c) = _grouped(torch.lstm, 4, x, weight_ih, weight_hh, bias_ih, bias_hh, state or (None, None))
    return y, (h, c)


def _block_diagonal(weight: Tensor, gates: int) -> Tensor:
    """(G, gates·H, I) -> (gates·G·H, G·I): one recurrence in which no group sees another."""
    groups, rows, inputs = weight.shape
    by_gate = weight.unflatten(1, (gates, -1)).movedim(1, 0)  # (gates, G, H, I)
    eye = torch.eye(groups, dtype=weight.dtype, device=weight.device)
    return torch.einsum("kghi,gf->kghfi", by_gate, eye).reshape(gates * groups * (rows // gates), groups * inputs)


def _grouped(recurrence, gates, x, weight_ih, weight_hh, bias_ih, bias_hh, state):
    directions, groups, _, hidden = weight_hh.shape
    batch, length, _ = x.shape
    dtype = x.dtype
    weights = []
    for d in range(directions):
        weights += [_block_diagonal(weight_ih[d], gates), _block_diagonal(weight_hh[d], gates)]
        if bias_ih is not None:
            weights += [b[d].unflatten(1, (gates, -1)).movedim(1, 0).flatten() for b in (bias_ih, bias_hh)]
    initial = [x.new_zeros(directions, batch, groups * hidden) if s is None else s.to(dtype) for s in state]
    has_bias, bidirectional = bias_ih is not None, directions == 2
    hx = initial[0] if len(initial) == 1 else initial
    y, *final = recurrence(x, hx, weights, has_bias, 1, 0.0, False, bidirectional, True)
    if bidirectional:  # (direction, group) -> (group, direction)
        y = y.unflatten(2, (directions, groups, hidden)).transpose(2, 3).flatten(2)
    return y, final
