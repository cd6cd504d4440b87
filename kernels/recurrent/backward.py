"""The backward pass of grouped GRUs and LSTMs through time: its kernel and its launch. Formulas: `operator`."""

# ruff: noqa: SIM300 -- Triton compiles what follows a taken `if` as well; DTYPE is a variable

from functools import lru_cache

import torch
from torch import Tensor

from fastblocks.kernels import runtime
from fastblocks.kernels.launch import Prepared
from fastblocks.kernels.numerics import round_to
from fastblocks.kernels.recurrent.cell import (
    across,
    activate,
    hold,
    input_preactivations,
    load_float,
    load_padded,
    load_quads,
    load_weights,
    outer_product,
    product,
    state_preactivations,
    store_quads,
    store_weights,
    tanh,
    unpack,
)
from fastblocks.kernels.recurrent.forward import (
    Inputs,
    Sizes,
    forward,
    launch_config,
    numbers_of,
    outputs,
    pointers_of,
    precision_of,
    quad_weight,
    sizes_of,
)
from fastblocks.kernels.recurrent.weights import weight_gradients
from fastblocks.kernels.reduce import sum_rows
from fastblocks.kernels.runtime import cdiv, tl, triton


@triton.jit(do_not_specialize=["batch", "length", "groups"])
def _grouped_rnn_backward_kernel(
    grad_y_ptr, grad_h_last_ptr, grad_c_last_ptr, x_ptr, weight_ih_ptr, weight_hh_ptr, h_first_ptr, c_first_ptr,
    gates_ptr, cell_ptr, y_ptr, grad_x_ptr, grad_preactivations_words_ptr, partial_ptr, grad_h_first_ptr,
    grad_c_first_ptr,
    batch, length, groups, partial_size,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    I: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PACK: tl.constexpr, DIRECTIONS: tl.constexpr, LSTM: tl.constexpr, FUSED: tl.constexpr, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    TRANSPOSED: tl.constexpr, HELD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """grid (tiles of batch · directions · G / PACK,), groups fastest. A tile packs PACK groups of H units, padded to
    BLOCK_H, and I inputs, padded to BLOCK_I.

    gates_ptr: (G, B·T, N, H, 4), a unit's four values as one 64-bit word (float32: two), or None: recompute them.
    cell_ptr: (G, B·T, N, H). FUSED: fills grad_x (N, B, T, G·I), a tensor per direction, and row `tile` of partial
    (tiles, partial_size); else grad_preactivations_words, laid out as gates. STAGES: of the time loop's pipeline.
    """
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    GATES: tl.constexpr = 4 if LSTM else 3
    SHAPE: tl.constexpr = (PACK * BLOCK_H, BLOCK_B) if TRANSPOSED else (BLOCK_B, PACK * BLOCK_H)
    X_SHAPE: tl.constexpr = (PACK * BLOCK_I, BLOCK_B) if TRANSPOSED else (BLOCK_B, PACK * BLOCK_I)
    WORDS: tl.constexpr = 2 if DTYPE == tl.float32 else 1  # 64-bit words per four values
    RECOMPUTE: tl.constexpr = gates_ptr is None  # the gates, from x and y, which are kept anyway
    packs = groups // PACK
    group = tl.program_id(0) % packs * PACK
    direction = tl.program_id(0) // packs % DIRECTIONS
    tile = tl.program_id(0) // (packs * DIRECTIONS)
    first = direction * groups + group
    step = 1 - 2 * direction
    start = direction * (length - 1)

    offs_b = tile * BLOCK_B + tl.arange(0, BLOCK_B)
    offs_u = tl.arange(0, PACK * BLOCK_H)
    inside = across(offs_b, not TRANSPOSED) < batch
    row = across(tl.minimum(offs_b, batch - 1).to(tl.int64), not TRANSPOSED)  # past the batch: its last row again
    unit = across(offs_u % BLOCK_H, TRANSPOSED)
    member = group + across(offs_u // BLOCK_H, TRANSPOSED)
    mask_u = unit < H
    mask = inside & mask_u
    stride_x_t = groups * I
    stride_y_t = groups * DIRECTIONS * H
    stride_g_t = DIRECTIONS * H * WORDS
    stride_c_t = DIRECTIONS * H
    index_y = row * length * stride_y_t + (member * DIRECTIONS + direction) * H + unit
    state_index = (direction * batch + row) * groups * H + member * H + unit
    kept_row = (member * batch + row) * length * DIRECTIONS + direction
    y_ptrs = y_ptr + index_y
    grad_y_ptrs = grad_y_ptr + index_y
    if gates_ptr is not None:
        gates_ptrs = gates_ptr + (kept_row * H + unit) * WORDS
    if cell_ptr is not None:
        cell_ptrs = cell_ptr + kept_row * H + unit
    u_back = load_weights(weight_hh_ptr, first, offs_u, offs_u, H, BLOCK_H, H, BLOCK_H, LSTM, not TRANSPOSED, DTYPE)
    u_back = hold(u_back, HELD, LSTM, DTYPE)
    if FUSED:
        offs_i = tl.arange(0, PACK * BLOCK_I)
        feature = across(offs_i % BLOCK_I, TRANSPOSED)
        mask_i = feature < I
        index_i = (group + across(offs_i // BLOCK_I, TRANSPOSED)) * I + feature
        x_ptrs = x_ptr + row * length * stride_x_t + index_i
        grad_x_ptrs = grad_x_ptr + (direction * batch + row) * length * stride_x_t + index_i
        w_back = load_weights(weight_ih_ptr, first, offs_u, offs_i, H, BLOCK_H, I, BLOCK_I, LSTM, not TRANSPOSED, DTYPE)
        if RECOMPUTE:
            w = load_weights(weight_ih_ptr, first, offs_u, offs_i, H, BLOCK_H, I, BLOCK_I, LSTM, TRANSPOSED, DTYPE)
            u = load_weights(weight_hh_ptr, first, offs_u, offs_u, H, BLOCK_H, H, BLOCK_H, LSTM, TRANSPOSED, DTYPE)
        W_SHAPE: tl.constexpr = (PACK * BLOCK_H, PACK * BLOCK_I) if TRANSPOSED else (PACK * BLOCK_I, PACK * BLOCK_H)
        grad_w0 = tl.zeros(W_SHAPE, tl.float32)
        grad_w1 = grad_w0
        grad_w2 = grad_w0
        grad_w3 = grad_w0
        grad_u0 = tl.zeros((PACK * BLOCK_H, PACK * BLOCK_H), tl.float32)
        grad_u1 = grad_u0
        grad_u2 = grad_u0
        grad_u3 = grad_u0
    else:
        grad_preactivations_ptrs = grad_preactivations_words_ptr + (kept_row * H + unit) * WORDS

    HOLD_FIRST: tl.constexpr = h_first_ptr is not None and not (LSTM and FUSED)  # which has no registers left for it
    if HOLD_FIRST:
        h_first = round_to(load_float(h_first_ptr + state_index, mask), DTYPE)

    grad_h = tl.zeros(SHAPE, tl.float32)
    grad_c = tl.zeros(SHAPE, tl.float32)
    if grad_h_last_ptr is not None:
        grad_h = load_float(grad_h_last_ptr + state_index, mask)
    if grad_c_last_ptr is not None:
        grad_c = load_float(grad_c_last_ptr + state_index, mask)

    # Gates are recomputed one iteration early, off the critical path from ∂h to ∂h: step s works on what the iteration
    # before prepared. The first iteration only prepares: its step has zero gradients and a g1 (z or
    # forget gate) of 1.
    last = length - 1
    if RECOMPUTE:
        last = length
        g0 = tl.zeros(SHAPE, tl.float32)
        g1 = g0 + 1.0
        g2 = g0
        g3 = g0
        h_prev = tl.zeros(SHAPE, DTYPE)
        x = tl.zeros(X_SHAPE, DTYPE)
    for iteration in tl.range(0, last + 1, num_stages=STAGES):
        s = last - iteration
        inside_s = s < length
        t = (start + (tl.minimum(s, length - 1) if RECOMPUTE else s) * step).to(tl.int64)
        prepared = s - 1 if RECOMPUTE else s
        t_prepared = (start + tl.maximum(prepared, 0) * step).to(tl.int64)
        t_before = (start + tl.maximum(prepared - 1, 0) * step).to(tl.int64)
        later = prepared > 0  # the state before the first step is h_first, not in y
        # Loads stay in the asynchronous pipeline if no mask varies, by row or by step, and a selection by a scalar
        # follows each, before any change of layout. Rows past the batch are its last one again: their gradients
        # are set to zero only where they would enter the weights'.
        grad_y = load_padded(grad_y_ptrs + t * stride_y_t, mask_u, BLOCK_H != H)
        grad_y = tl.where(inside_s, grad_y, 0.0).to(tl.float32)
        h_before = load_padded(y_ptrs + t_before * stride_y_t, mask_u, BLOCK_H != H)
        if h_first_ptr is None:
            h_before = tl.where(later, h_before, 0.0)
        else:
            if not HOLD_FIRST:
                h_first = round_to(load_float(h_first_ptr + state_index, mask & (prepared == 0)), DTYPE)
            h_before = tl.where(later, h_before, h_first)
        if FUSED:
            x_ahead = round_to(load_padded(x_ptrs + t_prepared * stride_x_t, mask_i, BLOCK_I != I), DTYPE)
        if LSTM:  # c was the last iteration's c_prev, but carrying it over would end the pipelining of loads
            t_previous = (start + tl.maximum(s - 1, 0) * step).to(tl.int64)
            c = tl.where(inside_s, load_padded(cell_ptrs + t * stride_c_t, mask_u, BLOCK_H != H), 0.0)
            c_prev = load_padded(cell_ptrs + t_previous * stride_c_t, mask_u, BLOCK_H != H)
            if c_first_ptr is None:
                c_prev = tl.where(s > 0, c_prev, 0.0)
            else:
                c_first = round_to(load_float(c_first_ptr + state_index, mask & (s == 0)), DTYPE)
                c_prev = tl.where(s > 0, c_prev, c_first)
        if not RECOMPUTE:
            low, high = load_quads(gates_ptrs + t * stride_g_t, mask_u, BLOCK_H != H, DTYPE)
            g0, g1, g2, g3 = unpack(low, high, DTYPE)
            h_prev = h_before
            if FUSED:
                x = x_ahead

        grad_h += grad_y
        if FUSED:
            grad_h = tl.where(inside, grad_h, 0.0)
        if LSTM:
            tanh_c = tanh(c.to(tl.float32), ACTIVATION)
            grad_c += grad_h * g3 * (1.0 - tanh_c * tanh_c)
            d0 = grad_c * g2 * g0 * (1.0 - g0)
            d1 = grad_c * c_prev.to(tl.float32) * g1 * (1.0 - g1)
            d2 = grad_c * g0 * (1.0 - g2 * g2)
            d3 = grad_h * tanh_c * g3 * (1.0 - g3)
            grad_c *= g1
            carried = tl.where(inside_s, 0.0, grad_h) if RECOMPUTE else tl.zeros(SHAPE, tl.float32)
        else:
            d2 = grad_h * (1.0 - g1) * (1.0 - g2 * g2)
            d1 = grad_h * (h_prev.to(tl.float32) - g2) * g1 * (1.0 - g1)
            d0 = d2 * g3 * g0 * (1.0 - g0)
            d3 = d2 * g0
            carried = grad_h * g1
        e0 = round_to(d0, DTYPE)
        e1 = round_to(d1, DTYPE)
        e2 = round_to(d2, DTYPE)
        e3 = round_to(d3, DTYPE)
        grad_h = product(e1, u_back[1], carried, TRANSPOSED, PRECISION)
        grad_h = product(e3, u_back[3], grad_h, TRANSPOSED, PRECISION)
        grad_h = product(e0, u_back[0], grad_h, TRANSPOSED, PRECISION)
        if LSTM:
            grad_h = product(e2, u_back[2], grad_h, TRANSPOSED, PRECISION)
        if FUSED:
            grad_x = product(e0, w_back[0], tl.zeros(X_SHAPE, tl.float32), TRANSPOSED, PRECISION)
            grad_x = product(e1, w_back[1], grad_x, TRANSPOSED, PRECISION)
            grad_x = product(e2, w_back[2], grad_x, TRANSPOSED, PRECISION)
            grad_w0 = outer_product(x, e0, grad_w0, TRANSPOSED, PRECISION)
            grad_w1 = outer_product(x, e1, grad_w1, TRANSPOSED, PRECISION)
            grad_w2 = outer_product(x, e2, grad_w2, TRANSPOSED, PRECISION)
            grad_u0 = outer_product(h_prev, e0, grad_u0, TRANSPOSED, PRECISION)
            grad_u1 = outer_product(h_prev, e1, grad_u1, TRANSPOSED, PRECISION)
            grad_u2 = outer_product(h_prev, e2 if LSTM else e3, grad_u2, TRANSPOSED, PRECISION)
            if LSTM:
                grad_x = product(e3, w_back[3], grad_x, TRANSPOSED, PRECISION)
                grad_w3 = outer_product(x, e3, grad_w3, TRANSPOSED, PRECISION)
                grad_u3 = outer_product(h_prev, e3, grad_u3, TRANSPOSED, PRECISION)
            tl.store(
                grad_x_ptrs + t * stride_x_t,
                round_to(grad_x, grad_x_ptr.dtype.element_ty),
                mask=inside & mask_i & (s < length),
            )
        else:
            store_quads(grad_preactivations_ptrs + t * stride_g_t, d0, d1, d2, d3, mask & (s < length), DTYPE)

        if RECOMPUTE:
            preactivations = input_preactivations(x_ahead, w, SHAPE, LSTM, TRANSPOSED, PRECISION)
            preactivations = state_preactivations(h_before, u, preactivations, LSTM, TRANSPOSED, PRECISION)
            g0, g1, g2, g3 = activate(preactivations, LSTM, ACTIVATION, False)
            h_prev = h_before
            x = x_ahead

    if grad_h_first_ptr is not None:
        tl.store(grad_h_first_ptr + state_index, grad_h, mask=mask)
        if LSTM:
            tl.store(grad_c_first_ptr + state_index, grad_c, mask=mask)
    if FUSED:
        # This tile's share of the weights' gradients: weight_ih, then weight_hh.
        ptr = partial_ptr + tile.to(tl.int64) * partial_size
        store_weights(
            ptr, first, offs_u, offs_i, H, BLOCK_H, I, BLOCK_I, LSTM, TRANSPOSED, (grad_w0, grad_w1, grad_w2, grad_w3)
        )
        ptr += groups * DIRECTIONS * GATES * H * I
        store_weights(
            ptr, first, offs_u, offs_u, H, BLOCK_H, H, BLOCK_H, LSTM, TRANSPOSED, (grad_u0, grad_u1, grad_u2, grad_u3)
        )


def _partial_size(sizes: Sizes) -> int:
    """Elements of both weights."""
    rows = sizes.directions * sizes.groups * (4 if sizes.lstm else 3) * sizes.hidden
    return rows * (sizes.inputs + sizes.hidden)


@lru_cache(maxsize=1024)
def _backward_launch(
    sizes: Sizes, float32: bool, architecture: str, state: bool, activation: str, precision: str
) -> tuple[Prepared, int]:
    """And the number of tiles of batch."""
    config = launch_config(sizes, float32, architecture, state, backward=True, tf32=precision == "tf32")
    numbers, tiles = numbers_of(sizes), cdiv(sizes.batch, config["BLOCK_B"])
    prepared = Prepared(
        _grouped_rnn_backward_kernel, (sizes.groups // numbers["PACK"] * sizes.directions * tiles,), config,
        **numbers, ACTIVATION=activation, PRECISION=precision,
        partial_size=_partial_size(sizes) if sizes.fused else 0, STAGES=config.num_stages,
    )  # fmt: skip
    return prepared, tiles


def backward(
    grad_y: Tensor | None,
    grad_h_last: Tensor | None,
    grad_c_last: Tensor | None,
    given: Inputs,
    y: Tensor,
    gates: Tensor | None,
    cell: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of the inputs, in their dtypes, or None."""
    x, weight_ih, h_first, dtype = given.x, given.weight_ih, given.h_first, y.dtype
    sizes = sizes_of(given, dtype)
    directions, lstm, fused = sizes.directions, sizes.lstm, sizes.fused
    grad_y = torch.zeros_like(y) if grad_y is None else grad_y
    if gates is None and not fused:
        again = outputs(given, dtype, keep_gates=True, keep_cell=True)
        forward(given, *again)
        *_, gates, cell = again
    activation, precision = precision_of(x, dtype).values()
    prepared, tiles = _backward_launch(
        sizes, dtype == torch.float32, runtime.architecture(x.device), h_first is not None, activation, precision
    )
    grads = [torch.empty_like(weight) for weight in (weight_ih, given.weight_hh)]
    grad_x = grad_preactivations = partial = grad_h_first = None
    if fused:
        grad_x = x.new_empty(directions, *x.shape)
        partial = x.new_empty(tiles, _partial_size(sizes), dtype=torch.float32)
    else:
        grad_preactivations = torch.empty_like(gates)
    if h_first is not None:
        grad_h_first = torch.empty_like(h_first, dtype=torch.float32)
    grad_c_first = torch.empty_like(grad_h_first) if given.c_first is not None else None
    prepared(
        x, **pointers_of(given, y, gates, cell),
        grad_y_ptr=grad_y, grad_h_last_ptr=grad_h_last, grad_c_last_ptr=grad_c_last, grad_x_ptr=grad_x,
        grad_preactivations_words_ptr=None if grad_preactivations is None else grad_preactivations.view(torch.int64),
        partial_ptr=partial, grad_h_first_ptr=grad_h_first, grad_c_first_ptr=grad_c_first,
    )  # fmt: skip
    grad_biases = (None, None)
    if fused:
        grad_x = grad_x[0] if directions == 1 else grad_x[0] + grad_x[1]
        sum_rows(partial, grads)
    else:
        weight = quad_weight(weight_ih, sizes.hidden, dtype).transpose(1, 2)
        rows = torch.bmm(grad_preactivations.flatten(2), weight)  # (G, B·T, I)
        grad_x = rows.transpose(0, 1).reshape(x.shape).to(x.dtype)
        weight_gradients(x, y, h_first, grad_preactivations, *grads, precision)
        if given.bias_ih is not None:
            quads = grad_preactivations.sum(1, dtype=torch.float32).permute(1, 0, 3, 2)  # (N, G, 4, H)
            of_gates = (quads, quads) if lstm else (quads[:, :, :3], quads[:, :, [0, 1, 3]])
            grad_biases = [
                grad.reshape(bias.shape).to(bias.dtype)
                for grad, bias in zip(of_gates, (given.bias_ih, given.bias_hh), strict=True)
            ]
    grad_states = [
        None if grad is None else grad.to(state.dtype)
        for grad, state in ((grad_h_first, h_first), (grad_c_first, given.c_first))
    ]
    return grad_x, *grads, *grad_biases, *grad_states
