"""The forward pass of grouped GRUs and LSTMs: its kernel and its launch. Formulas: `operator`."""

# ruff: noqa: SIM300 -- Triton compiles what follows a taken `if` as well; DTYPE is a variable

from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fastblocks.kernels import runtime
from fastblocks.kernels.launch import LaunchConfig, Prepared
from fastblocks.kernels.numerics import round_to
from fastblocks.kernels.recurrent import config as table
from fastblocks.kernels.recurrent.cell import (
    across,
    activate,
    hold,
    input_preactivations,
    load_biases,
    load_float,
    load_padded,
    load_quads,
    load_weights,
    state_preactivations,
    store_quads,
    tanh,
    unpack,
)
from fastblocks.kernels.runtime import cdiv, power_of_two, tl, triton

# Largest I and H (16 bits; float32) for which, without biases, the projection of x and all gradients are computed in
# the time loop: the weights' gradients accumulate in registers, and neither gates nor their gradients go through
# memory. Biases are excluded because an LSTM of 16 units has no registers left for them and the sums of their
# gradients.
FUSED_LIMIT, FUSED_LIMIT_FLOAT32 = 32, 16

# Fewest columns of a tl.dot: Triton before 3.6 takes 16.
LEAST_COLUMNS = 8 if runtime.VERSION >= (3, 6) else 16

# One instruction, `tanh.approx`, good to 11 bits: enough for bfloat16, too little for float16. It is inline
# PTX: tools that execute Triton's IR cannot run it and may set this to False.
HARDWARE_TANH = True


