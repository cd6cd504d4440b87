"""The ConvNeXt block in 2-D."""

from benchmarks.original.generator._convnext import ConvNeXtBlock


class ConvNeXt2DBlock(ConvNeXtBlock):
    """(B, input_dim, H, W) -> (B, output_dim, H, W)."""

    spatial = 2
