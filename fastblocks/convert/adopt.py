"""Moves everything that a block holds into its replacement: tensors as the objects they are, modes, hooks."""

import weakref

from torch import Tensor, nn
from torch.nn.modules.module import _WrappedHook
from torch.nn.utils.spectral_norm import SpectralNorm as TorchSpectralNorm
from torch.nn.utils.weight_norm import WeightNorm as TorchWeightNorm

from fastblocks.convert.compare import HOOKS
from fastblocks.discriminator._layers import SpectralNorm, WeightNorm


def adopt(original: nn.Module, replacement: nn.Module) -> None:
    """Parameters, persistent buffers, hooks and modes of every child, by path. Nothing here can fail half way: what
    does not fit was refused before."""
    keys = original.state_dict(keep_vars=True)
    tensors = {
        **dict(original.named_parameters(remove_duplicate=False)),  # a tied weight stands under each of its names
        **{key: value for key, value in original.named_buffers(remove_duplicate=False) if key in keys},
    }
    for key, tensor in tensors.items():
        parent, _, name = key.rpartition(".")
        holder = replacement.get_submodule(parent)
        (holder._parameters if name in holder._parameters else holder._buffers)[name] = tensor
    like = next((tensor for tensor in tensors.values() if tensor.is_floating_point()), None)
    for key, parameter in replacement.named_parameters():
        if key not in tensors and like is not None:
            parameter.data = parameter.data.to(like.device, like.dtype)
    replacement.train(original.training)
    twins = dict(replacement.named_modules())
    for path, child in original.named_modules():
        if path in twins:
            _adopt_child(child, twins[path])


def _adopt_child(child: nn.Module, twin: nn.Module) -> None:
    twin.training = child.training
    for name, value in child.__dict__.items():
        if isinstance(value, Tensor) and isinstance(twin.__dict__.get(name), Tensor):
            twin.__dict__[name] = value  # a weight that a norm derived
    for name in HOOKS:
        twin.__dict__[name] = child.__dict__[name]  # the dict itself, which the handles that remove hooks refer to
    for key, hook in twin._forward_pre_hooks.items():
        if type(hook) is TorchSpectralNorm:
            twin._forward_pre_hooks[key] = SpectralNorm(hook.name, hook.n_power_iterations, hook.dim, hook.eps)
        if type(hook) is TorchWeightNorm:
            twin._forward_pre_hooks[key] = WeightNorm(hook.name, hook.dim)
    for hook in twin._load_state_dict_pre_hooks.values():
        if isinstance(hook, _WrappedHook) and hook.with_module:
            hook.module = weakref.ref(twin)
