"""The formulas that fastblocks replaces, in plain PyTorch: the rival called "original" in every table.

Same import paths below the package, same arguments, same state_dict as fastblocks, and nothing that the first person
to write such a model would not write: nn modules, autograd's own derivatives, torch.nn's RNNs in a loop over groups.
"""

from benchmarks.original import functional
from benchmarks.original.discriminator.EnsembleDiscriminator import EnsembleDiscriminator
from benchmarks.original.discriminator.MultiFrequencyDiscriminator import MultiFrequencyDiscriminator
from benchmarks.original.discriminator.MultiPeriodDiscriminator import MultiPeriodDiscriminator
from benchmarks.original.discriminator.MultiResolutionDiscriminator import MultiResolutionDiscriminator
from benchmarks.original.discriminator.MultiScaleDiscriminator import MultiScaleDiscriminator
from benchmarks.original.generator.AttentionRegisterRoFormerBlock import AttentionRegisterRoFormerBlock
from benchmarks.original.generator.ConvNeXt1DBlock import ConvNeXt1DBlock
from benchmarks.original.generator.ConvNeXt2DBlock import ConvNeXt2DBlock
from benchmarks.original.generator.RNNBlock import RNNBlock
from benchmarks.original.generator.RoFormerBlock import RoFormerBlock
from benchmarks.original.spectral_ops import Band, Fourier

__all__ = [
    "AttentionRegisterRoFormerBlock",
    "Band",
    "ConvNeXt1DBlock",
    "ConvNeXt2DBlock",
    "EnsembleDiscriminator",
    "Fourier",
    "MultiFrequencyDiscriminator",
    "MultiPeriodDiscriminator",
    "MultiResolutionDiscriminator",
    "MultiScaleDiscriminator",
    "RNNBlock",
    "RoFormerBlock",
    "functional",
]
