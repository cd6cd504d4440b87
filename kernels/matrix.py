"""Matrices in memory: loading and storing tiles of them in kernels, and naming their strides at a launch."""

from torch import Tensor

from fastblocks.kernels.numerics import round_to
from fastblocks.kernels.runtime import tl, triton


@triton.jit
def load_matrix(ptr, rows, columns, n_rows, n_columns):
    """Elements [rows, columns] of a contiguous (n_rows, n_columns) matrix, zeros past its ends."""
    mask = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    return tl.load(ptr + (rows[:, None] * n_columns + columns[None, :]), mask=mask, other=0.0)


@triton.jit
def load_transposed(ptr, rows, columns, n_rows, n_columns):
    """The transpose of `load_matrix`, [columns, rows], without a conversion of layouts."""
    mask = (rows < n_rows)[None, :] & (columns < n_columns)[:, None]
    return tl.load(ptr + (rows[None, :] * n_columns + columns[:, None]), mask=mask, other=0.0)


@triton.jit
def store_matrix(ptr, x, rows, columns, n_rows, n_columns):
    """The counterpart of `load_matrix`; x is rounded to the pointer's dtype."""
    mask = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    tl.store(ptr + (rows[:, None] * n_columns + columns[None, :]), round_to(x, ptr.dtype.element_ty), mask=mask)


@triton.jit
def times(index, stride, INDEX_INT64: tl.constexpr):
    """index · stride, in 64 bits where it can pass 2^31."""
    if INDEX_INT64:
        index = index.to(tl.int64)
    return index * stride


def strides(name: str, x: Tensor | None, dimensions: str) -> dict[str, int]:
    """x's strides as a kernel's arguments: `strides("y", y, "bcs")` is stride_y_b, stride_y_c and stride_y_s."""
    found = [0] * len(dimensions) if x is None else x.stride()
    return {f"stride_{name}_{dimension}": stride for dimension, stride in zip(dimensions, found, strict=False)}
