"""Discriminators of HiFi-GAN's build (Vocos, BigVGAN, DAC, SpeechBrain, …): known, so that the report can say why they
stay.

Their strides, slopes and outputs are not those of fastblocks' discriminators. A block for them would have nothing to
gain: nearly all of the time is PyTorch's convolutions (LeakyReLU in place: 0.99 × in training, 4 % less
memory, for a period discriminator on a CPU).
"""

from torch import nn

from fastblocks.convert.adapter import Adapter, Arguments, Block, Foreign
from fastblocks.discriminator.MultiPeriodDiscriminator import MultiPeriodDiscriminator

NAMES = ("MultiPeriodDiscriminator", "MultiScaleDiscriminator", "MultiResolutionDiscriminator", "MPD", "MSD", "MRD")


def _is_hifi_gans(module: nn.Module) -> bool:
    """Its last convolution is called `conv_post`, in itself or in each of its discriminators."""
    judges = getattr(module, "discriminators", None)
    return any("conv_post" in part._modules for part in (module, *(judges if judges is not None else ())))


def _left(block: Block) -> Arguments:
    raise Foreign(
        "it is of HiFi-GAN's build, whose strides, slopes and outputs are others; nearly all of its time is PyTorch's "
        "convolutions, so there is nothing to gain"
    )


ADAPTERS = {
    name: [Adapter(MultiPeriodDiscriminator, _left, lambda arguments: [], claims=_is_hifi_gans)] for name in NAMES
}
