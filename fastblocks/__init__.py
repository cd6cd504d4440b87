"""Drop-in building blocks of neural audio models, with fused Triton kernels. See the README.

Every class is here, and under the path of its original: `fastblocks.generator.RoFormerBlock.RoFormerBlock`.
"""

from fastblocks import functional
from fastblocks.backend import explain, use_backend
from fastblocks.convert import convert
from fastblocks.discriminator.MultiFrequencyDiscriminator import MultiFrequencyDiscriminator
from fastblocks.discriminator.MultiPeriodDiscriminator import MultiPeriodDiscriminator
from fastblocks.discriminator.MultiResolutionDiscriminator import MultiResolutionDiscriminator
from fastblocks.discriminator.MultiScaleDiscriminator import MultiScaleDiscriminator
from fastblocks.generator.AttentionRegisterRoFormerBlock import AttentionRegisterRoFormerBlock
from fastblocks.generator.ConvNeXt1DBlock import ConvNeXt1DBlock
from fastblocks.generator.ConvNeXt2DBlock import ConvNeXt2DBlock
from fastblocks.generator.RNNBlock import GroupedRNN, RNNBlock
from fastblocks.generator.RoFormerBlock import RoFormerBlock
from fastblocks.spectral_ops import Band, Fourier

__version__ = "0.1.0"

__all__ = [
    "AttentionRegisterRoFormerBlock",
    "Band",
    "ConvNeXt1DBlock",
    "ConvNeXt2DBlock",
    "Fourier",
    "GroupedRNN",
    "MultiFrequencyDiscriminator",
    "MultiPeriodDiscriminator",
    "MultiResolutionDiscriminator",
    "MultiScaleDiscriminator",
    "RNNBlock",
    "RoFormerBlock",
    "convert",
    "explain",
    "functional",
    "use_backend",
]
