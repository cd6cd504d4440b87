"""Attention over a long sequence: one program per (batch, head, block of rows), looping over blocks of the other side.

A block of queries sees the register tokens first (one tile), then the blocks of keys within its window: a masked loop
over the blocks at the edges of the window and of the sequence, and an unmasked one over the interior. The softmax is
online; the base-2 logarithm of its sum (`lse`) is kept, and backward recomputes P from it in two deterministic kernels:
one program per block of queries (dq, delta, and a partial sum of the register tokens' dk and dv), then one per block of
keys (dk, dv). `registers` computes the register tokens' output and dq, and adds up the partial sums.

Bytes per (batch, head): forward 4·T·D elements and 4·T of lse, backward 12·T·D: both kernels read q, k, v and dout.
Neighbouring blocks share keys in cache: each key is read (BLOCK_M + W) / BLOCK_M times, and from ROTATE_FROM tokens on
a kernel of its own rotates q and k first (4·T·D more), because a key's part of the rope table is twice its own bytes.
Those 2·T·D elements are kept for backward. Below that, the kernel of dq hands its rotated q on to the one of dk and dv
(T·D more), which would rotate each query once for every block of keys. FLOPs: 4·T·(W + R)·D and, with
seven products, 14·T·(W + R)·D; W is the window, T in its place where there is none.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fastblocks.kernels.attention.config import Plan
from fastblocks.kernels.attention.tiles import (
    LOG2_E,
    load_gate,
    load_rotated,
    load_rows,
    numbers_of,
    program_of,
    register_keys,
    register_pointer,
    register_queries,
    register_stride,
    rotate,
    store_rows,
    stride_of,
)
from fastblocks.kernels.attention.windows import start_of_block, visible_blocks, visible_tokens
from fastblocks.kernels.launch import Prepared
from fastblocks.kernels.numerics import dot, round_to
from fastblocks.kernels.runtime import cdiv, tl, triton


@triton.jit
def _softmax_step(s, v, m, total, acc, scale, PRECISION: tl.constexpr, MASKED: tl.constexpr):
    """One block of keys of an online softmax: m, total, acc are the running maximum, sum and output; s [queries, keys]
    is unscaled. m is scaled, by a `scale` that includes log2(e): s · scale − m is one fused multiply-add, and the
    rounding of m is the same in every term of the softmax."""
    m_new = tl.maximum(m, tl.max(s, 1) * scale)
    base = m_new
    if MASKED:
        base = tl.where(m_new == float("-inf"), 0.0, m_new)  # a row without a visible key so far
    p = tl.exp2(s * scale - base[:, None])
    shrink = tl.exp2(m - base)
    acc = acc * shrink[:, None] + dot(round_to(p, v.dtype), v, PRECISION)
    return m_new, total * shrink + tl.sum(p, 1), acc


@triton.jit
def _key_block(
    qk_ptr, v_ptr, rope_ptr, start, n_tokens, n_channels, stride_qk_t, stride_v_t,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr = False, ROTATED: tl.constexpr = False,
):  # fmt: skip
    """Load k, rotated, and v of BLOCK_N tokens from `start` on."""
    offs = tl.arange(0, BLOCK_N)
    left = n_tokens - start
    k_ptr = qk_ptr + tl.cast(start, tl.int64) * stride_qk_t + n_channels
    k = load_rotated(
        k_ptr, rope_ptr + tl.cast(start, tl.int64) * HEAD_DIM, offs, left, stride_qk_t, HEAD_DIM, BLOCK_D, EVEN, ROTATED
    )
    v = load_rows(v_ptr + tl.cast(start, tl.int64) * stride_v_t, offs, left, stride_v_t, HEAD_DIM, BLOCK_D, EVEN)
    return k, v


@triton.jit
def _long_forward_kernel(
    qk_ptr, v_ptr, rope_ptr, register_ptr, gate_ptr, out_ptr, lse_ptr,
    stride_qk_b, stride_qk_t, stride_v_b, stride_v_t, stride_register_b, stride_register_r,
    stride_gate_b, stride_gate_t,
    n_tokens, n_registers, window_left, window_right, n_head, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_REGISTERS: tl.constexpr, ROTATED: tl.constexpr, KEEP_LSE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out (B, T, C) and, with KEEP_LSE, lse (B, H, T). grid (B·H·blocks of queries,), blocks fastest.

    qk_ptr: q, then k n_channels later, in each row; ROTATED: they are rotated already. register_ptr: q, k, v of the
    register tokens.
    """
    block, pid_bh, b, h = program_of(tl.cdiv(n_tokens, BLOCK_M), n_head)
    start_m = block * BLOCK_M
    n_channels = n_head * HEAD_DIM
    qk_ptr += b * stride_qk_b + h * HEAD_DIM
    v_ptr += b * stride_v_b + h * HEAD_DIM
    token_rope_ptr = rope_ptr + n_registers * HEAD_DIM

    offs_m = start_m + tl.arange(0, BLOCK_M)
    query_rope_ptr = token_rope_ptr + start_m.to(tl.int64) * HEAD_DIM
    q = load_rotated(
        qk_ptr + start_m.to(tl.int64) * stride_qk_t, query_rope_ptr, tl.arange(0, BLOCK_M),
        n_tokens - start_m, stride_qk_t, HEAD_DIM, BLOCK_D, ROTATED=ROTATED,
    )  # fmt: skip
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)

    if HAS_REGISTERS:
        offs_r = tl.arange(0, BLOCK_R)
        register_ptr += b * stride_register_b + h * HEAD_DIM
        k_r, v_r = register_keys(
            register_ptr, rope_ptr, offs_r, n_registers, n_channels, stride_register_r, HEAD_DIM, BLOCK_D
        )
        s_r = tl.where((offs_r < n_registers)[None, :], dot(q, tl.trans(k_r), PRECISION), float("-inf"))
        m, total, acc = _softmax_step(s_r, v_r, m, total, acc, scale, PRECISION, MASKED=False)

    low, before, interior, after = visible_blocks(
        start_m, n_tokens, window_left, window_right, BLOCK_M, BLOCK_N, HAS_WINDOW
    )
    for INTERIOR in tl.static_range(2):  # first the blocks at the edges, where not every pair is visible
        for i in range(before if INTERIOR else 0, before + (interior if INTERIOR else after)):
            start_n = start_of_block(i, low, before, interior, BLOCK_N, INTERIOR)
            k, v = _key_block(
                qk_ptr, v_ptr, token_rope_ptr, start_n, n_tokens, n_channels, stride_qk_t, stride_v_t,
                HEAD_DIM, BLOCK_D, BLOCK_N, INTERIOR, ROTATED,
            )  # fmt: skip
            s = dot(q, tl.trans(k), PRECISION)  # [BLOCK_M, BLOCK_N]
            if not INTERIOR:
                offs_n = start_n + tl.arange(0, BLOCK_N)
                mask = visible_tokens(offs_m, offs_n, n_tokens, window_left, window_right, HAS_WINDOW)
                s = tl.where(mask, s, float("-inf"))
            m, total, acc = _softmax_step(s, v, m, total, acc, scale, PRECISION, MASKED=not INTERIOR)

    out_ptr += (b * n_tokens + start_m) * n_channels + h * HEAD_DIM
    offs, left = tl.arange(0, BLOCK_M), n_tokens - start_m
    factor = 1.0 / total
    if gate_ptr is not None:
        gate_ptr += b * stride_gate_b + start_m.to(tl.int64) * stride_gate_t + h
        factor *= load_gate(gate_ptr, offs, left, stride_gate_t)
    acc *= factor[:, None]
    store_rows(out_ptr, acc, offs, left, n_channels, HEAD_DIM, BLOCK_D)
    if KEEP_LSE:
        lse_ptr += pid_bh.to(tl.int64) * n_tokens
        tl.store(lse_ptr + offs_m, m + tl.log2(total), mask=offs_m < n_tokens)


