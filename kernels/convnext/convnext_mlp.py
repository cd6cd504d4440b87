"""The operator of `fastblocks.functional.convnext_mlp`: Linear, exact GELU, Linear, residual, back to channels first.

    pre = x W1ᵀ + b1,   hidden = pre · Φ(pre),   y[b, :, s] = hidden W2ᵀ + b2 + residual[b, :, s]

x (B, *sizes, C), y and the residual (B, C_out, *sizes). Two ways, by size and dtype:

- Up to FUSED_CHANNELS channels in 16 bits: the kernels of `mlp`; only x is kept for backward, which runs in them, too,
  up to FUSED_BACKWARD_CHANNELS; above, it recomputes pre and runs as below.
- Above, and in float32 (where the library's products follow torch's own TF32 switch): the library multiplies, and a
  kernel adds bias and residual while it transposes. Kept: x and pre, 2·(C + F) bytes per position.
  Backward: one kernel transposes dy and sums db2; one computes hidden and d pre together, d pre in place of d hidden,
  and sums db1; three or four products.

Products are rounded to `dtype` (autocast's, where that is on); y has the promoted dtype of `dtype` and the residual.
"""

import math

import torch
from torch import Tensor

from fastblocks.backend import KERNEL_DTYPES
from fastblocks.eager import convnext as eager
from fastblocks.kernels import runtime
from fastblocks.kernels.convnext import config as table
from fastblocks.kernels.convnext import mlp
from fastblocks.kernels.launch import launch
from fastblocks.kernels.matrix import load_matrix, store_matrix, strides, times
from fastblocks.kernels.numerics import round_to
from fastblocks.kernels.operator import Operator, compute_dtype
from fastblocks.kernels.reduce import sum_rows
from fastblocks.kernels.runtime import cdiv, tl, triton

__all__ = ["convnext_mlp", "unsupported_reason"]

# Most channels for which hidden units stay on the chip. Bytes: 10C per position instead of 54C; at 128 channels the
# products still take less time than those bytes did, at 256 the library's products are predicted to win. Not timed.
FUSED_CHANNELS = 128
FUSED_BACKWARD_CHANNELS = 64  # above, the weights' gradients keep a tenth of the tensor cores busy: a prediction


