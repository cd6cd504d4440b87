"""Operators of `fastblocks.functional.convnext_mlp`: Linear, exact GELU, Linear, residual, back to channels first.

    pre = x W1ᵀ + b1,   hidden = pre · Φ(pre),   y[b, :, s] = hidden W2ᵀ + b2 + residual[b, :, s]

x (B, *sizes, C), y and the residual (B, C_out, *sizes). Two ways, by size and dtype:

- Up to FUSED_CHANNELS channels in 16 bits: the kernels of `mlp`; only x is kept for backward, which is theirs too
  up to FUSED_BACKWARD_CHANNELS and the library's, with pre computed again, above.
- Above, and in float32 (where the library's products follow torch's own TF32 switch): the library multiplies, and a
  kernel adds bias and residual while it transposes. Kept: x and pre, 2·(C + F) bytes a position, or x alone
  (`recompute=True`: 17 % more FLOPs). Backward: one kernel transposes dy and sums db2; one computes hidden and d pre
  together, d pre over d hidden in place, and sums db1; three or four products.

Products are rounded to `dtype` (autocast's, where that is on); y has the promoted dtype of `dtype` and the residual.
"""

import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from fastblocks.kernels import reduce, runtime
from fastblocks.kernels.convnext import config, mlp
from fastblocks.kernels.launch import CompileCase
from fastblocks.kernels.recording import recorded
from fastblocks.kernels.reduce import sum_rows
from fastblocks.kernels.runtime import tl, triton

# Where the hidden units stay on the chip. Bytes: 10C a position instead of 54C; at 128 channels the products still
# take less time than those bytes did, at 256 the library's products are predicted to win. Not timed.
FUSED_CHANNELS = 128
FUSED_BACKWARD_CHANNELS = 64  # above, the weights' gradients spill registers in every configuration tried


