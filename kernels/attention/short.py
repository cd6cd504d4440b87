"""Attention over a short sequence: one program per (batch, head) keeps all its keys and values on chip.

    P = softmax(scale · q kᵀ + mask),  out = P v
    dv = Pᵀ dout,  dP = dout vᵀ,  dS = P ∘ (dP − rowsum(P ∘ dP)),  dq = scale · dS k,  dk = scale · dSᵀ q

Rows are register tokens, then tokens. The keys are two tiles of BLOCK_A + BLOCK_B rows (a power of two each, so 70 rows
take 64 + 16 instead of 128; BLOCK_B = 0: one tile); a loop takes queries in blocks of BLOCK_M, once where all fit. A
row sees all its keys at once, so there is no running maximum, nothing is saved for backward but the inputs, and
backward is one kernel of five products, where `long` needs seven.

Bytes per (batch, head): forward 4·T·D elements, backward 7·T·D (q, k, v, dout; dq, dk, dv), plus the rope table, which
stays in cache. FLOPs: 4·T²·D and 10·T²·D. At T = 64, D = 32 that is 64 and 91 FLOPs per element (32 and 46 per byte of
bfloat16): memory-bound, as long as the exponentials (16 per clock and SM) keep up: T / (8·D) of them per byte.
"""

from functools import lru_cache

from torch import Tensor

from fastblocks.kernels.attention.config import Plan
from fastblocks.kernels.attention.tiles import (
    LOG2_E,
    load_gate,
    load_rows,
    load_sequence,
    numbers_of,
    register_pointer,
    register_stride,
    rotate,
    store_rows,
    stride_of,
)
from fastblocks.kernels.attention.windows import visible
from fastblocks.kernels.launch import Prepared
from fastblocks.kernels.numerics import dot, round_to
from fastblocks.kernels.runtime import tl, triton


@triton.jit
def _load_keys(
    token_ptr, register_ptr, rope_ptr, offs, n_registers, n_rows, n_channels, stride_token, stride_register,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr, HAS_REGISTERS: tl.constexpr,
):  # fmt: skip
    """Load k, rotated, and v of rows offs; the pointers point at this head's q."""
    k = load_sequence(
        token_ptr + n_channels, register_ptr + n_channels, offs, n_registers, n_rows, stride_token, stride_register,
        HEAD_DIM, BLOCK_D, EVEN, HAS_REGISTERS,
    )  # fmt: skip
    k = round_to(rotate(k, rope_ptr, offs, n_rows, HEAD_DIM, BLOCK_D, EVEN), k.dtype)
    v = load_sequence(
        token_ptr + 2 * n_channels, register_ptr + 2 * n_channels, offs, n_registers, n_rows, stride_token,
        stride_register, HEAD_DIM, BLOCK_D, EVEN, HAS_REGISTERS,
    )  # fmt: skip
    return k, v


