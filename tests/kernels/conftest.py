"""What the interpreter does otherwise than a GPU, put right."""

import pytest
import torch


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
