"""Discriminators of HiFi-GAN's build (Vocos, BigVGAN, DAC, SpeechBrain, …): known, so that the report can say why they
stay; convolutions under spectral norm within them are swapped one by one (`spectral_norm`).

Their strides, slopes and outputs are not those of fastblocks' discriminators. A block for them would have nothing to
gain: nearly all of the time is PyTorch's convolutions (LeakyReLU in place: 0.99 × in training, 4 % less
memory, for a period discriminator on a CPU). Nor have all weight norms in one launch: PyTorch's own is one kernel
a convolution, and one backward. Of 26 weights one costs the host 2.6 µs and a launch forward, 19 µs and two launches
with its backward pass; in `functional.weight_norms` 8 and 30 µs.
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
        "convolutions, and its weight norm one kernel a convolution, so there is nothing to gain"
    )


ADAPTERS = {
    name: [Adapter(MultiPeriodDiscriminator, _left, lambda arguments: [], claims=_is_hifi_gans)] for name in NAMES
}
