"""GRU and LSTM layers from their formulas: a loop over directions, groups and time steps."""

import torch
from torch import Tensor


def gru_cell(x: Tensor, h: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor, bias_hh: Tensor) -> Tensor:
    """Cho et al., 2014, as torch.nn.GRUCell has it: gates in the order r, z, n."""
    x_r, x_z, x_n = (x @ weight_ih.T + bias_ih).chunk(3, dim=-1)
    h_r, h_z, h_n = (h @ weight_hh.T + bias_hh).chunk(3, dim=-1)
    r = torch.sigmoid(x_r + h_r)
    z = torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + r * h_n)
    return (1 - z) * n + z * h


def lstm_cell(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh) -> tuple[Tensor, Tensor]:
    """Hochreiter and Schmidhuber, 1997, as torch.nn.LSTMCell has it: gates in the order i, f, g, o."""
    i, f, g, o = (x @ weight_ih.T + bias_ih + h @ weight_hh.T + bias_hh).chunk(4, dim=-1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def grouped_rnn(x, weight_ih, weight_hh, bias_ih=None, bias_hh=None, h=None, c=None) -> tuple[Tensor, Tensor, Tensor]:
    """One layer: y (B, T, G·N·H), the last h and, for an LSTM, the last c, both (N, B, G·H)."""
    directions, groups, rows, inputs = weight_ih.shape
    hidden = weight_hh.shape[3]
    batch, length, _ = x.shape
    zeros = x.new_zeros(directions, groups, rows)
    bias_ih, bias_hh = (zeros, zeros) if bias_ih is None else (bias_ih, bias_hh)
    start = x.new_zeros(directions, batch, groups * hidden)
    h, c = start if h is None else h, start if c is None else c
    y, h_last, c_last = {}, {}, {}
    for n in range(directions):
        for g in range(groups):
            state, cell = (s[n, :, g * hidden : (g + 1) * hidden] for s in (h, c))
            parameters = weight_ih[n, g], weight_hh[n, g], bias_ih[n, g], bias_hh[n, g]
            for t in range(length) if n == 0 else reversed(range(length)):
                x_t = x[:, t, g * inputs : (g + 1) * inputs]
                if rows == 3 * hidden:
                    state = gru_cell(x_t, state, *parameters)
                else:
                    state, cell = lstm_cell(x_t, state, cell, *parameters)
                y[g, n, t] = state
            h_last[n, g], c_last[n, g] = state, cell
    pairs = [(g, n) for g in range(groups) for n in range(directions)]
    return (
        torch.stack([torch.cat([y[g, n, t] for g, n in pairs], -1) for t in range(length)], 1),
        torch.stack([torch.cat([h_last[n, g] for g in range(groups)], -1) for n in range(directions)]),
        torch.stack([torch.cat([c_last[n, g] for g in range(groups)], -1) for n in range(directions)]),
    )


def library(x, weight_ih, weight_hh, bias_ih=None, bias_hh=None, h=None, c=None) -> tuple[Tensor, Tensor, Tensor]:
    """The same by torch.gru and torch.lstm, a call a group."""
    directions, groups, rows, inputs = weight_ih.shape
    hidden = weight_hh.shape[3]
    start = x.new_zeros(directions, x.shape[0], groups * hidden)
    h, c = start if h is None else h, start if c is None else c
    results = []
    for g in range(groups):
        x_g = x[..., g * inputs : (g + 1) * inputs]
        state, cell = (s[..., g * hidden : (g + 1) * hidden].contiguous() for s in (h, c))
        weights = []
        for n in range(directions):
            weights += [weight_ih[n, g], weight_hh[n, g]]
            weights += [bias_ih[n, g], bias_hh[n, g]] if bias_ih is not None else []
        # in training mode: cuDNN has a backward pass in no other
        options = weights, bias_ih is not None, 1, 0.0, True, directions == 2, True
        if rows == 3 * hidden:
            results.append((*torch.gru(x_g, state, *options), cell))
        else:
            results.append(torch.lstm(x_g, (state, cell), *options))
    return tuple(torch.cat(parts, -1) for parts in zip(*results, strict=True))
