"""Layers of independent GRUs and LSTMs."""

from types import ModuleType

from torch import Tensor

from fastblocks.eager import recurrent as eager
from fastblocks.functional._dispatch import require, require_floating, run, shape


def grouped_gru(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    state: Tensor | None = None,
    keep_gates: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """One layer of G independent GRUs side by side, in one or both directions.

    With gates in torch.nn.GRU's order and equations: `r = σ(W_r x + U_r h)`, `z = σ(W_z x + U_z h)`,
    `n = tanh(W_n x + r * (U_n h))`, `h = n + z * (h - n)`; biases, where given, as in torch.nn.GRU.

    Source: Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder", 2014, in cuDNN's form.

    Args:
        x: (B, T, G·I): group g reads its channels g·I … (g+1)·I - 1.
        weight_ih: (N, G, 3H, I), N = 1 for one direction, 2 for both (the second runs backward in time).
        weight_hh: (N, G, 3H, H).
        bias_ih, bias_hh: (N, G, 3H), both or none.
        state: (N, B, G·H), the hidden state before the first step; None: zeros.
        keep_gates: of the Triton kernels: keep every step's gates for the backward pass (four values a unit and step)
            instead of recomputing them. None: only where they are in memory anyway
            (with biases, or I or H over 32; float32: 16).

    Returns:
        y: (B, T, G·N·H): for every group its forward, then its backward hidden units; under autocast in its dtype.
        state: (N, B, G·H), the hidden state after the last step of each direction.

    Raises:
        ValueError: if shapes do not fit.
    """
    _check_recurrent("grouped_gru", 3, x, weight_ih, weight_hh, bias_ih, bias_hh, state)
    return run("grouped_gru", _kernels, eager.grouped_gru, x, weight_ih, weight_hh, bias_ih, bias_hh, state, keep_gates)


def grouped_lstm(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    state: tuple[Tensor, Tensor] | None = None,
    keep_gates: bool | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One layer of G independent LSTMs side by side, in one or both directions.

    With gates in torch.nn.LSTM's order and equations: `i, f, o = σ(…)`, `g = tanh(…)`, `c = f * c + i * g`,
    `h = o * tanh(c)`.

    Source: Hochreiter and Schmidhuber, "Long Short-Term Memory", 1997, in cuDNN's form.

    Args:
        x: (B, T, G·I): group g reads its channels g·I … (g+1)·I - 1.
        weight_ih: (N, G, 4H, I), N = 1 for one direction, 2 for both (the second runs backward in time).
        weight_hh: (N, G, 4H, H).
        bias_ih, bias_hh: (N, G, 4H), both or none.
        state: the pair (h, c), each (N, B, G·H), before the first step; None: zeros.
        keep_gates: of the Triton kernels: keep every step's gates for the backward pass (four values a unit and step)
            instead of recomputing them. None: only where they are in memory anyway
            (with biases, or I or H over 32; float32: 16).

    Returns:
        y: (B, T, G·N·H): for every group its forward, then its backward hidden units; under autocast in its dtype.
        state: the pair (h, c) after the last step of each direction.

    Raises:
        ValueError: if shapes do not fit.
    """
    require(
        state is None or (isinstance(state, tuple | list) and len(state) == 2),
        lambda: f"grouped_lstm: state must be a pair (h, c), got {type(state).__name__}",
    )
    for part in state or (None,):
        _check_recurrent("grouped_lstm", 4, x, weight_ih, weight_hh, bias_ih, bias_hh, part)
    return run(
        "grouped_lstm", _kernels, eager.grouped_lstm, x, weight_ih, weight_hh, bias_ih, bias_hh, state, keep_gates
    )


def _kernels() -> ModuleType:
    from fastblocks.kernels.recurrent import operator

    return operator


def _check_recurrent(name, gates, x, weight_ih, weight_hh, bias_ih, bias_hh, state) -> None:
    require(
        x.dim() == 3 and weight_ih.dim() == 4 and weight_hh.dim() == 4,
        lambda: (
            f"{name}: x must be (B, T, G·I), weight_ih (N, G, {gates}H, I), weight_hh (N, G, {gates}H, H), "
            f"got {shape(x)}, {shape(weight_ih)}, {shape(weight_hh)}"
        ),
    )
    directions, groups, rows, hidden = weight_hh.shape
    require(
        directions in (1, 2)
        and rows == gates * hidden
        and shape(weight_ih)[:3] == (directions, groups, rows)
        and groups * weight_ih.shape[3] == x.shape[2],
        lambda: (
            f"{name}: weights do not fit x {shape(x)} or each other: weight_ih {shape(weight_ih)}, "
            f"weight_hh {shape(weight_hh)}"
        ),
    )
    require((bias_ih is None) == (bias_hh is None), lambda: f"{name}: give both biases or none")
    require(
        all(bias is None or shape(bias) == (directions, groups, rows) for bias in (bias_ih, bias_hh)),
        lambda: f"{name}: biases must be {(directions, groups, rows)}, got {shape(bias_ih)} and {shape(bias_hh)}",
    )
    wanted = (directions, x.shape[0], groups * hidden)
    require(
        state is None or shape(state) == wanted,
        lambda: f"{name}: state must be {wanted}, got {state is not None and shape(state)}",
    )
    require_floating(name, x=x, weight_ih=weight_ih, weight_hh=weight_hh, bias_ih=bias_ih, bias_hh=bias_hh, state=state)
