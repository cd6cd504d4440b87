"""Matrix products and rounding with a GPU's results, in Triton's interpreter too."""

from fastblocks.kernels import runtime
from fastblocks.kernels.runtime import tl, triton

INTERPRETED = tl.constexpr(runtime.INTERPRETED)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr, accumulator=None):
    """accumulator + a @ b in float32. The interpreter would multiply bfloat16's bits as integers, so operands are
    widened there."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def round_to(x, DTYPE: tl.constexpr):
    """float32 to DTYPE, to nearest even. The interpreter truncates to bfloat16, so there the bits are rounded first."""
    if INTERPRETED and tl.bfloat16 == DTYPE and x.dtype == tl.float32:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)
    return x.to(DTYPE)