@triton.jit
def _grad_query_kernel(
    qk_ptr, v_ptr, rope_ptr, register_ptr, gate_ptr, out_ptr, grad_out_ptr, lse_ptr,
    delta_ptr, grad_qkv_ptr, grad_gate_ptr, rotated_ptr, gated_ptr, partial_ptr,
    stride_qk_b, stride_qk_t, stride_v_b, stride_v_t, stride_register_b, stride_register_r,
    stride_gate_b, stride_gate_t, stride_grad_b, stride_grad_t,
    n_tokens, n_registers, window_left, window_right, n_head, scale, n_parts,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_REGISTERS: tl.constexpr, ROTATED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, delta = rowsum(out ∘ dout) (B, H, T), and these queries' part of the register tokens' dk and dv, to part
    1 + block of partial (B, n_parts, R, 3C) float32. grid (B·H·blocks of queries,), blocks fastest.

    For the kernel of dk and dv: unless they are ROTATED already, rotated (B, T, C) = q; with gates, gated (B, T, C) =
    gate · dout. With gates also their gradient (B, T, H)."""
    block, pid_bh, b, h = program_of(tl.cdiv(n_tokens, BLOCK_M), n_head)
    start_m = block * BLOCK_M
    n_channels = n_head * HEAD_DIM
    qk_ptr += b * stride_qk_b + h * HEAD_DIM
    v_ptr += b * stride_v_b + h * HEAD_DIM
    token_rope_ptr = rope_ptr + n_registers * HEAD_DIM

    offs = tl.arange(0, BLOCK_M)
    offs_m = start_m + offs
    left = n_tokens - start_m
    query_rope_ptr = token_rope_ptr + start_m.to(tl.int64) * HEAD_DIM
    q = load_rotated(
        qk_ptr + start_m.to(tl.int64) * stride_qk_t, query_rope_ptr, offs, left, stride_qk_t,
        HEAD_DIM, BLOCK_D, ROTATED=ROTATED,
    )  # fmt: skip
    here = (b * n_tokens + start_m) * n_channels + h * HEAD_DIM  # in what is (B, T, C) and contiguous
    if not ROTATED:
        store_rows(rotated_ptr + here, q, offs, left, n_channels, HEAD_DIM, BLOCK_D)
    grad_out_ptr += b * stride_grad_b + start_m.to(tl.int64) * stride_grad_t + h * HEAD_DIM
    do = load_rows(grad_out_ptr, offs, left, stride_grad_t, HEAD_DIM, BLOCK_D)
    out = load_rows(out_ptr + here, offs, left, n_channels, HEAD_DIM, BLOCK_D)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta_ptr + pid_bh.to(tl.int64) * n_tokens + offs_m, delta, mask=offs_m < n_tokens)
    if gate_ptr is not None:  # out is gated, and delta the gate times its gradient
        gate_ptr += b * stride_gate_b + start_m.to(tl.int64) * stride_gate_t + h
        gate = load_gate(gate_ptr, offs, left, stride_gate_t)
        grad_gate = round_to(delta * (1.0 - gate), grad_gate_ptr.dtype.element_ty)
        tl.store(grad_gate_ptr + (b * n_tokens + offs_m) * n_head + h, grad_gate, mask=offs_m < n_tokens)
        do = round_to(do.to(tl.float32) * gate[:, None], do.dtype)
        store_rows(gated_ptr + here, do, offs, left, n_channels, HEAD_DIM, BLOCK_D)
    lse_ptr += pid_bh.to(tl.int64) * n_tokens
    lse = tl.load(lse_ptr + offs_m, mask=offs_m < n_tokens, other=float("inf"))  # P = 0 past the end
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)

    if HAS_REGISTERS:
        offs_r = tl.arange(0, BLOCK_R)
        register_ptr += b * stride_register_b + h * HEAD_DIM
        k_r, v_r = register_keys(
            register_ptr, rope_ptr, offs_r, n_registers, n_channels, stride_register_r, HEAD_DIM, BLOCK_D
        )
        s_r = tl.where((offs_r < n_registers)[None, :], dot(q, tl.trans(k_r), PRECISION) * scale, float("-inf"))
        p_r = tl.exp2(s_r - lse[:, None])  # [BLOCK_M, BLOCK_R]
        ds_r = round_to(p_r * (dot(do, tl.trans(v_r), PRECISION) - delta[:, None]), q.dtype)
        dq += dot(ds_r, k_r, PRECISION)
        part = b * n_parts + 1 + block
        partial_ptr += part * n_registers * (3 * n_channels) + h * HEAD_DIM
        dv_r = dot(tl.trans(round_to(p_r, do.dtype)), do, PRECISION)
        store_rows(partial_ptr + 2 * n_channels, dv_r, offs_r, n_registers, 3 * n_channels, HEAD_DIM, BLOCK_D)
        dk_r = dot(tl.trans(ds_r), q, PRECISION) * (scale / LOG2_E)
        store_rows(partial_ptr + n_channels, dk_r, offs_r, n_registers, 3 * n_channels, HEAD_DIM, BLOCK_D)

    low, before, interior, after = visible_blocks(
        start_m, n_tokens, window_left, window_right, BLOCK_M, BLOCK_N, HAS_WINDOW
    )
    for INTERIOR in tl.static_range(2):  # first the blocks at the edges, where not every pair is visible
        for i in range(before if INTERIOR else 0, before + (interior if INTERIOR else after)):
            start_n = start_of_block(i, low, before, interior, BLOCK_N, INTERIOR)
            k, v = _key_block(
                qk_ptr, v_ptr, token_rope_ptr, start_n, n_tokens, n_channels, stride_qk_t, stride_v_t,
                HEAD_DIM, BLOCK_D, BLOCK_N, INTERIOR, ROTATED,
            )  # fmt: skip
            p = tl.exp2(dot(q, tl.trans(k), PRECISION) * scale - lse[:, None])
            if not INTERIOR:
                offs_n = start_n + tl.arange(0, BLOCK_N)
                mask = visible_tokens(offs_m, offs_n, n_tokens, window_left, window_right, HAS_WINDOW)
                p = tl.where(mask, p, 0.0)
            ds = p * (dot(do, tl.trans(v), PRECISION) - delta[:, None])
            dq += dot(round_to(ds, k.dtype), k, PRECISION)

    dq = rotate(dq * (scale / LOG2_E), query_rope_ptr, offs, left, HEAD_DIM, BLOCK_D, INVERSE=True)
    grad_qkv_ptr += (b * n_tokens + start_m) * (3 * n_channels) + h * HEAD_DIM
    store_rows(grad_qkv_ptr, dq, offs, left, 3 * n_channels, HEAD_DIM, BLOCK_D)


@triton.jit
def _grad_key_step(q, do, k, v, lse, delta, mask, dk, dv, scale, PRECISION: tl.constexpr, MASKED: tl.constexpr):
    """Add a block of queries to dk and dv. P and dS are transposed, [keys, queries], as the products need them."""
    s = dot(k, tl.trans(q), PRECISION)
    dp = dot(v, tl.trans(do), PRECISION)  # before the exponentials: each product is waited for where it stands
    p = tl.exp2(s * scale - lse[None, :])
    if MASKED:
        p = tl.where(mask, p, 0.0)
    ds = round_to(p * (dp - delta[None, :]), q.dtype)
    dv += dot(round_to(p, do.dtype), do, PRECISION)
    return dk + dot(ds, q, PRECISION), dv


@triton.jit
def _query_block(
    rotated_ptr, grad_out_ptr, lse_ptr, delta_ptr, start, n_tokens, stride_rotated_t, stride_grad_t,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, EVEN: tl.constexpr = False,
):  # fmt: skip
    """Load rotated q, dout, lse and delta of BLOCK_M tokens; past the end q = dout = delta = 0 and P = 0."""
    offs = tl.arange(0, BLOCK_M)
    left = n_tokens - start
    q_ptr = rotated_ptr + tl.cast(start, tl.int64) * stride_rotated_t
    q = load_rows(q_ptr, offs, left, stride_rotated_t, HEAD_DIM, BLOCK_D, EVEN)
    do_ptr = grad_out_ptr + tl.cast(start, tl.int64) * stride_grad_t
    do = load_rows(do_ptr, offs, left, stride_grad_t, HEAD_DIM, BLOCK_D, EVEN)
    if EVEN:  # every thread loads what its columns need, 16 numbers of 32 queries: masks would be a tenth of the loop
        return q, do, tl.load(lse_ptr + start + offs), tl.load(delta_ptr + start + offs)
    lse = tl.load(lse_ptr + start + offs, mask=offs < left, other=float("inf"))
    delta = tl.load(delta_ptr + start + offs, mask=offs < left, other=0.0)
    return q, do, lse, delta


@triton.jit
def _grad_key_kernel(
    qk_ptr, v_ptr, rope_ptr, register_ptr, register_out_ptr, rotated_ptr, grad_out_ptr, grad_register_out_ptr,
    lse_ptr, register_lse_ptr, delta_ptr, grad_qkv_ptr,
    stride_qk_b, stride_qk_t, stride_v_b, stride_v_t, stride_register_b, stride_register_r,
    stride_rotated_b, stride_rotated_t, stride_grad_b, stride_grad_t, stride_grad_register_b, stride_grad_register_r,
    n_tokens, n_registers, window_left, window_right, n_head, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    HAS_WINDOW: tl.constexpr, REGISTERS_OUT: tl.constexpr, ROTATED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of tokens. rotated_ptr: rotated q. REGISTERS_OUT: register tokens are queries too.
    grid (B·H·blocks of keys,), blocks fastest."""
    block, pid_bh, b, h = program_of(tl.cdiv(n_tokens, BLOCK_N), n_head)
    n_channels = n_head * HEAD_DIM
    qk_ptr += b * stride_qk_b + h * HEAD_DIM
    v_ptr += b * stride_v_b + h * HEAD_DIM
    rotated_ptr += b * stride_rotated_b + h * HEAD_DIM
    grad_out_ptr += b * stride_grad_b + h * HEAD_DIM
    lse_ptr += pid_bh.to(tl.int64) * n_tokens
    delta_ptr += pid_bh.to(tl.int64) * n_tokens
    token_rope_ptr = rope_ptr + n_registers * HEAD_DIM
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)

    start_n = block * BLOCK_N
    offs = tl.arange(0, BLOCK_N)
    offs_n = start_n + offs
    left = n_tokens - start_n
    k, v = _key_block(
        qk_ptr, v_ptr, token_rope_ptr, start_n, n_tokens, n_channels, stride_qk_t, stride_v_t,
        HEAD_DIM, BLOCK_D, BLOCK_N, ROTATED=ROTATED,
    )  # fmt: skip
    if REGISTERS_OUT:
        q_r, do_r, lse_r, delta_r = register_queries(
            register_ptr + b * stride_register_b + h * HEAD_DIM, rope_ptr,
            register_out_ptr + b * n_registers * n_channels + h * HEAD_DIM,
            grad_register_out_ptr + b * stride_grad_register_b + h * HEAD_DIM,
            register_lse_ptr + pid_bh.to(tl.int64) * n_registers,
            n_registers, n_channels, stride_register_r, stride_grad_register_r, HEAD_DIM, BLOCK_D, BLOCK_R,
        )  # fmt: skip
        dk, dv = _grad_key_step(q_r, do_r, k, v, lse_r, delta_r, None, dk, dv, scale, PRECISION, MASKED=False)

    low, before, interior, after = visible_blocks(
        start_n, n_tokens, window_right, window_left, BLOCK_N, BLOCK_M, HAS_WINDOW
    )
    for INTERIOR in tl.static_range(2):  # first the blocks at the edges, where not every pair is visible
        for i in range(before if INTERIOR else 0, before + (interior if INTERIOR else after)):
            start_m = start_of_block(i, low, before, interior, BLOCK_M, INTERIOR)
            q, do, lse, delta = _query_block(
                rotated_ptr, grad_out_ptr, lse_ptr, delta_ptr, start_m, n_tokens, stride_rotated_t, stride_grad_t,
                HEAD_DIM, BLOCK_D, BLOCK_M, INTERIOR,
            )  # fmt: skip
            offs_m = start_m + tl.arange(0, BLOCK_M)
            mask = visible_tokens(offs_n, offs_m, n_tokens, window_right, window_left, HAS_WINDOW)
            dk, dv = _grad_key_step(
                q, do, k, v, lse, delta, mask, dk, dv, scale, PRECISION, MASKED=HAS_WINDOW and not INTERIOR
            )

    grad_qkv_ptr += (b * n_tokens + start_n) * (3 * n_channels) + h * HEAD_DIM
    store_rows(grad_qkv_ptr + 2 * n_channels, dv, offs, left, 3 * n_channels, HEAD_DIM, BLOCK_D)
    key_rope_ptr = token_rope_ptr + start_n.to(tl.int64) * HEAD_DIM
    dk = rotate(dk * (scale / LOG2_E), key_rope_ptr, offs, left, HEAD_DIM, BLOCK_D, INVERSE=True)
    store_rows(grad_qkv_ptr + n_channels, dk, offs, left, 3 * n_channels, HEAD_DIM, BLOCK_D)


