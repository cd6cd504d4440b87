"""RMSNorm and the product behind it in one kernel, and their gradient by the input.

    x̂ = x · rsqrt(mean(x²) + ε)   rstd = that root   out = x̂ Wᵀ      W has the norm's scale folded in
    ∂x = ∂m + rstd · (g − x̂ · mean(g ∘ x̂)),  g = ∂out W               ∂m: the residual's gradient, where there is one

x (N, C) contiguous, float32 or 16 bits; x̂ (N, C), W (M, C), out (N, M) in the products' dtype, 16 bits; rstd (N,)
float32. x̂ is normalized once per tile of rows and read by all chunks of W on the chip. Without storing x̂ the kernel is
predicted slower (49 µs instead of 37.5), so it is stored in inference, too.
Kept for backward: x̂ and rstd; neither x nor out.

Bytes an element of (N, C), s = 4 or 2 of x, M = 3C: forward s + 8; backward 8 + 2s. FLOPs 6C either way.
Predicted (not measured), N 72192, C 128, float32 x, H100: forward 37.5 µs (memory's floor 37.1), backward 49 (49).
"""

from functools import lru_cache

from torch import Tensor

from fastblocks.kernels.blocks import config
from fastblocks.kernels.launch import Prepared
from fastblocks.kernels.numerics import dot, round_to
from fastblocks.kernels.runtime import architecture, cdiv, tl, triton


@triton.jit
def _norm_linear_forward_kernel(
    x_ptr, weight_ptr, out_ptr, normalized_ptr, rstd_ptr,
    n_rows, eps,
    C: tl.constexpr, OUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grid (blocks of rows,)."""
    start_m = tl.program_id(0).to(tl.int64) * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)
    offs_c = tl.arange(0, BLOCK_C)
    mask_m = start_m + offs_m < n_rows
    mask_c = offs_c < C
    mask = mask_m[:, None] & mask_c[None, :]
    offs = offs_m[:, None] * C + offs_c[None, :]
    x = tl.load(x_ptr + start_m * C + offs, mask=mask, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / C + eps)
    normalized = round_to(x * rstd[:, None], weight_ptr.dtype.element_ty)  # [BLOCK_M, BLOCK_C]
    tl.store(normalized_ptr + start_m * C + offs, normalized, mask=mask)
    tl.store(rstd_ptr + start_m + offs_m, rstd, mask=mask_m)
    out_ptr += start_m * OUT
    for start in range(0, OUT, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        offs_w, offs_out = offs_n[:, None] * C + offs_c[None, :], offs_m[:, None] * OUT + offs_n[None, :]
        if OUT % BLOCK_N == 0:
            weight = tl.load(weight_ptr + offs_w, mask=mask_c[None, :], other=0.0)
            out = dot(normalized, tl.trans(weight), "ieee")
            tl.store(out_ptr + offs_out, round_to(out, out_ptr.dtype.element_ty), mask=mask_m[:, None])
        else:
            mask_n = offs_n < OUT
            weight = tl.load(weight_ptr + offs_w, mask=mask_n[:, None] & mask_c[None, :], other=0.0)
            out = dot(normalized, tl.trans(weight), "ieee")
            mask_out = mask_m[:, None] & mask_n[None, :]
            tl.store(out_ptr + offs_out, round_to(out, out_ptr.dtype.element_ty), mask=mask_out)


@triton.jit
def _norm_linear_grad_x_kernel(
    grad_out_ptr, normalized_ptr, rstd_ptr, weight_ptr, residual_ptr, grad_x_ptr,
    n_rows,
    C: tl.constexpr, OUT: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grid (blocks of rows,). residual: the gradient that reaches x past the norm."""
    start_m = tl.program_id(0).to(tl.int64) * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)
    offs_c = tl.arange(0, BLOCK_C)
    mask_m = start_m + offs_m < n_rows
    mask_c = offs_c < C
    mask = mask_m[:, None] & mask_c[None, :]
    offs = offs_m[:, None] * C + offs_c[None, :]
    grad_out_ptr += start_m * OUT
    grad = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for start in range(0, OUT, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        offs_w, offs_out = offs_n[:, None] * C + offs_c[None, :], offs_m[:, None] * OUT + offs_n[None, :]
        if OUT % BLOCK_N == 0:
            weight = tl.load(weight_ptr + offs_w, mask=mask_c[None, :], other=0.0)
            grad_out = tl.load(grad_out_ptr + offs_out, mask=mask_m[:, None], other=0.0)
        else:
            mask_n = offs_n < OUT
            weight = tl.load(weight_ptr + offs_w, mask=mask_n[:, None] & mask_c[None, :], other=0.0)
            grad_out = tl.load(grad_out_ptr + offs_out, mask=mask_m[:, None] & mask_n[None, :], other=0.0)
        grad = dot(grad_out, weight, "ieee", grad)
    normalized = tl.load(normalized_ptr + start_m * C + offs, mask=mask, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + start_m + offs_m, mask=mask_m, other=0.0)
    grad_x = rstd[:, None] * (grad - normalized * (tl.sum(grad * normalized, axis=1) / C)[:, None])
    if HAS_RESIDUAL:
        grad_x += tl.load(residual_ptr + start_m * C + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(grad_x_ptr + start_m * C + offs, round_to(grad_x, grad_x_ptr.dtype.element_ty), mask=mask)


@lru_cache(maxsize=1024)
def _forward_launch(n_rows: int, channels: int, outputs: int, eps: float, architecture: str) -> Prepared:
    chosen = config.of_kernel("norm_linear_forward", architecture, channels)
    grid = (cdiv(n_rows, chosen["BLOCK_M"]),)
    return Prepared(_norm_linear_forward_kernel, grid, chosen, n_rows=n_rows, eps=eps, C=channels, OUT=outputs)


@lru_cache(maxsize=1024)
def _grad_x_launch(n_rows: int, channels: int, outputs: int, residual: bool, architecture: str) -> Prepared:
    chosen = config.of_kernel("norm_linear_grad_x", architecture, channels)
    grid = (cdiv(n_rows, chosen["BLOCK_M"]),)
    return Prepared(
        _norm_linear_grad_x_kernel, grid, chosen, n_rows=n_rows, C=channels, OUT=outputs, HAS_RESIDUAL=residual
    )


def forward(x: Tensor, weight: Tensor, out: Tensor, normalized: Tensor, rstd: Tensor, eps: float) -> None:
    """Fills out (N, M), normalized (N, C) and rstd (N,) from x (…, C) and the M · C numbers of weight; all
    contiguous."""
    channels = x.shape[-1]
    prepared = _forward_launch(rstd.numel(), channels, weight.numel() // channels, eps, architecture(x.device))
    prepared(x, x_ptr=x, weight_ptr=weight, out_ptr=out, normalized_ptr=normalized, rstd_ptr=rstd)


def grad_x(
    grad_out: Tensor, normalized: Tensor, rstd: Tensor, weight: Tensor, residual: Tensor | None, grad_x: Tensor
) -> None:
    """Fills grad_x (…, C) of any float dtype; the residual is added to it. Others as in `forward`."""
    channels = grad_x.shape[-1]
    prepared = _grad_x_launch(
        rstd.numel(), channels, weight.numel() // channels, residual is not None, architecture(grad_x.device)
    )
    prepared(
        grad_x, grad_out_ptr=grad_out, normalized_ptr=normalized, rstd_ptr=rstd, weight_ptr=weight,
        residual_ptr=residual, grad_x_ptr=grad_x,
    )  # fmt: skip
