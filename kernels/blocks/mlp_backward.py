"""Gradients of `mlp`: by its input and, through it, by the attention's output; and by the weights.

    g = ∂gate W_gate + ∂up W_up,  (∂gate, ∂up) from ∂hidden = ∂y W_down through SwiGLU
    ∂m = ∂y + rstd · (g − x̂ · mean(g ∘ x̂))     ∂a = ∂m W_out, or ∂m
    ∂W_gate = ∂gateᵀ x̂    ∂W_up = ∂upᵀ x̂    ∂W_downᵀ = hiddenᵀ ∂y      of the packed weights, (3, F', C)

Both kernels recompute gate and up from x̂: storing them would move 6F/C bytes an element of (N, C), the largest tensors
of the block. Above 64 channels the second kernel spills; there the first stores what it recomputed, and `grad_weight`
multiplies. Layouts as in `mlp`; ∂y and ∂m have y's dtype, ∂a the products'. With a float32 ∂y the first kernel also
writes ∂y in the products' dtype: inside a loop of products float32 would be converted in every pass.

While it runs, a storing backward pass holds 6F' bytes a row: 2112 at C 128, F 341, more than a block keeps for it.

Bytes an element of (N, C), s = 4 or 2 of y: the first 2s + 4 (+ 2 with the narrow ∂y), the second 4 and the partial
sums, 24 · slabs · F' / N; FLOPs 10F + 2C and 12F.
Predicted (not measured), N 72192, float32 y, H100: C 64, F 170, 47 and 27 µs; C 128, F 341, storing, 137 µs.
"""

from functools import lru_cache

from torch import Tensor

from fastblocks.kernels import runtime
from fastblocks.kernels.blocks import config
from fastblocks.kernels.blocks.mlp import hardware_sigmoid, sigmoid
from fastblocks.kernels.launch import Prepared
from fastblocks.kernels.numerics import dot, round_to
from fastblocks.kernels.runtime import cdiv, tl, triton


@triton.jit
def _swiglu_backward(gate, up, grad, HARDWARE: tl.constexpr):
    """silu(gate), and the gradients of gate and up."""
    sig = sigmoid(gate, HARDWARE)
    swish = gate * sig
    return swish, grad * up * (sig + swish * (1.0 - sig)), grad * swish


