"""Bias and LeakyReLU of a convolution's output: y = leaky_relu(x + bias[c], slope), channels first or last in memory.

    grad_x = grad_y · (1 where y > 0, else slope),   grad_bias = Σ grad_x over batch and positions

slope ≥ 0, so y has the sign of x + bias, and only y is kept for backward: it is the next layer's input, and a feature
map, anyway. Everything is float32 between reading and writing; y is rounded once.

Memory is walked in blocks, whatever lies in them, so that accesses are aligned: rows of an odd number of positions are
the rule after strides of 3. A row is what lies together of one sample and channel, a run of `inner` elements, one
element with channels last. Each block writes the sum of grad_x of each row that it meets; a second launch sums a
channel's in a fixed order. Channels last, or of less than MIN_RUN positions, have sums by column as RMSNorm has.

Bytes per element of s bytes: forward 2s, backward 3s (PyTorch: 4s and 4s, with the bias added in a launch of its own).
Launches: forward 1, backward 2, or 1 if the bias needs no gradient. Predicted for an H100 (bound by memory, 3.0 TB/s;
not measured), 10.9 million elements: in 16 bits forward 15 µs, backward 23; in float32 29 and 45.
"""

import torch
from torch import Tensor

from fastblocks.backend import KERNEL_DTYPES
from fastblocks.eager import activations as eager
from fastblocks.kernels import runtime
from fastblocks.kernels.activations import config
from fastblocks.kernels.launch import launch
from fastblocks.kernels.numerics import round_to
from fastblocks.kernels.operator import Operator
from fastblocks.kernels.reduce import sum_rows
from fastblocks.kernels.runtime import cdiv, tl, triton

__all__ = ["bias_leaky_relu", "unsupported_reason"]

MAX_SAMPLE = 2**30  # channels · positions: what is counted from a block's first row on has 32 bits
MAX_INT32 = 2**31 - 2**12  # a block's last element may lie beyond the end


@triton.jit
def _first_of(BLOCK: tl.constexpr, INDEX_INT64: tl.constexpr):
    """The program's first element. Dividing it in 64 bits would take as long as all else."""
    pid = tl.program_id(0)
    if INDEX_INT64:
        pid = pid.to(tl.int64)
    return pid * BLOCK


