"""The ConvNeXt block in 1-D."""

from benchmarks.original.generator._convnext import ConvNeXtBlock


class ConvNeXt1DBlock(ConvNeXtBlock):
    """(B, input_dim, L) -> (B, output_dim, L)."""

    spatial = 1
