"""RMSNorm over rows of channels, with what stands around it in a residual block.

    total = x + addend                                     optional; else total is x
    rstd = 1 / √(mean(total²) + eps),   out = total · rstd · weight
    grad_x = grad_residual + rstd · (G − x̂ · mean(G · x̂)),   G = grad_out · weight,   x̂ = total · rstd
    grad_weight = Σ grad_out · x̂                           over rows

All tensors are contiguous rows (N, C) in dtypes of their own, weight (C,), rstd (N,) float32; everything is computed in
float32. A weight that a following product has taken over is None. Kept for backward: rstd, and total or x̂ itself, in
whichever dtype the caller has it.

Bytes per element, s those of the stream x, o those of out, k of what is kept: forward s + o, with an addend of a bytes
2s + a + o; backward o + k + s, with a residual's gradient o + k + 2s. Predicted for an H100 (bound by memory, 3.0 TB/s;
not measured), N 72192, C 128, a float32 stream and 16-bit operands: forward 19 µs, with an addend 37, backward with a
residual's gradient 37.
"""

from functools import lru_cache

import torch
from torch import Tensor

from fastblocks.backend import KERNEL_DTYPES
from fastblocks.eager import rows as eager
from fastblocks.kernels import runtime
from fastblocks.kernels.launch import Prepared
from fastblocks.kernels.numerics import round_to
from fastblocks.kernels.operator import Operator
from fastblocks.kernels.reduce import sum_rows
from fastblocks.kernels.rows import config
from fastblocks.kernels.runtime import cdiv, tl, triton

__all__ = ["backward", "forward", "rms_norm", "unsupported_reason"]

MAX_CHANNELS = 16384  # a row is normalized in registers: 16 elements per thread in 32 warps


@triton.jit
def _rms_norm_forward_kernel(
    x_ptr, addend_ptr, total_ptr, weight_ptr, out_ptr, rstd_ptr,
    n_rows, eps,
    C: tl.constexpr, HAS_ADDEND: tl.constexpr, HAS_WEIGHT: tl.constexpr, KEEP_RSTD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grid (tiles of BLOCK_M rows,)."""
    offs_m = tl.arange(0, BLOCK_M)
    offs_c = tl.arange(0, BLOCK_C)
    start = tl.program_id(0).to(tl.int64) * BLOCK_M  # only what is the same for a whole tile has 64 bits
    mask_m = start + offs_m < n_rows
    mask_c = offs_c < C
    mask = mask_m[:, None] & mask_c[None, :]
    offs = offs_m[:, None] * C + offs_c[None, :]
    x = tl.load(x_ptr + start * C + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_C]
    if HAS_ADDEND:
        x += tl.load(addend_ptr + start * C + offs, mask=mask, other=0.0).to(tl.float32)
        total = round_to(x, total_ptr.dtype.element_ty)
        tl.store(total_ptr + start * C + offs, total, mask=mask)
        x = total.to(tl.float32)  # backward reads the rounded sum
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / C + eps)
    if KEEP_RSTD:
        tl.store(rstd_ptr + start + offs_m, rstd, mask=mask_m)
    out = x * rstd[:, None]
    if HAS_WEIGHT:
        out *= tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + start * C + offs, round_to(out, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rms_norm_backward_kernel(
    grad_out_ptr, kept_ptr, rstd_ptr, weight_ptr, grad_residual_ptr, grad_x_ptr, partial_ptr,
    n_rows,
    C: tl.constexpr, IS_NORMALIZED: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    NEED_X: tl.constexpr, NEED_WEIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grid (programs,), which share the tiles of BLOCK_M rows in turn. partial (programs, C): their sums of grad_out ·
    x̂. IS_NORMALIZED: kept is x̂, not x."""
    offs_m = tl.arange(0, BLOCK_M)
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    offs = offs_m[:, None] * C + offs_c[None, :]
    if NEED_WEIGHT:
        grad_weight = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_M), tl.num_programs(0)):
        start = tl.full([], BLOCK_M, tl.int64) * tile
        mask_m = start + offs_m < n_rows
        mask = mask_m[:, None] & mask_c[None, :]
        rstd = tl.load(rstd_ptr + start + offs_m, mask=mask_m, other=0.0)[:, None]
        normalized = tl.load(kept_ptr + start * C + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_C]
        if not IS_NORMALIZED:
            normalized *= rstd
        grad = tl.load(grad_out_ptr + start * C + offs, mask=mask, other=0.0).to(tl.float32)
        if NEED_WEIGHT:
            grad_weight += grad * normalized
        if NEED_X:
            if HAS_WEIGHT:  # loaded here: held through the loop, it costs 32 registers per thread in the widest rows
                grad *= tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
            mean = tl.sum(grad * normalized, axis=1)[:, None] / C
            grad_x = rstd * (grad - normalized * mean)
            if HAS_RESIDUAL:
                grad_x += tl.load(grad_residual_ptr + start * C + offs, mask=mask, other=0.0).to(tl.float32)
            tl.store(grad_x_ptr + start * C + offs, round_to(grad_x, grad_x_ptr.dtype.element_ty), mask=mask)
    if NEED_WEIGHT:
        tl.store(partial_ptr + tl.program_id(0) * C + offs_c, tl.sum(grad_weight, axis=0), mask=mask_c)