@triton.jit
def _bias_leaky_relu_forward_kernel(
    x_ptr, bias_ptr, y_ptr,
    total, channels, inner, slope,
    INDEX_INT64: tl.constexpr, RUNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grid (blocks,). RUNS: how many rows a block can meet, at most."""
    start = _first_of(BLOCK, INDEX_INT64)
    offs = tl.arange(0, BLOCK)
    mask = start + offs < total
    first, position = (start // inner % channels).to(tl.int32), (start % inner).to(tl.int32)
    if RUNS == 2:
        second = tl.where(first + 1 < channels, first + 1, 0)
        bias = tl.where(offs < inner - position, tl.load(bias_ptr + first), tl.load(bias_ptr + second))
    else:
        bias = tl.load(bias_ptr + (first + (position + offs) // inner) % channels)
    y = tl.load(x_ptr + start + offs, mask=mask, other=0.0).to(tl.float32) + bias.to(tl.float32)
    y = round_to(tl.where(y > 0, y, y * slope), y_ptr.dtype.element_ty)
    tl.store(y_ptr + start + offs, y, mask=mask)


@triton.jit
def _bias_leaky_relu_backward_kernel(
    grad_y_ptr, y_ptr, grad_x_ptr, partial_ptr,
    total, inner, slope,
    NEED_BIAS: tl.constexpr, INDEX_INT64: tl.constexpr, RUNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grid (blocks,). partial (blocks, RUNS): sums of the rows that a block meets."""
    start = _first_of(BLOCK, INDEX_INT64)
    offs = tl.arange(0, BLOCK)
    mask = start + offs < total
    grad = tl.load(grad_y_ptr + start + offs, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + start + offs, mask=mask, other=0.0).to(tl.float32)
    grad = tl.where(y > 0, grad, grad * slope)
    tl.store(grad_x_ptr + start + offs, round_to(grad, grad_x_ptr.dtype.element_ty), mask=mask)
    if NEED_BIAS:
        end = inner - (start % inner).to(tl.int32)  # of the block's first row
        for run in tl.static_range(RUNS):
            is_of_run = (offs < end) & (offs >= end - inner)
            tl.store(partial_ptr + tl.program_id(0) * RUNS + run, tl.sum(tl.where(is_of_run, grad, 0.0), axis=0))
            end += inner


@triton.jit
def _bias_leaky_relu_gather_kernel(
    partial_ptr, grad_bias_ptr,
    samples, channels, inner, blocks_of_row,
    RUNS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A channel's sum from partial (blocks, RUNS). grid (channels,). blocks_of_row: how many a row can lie in."""
    channel = tl.program_id(0)
    total = tl.zeros([BLOCK_P], tl.float32)
    for start in range(0, samples * blocks_of_row, BLOCK_P):
        offs = start + tl.arange(0, BLOCK_P)
        row = (offs // blocks_of_row * channels + channel).to(tl.int64) * inner  # its first element
        nth = offs % blocks_of_row
        before = (row % BLOCK).to(tl.int32)  # elements of its first block
        run = tl.where(nth == 0, (before + inner - 1) // inner, 0)  # rows
        mask = (offs < samples * blocks_of_row) & (nth * BLOCK < before + inner)
        total += tl.load(partial_ptr + (row // BLOCK + nth) * RUNS + run, mask=mask, other=0.0)
    tl.store(grad_bias_ptr + channel, round_to(tl.sum(total, axis=0), grad_bias_ptr.dtype.element_ty))


@triton.jit
def _bias_leaky_relu_columns_kernel(
    grad_y_ptr, y_ptr, grad_x_ptr, partial_ptr,
    rows, width, programs, slope,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """As the backward kernel, for rows of `width` columns. grid (blocks of columns · programs,), columns fastest;
    programs share the tiles of BLOCK_M rows in turn. partial (programs, width): their sums of columns."""
    blocks_n = tl.cdiv(width, BLOCK_N)
    program = tl.program_id(0) // blocks_n
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for tile in range(program, tl.cdiv(rows, BLOCK_M), programs):
        start = tl.full([], BLOCK_M, tl.int64) * tile
        mask = (start + offs_m < rows)[:, None] & (offs_n < width)[None, :]
        offs = start * width + (offs_m[:, None] * width + offs_n[None, :])
        grad = tl.load(grad_y_ptr + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N]
        y = tl.load(y_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        grad = tl.where(y > 0, grad, grad * slope)
        tl.store(grad_x_ptr + offs, round_to(grad, grad_x_ptr.dtype.element_ty), mask=mask)
        total += grad
    tl.store(partial_ptr + program.to(tl.int64) * width + offs_n, tl.sum(total, axis=0), mask=offs_n < width)


def forward(x: Tensor, bias: Tensor, slope: float, y: Tensor, inner: int) -> None:
    """Fill y; x and y lie in memory as (samples, channels, inner)."""
    total, chosen = x.numel(), config.flat(inner)
    launch(
        _bias_leaky_relu_forward_kernel, (cdiv(total, chosen["BLOCK"]),), chosen, like=x,
        x_ptr=x, bias_ptr=bias, y_ptr=y, total=total, channels=bias.numel(), inner=inner, slope=slope,
        INDEX_INT64=total > MAX_INT32,
    )  # fmt: skip


def backward(
    grad_y: Tensor, y: Tensor, slope: float, grad_x: Tensor, grad_bias: Tensor | None, channels: int, inner: int
) -> None:
    """Fill grad_x and grad_bias (channels,), unless it is None; the others lie in memory as (samples, channels,
    inner)."""
    total, chosen, partial = y.numel(), config.flat(inner), None
    if grad_bias is not None and inner < config.MIN_RUN:
        _backward_by_columns(grad_y, y, slope, grad_x, grad_bias, channels * inner)
        return
    blocks = cdiv(total, chosen["BLOCK"])
    if grad_bias is not None:
        partial = y.new_empty((blocks, chosen["RUNS"]), dtype=torch.float32)
    launch(
        _bias_leaky_relu_backward_kernel, (blocks,), chosen, like=y,
        grad_y_ptr=grad_y, y_ptr=y, grad_x_ptr=grad_x, partial_ptr=partial,
        total=total, inner=inner, slope=slope, NEED_BIAS=grad_bias is not None, INDEX_INT64=total > MAX_INT32,
    )  # fmt: skip
    if grad_bias is not None:
        samples, blocks_of_row = total // (channels * inner), cdiv(inner, chosen["BLOCK"]) + 1
        launch(
            _bias_leaky_relu_gather_kernel, (channels,), config.gather(samples * blocks_of_row), like=y,
            partial_ptr=partial, grad_bias_ptr=grad_bias, samples=samples, channels=channels, inner=inner,
            blocks_of_row=blocks_of_row, RUNS=chosen["RUNS"], BLOCK=chosen["BLOCK"],
        )  # fmt: skip


def _backward_by_columns(
    grad_y: Tensor, y: Tensor, slope: float, grad_x: Tensor, grad_bias: Tensor, width: int
) -> None:
    rows, chosen = y.numel() // width, config.columns(width)
    programs = min(cdiv(rows, chosen["BLOCK_M"]), config.PROGRAMS_PER_SM * runtime.sm_count(y.device))
    partial = y.new_empty((programs, width), dtype=torch.float32)
    launch(
        _bias_leaky_relu_columns_kernel, (cdiv(width, chosen["BLOCK_N"]) * programs,), chosen, like=y,
        grad_y_ptr=grad_y, y_ptr=y, grad_x_ptr=grad_x, partial_ptr=partial,
        rows=rows, width=width, programs=programs, slope=slope,
    )  # fmt: skip
    channels = grad_bias.numel()
    if width == channels:
        sum_rows(partial, [grad_bias])
        return
    by_column = y.new_empty(width, dtype=torch.float32)
    sum_rows(partial, [by_column])
    grad_bias.copy_(by_column.view(channels, -1).sum(1))


# ---- the operator of `fastblocks.functional.bias_leaky_relu` ---------------------------------------------------------


def unsupported_reason(x: Tensor, bias: Tensor, slope: float) -> str:
    """Why the kernels do not take this call; an empty string if they do."""
    if bias.dtype not in KERNEL_DTYPES:
        return f"no kernel for a bias in {str(bias.dtype).removeprefix('torch.')}"
    if bias.device != x.device:
        return f"bias on {bias.device}, input on {x.device}"
    if x.numel() >= MAX_SAMPLE * x.shape[0]:
        return f"samples of {MAX_SAMPLE} numbers or more"
    return ""


def _is_channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def _in_memory(x: Tensor, channels_last: bool) -> Tensor:
    """x without gaps, its dimensions in the order that they shall have in memory."""
    return (x.movedim(1, -1) if channels_last else x).contiguous()


def _empty(x: Tensor) -> Tensor:
    """What has x's shape, channels first in memory or last as x has them."""
    if _is_channels_last(x):
        return x.new_empty(x.movedim(1, -1).shape).movedim(-1, 1)
    return x.new_empty(x.shape)


def _inner(x: Tensor, channels_last: bool) -> int:
    return 1 if channels_last else x.numel() // (x.shape[0] * x.shape[1])


def _outputs(x, bias, slope, keep):
    return (_empty(x),)


def _forward(outputs, x, bias, slope, keep):
    last = _is_channels_last(x)
    forward(_in_memory(x, last), bias.contiguous(), slope, _in_memory(outputs[0], last), _inner(x, last))


def _backward(grads, needs, y, bias, slope):
    last = _is_channels_last(y)
    grad_x = _empty(y)
    grad_bias = torch.empty_like(bias, memory_format=torch.contiguous_format) if needs[1] else None
    backward(
        _in_memory(grads[0], last), _in_memory(y, last), slope, _in_memory(grad_x, last), grad_bias,
        bias.numel(), _inner(y, last),
    )  # fmt: skip
    return grad_x, grad_bias


def _gradients(needs, y, bias, slope):
    return _empty(y), torch.empty_like(bias, memory_format=torch.contiguous_format)


_operator = Operator(
    "bias_leaky_relu",
    "(Tensor x, Tensor bias, float slope, bool keep) -> Tensor y",
    results=1,
    outputs=_outputs,
    forward=_forward,
    kept_instead={"x": "y"},
    backward=_backward,
    formula=eager.bias_leaky_relu_from_output,
    gradients=_gradients,
)


def bias_leaky_relu(x: Tensor, bias: Tensor, slope: float) -> Tensor:
    """`fastblocks.functional.bias_leaky_relu`, for arguments that `unsupported_reason` accepts."""
    return _operator(x, bias, slope)[0]
