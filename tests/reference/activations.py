"""What follows a convolution: slow, obvious, in the dtype it is given (float64 in tests)."""

import torch
from torch import Tensor


def bias_leaky_relu(x: Tensor, bias: Tensor, slope: float) -> Tensor:
    total = (x.movedim(1, -1) + bias).movedim(-1, 1)
    return torch.where(total > 0, total, slope * total)