@lru_cache(maxsize=1024)
def _forward_launch(n_rows: int, channels: int, eps: float, addend: bool, weight: bool, keep: bool) -> Prepared:
    chosen = config.rms_norm(channels)
    return Prepared(
        _rms_norm_forward_kernel, (cdiv(n_rows, chosen["BLOCK_M"]),), chosen, n_rows=n_rows, eps=eps, C=channels,
        HAS_ADDEND=addend, HAS_WEIGHT=weight, KEEP_RSTD=keep,
    )  # fmt: skip


@lru_cache(maxsize=1024)
def _backward_launch(
    n_rows: int, channels: int, programs: int, normalized: bool, weight: bool, residual: bool, need_x: bool,
    need_weight: bool,
) -> Prepared:  # fmt: skip
    return Prepared(
        _rms_norm_backward_kernel, (programs,), config.rms_norm(channels), n_rows=n_rows, C=channels,
        IS_NORMALIZED=normalized, HAS_WEIGHT=weight, HAS_RESIDUAL=residual, NEED_X=need_x, NEED_WEIGHT=need_weight,
    )  # fmt: skip


def forward(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    out: Tensor,
    rstd: Tensor | None,
    addend: Tensor | None = None,
    total: Tensor | None = None,
) -> None:
    """Fill out, rstd (unless None) and, with an addend, total, all of x's shape (…, C) and contiguous, as the module
    says."""
    channels = x.shape[-1]
    prepared = _forward_launch(
        x.numel() // channels, channels, eps, addend is not None, weight is not None, rstd is not None
    )
    prepared(x, x_ptr=x, addend_ptr=addend, total_ptr=total, weight_ptr=weight, out_ptr=out, rstd_ptr=rstd)


def backward(
    grad_out: Tensor,
    kept: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    grad_x: Tensor | None,
    *,
    kept_is_normalized: bool,
    grad_residual: Tensor | None = None,
    grad_weight: Tensor | None = None,
) -> None:
    """Fill grad_x and grad_weight, those that are not None; others (…, C); all contiguous, as the module says.

    Args:
        kept: x̂ if `kept_is_normalized`, else x (or total).
        grad_x: may be grad_residual, grad_out or kept itself, in place.
        grad_residual: gradient that reaches x past the norm; it is added to grad_x.
    """
    channels = grad_out.shape[-1]
    n_rows = grad_out.numel() // channels
    programs, partial = cdiv(n_rows, config.rms_norm(channels)["BLOCK_M"]), None
    if grad_weight is not None:
        programs = min(programs, config.PROGRAMS_PER_SM * runtime.sm_count(grad_out.device))
        partial = grad_out.new_empty((programs, channels), dtype=torch.float32)
    prepared = _backward_launch(
        n_rows, channels, programs, kept_is_normalized, weight is not None, grad_residual is not None,
        grad_x is not None, grad_weight is not None,
    )  # fmt: skip
    prepared(
        grad_out, grad_out_ptr=grad_out, kept_ptr=kept, rstd_ptr=rstd, weight_ptr=weight,
        grad_residual_ptr=grad_residual, grad_x_ptr=grad_x, partial_ptr=partial,
    )  # fmt: skip
    if partial is not None:
        sum_rows(partial, [grad_weight])


# ---- the operator of `fastblocks.functional.rms_norm` ----------------------------------------------------------------


def unsupported_reason(x: Tensor, scale: Tensor, eps: float) -> str:
    """Why the kernels do not take this call; an empty string if they do."""
    if x.shape[-1] > MAX_CHANNELS:
        return f"rows of {x.shape[-1]} channels do not fit in registers, {MAX_CHANNELS} do"
    if scale.dtype not in KERNEL_DTYPES:
        return f"no kernel for a scale in {str(scale.dtype).removeprefix('torch.')}"
    if scale.device != x.device:
        return f"scale on {scale.device}, input on {x.device}"
    return ""


def _outputs(x, scale, eps, keep):
    y = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, scale.dtype))
    return y, x.new_empty(x.shape[:-1], dtype=torch.float32) if keep else None


def _forward(outputs, x, scale, eps, keep):
    y, rstd = outputs
    forward(x.contiguous(), scale.contiguous(), eps, y, rstd)


def _backward(grads, needs, x, scale, eps, rstd):
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if needs[0] else None
    grad_scale = torch.empty_like(scale, memory_format=torch.contiguous_format) if needs[1] else None
    backward(
        grads[0].contiguous(), x.contiguous(), rstd, scale.contiguous(), grad_x,
        kept_is_normalized=False, grad_weight=grad_scale,
    )  # fmt: skip
    return grad_x, grad_scale


_operator = Operator(
    "rms_norm",
    "(Tensor x, Tensor scale, float eps, bool keep) -> (Tensor y, Tensor rstd)",
    results=1,
    outputs=_outputs,
    forward=_forward,
    saved=("rstd",),
    backward=_backward,
    formula=eager.rms_norm_formula,
)


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """`fastblocks.functional.rms_norm`, for arguments that `unsupported_reason` accepts."""
    return _operator(x, scale, eps)[0]