@triton.jit(do_not_specialize=["batch", "length", "groups"])
def _grouped_rnn_forward_kernel(
    x_ptr, weight_ih_ptr, weight_hh_ptr, bias_ih_ptr, bias_hh_ptr, h_first_ptr, c_first_ptr, gates_ptr, cell_ptr,
    y_ptr, h_last_ptr, c_last_ptr,
    batch, length, groups,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    I: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PACK: tl.constexpr, DIRECTIONS: tl.constexpr, LSTM: tl.constexpr, FUSED: tl.constexpr, KEEP: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    TRANSPOSED: tl.constexpr, HELD: tl.constexpr, STAGES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """grid (tiles of batch · directions · G / PACK,), groups fastest. A tile packs PACK groups of H units, padded to
    BLOCK_H, and I inputs, padded to BLOCK_I.

    gates_ptr: (G, B·T, N, H, 4), a unit's four values as one 64-bit word (float32: two). Unless FUSED it holds W x;
    with KEEP it is filled with the gates, in place. cell_ptr: (G, B·T, N, H) or None. STAGES: of the time loop's
    pipeline. UNROLL: steps per iteration of it.
    """
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    WORDS: tl.constexpr = 2 if DTYPE == tl.float32 else 1  # 64-bit words per four values
    SHAPE: tl.constexpr = (PACK * BLOCK_H, BLOCK_B) if TRANSPOSED else (BLOCK_B, PACK * BLOCK_H)
    packs = groups // PACK
    group = tl.program_id(0) % packs * PACK
    direction = tl.program_id(0) // packs % DIRECTIONS
    first = direction * groups + group
    step = 1 - 2 * direction
    start = direction * (length - 1)

    offs_b = tl.program_id(0) // (packs * DIRECTIONS) * BLOCK_B + tl.arange(0, BLOCK_B)
    offs_u = tl.arange(0, PACK * BLOCK_H)
    row = across(tl.minimum(offs_b, batch - 1).to(tl.int64), not TRANSPOSED)  # past the batch: its last row again
    unit = across(offs_u % BLOCK_H, TRANSPOSED)
    member = group + across(offs_u // BLOCK_H, TRANSPOSED)
    mask_u = unit < H
    mask = (across(offs_b, not TRANSPOSED) < batch) & mask_u
    channel = (member * DIRECTIONS + direction) * H + unit
    stride_x_t = groups * I
    stride_y_t = groups * DIRECTIONS * H
    stride_g_t = DIRECTIONS * H * WORDS
    stride_c_t = DIRECTIONS * H
    y_ptrs = y_ptr + row * length * stride_y_t + channel
    state_index = (direction * batch + row) * groups * H + member * H + unit
    kept_row = (member * batch + row) * length * DIRECTIONS + direction
    if FUSED:
        offs_i = tl.arange(0, PACK * BLOCK_I)
        feature = across(offs_i % BLOCK_I, TRANSPOSED)
        mask_i = feature < I
        x_ptrs = x_ptr + row * length * stride_x_t + (group + across(offs_i // BLOCK_I, TRANSPOSED)) * I + feature
        w = load_weights(weight_ih_ptr, first, offs_u, offs_i, H, BLOCK_H, I, BLOCK_I, LSTM, TRANSPOSED, DTYPE)
    if gates_ptr is not None:
        gates_ptrs = gates_ptr + (kept_row * H + unit) * WORDS
    if cell_ptr is not None:
        cell_ptrs = cell_ptr + kept_row * H + unit
    if not FUSED:
        biases = load_biases(bias_ih_ptr, bias_hh_ptr, first, offs_u, H, BLOCK_H, LSTM, TRANSPOSED)
    u = load_weights(weight_hh_ptr, first, offs_u, offs_u, H, BLOCK_H, H, BLOCK_H, LSTM, TRANSPOSED, DTYPE)

    u = hold(u, HELD, LSTM, DTYPE)
    if FUSED:
        w = hold(w, HELD, LSTM, DTYPE)
    h = tl.zeros(SHAPE, tl.float32)
    c = tl.zeros(SHAPE, tl.float32)
    if h_first_ptr is not None:
        h = load_float(h_first_ptr + state_index, mask)
        if LSTM:
            c = load_float(c_first_ptr + state_index, mask)

    # The critical path from h to h is U h, the gates and the update: W x of step s + 1 is computed (or, unless FUSED,
    # loaded) during step s. U h follows h at once, at the end of the step before, for fewer barriers; float32 has no
    # registers to carry it.
    EARLY: tl.constexpr = TRANSPOSED
    t = start.to(tl.int64)
    if FUSED:
        x = round_to(load_padded(x_ptrs + t * stride_x_t, mask_i, BLOCK_I != I), DTYPE)
        s0, s1, s2, s3 = input_preactivations(x, w, SHAPE, LSTM, TRANSPOSED, PRECISION)
    else:
        nothing = tl.zeros(SHAPE, tl.float32)
        s0, s1, s2, s3 = nothing, nothing, nothing, nothing
    rounded = round_to(h, DTYPE)
    preactivations = (s0, s1, s2, s3)
    if EARLY:
        preactivations = state_preactivations(rounded, u, preactivations, LSTM, TRANSPOSED, PRECISION)
    for s in tl.range(0, length, num_stages=STAGES, loop_unroll_factor=UNROLL):
        t = (start + s * step).to(tl.int64)
        if FUSED:
            ahead = (start + tl.minimum(s + 1, length - 1) * step).to(tl.int64)
            x = round_to(load_padded(x_ptrs + ahead * stride_x_t, mask_i, BLOCK_I != I), DTYPE)
        else:
            low, high = load_quads(gates_ptrs + t * stride_g_t, mask_u, BLOCK_H != H, DTYPE)
            x0, x1, x2, x3 = unpack(low, high, DTYPE)
            preactivations = (
                preactivations[0] + (x0 + biases[0]),
                preactivations[1] + (x1 + biases[1]),
                preactivations[2] + (x2 + biases[2]),
                preactivations[3] + (x3 + biases[3]),
            )
        if not EARLY:
            preactivations = state_preactivations(rounded, u, preactivations, LSTM, TRANSPOSED, PRECISION)
        g0, g1, g2, g3 = activate(preactivations, LSTM, ACTIVATION, True)
        if LSTM:
            c = g1 * c + g0 * g2
            h = g3 * tanh(c, ACTIVATION)
        else:
            h = g2 + g1 * (h - g2)
        rounded = round_to(h, DTYPE)
        tl.store(y_ptrs + t * stride_y_t, rounded, mask=mask)
        if KEEP:
            store_quads(gates_ptrs + t * stride_g_t, g0, g1, g2, g3, mask, DTYPE)
        if cell_ptr is not None:
            tl.store(cell_ptrs + t * stride_c_t, round_to(c, DTYPE), mask=mask)
        if FUSED:
            s0, s1, s2, s3 = input_preactivations(x, w, SHAPE, LSTM, TRANSPOSED, PRECISION)
        preactivations = (s0, s1, s2, s3)
        if EARLY:
            preactivations = state_preactivations(rounded, u, preactivations, LSTM, TRANSPOSED, PRECISION)
    tl.store(h_last_ptr + state_index, rounded, mask=mask)
    if LSTM:
        tl.store(c_last_ptr + state_index, round_to(c, DTYPE), mask=mask)


@cache
def tile_of(groups: int, inputs: int, hidden: int) -> dict[str, int]:
    """How groups are packed: as many as fill 16 units (the least a tensor core takes) and divide G, but not past
    FUSED_LIMIT inputs: 4 groups of 32 spilled 3.4 KB per thread in backward."""
    pack = 1
    width, depth = power_of_two(hidden), power_of_two(inputs)
    most = FUSED_LIMIT if inputs <= FUSED_LIMIT else depth * groups  # past the limit x is not in a tile
    while 2 * pack * width <= 16 and groups % (2 * pack) == 0 and 2 * pack * depth <= most:
        pack *= 2
    least = 16 // pack
    return {"H": hidden, "BLOCK_H": max(width, least), "I": inputs, "BLOCK_I": max(depth, least), "PACK": pack}


def precision_of(x: Tensor, dtype: torch.dtype) -> dict[str, str]:
    if dtype == torch.float32:
        return {"ACTIVATION": "exact", "PRECISION": "tf32" if runtime.allows_tf32() else "ieee"}
    hardware = HARDWARE_TANH and dtype == torch.bfloat16 and runtime.architecture(x.device).startswith("sm_")
    return {"ACTIVATION": "hardware" if hardware else "fast", "PRECISION": "ieee"}


class Inputs(NamedTuple):
    """The operator's tensors; contiguous, where a kernel reads them."""

    x: Tensor
    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    h_first: Tensor | None
    c_first: Tensor | None


class Sizes(NamedTuple):
    batch: int
    length: int
    directions: int
    groups: int
    inputs: int
    hidden: int
    lstm: bool
    fused: bool  # the projection of x is computed in the time loop


def sizes_of(given: Inputs, dtype: torch.dtype) -> Sizes:
    directions, groups, rows, inputs = given.weight_ih.shape
    hidden = given.weight_hh.shape[3]
    limit = FUSED_LIMIT_FLOAT32 if dtype == torch.float32 else FUSED_LIMIT
    fused = max(inputs, hidden) <= limit and given.bias_ih is None
    return Sizes(*given.x.shape[:2], directions, groups, inputs, hidden, rows == 4 * hidden, fused)


def pointers_of(given: Inputs, y: Tensor, gates: Tensor | None, cell: Tensor | None) -> dict[str, Tensor | None]:
    """What the two kernels of the time loop share, by name: their tensors."""
    return {
        "x_ptr": given.x,
        "weight_ih_ptr": given.weight_ih,
        "weight_hh_ptr": given.weight_hh,
        "h_first_ptr": given.h_first,
        "c_first_ptr": given.c_first,
        "gates_ptr": None if gates is None else gates.view(torch.int64),
        "cell_ptr": cell,
        "y_ptr": y,
    }


def numbers_of(sizes: Sizes) -> dict[str, int]:
    """And their numbers."""
    return {
        "batch": sizes.batch,
        "length": sizes.length,
        "groups": sizes.groups,
        "DIRECTIONS": sizes.directions,
        "LSTM": sizes.lstm,
        "FUSED": sizes.fused,
        **tile_of(sizes.groups, sizes.inputs, sizes.hidden),
    }


def quad_weight(weight_ih: Tensor, hidden: int, dtype: torch.dtype) -> Tensor:
    """weight_ih as (G, I, N·H·4), a unit's four gates adjacent; a GRU's fourth, `U_n h`, takes nothing from x."""
    directions, groups, rows, inputs = weight_ih.shape
    weight = weight_ih.to(dtype).view(directions, groups, rows // hidden, hidden, inputs).permute(1, 4, 0, 3, 2)
    if rows == 3 * hidden:
        weight = torch.nn.functional.pad(weight, (0, 1))
    return weight.reshape(groups, inputs, directions * hidden * 4)


def project(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """Fills out (G, B·T, N·H·4) with W x, the inputs' part of all steps' preactivations, in one batched product."""
    groups, inputs, _ = weight.shape
    torch.bmm(x.to(weight.dtype).view(-1, groups, inputs).transpose(0, 1), weight, out=out)


def launch_config(
    sizes: Sizes, float32: bool, architecture: str, state: bool, backward: bool, tf32: bool = False
) -> LaunchConfig:
    """The time loop's configuration; `state`: it starts from a given state."""
    tile = tile_of(sizes.groups, sizes.inputs, sizes.hidden)
    units, inputs = (tile["PACK"] * tile[block] for block in ("BLOCK_H", "BLOCK_I"))
    padded = tile["BLOCK_H"] != sizes.hidden or tile["BLOCK_I"] != sizes.inputs
    return at_least(
        table.time_loop(units, inputs, sizes.lstm, backward, sizes.fused, float32, architecture, state, padded, tf32)
    )


def at_least(config: LaunchConfig) -> LaunchConfig:
    """The configuration with BLOCK_B raised to the least that this Triton takes."""
    return config if config["BLOCK_B"] >= LEAST_COLUMNS else config.with_(BLOCK_B=LEAST_COLUMNS)


def outputs(
    given: Inputs, dtype: torch.dtype, keep_gates: bool, keep_cell: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Allocate y, the final h and c (a GRU has no c), and what is kept: gates, cell; None where there is nothing."""
    sizes = sizes_of(given, dtype)
    x, batch, directions, groups = given.x, sizes.batch, sizes.directions, sizes.groups
    state = (directions, batch, groups * sizes.hidden)
    cell = (groups, batch * sizes.length, directions, sizes.hidden)
    return (
        x.new_empty((batch, sizes.length, groups * directions * sizes.hidden), dtype=dtype),
        x.new_empty(state, dtype=dtype),
        x.new_empty(state, dtype=dtype) if sizes.lstm else None,
        x.new_empty((*cell, 4), dtype=dtype) if keep_gates else None,
        x.new_empty(cell, dtype=dtype) if keep_cell and sizes.lstm else None,
    )


def forward(
    given: Inputs, y: Tensor, h_last: Tensor, c_last: Tensor | None, gates: Tensor | None, cell: Tensor | None
) -> None:
    """Fills what `outputs` allocated; gates and cells are kept where there is memory for them."""
    x, dtype, keep_gates, sizes = given.x, y.dtype, gates is not None, sizes_of(given, y.dtype)
    if not sizes.fused:
        rows = sizes.batch * sizes.length
        if not keep_gates:
            gates = x.new_empty((sizes.groups, rows, sizes.directions, sizes.hidden, 4), dtype=dtype)
        project(x, quad_weight(given.weight_ih, sizes.hidden, dtype), out=gates.view(sizes.groups, rows, -1))
    architecture, state = runtime.architecture(x.device), given.h_first is not None
    _forward_launch(sizes, dtype == torch.float32, architecture, state, keep_gates, *precision_of(x, dtype).values())(
        x,
        **pointers_of(given, y, gates, cell),
        bias_ih_ptr=given.bias_ih, bias_hh_ptr=given.bias_hh, h_last_ptr=h_last, c_last_ptr=c_last,
    )  # fmt: skip


@lru_cache(maxsize=1024)
def _forward_launch(
    sizes: Sizes, float32: bool, architecture: str, state: bool, keep: bool, activation: str, precision: str
) -> Prepared:
    config = launch_config(sizes, float32, architecture, state, backward=False)
    numbers = numbers_of(sizes)
    units = numbers["PACK"] * numbers["BLOCK_H"]
    return Prepared(
        _grouped_rnn_forward_kernel,
        (sizes.groups // numbers["PACK"] * sizes.directions * cdiv(sizes.batch, config["BLOCK_B"]),), config,
        **numbers,
        KEEP=keep, ACTIVATION=activation, PRECISION=precision,
        STAGES=config.num_stages, UNROLL=table.forward_unroll(units, float32, architecture),
    )  # fmt: skip