@triton.jit
def _finish_kernel(
    product_ptr, bias_ptr, residual_ptr, y_ptr,
    S, blocks_s,
    stride_residual_b, stride_residual_c, stride_residual_s,
    C: tl.constexpr, INDEX_INT64: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y (B, C, S) = product (B·S, C) + bias + residual, transposed. grid (B · blocks of S, blocks of C)."""
    batch = (tl.program_id(0) // blocks_s).to(tl.int64)
    start_s = tl.program_id(0) % blocks_s * BLOCK_S
    offs_s = tl.arange(0, BLOCK_S)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    y = load_matrix(product_ptr + (batch * S + start_s) * C, offs_s, offs_c, S - start_s, C).to(tl.float32)
    y += mlp.load_vector(bias_ptr, offs_c, C)[None, :]
    mask = (offs_s < S - start_s)[:, None] & (offs_c < C)[None, :]
    if residual_ptr is not None:
        ptrs = mlp.position_pointers(
            residual_ptr, batch, start_s, offs_s, offs_c,
            stride_residual_b, stride_residual_c, stride_residual_s, INDEX_INT64,
        )  # fmt: skip
        y += tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    ptrs = y_ptr + (batch * C * S + start_s) + (times(offs_c, S, INDEX_INT64)[None, :] + offs_s[:, None])
    tl.store(ptrs, round_to(y, y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _to_rows_kernel(
    grad_y_ptr, rows_ptr, partial_ptr,
    S, blocks_s, n_tiles,
    stride_grad_y_b, stride_grad_y_c, stride_grad_y_s,
    C: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grad_y (B, C, S) to rows (B·S, C); each split's sum over positions to partial (splits, C).

    grid (splits, blocks of C); splits share the n_tiles = B · blocks_s tiles of positions in turn.
    """
    offs_s = tl.arange(0, BLOCK_S).to(tl.int64)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)
    total = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        batch = (tile // blocks_s).to(tl.int64)
        start_s = tile % blocks_s * BLOCK_S
        ptrs = mlp.position_pointers(
            grad_y_ptr, batch, start_s, offs_s, offs_c, stride_grad_y_b, stride_grad_y_c, stride_grad_y_s, True
        )
        grad = tl.load(ptrs, mask=(offs_s < S - start_s)[:, None] & (offs_c < C)[None, :], other=0.0)
        total += grad.to(tl.float32)
        store_matrix(rows_ptr + (batch * S + start_s) * C, grad, offs_s, offs_c, S - start_s, C)
    tl.store(partial_ptr + tl.program_id(0) * C + offs_c, tl.sum(total, axis=0), mask=offs_c < C)


@triton.jit
def _grad_activation_kernel(
    pre_ptr, grad_ptr, hidden_ptr, partial_ptr,
    n_rows,
    F: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Recomputes hidden from pre (both (n_rows, F)); grad_ptr holds d hidden, replaced by d pre; each split's sum of d
    pre goes to partial (splits, F). grid (splits, blocks of F)."""
    offs_f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    total = tl.zeros([BLOCK_M, BLOCK_F], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_M), tl.num_programs(0)):
        offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
        pre = load_matrix(pre_ptr, offs_m, offs_f, n_rows, F).to(tl.float32)
        grad = load_matrix(grad_ptr, offs_m, offs_f, n_rows, F).to(tl.float32)
        grad_pre = grad * mlp.slope(pre, EXACT)
        total += grad_pre
        store_matrix(hidden_ptr, mlp.activate(pre, EXACT), offs_m, offs_f, n_rows, F)
        store_matrix(grad_ptr, grad_pre, offs_m, offs_f, n_rows, F)
    tl.store(partial_ptr + tl.program_id(0) * F + offs_f, tl.sum(total, axis=0), mask=offs_f < F)


def unsupported_reason(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, residual: Tensor | None
) -> str:
    """Why the kernels do not take this call; an empty string if they do."""
    parameters = (weight1, bias1, weight2, bias2)
    for tensor in (*parameters, residual):
        if tensor is not None and tensor.dtype not in KERNEL_DTYPES:
            return f"no kernel for {str(tensor.dtype).removeprefix('torch.')} beside x"
        if tensor is not None and tensor.device != x.device:
            return f"parameters on {tensor.device}, input on {x.device}"
    if not torch.is_autocast_enabled(x.device.type) and any(t.dtype != x.dtype for t in parameters):
        return "x and the parameters have different dtypes"
    return ""


def _is_fused(x: Tensor, weight2: Tensor, dtype: torch.dtype, limit: int) -> bool:
    return dtype != torch.float32 and max(x.shape[-1], weight2.shape[0]) <= limit


def _outputs(x, weight1, bias1, weight2, bias2, residual, dtype, keep):
    y_dtype = dtype if residual is None else torch.promote_types(dtype, residual.dtype)
    kept = keep and not _is_fused(x, weight2, dtype, FUSED_CHANNELS)
    return (
        x.new_empty((x.shape[0], weight2.shape[0], *x.shape[1:-1]), dtype=y_dtype),
        x.new_empty((math.prod(x.shape[:-1]), weight1.shape[0]), dtype=dtype) if kept else None,
    )


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as contiguous rows (N, C), as the kernels read them."""
    return x.reshape(-1, x.shape[-1]).to(dtype).contiguous()


def _operand(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype).contiguous()


def _forward(outputs, x, weight1, bias1, weight2, bias2, residual, dtype, keep):
    y, pre = outputs
    batch, c_out, rows = y.shape[0], y.shape[1], _rows(x, dtype)
    flat_y, bias2 = y.view(batch, c_out, -1), bias2.contiguous()
    residual = None if residual is None else residual.reshape(batch, c_out, -1)
    if _is_fused(x, weight2, dtype, FUSED_CHANNELS):
        weights = _operand(weight1, dtype), bias1.contiguous(), _operand(weight2, dtype), bias2
        mlp.fused_forward(rows, *weights, residual, flat_y)
        return
    if pre is None:
        pre = x.new_empty((rows.shape[0], weight1.shape[0]), dtype=dtype)
    torch.addmm(bias1.to(dtype), rows, weight1.to(dtype).t(), out=pre)
    product = torch.mm(torch.nn.functional.gelu(pre), weight2.to(dtype).t())
    positions, config = flat_y.shape[2], table.transposing(c_out)
    blocks_s = cdiv(positions, config["BLOCK_S"])
    spans = [c_out * positions] + ([] if residual is None else [c_out * residual.stride(1)])
    launch(
        _finish_kernel, (batch * blocks_s, cdiv(c_out, config["BLOCK_C"])), config, like=x,
        product_ptr=product, bias_ptr=bias2, residual_ptr=residual, y_ptr=y,
        S=positions, blocks_s=blocks_s,
        **strides("residual", residual, "bcs"),
        C=c_out, INDEX_INT64=max(spans) >= 2**31,
    )  # fmt: skip


def _backward(grads, needs, x, weight1, bias1, weight2, bias2, residual, dtype, pre):
    (grad_y,) = grads
    grad_residual = grad_y.to(residual.dtype).contiguous() if needs[5] else None
    need_x, need_weights = needs[0], any(needs[1:5])
    if not (need_x or need_weights):
        return (None,) * 5 + (grad_residual,)
    batch, c_out = grad_y.shape[:2]
    rows, grad_y = _rows(x, dtype), grad_y.reshape(batch, c_out, -1)
    parameters = (weight1, bias1, weight2, bias2)
    if _is_fused(x, weight2, dtype, FUSED_BACKWARD_CHANNELS):
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_x else None
        found = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in parameters] if need_weights else None
        mlp.fused_backward(
            grad_y,
            rows,
            _operand(weight1, dtype),
            bias1.contiguous(),
            _operand(weight2, dtype),
            grad_x.view(rows.shape) if need_x else None,
            [found[i] for i in (0, 2, 1, 3)] if need_weights else None,
        )
        return grad_x, *(found or [None] * 4), grad_residual
    if pre is None:
        pre = torch.addmm(bias1.to(dtype), rows, weight1.to(dtype).t())
    grad_rows, partial2 = _to_rows(grad_y, dtype)
    grad_pre = torch.mm(grad_rows, weight2.to(dtype))
    hidden, partial1 = _through_activation(pre, grad_pre)
    grad_x = torch.mm(grad_pre, weight1.to(dtype)).view(x.shape).to(x.dtype) if need_x else None
    if not need_weights:
        return (grad_x,) + (None,) * 4 + (grad_residual,)
    grad_biases = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (bias1, bias2)]
    sum_rows(partial1, [grad_biases[0]])
    sum_rows(partial2, [grad_biases[1]])
    grad_weight1 = torch.mm(grad_pre.t(), rows).to(weight1.dtype)
    grad_weight2 = torch.mm(grad_rows.t(), hidden).to(weight2.dtype)
    return grad_x, grad_weight1, grad_biases[0], grad_weight2, grad_biases[1], grad_residual


