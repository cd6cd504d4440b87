"""The second half of a block in one kernel: output product, residual, RMSNorm, SwiGLU MLP, residual.

    m = x + a W_outᵀ,  or  m = x + a  behind a recurrence
    x̂ = m · rsqrt(mean(m²) + ε)   y = m + (silu(x̂ W_gateᵀ) ∘ x̂ W_upᵀ) W_downᵀ      the scale is folded into gate and up

a (N, C) in the products' dtype, 16 bits; x and y (N, C) float32 or 16 bits; weights as `pack` makes them, (3, F', C):
a chunk of all three is an aligned block without a mask. A program takes BLOCK_M rows and loops over the hidden units in
chunks of BLOCK_F, which never leave the chip. The accumulator of the down product starts as m: the residual costs
neither registers nor a second read. Kept for backward: x̂ and rstd; neither m nor the hidden units.

Bytes an element of (N, C), s = 4 or 2 of x: 2 + 2s + 2; FLOPs 2C + 6F. The weights stream through L2.
Predicted (not measured), N 72192, C 128, F 341, float32 x, H100: 74 µs (memory's floor 37, tensor cores 28), without
the output product 70 (37).
"""

from functools import lru_cache

from torch import Tensor

from fastblocks.kernels import runtime
from fastblocks.kernels.blocks import config
from fastblocks.kernels.launch import Prepared
from fastblocks.kernels.numerics import dot, round_to
from fastblocks.kernels.runtime import cdiv, tl, triton

# Exponential and reciprocal as single instructions, without Triton's handling of denormals: 4 instead of about 9 per
# sigmoid, as exact. They are inline PTX: tools that execute Triton's IR cannot run it and may set this to False.
HARDWARE_SIGMOID = True


def hardware_sigmoid(architecture: str) -> bool:
    """Whether kernels use those instructions there."""
    return HARDWARE_SIGMOID and architecture.startswith("sm_")


@triton.jit
def sigmoid(x, HARDWARE: tl.constexpr):
    x *= -1.4426950408889634
    if HARDWARE:
        power = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
        result = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + power], tl.float32, True, 1)
    else:
        result = 1.0 / (1.0 + tl.exp2(x))
    return result


@triton.jit
def _block_mlp_forward_kernel(
    addend_ptr, weight_out_ptr, x_ptr, weight_ptr, y_ptr, normalized_ptr, rstd_ptr,
    n_rows, eps,
    C: tl.constexpr, F_PAD: tl.constexpr, HAS_PRODUCT: tl.constexpr, KEEP: tl.constexpr, HARDWARE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grid (blocks of rows,).

    HAS_PRODUCT: of the addend and weight_out. KEEP: store x̂ and rstd; always without a product, where x̂ is read back,
    which makes it an operand in shared memory: from registers, where no product left it in them, every chunk would
    convert it again (a prediction: 91 µs instead of 66).
    """
    start_m = tl.program_id(0).to(tl.int64) * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)
    offs_c = tl.arange(0, BLOCK_C)
    mask_m = start_m + offs_m < n_rows
    mask_c = offs_c < C
    mask = mask_m[:, None] & mask_c[None, :]
    offs = offs_m[:, None] * C + offs_c[None, :]
    y = tl.load(x_ptr + start_m * C + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_C]
    addend = tl.load(addend_ptr + start_m * C + offs, mask=mask, other=0.0)
    if HAS_PRODUCT:
        offs_out = offs_c[:, None] * C + offs_c[None, :]
        weight_out = tl.load(weight_out_ptr + offs_out, mask=mask_c[:, None] & mask_c[None, :], other=0.0)
        y = dot(addend, tl.trans(weight_out), "ieee", y)
    else:
        y += addend.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(y * y, axis=1) / C + eps)
    normalized = round_to(y * rstd[:, None], weight_ptr.dtype.element_ty)
    if KEEP:
        tl.store(normalized_ptr + start_m * C + offs, normalized, mask=mask)
        tl.store(rstd_ptr + start_m + offs_m, rstd, mask=mask_m)
    if not HAS_PRODUCT:
        tl.debug_barrier()
        normalized = tl.load(normalized_ptr + start_m * C + offs, mask=mask, other=0.0)
    for start in range(0, F_PAD, BLOCK_F):
        offs_w = (start + tl.arange(0, BLOCK_F))[:, None] * C + offs_c[None, :]  # [BLOCK_F, BLOCK_C]
        gate = dot(normalized, tl.trans(tl.load(weight_ptr + offs_w, mask=mask_c[None, :], other=0.0)), "ieee")
        weight_up = tl.load(weight_ptr + F_PAD * C + offs_w, mask=mask_c[None, :], other=0.0)
        up = dot(normalized, tl.trans(weight_up), "ieee")
        hidden = round_to(gate * sigmoid(gate, HARDWARE) * up, normalized.dtype)  # [BLOCK_M, BLOCK_F]
        weight_down = tl.load(weight_ptr + 2 * F_PAD * C + offs_w, mask=mask_c[None, :], other=0.0)
        y = dot(hidden, weight_down, "ieee", y)
    tl.store(y_ptr + start_m * C + offs, round_to(y, y_ptr.dtype.element_ty), mask=mask)


@lru_cache(maxsize=1024)
def _forward_launch(
    n_rows: int, channels: int, padded: int, product: bool, keep: bool, eps: float, architecture: str, hardware: bool
) -> Prepared:
    chosen = config.of_kernel("block_mlp_forward", architecture, channels)
    return Prepared(
        _block_mlp_forward_kernel, (cdiv(n_rows, chosen["BLOCK_M"]),), chosen, n_rows=n_rows, eps=eps, C=channels,
        F_PAD=padded, HAS_PRODUCT=product, KEEP=keep, HARDWARE=hardware,
    )  # fmt: skip


def forward(
    addend: Tensor,
    weight_out: Tensor | None,
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    normalized: Tensor | None,
    rstd: Tensor | None,
    eps: float,
) -> None:
    """Fills y (…, C), normalized (N, C) and rstd (N,) from x and addend (…, C); all contiguous.

    addend: the attention's output, with weight_out (C, C), and then normalized and rstd may be None; or a recurrence's
    output, with None. weight: 3 · F' · C numbers.
    """
    channels, name = x.shape[-1], runtime.architecture(x.device)
    prepared = _forward_launch(
        x.numel() // channels, channels, weight.numel() // (3 * channels), weight_out is not None,
        normalized is not None, eps, name, hardware_sigmoid(name),
    )  # fmt: skip
    prepared(
        x, addend_ptr=addend, weight_out_ptr=weight_out, x_ptr=x, weight_ptr=weight, y_ptr=y,
        normalized_ptr=normalized, rstd_ptr=rstd,
    )  # fmt: skip
