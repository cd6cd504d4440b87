"""Drop-in building blocks of neural audio models, with fused Triton kernels. See the README.

Every class is here, and under the path of its original: `fastblocks.generator.RoFormerBlock.RoFormerBlock`. MSRKit's
own ConvNeXt blocks are `variant='msrkit'`; the default is the paper's block.
"""

import importlib.util
import sys
from pathlib import Path


def _find_kernels() -> None:
    """An installation has the kernels in the package; a clone has them beside it, and is usable without installing."""
    inside, beside = Path(__file__).with_name("kernels"), Path(__file__).parent.with_name("kernels")
    if inside.exists() or not (beside / "runtime.py").exists():
        return
    name = f"{__name__}.kernels"
    spec = importlib.util.spec_from_file_location(
        name, beside / "__init__.py", submodule_search_locations=[str(beside)]
    )
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    globals()["kernels"] = module  # as an import of a submodule binds it


_find_kernels()

from fastblocks import functional
from fastblocks.backend import explain, use_backend
from fastblocks.convert import conversion_report, convert
from fastblocks.discriminator.EnsembleDiscriminator import EnsembleDiscriminator
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
    "EnsembleDiscriminator",
    "Fourier",
    "GroupedRNN",
    "MultiFrequencyDiscriminator",
    "MultiPeriodDiscriminator",
    "MultiResolutionDiscriminator",
    "MultiScaleDiscriminator",
    "RNNBlock",
    "RoFormerBlock",
    "conversion_report",
    "convert",
    "explain",
    "functional",
    "use_backend",
]
