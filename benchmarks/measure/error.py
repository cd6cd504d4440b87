"""How far results are from float64, and how far they may be: a provider that is wrong is not timed."""

from collections.abc import Sequence

from torch import Tensor

EPSILON = {"bf16": 2.0**-8, "fp16": 2.0**-11, "fp32": 2.0**-23, "tf32": 2.0**-11}  # relative, of one rounding's ulp
TOLERANCE = 1.5  # times the baseline's own error in the same dtype, plus one rounding
ALONE = 8  # roundings, where the baseline cannot run to be compared with


def errors(got: Sequence[Tensor | None], want: Sequence[Tensor | None]) -> list[float]:
    """Of each tensor: the largest absolute error over the largest absolute value; infinite where there is a NaN."""
    found = []
    for g, w in zip(got, want, strict=False):  # a rival has fewer: `Runner.compared`
        if w is None or g is None or not w.numel():
            found.append(0.0 if w is None or g is not None or not w.any() else float("inf"))
            continue
        scale = w.abs().max().clamp_min(1e-30)
        value = ((g.detach().double() - w).abs().max() / scale).item()
        found.append(value if value == value else float("inf"))
    return found


def objection(found: list[float], baseline: list[float] | None, dtype: str, strict: bool) -> str:
    """Why a provider with these errors is wrong, or an empty string.

    Args:
        found: of each tensor.
        baseline: the original formulas' own errors in the same dtype; None if they cannot run.
        dtype: a key of `EPSILON`.
        strict: tensor by tensor. Through many layers a small tensor's error is a matter of luck, for the baseline too,
            so there every tensor is held against the baseline's worst.
    """
    if baseline and not strict:
        baseline = [max(baseline)] * len(baseline)
    for i, error in enumerate(found):
        allowed = ALONE * EPSILON[dtype] if baseline is None else TOLERANCE * baseline[i] + EPSILON[dtype]
        if not error <= allowed:
            return f"wrong: error {error:.1e}, allowed {allowed:.1e}"
    return ""