@triton.jit
def _finish_kernel(
    product_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    S,
    stride_residual_b,
    stride_residual_c,
    stride_residual_s,
    C: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    batch = tl.program_id(2).to(tl.int64)
    offs_s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S).to(tl.int64)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)
    mask_c = offs_c < C
    mask = (offs_s < S)[:, None] & mask_c[None, :]
    y = tl.load(product_ptr + (batch * S + offs_s)[:, None] * C + offs_c[None, :], mask=mask, other=0.0)
    y = y.to(tl.float32) + tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    if HAS_RESIDUAL:
        offs = offs_s[:, None] * stride_residual_s + offs_c[None, :] * stride_residual_c
        residual = tl.load(residual_ptr + batch * stride_residual_b + offs, mask=mask, other=0.0)
        y += residual.to(tl.float32)
    offs = (batch * C + offs_c)[None, :] * S + offs_s[:, None]
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _to_rows_kernel(
    grad_y_ptr,
    rows_ptr,
    partial_ptr,
    S,
    blocks_s,
    n_tiles,
    stride_grad_y_b,
    stride_grad_y_c,
    stride_grad_y_s,
    C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)
    mask_c = offs_c < C
    total = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        batch = (tile // blocks_s).to(tl.int64)
        offs_s = tile % blocks_s * BLOCK_S + tl.arange(0, BLOCK_S).to(tl.int64)
        mask = (offs_s < S)[:, None] & mask_c[None, :]
        offs = batch * stride_grad_y_b + offs_s[:, None] * stride_grad_y_s + offs_c[None, :] * stride_grad_y_c
        grad = tl.load(grad_y_ptr + offs, mask=mask, other=0.0)
        total += grad.to(tl.float32)
        offs = (batch * S + offs_s)[:, None] * C + offs_c[None, :]
        tl.store(rows_ptr + offs, grad.to(rows_ptr.dtype.element_ty), mask=mask)
    tl.store(partial_ptr + tl.program_id(0) * C + offs_c, tl.sum(total, axis=0), mask=mask_c)


@triton.jit
def _grad_activation_kernel(
    pre_ptr,
    grad_ptr,
    hidden_ptr,
    partial_ptr,
    n_rows,
    F: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    offs_f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask_f = offs_f < F
    total = tl.zeros([BLOCK_M, BLOCK_F], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_M), tl.num_programs(0)):
        offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
        mask = (offs_m < n_rows)[:, None] & mask_f[None, :]
        offs = offs_m[:, None] * F + offs_f[None, :]
        pre = tl.load(pre_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        hidden, grad_pre, _ = mlp._activate_backward(pre, pre, grad, ACTIVATION, EXACT)
        total += grad_pre
        tl.store(hidden_ptr + offs, hidden.to(hidden_ptr.dtype.element_ty), mask=mask)
        tl.store(grad_ptr + offs, grad_pre.to(grad_ptr.dtype.element_ty), mask=mask)
    tl.store(partial_ptr + tl.program_id(0) * F + offs_f, tl.sum(total, axis=0), mask=mask_f)


def unsupported_reason(x: Tensor, *others: Tensor | None) -> str:
    """Why the kernels do not take this call; an empty string if they do."""
    for tensor in others:
        if tensor is not None and tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"no kernel for {str(tensor.dtype).removeprefix('torch.')} beside x"
        if tensor is not None and tensor.device != x.device:
            return f"parameters on {tensor.device}, input on {x.device}"
    if not torch.is_autocast_enabled(x.device.type) and any(t.dtype != x.dtype for t in others[:4]):
        return "x and the parameters have different dtypes"
    return ""


def _is_fused(x: Tensor, weight2: Tensor, dtype: torch.dtype, limit: int) -> bool:
    return dtype != torch.float32 and max(x.shape[-1], weight2.shape[0]) <= limit


def _y_dtype(dtype: torch.dtype, residual: Tensor | None) -> torch.dtype:
    return dtype if residual is None else torch.promote_types(dtype, residual.dtype)


def _forward(x, weight1, bias1, weight2, bias2, residual, dtype, keep):
    batch, c_out, sizes = x.shape[0], weight2.shape[0], x.shape[1:-1]
    y = torch.empty((batch, c_out, *sizes), dtype=_y_dtype(dtype, residual), device=x.device)
    fused = _is_fused(x, weight2, dtype, FUSED_CHANNELS)
    pre = x.new_empty(0, dtype=dtype)
    rows = x.reshape(-1, x.shape[-1]).to(dtype)
    flat_y = y.view(batch, c_out, -1)
    residual = None if residual is None else residual.reshape(batch, c_out, -1)
    if fused:
        mlp.fused_forward(
            rows, _operand(weight1, dtype), bias1, None, _operand(weight2, dtype), bias2, residual, flat_y, "gelu"
        )
        return y, pre
    hidden = torch.addmm(bias1.to(dtype), rows, weight1.to(dtype).t())
    if keep:
        pre, hidden = hidden, torch.nn.functional.gelu(hidden)
    else:
        hidden = torch.nn.functional.gelu(hidden)
    product = torch.mm(hidden, weight2.to(dtype).t())
    positions, launch = flat_y.shape[2], config.transposing(c_out)
    strides = (0, 0, 0) if residual is None else residual.stride()
    _finish_kernel[(-(-positions // launch["BLOCK_S"]), -(-c_out // launch["BLOCK_C"]), batch)](
        product_ptr=product,
        bias_ptr=bias2,
        residual_ptr=residual,
        y_ptr=y,
        S=positions,
        stride_residual_b=strides[0],
        stride_residual_c=strides[1],
        stride_residual_s=strides[2],
        C=c_out,
        HAS_RESIDUAL=residual is not None,
        **launch.keywords(),
    )
    return y, pre


def _operand(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype).contiguous()


def _backward(grad_y, x, weight1, bias1, weight2, bias2, pre, dtype, need_x, need_weights):
    batch, c_out = grad_y.shape[:2]
    rows = x.reshape(-1, x.shape[-1]).to(dtype)
    grad_y = grad_y.reshape(batch, c_out, -1)
    parameters = (weight1, bias1, weight2, bias2)
    grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in parameters if need_weights]
    if _is_fused(x, weight2, dtype, FUSED_BACKWARD_CHANNELS):
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else x.new_empty(0)
        mlp.fused_backward(
            grad_y,
            rows,
            _operand(weight1, dtype),
            bias1,
            None,
            _operand(weight2, dtype),
            grad_x.view(rows.shape) if need_x else None,
            [grads[i] for i in (0, 2, 1, 3)] if need_weights else None,
            "gelu",
        )
        return grad_x, *(grads or [x.new_empty(0) for _ in range(4)])
    n_rows, hidden_units = rows.shape[0], weight1.shape[0]
    positions = grad_y.shape[2]
    if not pre.numel():
        pre = torch.addmm(bias1.to(dtype), rows, weight1.to(dtype).t())
    grad_rows = torch.empty((n_rows, c_out), dtype=dtype, device=x.device)
    launch = config.transposing(c_out)
    blocks_s, blocks_c = -(-positions // launch["BLOCK_S"]), -(-c_out // launch["BLOCK_C"])
    slabs = config.slabs(runtime.multiprocessors(x.device), batch * blocks_s, blocks_c)
    partial2 = torch.empty((slabs, c_out), dtype=torch.float32, device=x.device)
    _to_rows_kernel[(slabs, blocks_c)](
        grad_y_ptr=grad_y,
        rows_ptr=grad_rows,
        partial_ptr=partial2,
        S=positions,
        blocks_s=blocks_s,
        n_tiles=batch * blocks_s,
        stride_grad_y_b=grad_y.stride(0),
        stride_grad_y_c=grad_y.stride(1),
        stride_grad_y_s=grad_y.stride(2),
        C=c_out,
        **launch.keywords(),
    )
    grad_pre = torch.mm(grad_rows, weight2.to(dtype))
    hidden = torch.empty_like(grad_pre)
    launch = config.pointwise(hidden_units)
    blocks_f = -(-hidden_units // launch["BLOCK_F"])
    slabs = config.slabs(runtime.multiprocessors(x.device), -(-n_rows // launch["BLOCK_M"]), blocks_f)
    partial1 = torch.empty((slabs, hidden_units), dtype=torch.float32, device=x.device)
    _grad_activation_kernel[(slabs, blocks_f)](
        pre_ptr=pre,
        grad_ptr=grad_pre,
        hidden_ptr=hidden,
        partial_ptr=partial1,
        n_rows=n_rows,
        F=hidden_units,
        ACTIVATION="gelu",
        EXACT=dtype == torch.float32,
        **launch.keywords(),
    )
    grad_x = torch.mm(grad_pre, weight1.to(dtype)).view(x.shape).to(x.dtype) if need_x else x.new_empty(0)
    if not need_weights:
        return grad_x, *(x.new_empty(0) for _ in range(4))
    sum_rows(partial1, [grads[1]])
    sum_rows(partial2, [grads[3]])
    grad_weight1 = torch.mm(grad_pre.t(), rows).to(weight1.dtype)
    grad_weight2 = torch.mm(grad_rows.t(), hidden).to(weight2.dtype)
    return grad_x, grad_weight1, grads[1], grad_weight2, grads[3]


_LIBRARY = torch.library.Library("fastblocks", "FRAGMENT")
_LIBRARY.define(
    "convnext_mlp(Tensor x, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2, Tensor? residual, "
    "ScalarType dtype, bool keep) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "convnext_mlp_backward(Tensor grad_y, Tensor x, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2, "
    "Tensor pre, ScalarType dtype, bool need_x, bool need_weights) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
for _device in ("CPU", "CUDA"):  # the CPU's is the interpreter's
    _LIBRARY.impl("convnext_mlp", _forward, _device)
    _LIBRARY.impl("convnext_mlp_backward", _backward, _device)


@torch.library.register_fake("fastblocks::convnext_mlp", lib=_LIBRARY)
def _(x, weight1, bias1, weight2, bias2, residual, dtype, keep):
    y = x.new_empty((x.shape[0], weight2.shape[0], *x.shape[1:-1]), dtype=_y_dtype(dtype, residual))
    kept = keep and not _is_fused(x, weight2, dtype, FUSED_CHANNELS)
    return y, x.new_empty((x.numel() // x.shape[-1], weight1.shape[0]) if kept else (0,), dtype=dtype)


@torch.library.register_fake("fastblocks::convnext_mlp_backward", lib=_LIBRARY)
def _(grad_y, x, weight1, bias1, weight2, bias2, pre, dtype, need_x, need_weights):
    grad_x = x.new_empty(x.shape if need_x else (0,))
    parameters = (weight1, bias1, weight2, bias2)
    return grad_x, *(t.new_empty(t.shape) if need_weights else x.new_empty(0) for t in parameters)


_forward_op = torch.ops.fastblocks.convnext_mlp.default
_backward_op = torch.ops.fastblocks.convnext_mlp_backward.default


class _ConvNeXtMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight1, bias1, weight2, bias2, residual, dtype, keep):
        with torch._C._AutoDispatchBelowAutograd():
            y, pre = _forward_op(x, weight1, bias1, weight2, bias2, residual, dtype, keep)
        ctx.save_for_backward(x, weight1, bias1, weight2, bias2, pre, residual if ctx.needs_input_grad[5] else None)
        ctx.dtype = dtype
        ctx.mark_non_differentiable(pre)
        ctx.set_materialize_grads(False)
        return y, pre

    @staticmethod
    def backward(ctx, grad_y, _):
        if grad_y is None:
            return (None,) * 8
        *inputs, pre, residual = ctx.saved_tensors
        need = ctx.needs_input_grad
        if torch.is_grad_enabled():  # somebody will differentiate the gradient
            return (*_differentiable_backward(grad_y, [*inputs, residual], need, ctx.dtype), None, None)
        grads = (None,) * 5
        if any(need[:5]):
            grads = _backward_op(grad_y, *inputs, pre, ctx.dtype, need[0], any(need[1:5]))
        grad_residual = grad_y.to(residual.dtype) if need[5] else None
        return (*(g if wanted else None for g, wanted in zip(grads, need, strict=False)), grad_residual, None, None)


def _differentiable_backward(grad_y, inputs, need, dtype):
    from fastblocks.eager.convnext import convnext_mlp as formula

    x = inputs[0]
    with torch.enable_grad(), torch.autocast(x.device.type, dtype, enabled=dtype != x.dtype):
        y = formula(*inputs)
        wanted = [t for t, n in zip(inputs, need, strict=False) if n]
        grads = iter(torch.autograd.grad(y, wanted, grad_y.to(y.dtype), create_graph=True))
    return tuple(next(grads) if n else None for n in need[:6])


def _autograd(x, weight1, bias1, weight2, bias2, residual, dtype, keep):
    tensors = (x, weight1, bias1, weight2, bias2, residual)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _ConvNeXtMLP.apply(*tensors, dtype, keep)
    with torch._C._AutoDispatchBelowAutograd():
        return _forward_op(*tensors, dtype, keep)


_LIBRARY.impl("convnext_mlp", _autograd, "Autograd")


def convnext_mlp(x, weight1, bias1, weight2, bias2, residual, recompute: bool = False) -> Tensor:
    """The functional operation on kernels; `recompute` keeps x alone for backward, at any size."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    tensors = (x, weight1, bias1, weight2, bias2, residual)
    needed = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return _forward_op(*tensors, dtype, needed and not recompute)[0]


def aot_cases(architecture: str = "sm_90") -> Iterator[CompileCase]:
    """Every kernel of the standard workloads, as it would be launched, forward and backward."""
    shapes = {"cnx-1d": (16, 1000, 512)}
    for channels, height, width in ((32, 282, 64), (64, 141, 32), (128, 71, 16), (256, 36, 8)):
        shapes[f"cnx-2d C {channels}"] = (4, height, width, channels)
    for dtype in (torch.bfloat16, torch.float32):
        for name, shape in shapes.items():

            def run(shape=shape, dtype=dtype):
                batch, *sizes, channels = shape
                x = torch.empty(shape, dtype=dtype, device="meta")
                residual = torch.empty((batch, channels, *sizes), device="meta")
                parameters = [torch.empty(n, device="meta") for n in ((4 * channels, channels), (4 * channels,))]
                parameters += [torch.empty(n, device="meta") for n in ((channels, 4 * channels), (channels,))]
                y, pre = _forward(x, *parameters, residual, dtype, True)
                _backward(y, x, *parameters, pre, dtype, True, True)

            label = f"{name} {str(dtype).removeprefix('torch.')}"
            yield from recorded(architecture, label, (mlp, reduce, sys.modules[__name__]), run)
