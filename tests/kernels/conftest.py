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


@pytest.fixture(autouse=True)
def _masks_are_one_bit(monkeypatch):
    """The interpreter makes integers of a mask that a scalar comparison took part in; from Triton 3.9 on its own loads
    and stores refuse those. A GPU has one bit."""
    if torch.cuda.is_available():
        return
    from triton.runtime.interpreter import InterpreterBuilder

    def with_bits(access, position):
        def call(self, *arguments):
            arguments[position].data = arguments[position].data.astype(bool)
            return access(self, *arguments)

        return call

    for name, position in (("create_masked_load", 1), ("create_masked_store", 2)):
        monkeypatch.setattr(InterpreterBuilder, name, with_bits(getattr(InterpreterBuilder, name), position))
