"""What the interpreter does otherwise than a GPU, put right."""

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def _bfloat16_rounds_to_nearest(monkeypatch):
    """The interpreter cuts float32 to bfloat16; a GPU rounds to nearest, ties to even."""
    if torch.cuda.is_available():
        return
    from triton import language as tl
    from triton.runtime import interpreter

    original = interpreter._convert_float

    def convert(values, input_dtype, output_dtype, rounding_mode):
        if input_dtype != tl.float32 or output_dtype != tl.bfloat16:
            return original(values, input_dtype, output_dtype, rounding_mode)
        bits = values.view(np.uint32).astype(np.uint64)
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)

    monkeypatch.setattr(interpreter, "_convert_float", convert)
