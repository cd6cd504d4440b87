"""Register tokens in attention over a long sequence: their output, and the sums of their gradients.

A register token sees everything, which over 16k keys is 50 times a window's work. So the keys are split, one program
per split, and the partial softmaxes (m, total, acc) are combined in the order of the splits. The gradients of register
tokens are sums over all tokens (and the batch, where it shares its register tokens): each block of tokens has stored a
float32 partial sum, and they are added in the order of the blocks. No atomics: two runs give the same bits.

Bytes: forward 2·T·C elements read and 4·R·C·T / SPLIT written and read; backward 4·R·3C·(T / BLOCK) written and read.
"""

from functools import lru_cache

import torch
from torch import Tensor

from fastblocks.kernels.attention.config import COMBINE_ROWS, Plan
from fastblocks.kernels.attention.long import Inputs, _grad_key_step, _key_block, _softmax_step, input_numbers
from fastblocks.kernels.attention.tiles import (
    LOG2_E,
    load_rotated,
    load_rows,
    program_of,
    register_keys,
    register_queries,
    rotate,
    store_rows,
)
from fastblocks.kernels.launch import Prepared
from fastblocks.kernels.numerics import dot, round_to
from fastblocks.kernels.runtime import cdiv, tl, triton


@triton.jit
def _register_forward_kernel(
    qk_ptr, v_ptr, rope_ptr, register_ptr, m_ptr, total_ptr, acc_ptr,
    stride_qk_b, stride_qk_t, stride_v_b, stride_v_t, stride_register_b, stride_register_r,
    n_tokens, n_registers, n_head, scale, n_splits,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    SPLIT: tl.constexpr, ROTATED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial softmaxes of the register tokens over SPLIT keys each; their own keys belong to split 0.

    m, total: (B, H, splits, R); acc: (B, H, splits, R, D), all float32. grid (B·H·splits,), splits fastest.
    """
    split, pid_bh, b, h = program_of(n_splits, n_head)
    n_channels = n_head * HEAD_DIM
    qk_ptr += b * stride_qk_b + h * HEAD_DIM
    v_ptr += b * stride_v_b + h * HEAD_DIM
    register_ptr += b * stride_register_b + h * HEAD_DIM
    token_rope_ptr = rope_ptr + n_registers * HEAD_DIM

    offs_r = tl.arange(0, BLOCK_R)
    q = load_rotated(register_ptr, rope_ptr, offs_r, n_registers, stride_register_r, HEAD_DIM, BLOCK_D)
    m = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    acc = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    if split == 0:
        k, v = register_keys(
            register_ptr, rope_ptr, offs_r, n_registers, n_channels, stride_register_r, HEAD_DIM, BLOCK_D
        )
        s = tl.where((offs_r < n_registers)[None, :], dot(q, tl.trans(k), PRECISION), float("-inf"))
        m, total, acc = _softmax_step(s, v, m, total, acc, scale, PRECISION, MASKED=False)
    for start_n in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, n_tokens), BLOCK_N):
        k, v = _key_block(
            qk_ptr, v_ptr, token_rope_ptr, start_n, n_tokens, n_channels, stride_qk_t, stride_v_t,
            HEAD_DIM, BLOCK_D, BLOCK_N, ROTATED=ROTATED,
        )  # fmt: skip
        seen = (start_n + tl.arange(0, BLOCK_N) < n_tokens)[None, :]
        s = tl.where(seen, dot(q, tl.trans(k), PRECISION), float("-inf"))  # [BLOCK_R, BLOCK_N]
        m, total, acc = _softmax_step(s, v, m, total, acc, scale, PRECISION, MASKED=False)

    row = (pid_bh.to(tl.int64) * n_splits + split) * n_registers
    tl.store(m_ptr + row + offs_r, m, mask=offs_r < n_registers)
    tl.store(total_ptr + row + offs_r, total, mask=offs_r < n_registers)
    store_rows(acc_ptr + row * HEAD_DIM, acc, offs_r, n_registers, HEAD_DIM, HEAD_DIM, BLOCK_D)


@triton.jit
def _register_combine_kernel(
    m_ptr, total_ptr, acc_ptr, register_out_ptr, register_lse_ptr, n_registers, n_head, n_splits, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, KEEP_LSE: tl.constexpr,
):  # fmt: skip
    """Combine the splits' partial softmaxes in order. grid (B·H·blocks of R,), blocks fastest."""
    block, pid_bh, b, h = program_of(tl.cdiv(n_registers, BLOCK_R), n_head)
    offs_r = block * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < n_registers
    m = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    acc = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for split in range(n_splits):
        row = (pid_bh.to(tl.int64) * n_splits + split) * n_registers
        m_split = tl.load(m_ptr + row + offs_r, mask=mask_r, other=0.0)
        m_new = tl.maximum(m, m_split)
        shrink, grow = tl.exp2(m - m_new), tl.exp2(m_split - m_new)
        x = load_rows(acc_ptr + row * HEAD_DIM, offs_r, n_registers, HEAD_DIM, HEAD_DIM, BLOCK_D)
        acc = acc * shrink[:, None] + x * grow[:, None]
        total = total * shrink + tl.load(total_ptr + row + offs_r, mask=mask_r, other=1.0) * grow
        m = m_new
    n_channels = n_head * HEAD_DIM
    register_out_ptr += b * n_registers * n_channels + h * HEAD_DIM
    store_rows(register_out_ptr, acc / total[:, None], offs_r, n_registers, n_channels, HEAD_DIM, BLOCK_D)
    if KEEP_LSE:
        register_lse_ptr += pid_bh.to(tl.int64) * n_registers
        tl.store(register_lse_ptr + offs_r, m + tl.log2(total), mask=mask_r)


@triton.jit
def _register_backward_kernel(
    qk_ptr, v_ptr, rope_ptr, register_ptr, register_out_ptr, grad_register_out_ptr, register_lse_ptr, partial_ptr,
    stride_qk_b, stride_qk_t, stride_v_b, stride_v_t, stride_register_b, stride_register_r,
    stride_grad_register_b, stride_grad_register_r,
    n_tokens, n_registers, n_head, scale, n_splits, n_parts,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    SPLIT: tl.constexpr, ROTATED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Register tokens as queries: their dq over a split of keys, to part `split` of partial (B, n_parts, R, 3C).
    Split 0 also covers their own keys and stores those dk and dv. grid (B·H·splits,), splits fastest."""
    split, pid_bh, b, h = program_of(n_splits, n_head)
    n_channels = n_head * HEAD_DIM
    qk_ptr += b * stride_qk_b + h * HEAD_DIM
    v_ptr += b * stride_v_b + h * HEAD_DIM
    register_ptr += b * stride_register_b + h * HEAD_DIM
    partial_ptr += (b * n_parts + split) * n_registers * (3 * n_channels) + h * HEAD_DIM
    token_rope_ptr = rope_ptr + n_registers * HEAD_DIM

    offs_r = tl.arange(0, BLOCK_R)
    q, do, lse, delta = register_queries(
        register_ptr, rope_ptr, register_out_ptr + b * n_registers * n_channels + h * HEAD_DIM,
        grad_register_out_ptr + b * stride_grad_register_b + h * HEAD_DIM,
        register_lse_ptr + pid_bh.to(tl.int64) * n_registers,
        n_registers, n_channels, stride_register_r, stride_grad_register_r, HEAD_DIM, BLOCK_D, BLOCK_R,
    )  # fmt: skip
    dq = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    if split == 0:
        k_r, v_r = register_keys(
            register_ptr, rope_ptr, offs_r, n_registers, n_channels, stride_register_r, HEAD_DIM, BLOCK_D
        )
        dq += _grad_of_queries(q, do, k_r, v_r, lse, delta, n_registers, scale, PRECISION)
        dk = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
        dk, dv = _grad_key_step(q, do, k_r, v_r, lse, delta, None, dk, dk, scale, PRECISION, MASKED=False)
        dk *= scale / LOG2_E
        store_rows(partial_ptr + n_channels, dk, offs_r, n_registers, 3 * n_channels, HEAD_DIM, BLOCK_D)
        store_rows(partial_ptr + 2 * n_channels, dv, offs_r, n_registers, 3 * n_channels, HEAD_DIM, BLOCK_D)
    for start_n in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, n_tokens), BLOCK_N):
        k, v = _key_block(
            qk_ptr, v_ptr, token_rope_ptr, start_n, n_tokens, n_channels, stride_qk_t, stride_v_t,
            HEAD_DIM, BLOCK_D, BLOCK_N, ROTATED=ROTATED,
        )  # fmt: skip
        dq += _grad_of_queries(q, do, k, v, lse, delta, n_tokens - start_n, scale, PRECISION)
    store_rows(partial_ptr, dq * (scale / LOG2_E), offs_r, n_registers, 3 * n_channels, HEAD_DIM, BLOCK_D)


@triton.jit
def _grad_of_queries(q, do, k, v, lse, delta, end, scale, PRECISION: tl.constexpr):
    """What a block's keys 0 ≤ n < end add to dq, unscaled."""
    seen = (tl.arange(0, k.shape[0]) < end)[None, :]
    p = tl.where(seen, tl.exp2(dot(q, tl.trans(k), PRECISION) * scale - lse[:, None]), 0.0)
    ds = p * (dot(do, tl.trans(v), PRECISION) - delta[:, None])
    return dot(round_to(ds, k.dtype), k, PRECISION)


@triton.jit
def _register_gradient_kernel(
    partial_ptr, rope_ptr, grad_register_ptr, n_registers, n_head, n_parts, n_batches,
    first_part, last_part_q, last_part,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, REGISTERS_OUT: tl.constexpr,
):  # fmt: skip
    """Add up parts first_part … last_part - 1 (for q: last_part_q - 1), rotate q and k back, store.

    partial: (B, n_parts, R, 3C) float32. grad_register: (B / n_batches, R, 3C), where n_batches samples share it.
    Without REGISTERS_OUT register tokens were no queries: their dq is zero, and no part holds one.
    grid (B / n_batches · R · 3H,).
    """
    head = tl.program_id(0) % (3 * n_head)  # of q, then k, then v
    r = (tl.program_id(0) // (3 * n_head)) % n_registers
    b = (tl.program_id(0) // (3 * n_head * n_registers)).to(tl.int64)
    width = 3 * n_head * HEAD_DIM
    last_part = tl.where(head < n_head, last_part_q, last_part)
    offs_s = tl.arange(0, BLOCK_S)
    total = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    for batch in range(n_batches):
        if REGISTERS_OUT or head >= n_head:
            ptr = partial_ptr + (b * n_batches + batch) * n_parts * (n_registers * width) + r * width + head * HEAD_DIM
            for part in range(first_part, last_part, BLOCK_S):
                part_ptr = ptr + tl.cast(part, tl.int64) * (n_registers * width)
                total += load_rows(part_ptr, offs_s, last_part - part, n_registers * width, HEAD_DIM, BLOCK_D)
    x = tl.sum(total, 0)[None, :]  # [1, BLOCK_D]
    one = tl.arange(0, 1)
    if head < 2 * n_head:
        x = rotate(x, rope_ptr + r * HEAD_DIM, one, 1, HEAD_DIM, BLOCK_D, INVERSE=True)
    store_rows(grad_register_ptr + (b * n_registers + r) * width + head * HEAD_DIM, x, one, 1, width, HEAD_DIM, BLOCK_D)


def n_splits(plan: Plan) -> int:
    return cdiv(plan.n_tokens, plan.configs["register_forward"]["SPLIT"])


@lru_cache(maxsize=1024)
def _forward_launches(plan: Plan, batch: int, n_head: int, layouts: tuple, keep: bool) -> tuple[Prepared, Prepared]:
    splits = n_splits(plan)
    partial = Prepared(
        _register_forward_kernel, (batch * n_head * splits,), plan.configs["register_forward"],
        **input_numbers(plan, n_head, layouts), n_splits=splits,
    )  # fmt: skip
    combined = Prepared(
        _register_combine_kernel, (batch * n_head * cdiv(plan.n_registers, COMBINE_ROWS),),
        plan.configs["register_combine"], n_registers=plan.n_registers, n_head=n_head, n_splits=splits,
        scale=plan.scale, KEEP_LSE=keep,
    )  # fmt: skip
    return partial, combined


@lru_cache(maxsize=1024)
def _backward_launch(
    plan: Plan, batch: int, n_head: int, layouts: tuple, grad_register: tuple[int, ...], n_parts: int
) -> Prepared:
    splits = n_splits(plan)
    return Prepared(
        _register_backward_kernel, (batch * n_head * splits,), plan.configs["register_backward"],
        **input_numbers(plan, n_head, layouts, grad_register=grad_register), n_splits=splits, n_parts=n_parts,
    )  # fmt: skip


@lru_cache(maxsize=1024)
def _gradient_launch(
    plan: Plan, groups: int, n_head: int, n_parts: int, n_batches: int, first_part: int, last_part_q: int,
    last_part: int,
) -> Prepared:  # fmt: skip
    return Prepared(
        _register_gradient_kernel, (groups * plan.n_registers * 3 * n_head,), plan.configs["register_gradient"],
        n_registers=plan.n_registers, n_head=n_head, n_parts=n_parts, n_batches=n_batches, first_part=first_part,
        last_part_q=last_part_q, last_part=last_part,
    )  # fmt: skip


def forward(inputs: Inputs, register_out: Tensor, register_lse: Tensor, keep: bool, plan: Plan) -> None:
    """Fills register_out (B, R, C) and, with keep, register_lse (B, H, R)."""
    batch, n_registers, channels = register_out.shape
    rows = (batch, inputs.n_head, n_splits(plan), n_registers)
    m, total = (torch.empty(rows, dtype=torch.float32, device=register_out.device) for _ in range(2))
    acc = torch.empty((*rows, channels // inputs.n_head), dtype=torch.float32, device=register_out.device)
    both = {"m_ptr": m, "total_ptr": total, "acc_ptr": acc}
    partial, combined = _forward_launches(plan, batch, inputs.n_head, inputs.layouts, keep)
    partial(register_out, **inputs.pointers, **both)
    combined(register_out, **both, register_out_ptr=register_out, register_lse_ptr=register_lse)


def backward(
    inputs: Inputs, grad_register_out: Tensor, register_out: Tensor, register_lse: Tensor, partial: Tensor,
    n_parts: int, plan: Plan,
) -> None:  # fmt: skip
    """Fills parts 0 … splits - 1 of partial (B, n_parts, R, 3C) with the register tokens' dq, and part 0 with dk and dv
    from what they see of each other."""
    prepared = _backward_launch(plan, inputs.batch, inputs.n_head, inputs.layouts, grad_register_out.stride(), n_parts)
    prepared(
        register_out, **inputs.pointers, register_out_ptr=register_out, grad_register_out_ptr=grad_register_out,
        register_lse_ptr=register_lse, partial_ptr=partial,
    )  # fmt: skip


def gradient(
    partial: Tensor, rope: Tensor, n_head: int, grad_register: Tensor, first_part: int, last_part_q: int,
    last_part: int, plan: Plan,
) -> None:  # fmt: skip
    """Fills grad_register (B or 1, R, 3C) with the sum of partial (B, n_parts, R, 3C)."""
    groups = grad_register.shape[0]
    n_parts, n_batches = partial.shape[1], partial.shape[0] // groups
    if n_parts == 1:  # one part per sample: add the samples as if they were parts of one
        n_parts, last_part_q, last_part, n_batches = n_batches, n_batches, n_batches, 1
    prepared = _gradient_launch(plan, groups, n_head, n_parts, n_batches, first_part, last_part_q, last_part)
    prepared(partial, partial_ptr=partial, rope_ptr=rope, grad_register_ptr=grad_register)