@dataclass(frozen=True)
class Inputs:
    """What all kernels here and in `registers` read. qk: qkv, or where the plan says so what `rotate_tokens` filled."""

    pointers: dict[str, Tensor]
    batch: int
    n_head: int
    layouts: tuple[tuple[int, ...], ...]  # strides of qk, v and the register tokens


def inputs_of(qkv: Tensor, qk: Tensor, rope: Tensor, n_head: int, register_qkv: Tensor | None) -> Inputs:
    pointers = {
        "qk_ptr": qk, "v_ptr": qkv[..., 2 * (qkv.shape[2] // 3) :], "rope_ptr": rope,
        "register_ptr": register_pointer(qkv, register_qkv),
    }  # fmt: skip
    return Inputs(pointers, qkv.shape[0], n_head, (qk.stride(), qkv.stride(), register_stride(register_qkv)))


def input_numbers(plan: Plan, n_head: int, layouts: tuple[tuple[int, ...], ...], **more: tuple[int, ...]) -> dict:
    """The arguments of a kernel that reads `Inputs`, by name; more: strides of others."""
    qk, v, register = layouts
    return {**numbers_of(plan, n_head, qk=qk, v=v, register=register, **more), "scale": plan.scale}


@lru_cache(maxsize=1024)
def _forward_launch(plan: Plan, batch: int, n_head: int, layouts: tuple, gate: tuple[int, ...], keep: bool) -> Prepared:
    config = plan.configs["long_forward"]
    return Prepared(
        _long_forward_kernel, (batch * n_head * cdiv(plan.n_tokens, config["BLOCK_M"]),), config,
        **input_numbers(plan, n_head, layouts, gate=gate), **plan.window, KEEP_LSE=keep,
    )  # fmt: skip


@lru_cache(maxsize=1024)
def _grad_query_launch(
    plan: Plan, batch: int, n_head: int, layouts: tuple, gate: tuple[int, ...], grad: tuple[int, ...], n_parts: int
) -> Prepared:
    return Prepared(
        _grad_query_kernel, (batch * n_head * n_query_blocks(plan),), plan.configs["grad_query"],
        **input_numbers(plan, n_head, layouts, gate=gate, grad=grad), **plan.window, n_parts=n_parts,
    )  # fmt: skip


@lru_cache(maxsize=1024)
def _grad_key_launch(
    plan: Plan, batch: int, n_head: int, layouts: tuple, rotated: tuple[int, ...], grad: tuple[int, ...],
    grad_register: tuple[int, ...],
) -> Prepared:  # fmt: skip
    config = plan.configs["grad_key"]
    return Prepared(
        _grad_key_kernel, (batch * n_head * cdiv(plan.n_tokens, config["BLOCK_N"]),), config,
        **input_numbers(plan, n_head, layouts, rotated=rotated, grad=grad, grad_register=grad_register), **plan.window,
    )  # fmt: skip


def forward(inputs: Inputs, gate: Tensor | None, out: Tensor, lse: Tensor, keep: bool, plan: Plan) -> None:
    """Fills out (B, T, C) and, with keep, lse (B, H, T)."""
    prepared = _forward_launch(plan, inputs.batch, inputs.n_head, inputs.layouts, stride_of(gate), keep)
    prepared(out, **inputs.pointers, gate_ptr=gate, out_ptr=out, lse_ptr=lse)


def n_query_blocks(plan: Plan) -> int:
    return cdiv(plan.n_tokens, plan.configs["grad_query"]["BLOCK_M"])


def backward(
    inputs: Inputs, gate: Tensor | None, grad_out: Tensor, grad_register_out: Tensor, out: Tensor,
    register_out: Tensor, lse: Tensor, register_lse: Tensor, grad_qkv: Tensor, grad_gate: Tensor | None,
    partial: Tensor, n_parts: int, plan: Plan,
) -> None:  # fmt: skip
    """Fills grad_qkv (B, T, 3C), grad_gate (B, T, H), and parts 1 … blocks of partial (B, n_parts, R, 3C) with the
    register tokens' dk and dv."""
    batch, n_head, layouts = inputs.batch, inputs.n_head, inputs.layouts
    delta = torch.empty((batch, n_head, plan.n_tokens), dtype=torch.float32, device=out.device)
    rotated = inputs.pointers["qk_ptr"] if plan.rotated else torch.empty_like(out)
    gated = None if gate is None else torch.empty_like(out)
    both = {**inputs.pointers, "lse_ptr": lse, "delta_ptr": delta, "grad_qkv_ptr": grad_qkv}
    prepared = _grad_query_launch(plan, batch, n_head, layouts, stride_of(gate), grad_out.stride(), n_parts)
    prepared(
        out, **both, gate_ptr=gate, out_ptr=out, grad_out_ptr=grad_out, grad_gate_ptr=grad_gate, rotated_ptr=rotated,
        gated_ptr=gated, partial_ptr=partial,
    )  # fmt: skip
    grad_out = grad_out if gate is None else gated
    prepared = _grad_key_launch(
        plan, batch, n_head, layouts, rotated.stride(), grad_out.stride(), grad_register_out.stride()
    )
    prepared(
        out, **both, rotated_ptr=rotated, grad_out_ptr=grad_out, register_out_ptr=register_out,
        grad_register_out_ptr=grad_register_out, register_lse_ptr=register_lse,
    )  # fmt: skip