def _to_rows(grad_y: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """grad_y (B, C_out, S) by strides as rows (B·S, C_out), and partial sums of its columns."""
    batch, c_out, positions = grad_y.shape
    rows = torch.empty((batch * positions, c_out), dtype=dtype, device=grad_y.device)
    config = table.transposing(c_out)
    blocks_s, blocks_c = cdiv(positions, config["BLOCK_S"]), cdiv(c_out, config["BLOCK_C"])
    splits = table.splits(runtime.sm_count(grad_y.device), batch * blocks_s, blocks_c)
    partial = torch.empty((splits, c_out), dtype=torch.float32, device=grad_y.device)
    launch(
        _to_rows_kernel, (splits, blocks_c), config, like=grad_y,
        grad_y_ptr=grad_y, rows_ptr=rows, partial_ptr=partial,
        S=positions, blocks_s=blocks_s, n_tiles=batch * blocks_s,
        **strides("grad_y", grad_y, "bcs"),
        C=c_out,
    )  # fmt: skip
    return rows, partial


def _through_activation(pre: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The hidden units, and partial sums of d pre; `grad` is d hidden and is overwritten with d pre."""
    n_rows, hidden_units = pre.shape
    hidden = torch.empty_like(grad)
    config = table.pointwise(hidden_units)
    blocks_f = cdiv(hidden_units, config["BLOCK_F"])
    splits = table.splits(runtime.sm_count(pre.device), cdiv(n_rows, config["BLOCK_M"]), blocks_f)
    partial = torch.empty((splits, hidden_units), dtype=torch.float32, device=pre.device)
    launch(
        _grad_activation_kernel, (splits, blocks_f), config, like=pre,
        pre_ptr=pre, grad_ptr=grad, hidden_ptr=hidden, partial_ptr=partial,
        n_rows=n_rows,
        F=hidden_units, EXACT=pre.dtype == torch.float32,
    )  # fmt: skip
    return hidden, partial


def _formula(x, weight1, bias1, weight2, bias2, residual, dtype):
    return eager.convnext_mlp(x, weight1, bias1, weight2, bias2, residual)


_operator = Operator(
    "convnext_mlp",
    "(Tensor x, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2, Tensor? residual, ScalarType dtype, "
    "bool keep) -> (Tensor y, Tensor pre)",
    results=1,
    outputs=_outputs,
    forward=_forward,
    saved=("pre",),
    backward=_backward,
    formula=_formula,
)


def convnext_mlp(x, weight1, bias1, weight2, bias2, residual) -> Tensor:
    """`fastblocks.functional.convnext_mlp`, for arguments that `unsupported_reason` accepts."""
    return _operator(x, weight1, bias1, weight2, bias2, residual, compute_dtype(x))[0]
