"""Convolutions under PyTorch's own spectral norm (`torch.nn.utils.spectral_norm`), in whatever model.

The discriminators of HiFi-GAN's build, for one: the blocks stay what they are, and the norm of each weight takes three
launches on a GPU instead of twelve, and half the passes over the weight anywhere.
"""

from torch import nn
from torch.nn.utils.spectral_norm import SpectralNorm as TorchSpectralNorm

from fastblocks.convert.adapter import Adapter, Arguments, Block, Call
from fastblocks.discriminator import _layers

SETTINGS = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


class _Normed:
    """A convolution that is built with the norm.

    Args:
        n_power_iterations: at each call in training.
        eps: lower bound of the norm that a singular vector is divided by.
        **settings: the convolution's arguments.
    """

    def __init__(self, n_power_iterations: int = 1, eps: float = 1e-12, **settings):
        super().__init__(**settings)
        _layers.spectral_norm(self)
        (hook,) = self._forward_pre_hooks.values()
        hook.n_power_iterations, hook.eps = n_power_iterations, eps


class Conv1d(_Normed, _layers.Conv1d):
    pass


class Conv2d(_Normed, _layers.Conv2d):
    pass


def _norms(conv: nn.Module) -> list[TorchSpectralNorm]:
    return [hook for hook in conv._forward_pre_hooks.values() if type(hook) is TorchSpectralNorm]


def _is_normed(module: nn.Module) -> bool:
    norms = _norms(module) if type(module) in (nn.Conv1d, nn.Conv2d) else []
    return len(norms) == 1 and (norms[0].name, norms[0].dim) == ("weight", 0)


def _convolution(block: Block) -> Arguments:
    conv, (norm,) = block.module, _norms(block.module)
    told = {name: getattr(conv, name) for name in SETTINGS} | {"bias": conv.bias is not None}
    told |= {"n_power_iterations": norm.n_power_iterations, "eps": norm.eps}
    return {name: block.says(name, value) for name, value in told.items()}


def _signal(arguments: Arguments) -> list[Call]:
    """One more than the kernel covers."""
    spans = zip(arguments["kernel_size"], arguments["dilation"], strict=True)
    return [("forward", (2, arguments["in_channels"], *((k - 1) * d + 2 for k, d in spans)))]


ADAPTERS = {block.__name__: [Adapter(block, _convolution, _signal, claims=_is_normed)] for block in (Conv1d, Conv2d)}