@triton.jit
def _block_mlp_grad_x_kernel(
    grad_y_ptr, normalized_ptr, rstd_ptr, weight_ptr, weight_out_ptr, grad_m_ptr, grad_addend_ptr, narrow_ptr,
    grad_gate_up_ptr, hidden_ptr,
    n_rows,
    C: tl.constexpr, F_PAD: tl.constexpr, HAS_PRODUCT: tl.constexpr, NARROW: tl.constexpr, HARDWARE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grid (blocks of rows,). HAS_PRODUCT: grad_addend is grad_m W_out, else grad_m. NARROW: the products have another
    dtype than grad_y, which is also stored in that and read back as an operand in shared memory. grad_gate_up_ptr (N,
    2F'), hidden_ptr (N, F'): for the weights' gradients as products of their own, or None."""
    start_m = tl.program_id(0).to(tl.int64) * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)
    offs_c = tl.arange(0, BLOCK_C)
    mask_m = start_m + offs_m < n_rows
    mask_c = offs_c < C
    mask = mask_m[:, None] & mask_c[None, :]
    offs = offs_m[:, None] * C + offs_c[None, :]
    normalized = tl.load(normalized_ptr + start_m * C + offs, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_C]
    grad_y = round_to(tl.load(grad_y_ptr + start_m * C + offs, mask=mask, other=0.0), normalized.dtype)
    if NARROW:
        tl.store(narrow_ptr + start_m * C + offs, grad_y, mask=mask)
        tl.debug_barrier()
        grad_y = tl.load(narrow_ptr + start_m * C + offs, mask=mask, other=0.0)
    grad = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)  # by x̂
    for start in range(0, F_PAD, BLOCK_F):
        offs_w = (start + tl.arange(0, BLOCK_F))[:, None] * C + offs_c[None, :]  # [BLOCK_F, BLOCK_C]
        weight_gate = tl.load(weight_ptr + offs_w, mask=mask_c[None, :], other=0.0)
        weight_up = tl.load(weight_ptr + F_PAD * C + offs_w, mask=mask_c[None, :], other=0.0)
        weight_down = tl.load(weight_ptr + 2 * F_PAD * C + offs_w, mask=mask_c[None, :], other=0.0)
        gate = dot(normalized, tl.trans(weight_gate), "ieee")
        up = dot(normalized, tl.trans(weight_up), "ieee")
        grad_hidden = dot(grad_y, tl.trans(weight_down), "ieee")  # [BLOCK_M, BLOCK_F]
        swish, grad_gate, grad_up = _swiglu_backward(gate, up, grad_hidden, HARDWARE)
        grad_gate, grad_up = round_to(grad_gate, normalized.dtype), round_to(grad_up, normalized.dtype)
        if hidden_ptr is not None:
            offs_f = start + tl.arange(0, BLOCK_F)
            ptrs = hidden_ptr + start_m * F_PAD + offs_m[:, None] * F_PAD + offs_f[None, :]
            tl.store(ptrs, round_to(swish * up, normalized.dtype), mask=mask_m[:, None])
            ptrs = grad_gate_up_ptr + start_m * (2 * F_PAD) + offs_m[:, None] * (2 * F_PAD) + offs_f[None, :]
            tl.store(ptrs, grad_gate, mask=mask_m[:, None])
            tl.store(ptrs + F_PAD, grad_up, mask=mask_m[:, None])
        grad = dot(grad_gate, weight_gate, "ieee", grad)
        grad = dot(grad_up, weight_up, "ieee", grad)
    wide = tl.load(normalized_ptr + start_m * C + offs, mask=mask, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + start_m + offs_m, mask=mask_m, other=0.0)
    grad_m = rstd[:, None] * (grad - wide * (tl.sum(grad * wide, axis=1) / C)[:, None])
    grad_m += tl.load(grad_y_ptr + start_m * C + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(grad_m_ptr + start_m * C + offs, round_to(grad_m, grad_m_ptr.dtype.element_ty), mask=mask)
    if HAS_PRODUCT:
        offs_out = offs_c[:, None] * C + offs_c[None, :]
        weight_out = tl.load(weight_out_ptr + offs_out, mask=mask_c[:, None] & mask_c[None, :], other=0.0)
        grad_m = dot(round_to(grad_m, weight_out.dtype), weight_out, "ieee")
    if HAS_PRODUCT or NARROW:
        grad_addend = round_to(grad_m, grad_addend_ptr.dtype.element_ty)
        tl.store(grad_addend_ptr + start_m * C + offs, grad_addend, mask=mask)


@triton.jit
def _block_mlp_grad_weight_kernel(
    grad_y_ptr, normalized_ptr, weight_ptr, partial_ptr,
    n_rows,
    stride_slab,
    C: tl.constexpr, F_PAD: tl.constexpr, HARDWARE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grid (slabs, blocks of F_PAD): tiles of rows are dealt to slabs in turn.

    Hidden units lie in rows, so that their gradients go from accumulators to operands within registers.
    """
    offs_f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    offs_c = tl.arange(0, BLOCK_C)
    offs_m = tl.arange(0, BLOCK_M)
    mask_c = offs_c < C
    mask_w = (offs_f < F_PAD)[:, None] & mask_c[None, :]
    offs_w = offs_f[:, None] * C + offs_c[None, :]
    offs = offs_m[:, None] * C + offs_c[None, :]
    weight_gate = tl.load(weight_ptr + offs_w, mask=mask_w, other=0.0)  # [BLOCK_F, BLOCK_C]
    weight_up = tl.load(weight_ptr + F_PAD * C + offs_w, mask=mask_w, other=0.0)
    weight_down = tl.load(weight_ptr + 2 * F_PAD * C + offs_w, mask=mask_w, other=0.0)
    total_gate = tl.zeros([BLOCK_F, BLOCK_C], tl.float32)
    total_up = tl.zeros([BLOCK_F, BLOCK_C], tl.float32)
    total_down = tl.zeros([BLOCK_F, BLOCK_C], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_M), tl.num_programs(0)):
        start_m = tl.full([], BLOCK_M, tl.int64) * tile
        mask = (start_m + offs_m < n_rows)[:, None] & mask_c[None, :]
        normalized = tl.load(normalized_ptr + start_m * C + offs, mask=mask, other=0.0)
        grad_y = tl.load(grad_y_ptr + start_m * C + offs, mask=mask, other=0.0)
        gate = dot(weight_gate, tl.trans(normalized), "ieee")  # [BLOCK_F, BLOCK_M]
        up = dot(weight_up, tl.trans(normalized), "ieee")
        grad_hidden = dot(weight_down, tl.trans(grad_y), "ieee")
        swish, grad_gate, grad_up = _swiglu_backward(gate, up, grad_hidden, HARDWARE)
        total_down = dot(round_to(swish * up, normalized.dtype), grad_y, "ieee", total_down)
        total_gate = dot(round_to(grad_gate, normalized.dtype), normalized, "ieee", total_gate)
        total_up = dot(round_to(grad_up, normalized.dtype), normalized, "ieee", total_up)
    partial_ptr += tl.program_id(0).to(tl.int64) * stride_slab
    tl.store(partial_ptr + offs_w, total_gate, mask=mask_w)
    tl.store(partial_ptr + F_PAD * C + offs_w, total_up, mask=mask_w)
    tl.store(partial_ptr + 2 * F_PAD * C + offs_w, total_down, mask=mask_w)


@lru_cache(maxsize=1024)
def _grad_x_launch(
    n_rows: int, channels: int, padded: int, product: bool, narrow: bool, architecture: str, hardware: bool
) -> Prepared:
    chosen = config.of_kernel("block_mlp_grad_x", architecture, channels)
    return Prepared(
        _block_mlp_grad_x_kernel, (cdiv(n_rows, chosen["BLOCK_M"]),), chosen, n_rows=n_rows, C=channels, F_PAD=padded,
        HAS_PRODUCT=product, NARROW=narrow, HARDWARE=hardware,
    )  # fmt: skip


@lru_cache(maxsize=1024)
def _grad_weight_launch(
    n_rows: int, channels: int, padded: int, slabs: int, stride_slab: int, architecture: str, hardware: bool
) -> Prepared:
    chosen = config.of_kernel("block_mlp_grad_weight", architecture, channels)
    return Prepared(
        _block_mlp_grad_weight_kernel, (slabs, cdiv(padded, chosen["BLOCK_F"])), chosen, n_rows=n_rows,
        stride_slab=stride_slab, C=channels, F_PAD=padded, HARDWARE=hardware,
    )  # fmt: skip


def grad_x(
    grad_y: Tensor,
    normalized: Tensor,
    rstd: Tensor,
    weight: Tensor,
    weight_out: Tensor | None,
    grad_m: Tensor,
    grad_addend: Tensor | None,
    narrow: Tensor | None,
    grad_gate_up: Tensor | None = None,
    hidden: Tensor | None = None,
) -> None:
    """Fills grad_m and grad_addend (N, C), and narrow, grad_y in the products' dtype; narrow is None where grad_y has
    that dtype, and then, without weight_out, grad_addend, which is grad_m. Also grad_gate_up (N, 2F') and hidden (N,
    F'), where both are wanted; all contiguous. weight: 3 · F' · C numbers."""
    n_rows, channels = normalized.shape
    name = runtime.architecture(normalized.device)
    prepared = _grad_x_launch(
        n_rows, channels, weight.numel() // (3 * channels), weight_out is not None, narrow is not None, name,
        hardware_sigmoid(name),
    )  # fmt: skip
    prepared(
        normalized, grad_y_ptr=grad_y, normalized_ptr=normalized, rstd_ptr=rstd, weight_ptr=weight,
        weight_out_ptr=weight_out, grad_m_ptr=grad_m, grad_addend_ptr=grad_addend, narrow_ptr=narrow,
        grad_gate_up_ptr=grad_gate_up, hidden_ptr=hidden,
    )  # fmt: skip


def grad_weight(grad_y: Tensor, normalized: Tensor, weight: Tensor, partial: Tensor) -> None:
    """Fills partial (slabs, 3F' · C), float32, any stride between slabs; grad_y is in the products' dtype."""
    n_rows, channels = normalized.shape
    name = runtime.architecture(normalized.device)
    prepared = _grad_weight_launch(
        n_rows, channels, weight.numel() // (3 * channels), partial.shape[0], partial.stride(0), name,
        hardware_sigmoid(name),
    )  # fmt: skip
    prepared(normalized, grad_y_ptr=grad_y, normalized_ptr=normalized, weight_ptr=weight, partial_ptr=partial)
