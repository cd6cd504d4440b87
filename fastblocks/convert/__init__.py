"""Swap the blocks of a model that exists for the ones of this package, keeping its weights.

A block is known by the name of its class. `registry` lists the adapters: one file a family of models (`msrkit`,
`bs_roformer`, `timm`, `vocos`, `x_transformers`; `hifi_gan` for what stays; `spectral_norm` for convolutions of any),
each of which says how a block's constructor arguments are read from its weights and attributes, and how it is called.
What neither weights nor attributes tell has to be given, because a guess (a number of heads, the base of a rotation)
would load and train, and be wrong. Every block is compared with its replacement before anything is swapped.
"""

from fastblocks.convert.driver import convert
from fastblocks.convert.report import ConversionReport, conversion_report

__all__ = ["ConversionReport", "conversion_report", "convert"]