@triton.jit
def _scores(
    q, k, offs_q, offs_k, n_registers, n_rows, window_left, window_right,
    MASKED: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_REGISTERS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    s = dot(q, tl.trans(k), PRECISION)  # [queries, keys], unscaled
    if MASKED:
        s = tl.where(
            visible(offs_q, offs_k, n_registers, n_rows, window_left, window_right, HAS_WINDOW, HAS_REGISTERS),
            s,
            float("-inf"),
        )
    return s


@triton.jit
def _short_forward_kernel(
    qkv_ptr, rope_ptr, register_ptr, gate_ptr, out_ptr, register_out_ptr,
    stride_qkv_b, stride_qkv_t, stride_register_b, stride_register_r, stride_gate_b, stride_gate_t,
    n_tokens, n_registers, window_left, window_right, n_head, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
    ONE_BLOCK: tl.constexpr, NO_LOOP: tl.constexpr, EVEN: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_REGISTERS: tl.constexpr, REGISTERS_OUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grid (B·H,). register_ptr: q, k, v of the register tokens. ONE_BLOCK: all queries fit in BLOCK_M. EVEN: moreover
    there are no register tokens and the sequence fills tile A exactly."""
    b = (tl.program_id(0) // n_head).to(tl.int64)
    h = tl.program_id(0) % n_head
    n_rows = n_registers + n_tokens
    n_channels = n_head * HEAD_DIM
    token_ptr = qkv_ptr + b * stride_qkv_b + h * HEAD_DIM
    register_ptr += b * stride_register_b + h * HEAD_DIM
    out_ptr += b * n_tokens * n_channels + h * HEAD_DIM
    register_out_ptr += b * n_registers * n_channels + h * HEAD_DIM
    MASK_A: tl.constexpr = HAS_WINDOW or not (EVEN or BLOCK_B > 0)

    offs_a = tl.arange(0, BLOCK_A)
    k_a, v_a = _load_keys(
        token_ptr, register_ptr, rope_ptr, offs_a, n_registers, n_rows, n_channels, stride_qkv_t, stride_register_r,
        HEAD_DIM, BLOCK_D, EVEN or BLOCK_B > 0, HAS_REGISTERS,
    )  # fmt: skip
    if BLOCK_B > 0:
        offs_b = BLOCK_A + tl.arange(0, BLOCK_B)
        k_b, v_b = _load_keys(
            token_ptr, register_ptr, rope_ptr, offs_b, n_registers, n_rows, n_channels, stride_qkv_t,
            stride_register_r, HEAD_DIM, BLOCK_D, False, HAS_REGISTERS,
        )  # fmt: skip

    # Register tokens are queries only when their output is asked for.
    first = 0 if REGISTERS_OUT else n_registers
    for start in range(0 if NO_LOOP else first, 1 if NO_LOOP else n_registers + 1 if ONE_BLOCK else n_rows, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        if NO_LOOP:  # one pass with constant bounds is no loop to the compiler
            offs_m += first
        if REGISTERS_OUT:
            q = load_sequence(
                token_ptr, register_ptr, offs_m, n_registers, n_rows, stride_qkv_t, stride_register_r,
                HEAD_DIM, BLOCK_D, EVEN=False, HAS_REGISTERS=True,
            )  # fmt: skip
            q = round_to(rotate(q, rope_ptr, offs_m, n_rows, HEAD_DIM, BLOCK_D), q.dtype)
        else:
            q = load_rows(token_ptr, offs_m - n_registers, n_tokens, stride_qkv_t, HEAD_DIM, BLOCK_D, EVEN)
            q = round_to(rotate(q, rope_ptr, offs_m, n_rows, HEAD_DIM, BLOCK_D, EVEN), q.dtype)

        s_a = _scores(
            q, k_a, offs_m, offs_a, n_registers, n_rows, window_left, window_right,
            MASK_A, HAS_WINDOW, HAS_REGISTERS, PRECISION,
        )  # [BLOCK_M, BLOCK_A]  # fmt: skip
        m = tl.max(s_a, 1)
        if BLOCK_B > 0:
            s_b = _scores(
                q, k_b, offs_m, offs_b, n_registers, n_rows, window_left, window_right,
                True, HAS_WINDOW, HAS_REGISTERS, PRECISION,
            )  # [BLOCK_M, BLOCK_B]  # fmt: skip
            m = tl.maximum(m, tl.max(s_b, 1))
        m = tl.where(m == float("-inf"), 0.0, m)  # rows past the end may have no visible key
        p_a = tl.exp2((s_a - m[:, None]) * scale)
        total = tl.sum(p_a, 1)
        acc = dot(round_to(p_a, v_a.dtype), v_a, PRECISION)  # [BLOCK_M, BLOCK_D]
        if BLOCK_B > 0:
            p_b = tl.exp2((s_b - m[:, None]) * scale)
            total += tl.sum(p_b, 1)
            acc += dot(round_to(p_b, v_b.dtype), v_b, PRECISION)
        acc = acc / total[:, None]
        if gate_ptr is not None:
            gate = load_gate(gate_ptr + b * stride_gate_b + h, offs_m - n_registers, n_tokens, stride_gate_t)
            acc *= gate[:, None]
        store_rows(out_ptr, acc, offs_m - n_registers, n_tokens, n_channels, HEAD_DIM, BLOCK_D)
        if REGISTERS_OUT:
            store_rows(register_out_ptr, acc, offs_m, n_registers, n_channels, HEAD_DIM, BLOCK_D)


@triton.jit
def _store_gradient(
    x, token_ptr, partial_ptr, rope_ptr, offs, n_registers, n_rows, n_channels,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_REGISTERS: tl.constexpr, ROTATED: tl.constexpr,
):  # fmt: skip
    """Store tokens' rows, rotated back if ROTATED (q and k), and register tokens' rows, as they are, to partial."""
    if HAS_REGISTERS:
        store_rows(partial_ptr, x, offs, n_registers, 3 * n_channels, HEAD_DIM, BLOCK_D)
    if ROTATED:
        x = rotate(x, rope_ptr, offs, n_rows, HEAD_DIM, BLOCK_D, INVERSE=True)
    store_rows(token_ptr, x, offs - n_registers, n_rows - n_registers, 3 * n_channels, HEAD_DIM, BLOCK_D)


@triton.jit
def _short_backward_kernel(
    qkv_ptr, rope_ptr, register_ptr, gate_ptr, grad_out_ptr, grad_register_out_ptr, grad_qkv_ptr, grad_gate_ptr,
    partial_ptr,
    stride_qkv_b, stride_qkv_t, stride_register_b, stride_register_r, stride_gate_b, stride_gate_t,
    stride_grad_b, stride_grad_t, stride_grad_register_b, stride_grad_register_r,
    n_tokens, n_registers, window_left, window_right, n_head, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
    ONE_BLOCK: tl.constexpr, NO_LOOP: tl.constexpr, EVEN: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_REGISTERS: tl.constexpr, REGISTERS_OUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grid (B·H,). partial_ptr: (B, R, 3C) float32, the register tokens' gradients of each sample, not rotated back.
    ONE_BLOCK, EVEN: as in forward."""
    b = (tl.program_id(0) // n_head).to(tl.int64)
    h = tl.program_id(0) % n_head
    n_rows = n_registers + n_tokens
    n_channels = n_head * HEAD_DIM
    token_ptr = qkv_ptr + b * stride_qkv_b + h * HEAD_DIM
    register_ptr += b * stride_register_b + h * HEAD_DIM
    grad_out_ptr += b * stride_grad_b + h * HEAD_DIM
    grad_register_out_ptr += b * stride_grad_register_b + h * HEAD_DIM
    grad_qkv_ptr += b * n_tokens * (3 * n_channels) + h * HEAD_DIM
    partial_ptr += b * n_registers * (3 * n_channels) + h * HEAD_DIM
    MASK_A: tl.constexpr = HAS_WINDOW or not (EVEN or BLOCK_B > 0)

    offs_a = tl.arange(0, BLOCK_A)
    k_a, v_a = _load_keys(
        token_ptr, register_ptr, rope_ptr, offs_a, n_registers, n_rows, n_channels, stride_qkv_t, stride_register_r,
        HEAD_DIM, BLOCK_D, EVEN or BLOCK_B > 0, HAS_REGISTERS,
    )  # fmt: skip
    dk_a = tl.zeros((BLOCK_A, BLOCK_D), tl.float32)
    dv_a = tl.zeros((BLOCK_A, BLOCK_D), tl.float32)
    if BLOCK_B > 0:
        offs_b = BLOCK_A + tl.arange(0, BLOCK_B)
        k_b, v_b = _load_keys(
            token_ptr, register_ptr, rope_ptr, offs_b, n_registers, n_rows, n_channels, stride_qkv_t,
            stride_register_r, HEAD_DIM, BLOCK_D, False, HAS_REGISTERS,
        )  # fmt: skip
        dk_b = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
        dv_b = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)

    first = 0 if REGISTERS_OUT else n_registers
    for start in range(0 if NO_LOOP else first, 1 if NO_LOOP else n_registers + 1 if ONE_BLOCK else n_rows, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        if NO_LOOP:  # one pass with constant bounds is no loop to the compiler
            offs_m += first
        if REGISTERS_OUT:
            q = load_sequence(
                token_ptr, register_ptr, offs_m, n_registers, n_rows, stride_qkv_t, stride_register_r,
                HEAD_DIM, BLOCK_D, EVEN=False, HAS_REGISTERS=True,
            )  # fmt: skip
            q = round_to(rotate(q, rope_ptr, offs_m, n_rows, HEAD_DIM, BLOCK_D), q.dtype)
            do = load_sequence(
                grad_out_ptr, grad_register_out_ptr, offs_m, n_registers, n_rows, stride_grad_t,
                stride_grad_register_r, HEAD_DIM, BLOCK_D, False, True,
            )  # fmt: skip
        else:
            q = load_rows(token_ptr, offs_m - n_registers, n_tokens, stride_qkv_t, HEAD_DIM, BLOCK_D, EVEN)
            q = round_to(rotate(q, rope_ptr, offs_m, n_rows, HEAD_DIM, BLOCK_D, EVEN), q.dtype)
            do = load_rows(grad_out_ptr, offs_m - n_registers, n_tokens, stride_grad_t, HEAD_DIM, BLOCK_D, EVEN)
        if gate_ptr is not None:
            gate = load_gate(gate_ptr + b * stride_gate_b + h, offs_m - n_registers, n_tokens, stride_gate_t)
            do = round_to(do.to(tl.float32) * gate[:, None], do.dtype)

        p_a = _scores(
            q, k_a, offs_m, offs_a, n_registers, n_rows, window_left, window_right,
            MASK_A, HAS_WINDOW, HAS_REGISTERS, PRECISION,
        )  # [BLOCK_M, BLOCK_A]  # fmt: skip
        m = tl.max(p_a, 1)
        if BLOCK_B > 0:
            p_b = _scores(
                q, k_b, offs_m, offs_b, n_registers, n_rows, window_left, window_right,
                True, HAS_WINDOW, HAS_REGISTERS, PRECISION,
            )  # [BLOCK_M, BLOCK_B]  # fmt: skip
            m = tl.maximum(m, tl.max(p_b, 1))
        m = tl.where(m == float("-inf"), 0.0, m)
        p_a = tl.exp2((p_a - m[:, None]) * scale)
        total = tl.sum(p_a, 1)
        if BLOCK_B > 0:
            p_b = tl.exp2((p_b - m[:, None]) * scale)
            total += tl.sum(p_b, 1)
        inverse = 1.0 / tl.where(total == 0.0, 1.0, total)  # rows past the end: P = 0, not NaN
        p_a *= inverse[:, None]
        dv_a += dot(tl.trans(round_to(p_a, do.dtype)), do, PRECISION)  # [BLOCK_A, BLOCK_D]
        dp_a = dot(do, tl.trans(v_a), PRECISION)  # [BLOCK_M, BLOCK_A]
        delta = tl.sum(p_a * dp_a, 1)
        if BLOCK_B > 0:
            p_b *= inverse[:, None]
            dv_b += dot(tl.trans(round_to(p_b, do.dtype)), do, PRECISION)
            dp_b = dot(do, tl.trans(v_b), PRECISION)
            delta += tl.sum(p_b * dp_b, 1)
        if gate_ptr is not None:  # delta is the gate times its gradient
            offs_t = offs_m - n_registers
            grad_gate = round_to(delta * (1.0 - gate), grad_gate_ptr.dtype.element_ty)
            mask_t = (offs_t >= 0) & (offs_t < n_tokens)
            tl.store(grad_gate_ptr + (b * n_tokens + offs_t) * n_head + h, grad_gate, mask=mask_t)
        ds_a = round_to(p_a * (dp_a - delta[:, None]), q.dtype)
        dq = dot(ds_a, k_a, PRECISION)  # [BLOCK_M, BLOCK_D]
        dk_a += dot(tl.trans(ds_a), q, PRECISION)
        if BLOCK_B > 0:
            ds_b = round_to(p_b * (dp_b - delta[:, None]), q.dtype)
            dq += dot(ds_b, k_b, PRECISION)
            dk_b += dot(tl.trans(ds_b), q, PRECISION)
        _store_gradient(
            dq * (scale / LOG2_E), grad_qkv_ptr, partial_ptr, rope_ptr, offs_m, n_registers, n_rows, n_channels,
            HEAD_DIM, BLOCK_D, REGISTERS_OUT, True,
        )  # fmt: skip

    _store_gradient(
        dv_a, grad_qkv_ptr + 2 * n_channels, partial_ptr + 2 * n_channels, rope_ptr, offs_a, n_registers, n_rows,
        n_channels, HEAD_DIM, BLOCK_D, HAS_REGISTERS, False,
    )  # fmt: skip
    _store_gradient(
        dk_a * (scale / LOG2_E), grad_qkv_ptr + n_channels, partial_ptr + n_channels, rope_ptr, offs_a, n_registers,
        n_rows, n_channels, HEAD_DIM, BLOCK_D, HAS_REGISTERS, True,
    )  # fmt: skip
    if BLOCK_B > 0:
        _store_gradient(
            dv_b, grad_qkv_ptr + 2 * n_channels, partial_ptr + 2 * n_channels, rope_ptr, offs_b, n_registers, n_rows,
            n_channels, HEAD_DIM, BLOCK_D, HAS_REGISTERS, False,
        )  # fmt: skip
        _store_gradient(
            dk_b * (scale / LOG2_E), grad_qkv_ptr + n_channels, partial_ptr + n_channels, rope_ptr, offs_b,
            n_registers, n_rows, n_channels, HEAD_DIM, BLOCK_D, HAS_REGISTERS, True,
        )  # fmt: skip


@lru_cache(maxsize=1024)
def _forward_launch(
    plan: Plan, batch: int, n_head: int, qkv: tuple[int, ...], register: tuple[int, ...], gate: tuple[int, ...]
) -> Prepared:
    return Prepared(
        _short_forward_kernel, (batch * n_head,), plan.configs["short_forward"],
        **numbers_of(plan, n_head, qkv=qkv, register=register, gate=gate), **plan.window, scale=plan.scale,
    )  # fmt: skip


@lru_cache(maxsize=1024)
def _backward_launch(
    plan: Plan, batch: int, n_head: int, qkv: tuple[int, ...], register: tuple[int, ...], gate: tuple[int, ...],
    grad: tuple[int, ...], grad_register: tuple[int, ...],
) -> Prepared:  # fmt: skip
    layouts = {"qkv": qkv, "register": register, "gate": gate, "grad": grad, "grad_register": grad_register}
    return Prepared(
        _short_backward_kernel, (batch * n_head,), plan.configs["short_backward"],
        **numbers_of(plan, n_head, **layouts), **plan.window, scale=plan.scale,
    )  # fmt: skip


def forward(
    qkv: Tensor, rope: Tensor, n_head: int, register_qkv: Tensor | None, gate: Tensor | None, out: Tensor,
    register_out: Tensor, plan: Plan,
) -> None:  # fmt: skip
    """Fills out (B, T, C) and, where the plan has it, register_out (B, R, C)."""
    prepared = _forward_launch(plan, qkv.shape[0], n_head, qkv.stride(), register_stride(register_qkv), stride_of(gate))
    prepared(
        qkv, qkv_ptr=qkv, rope_ptr=rope, register_ptr=register_pointer(qkv, register_qkv), gate_ptr=gate, out_ptr=out,
        register_out_ptr=register_out,
    )  # fmt: skip


def backward(
    grad_out: Tensor, grad_register_out: Tensor, qkv: Tensor, rope: Tensor, n_head: int, register_qkv: Tensor | None,
    gate: Tensor | None, grad_qkv: Tensor, grad_gate: Tensor | None, partial: Tensor, plan: Plan,
) -> None:  # fmt: skip
    """Fills grad_qkv (B, T, 3C), grad_gate (B, T, H) and partial (B, 1, R, 3C)."""
    prepared = _backward_launch(
        plan, qkv.shape[0], n_head, qkv.stride(), register_stride(register_qkv), stride_of(gate), grad_out.stride(),
        grad_register_out.stride(),
    )  # fmt: skip
    prepared(
        qkv, qkv_ptr=qkv, rope_ptr=rope, register_ptr=register_pointer(qkv, register_qkv), gate_ptr=gate,
        grad_out_ptr=grad_out, grad_register_out_ptr=grad_register_out, grad_qkv_ptr=grad_qkv,
        grad_gate_ptr=grad_gate, partial_ptr=partial,
    )  # fmt: skip
