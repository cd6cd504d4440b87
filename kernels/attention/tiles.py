"""What all attention kernels share: loading and storing tiles of rows, rotation, masks, register tokens' arguments.

A tile is BLOCK rows by BLOCK_D channels; BLOCK_D is a power of two and at least 16 (what `tl.dot` takes), channels past
HEAD_DIM are loaded as zeros and not stored. Base pointers are advanced in int64, offsets inside a tile are int32.
Rows of the whole sequence: row i < R is register token i, row R + t is token t; a row is also its rotary position.
"""

from torch import Tensor

from fastblocks.kernels.attention.config import Plan
from fastblocks.kernels.numerics import round_to
from fastblocks.kernels.runtime import tl, triton

LOG2_E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(LOG2_E · x): the GPU has exp2 in hardware


@triton.jit
def load_rows(ptr, offs, end, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr = False):
    """Rows `offs` of a (rows, HEAD_DIM) matrix, zeros outside 0 ≤ offs < end; EVEN: all rows are inside."""
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = ptr + offs[:, None] * stride + offs_d[None, :]
    if EVEN and HEAD_DIM == BLOCK_D:
        return tl.load(ptrs)
    if HEAD_DIM == BLOCK_D:
        return tl.load(ptrs, mask=((offs >= 0) & (offs < end))[:, None], other=0.0)
    mask = ((offs >= 0) & (offs < end))[:, None] & (offs_d < HEAD_DIM)[None, :]
    return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def store_rows(ptr, x, offs, end, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The counterpart of `load_rows`; x is rounded to the pointer's dtype."""
    offs_d = tl.arange(0, BLOCK_D)
    mask = ((offs >= 0) & (offs < end))[:, None] & (offs_d < HEAD_DIM)[None, :]
    tl.store(ptr + offs[:, None] * stride + offs_d[None, :], round_to(x, ptr.dtype.element_ty), mask=mask)


@triton.jit
def rotate(
    x, rope_ptr, offs, end, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    EVEN: tl.constexpr = False, INVERSE: tl.constexpr = False,
):  # fmt: skip
    """Rotate the channel pairs of x by the angles of positions `offs`, in float32; INVERSE: back."""
    ROWS: tl.constexpr = x.shape[0]
    table = load_rows(rope_ptr, offs, end, HEAD_DIM, HEAD_DIM, BLOCK_D, EVEN)
    cos, sin = tl.split(tl.reshape(table, (ROWS, BLOCK_D // 2, 2)))  # [ROWS, BLOCK_D / 2]
    even, odd = tl.split(tl.reshape(x.to(tl.float32), (ROWS, BLOCK_D // 2, 2)))
    if INVERSE:
        sin = -sin
    rotated = tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (ROWS, BLOCK_D))
    if x.dtype == tl.float32:
        # For TF32 products Triton writes a reshaped operand to shared memory in its shape before the reshape, for which
        # sm_90 has no layout. An addition that it cannot fold separates the two; 16 bits have a conversion there.
        rotated += 0.0
    return rotated


@triton.jit
def load_rotated(
    ptr, rope_ptr, offs, end, stride,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr = False, ROTATED: tl.constexpr = False,
):  # fmt: skip
    """Rows 0 ≤ offs < end of q or k, rotated and rounded back; ROTATED: they already are in memory."""
    x = load_rows(ptr, offs, end, stride, HEAD_DIM, BLOCK_D, EVEN)
    if not ROTATED:
        x = round_to(rotate(x, rope_ptr, offs, end, HEAD_DIM, BLOCK_D, EVEN), x.dtype)
    return x


@triton.jit
def program_of(n_blocks, n_head):
    """Block, batch · n_head + head, batch and head of a program, in a grid of B·H·n_blocks with blocks fastest."""
    block = tl.program_id(0) % n_blocks
    pid_bh = tl.program_id(0) // n_blocks
    return block, pid_bh, (pid_bh // n_head).to(tl.int64), pid_bh % n_head


@triton.jit
def register_keys(
    register_ptr, rope_ptr, offs_r, n_registers, n_channels, stride_register_r,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Load k, rotated, and v of one head's register tokens; the pointer points at their q."""
    k_ptr, v_ptr = register_ptr + n_channels, register_ptr + 2 * n_channels
    k = load_rotated(k_ptr, rope_ptr, offs_r, n_registers, stride_register_r, HEAD_DIM, BLOCK_D)
    return k, load_rows(v_ptr, offs_r, n_registers, stride_register_r, HEAD_DIM, BLOCK_D)


@triton.jit
def register_queries(
    register_ptr, rope_ptr, out_ptr, grad_out_ptr, lse_ptr,
    n_registers, n_channels, stride_register_r, stride_grad_r,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """q, rotated, dout, lse and delta of one head's register tokens; past the end P = 0."""
    offs = tl.arange(0, BLOCK_R)
    q = load_rotated(register_ptr, rope_ptr, offs, n_registers, stride_register_r, HEAD_DIM, BLOCK_D)
    do = load_rows(grad_out_ptr, offs, n_registers, stride_grad_r, HEAD_DIM, BLOCK_D)
    out = load_rows(out_ptr, offs, n_registers, n_channels, HEAD_DIM, BLOCK_D)
    lse = tl.load(lse_ptr + offs, mask=offs < n_registers, other=float("inf"))
    return q, do, lse, tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)


@triton.jit
def load_sequence(
    token_ptr, register_ptr, offs, n_registers, n_rows, stride_token, stride_register,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr, HAS_REGISTERS: tl.constexpr,
):  # fmt: skip
    """Rows of the whole sequence: register tokens from one tensor, tokens from the other."""
    if HAS_REGISTERS:
        registers = load_rows(register_ptr, offs, n_registers, stride_register, HEAD_DIM, BLOCK_D)
        tokens = load_rows(token_ptr, offs - n_registers, n_rows - n_registers, stride_token, HEAD_DIM, BLOCK_D)
        return tl.where((offs < n_registers)[:, None], registers, tokens)
    return load_rows(token_ptr, offs, n_rows, stride_token, HEAD_DIM, BLOCK_D, EVEN)


@triton.jit
def load_gate(gate_ptr, offs, end, stride):
    """sigmoid of the logits of rows 0 ≤ offs < end of one head, 1 outside."""
    logits = tl.load(gate_ptr + offs * stride, mask=(offs >= 0) & (offs < end), other=float("inf"))
    return 1.0 / (1.0 + tl.exp2(logits.to(tl.float32) * -LOG2_E))


def stride_of(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if x is None else x.stride()


def register_pointer(qkv: Tensor, register_qkv: Tensor | None) -> Tensor:
    """The register tokens; without any, qkv is a placeholder."""
    return qkv if register_qkv is None else register_qkv


def register_stride(register_qkv: Tensor | None) -> tuple[int, int]:
    """Strides of the samples and of the register tokens: 0 where all samples share them."""
    if register_qkv is None:
        return 0, 0
    return 0 if register_qkv.shape[0] == 1 else register_qkv.stride(0), register_qkv.stride(1)


def numbers_of(plan: Plan, n_head: int, **layouts: tuple[int, ...]) -> dict:
    """The arguments that follow from shapes and layouts, by name. layouts: strides of samples and rows (and more)."""
    numbers = {"n_tokens": plan.n_tokens, "n_registers": plan.n_registers, "n_head": n_head}
    for name, (batch, row, *_) in layouts.items():
        numbers[f"stride_{name}_b"] = batch
        numbers[f"stride_{name}_{'r' if name.endswith('register') else 't'}"] = row
    return numbers
