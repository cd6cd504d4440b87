"""How results are held against a float64 reference: one rule, one table."""

import math

import torch
from torch import Tensor

# A result that is stored in a dtype is rounded once whatever computed it: half a unit in the last place.
ROUNDING = {
    dtype: torch.finfo(dtype).eps / 2 for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}
FACTOR = 1.5  # a kernel may be this much worse than eager PyTorch in the same dtype
# Triton's interpreter rounds each product and each sum of float32, PyTorch fuses the two: twice the variance.
INTERPRETED_FLOAT32 = 1.0 if torch.cuda.is_available() else math.sqrt(2)


def _factor(numbers: int) -> float:
    """FACTOR, or for less than a hundred numbers what chance alone makes of two equally good results: an error
    estimated from n numbers scatters by exp(±1 / √(2n)), the ratio of two by exp(±1 / √n), here four times that."""
    return max(FACTOR, math.exp(4 / math.sqrt(max(1, numbers))))


def relative_error(got: Tensor, want: Tensor) -> float:
    """‖got − want‖ / ‖want‖ in float64; NaN and Inf in `got` give NaN or Inf, which no bound admits."""
    got, want = got.detach().cpu().double(), want.detach().cpu().double()
    assert got.shape == want.shape, f"shapes differ: {tuple(got.shape)} and {tuple(want.shape)}"
    scale = want.norm()
    return float((got - want).norm() / scale) if scale > 0 else float((got - want).norm())


def assert_as_exact(
    got: Tensor, eager: Tensor, reference: Tensor, what: str = "result", independent: int | None = None
) -> None:
    """`got` is within FACTOR of eager's own error against the float64 reference, in eager's dtype.

    independent: of how many rounded numbers the errors are made, where fewer than the result has: all of a weight's
    gradient follows from one row's C numbers if there is only one row.
    """
    assert got.dtype == eager.dtype, f"{what}: dtype {got.dtype}, eager gives {eager.dtype}"
    factor = _factor(min(got.numel(), independent or got.numel())) * (
        INTERPRETED_FLOAT32 if got.dtype == torch.float32 else 1.0
    )
    error, allowed = relative_error(got, reference), factor * relative_error(eager, reference) + ROUNDING[eager.dtype]
    assert error <= allowed, f"{what}: error {error:.2e}, allowed {allowed:.2e}"


def assert_close(got: Tensor, reference: Tensor, terms: int = 1, what: str = "result") -> None:
    """`got` is as close to the float64 reference as sums of `terms` products in its dtype are: √terms roundings,
    times 8 for the few that follow one another."""
    error, allowed = relative_error(got, reference), 8 * ROUNDING[got.dtype] * max(1, terms) ** 0.5
    assert error <= allowed, f"{what}: error {error:.2e}, allowed {allowed:.2e}"
