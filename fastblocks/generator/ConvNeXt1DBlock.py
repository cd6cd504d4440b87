"""A ConvNeXt block over sequences: depthwise convolution, LayerNorm, GELU MLP, residual."""

from fastblocks.generator._convnext import ConvNeXtBlock


class ConvNeXt1DBlock(ConvNeXtBlock):
    """A 1-D ConvNeXt block, channels first: (B, input_dim, L) -> (B, output_dim, L').

    Depthwise convolution, LayerNorm over channels, Linear to 4 · input_dim, exact GELU, Linear to output_dim, plus the
    residual: x itself, or, where stride or channels change, a 1×1 convolution of the mean over each stride window
    (normal) or of each position repeated (transposed). A normal block turns a size L into ceil(L / stride), a
    transposed one into (L - 1) · stride + 1 or what `original_shape` says.

    Source: Liu et al., "A ConvNet for the 2020s", 2022.

    Args:
        kernel_size: an int or (k,), odd.
        stride: an int or (k,).
        input_dim: channels of the input.
        output_dim: channels of the output.
        mode: 'normal' or 'transposed'.
        variant: 'convnext', or 'msrkit' for MSRKit's own block (dense convolutions, RMSNorm, SwiGLU) and its
            checkpoints: a drop-in there needs variant='msrkit'. Loading the other variant's state_dict says so.

    Raises:
        ValueError: for even kernels, unknown modes and variants, and sizes that are not positive.
    """

    spatial = 1
