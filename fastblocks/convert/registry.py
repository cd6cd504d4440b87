"""Which adapters there are for a class name. A further family is one file beside this and one entry here."""

from torch import nn

from fastblocks.convert import bs_roformer, hifi_gan, msrkit, spectral_norm, timm, vocos, x_transformers
from fastblocks.convert.adapter import Adapter

FAMILIES = (hifi_gan, msrkit, bs_roformer, timm, vocos, x_transformers, spectral_norm)
ADAPTERS: dict[str, list[Adapter]] = {}
for _family in FAMILIES:
    for _name, _adapters in _family.ADAPTERS.items():
        ADAPTERS.setdefault(_name, []).extend(_adapters)
OURS = tuple({adapter.block for adapters in ADAPTERS.values() for adapter in adapters})


def adapter_of(module: nn.Module) -> Adapter | None:
    """The adapter for a module; None for one of an unknown name, or of this package."""
    if isinstance(module, OURS):
        return None
    adapters = ADAPTERS.get(type(module).__name__, [])
    return next((adapter for adapter in adapters if adapter.claims(module)), None)
