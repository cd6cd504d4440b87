"""Swap the blocks of a model that exists for the ones of this package, keeping its weights.

A block is known by the name of its class. Its constructor's arguments are read from the shapes of its weights and from
its attributes; what neither tells has to be given, because a guess (a number of heads, the base of a rotation) would
load and train, and be wrong.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastblocks.discriminator.MultiFrequencyDiscriminator import MultiFrequencyDiscriminator
from fastblocks.discriminator.MultiPeriodDiscriminator import MultiPeriodDiscriminator
from fastblocks.discriminator.MultiResolutionDiscriminator import MultiResolutionDiscriminator
from fastblocks.discriminator.MultiScaleDiscriminator import MultiScaleDiscriminator
from fastblocks.generator.AttentionRegisterRoFormerBlock import AttentionRegisterRoFormerBlock
from fastblocks.generator.ConvNeXt1DBlock import ConvNeXt1DBlock
from fastblocks.generator.ConvNeXt2DBlock import ConvNeXt2DBlock
from fastblocks.generator.RNNBlock import RNNBlock
from fastblocks.generator.RoFormerBlock import RoFormerBlock
from fastblocks.spectral_ops import Band, Fourier

Arguments = dict[str, Any]
State = dict[str, torch.Tensor]

# Other names under which public kits keep an argument.
_SYNONYMS = {
    "n_head": ("n_head", "n_heads", "num_heads", "heads"),
    "max_seq_len": ("max_seq_len", "max_len", "max_seq_length"),
    "rope_base": ("rope_base", "rope_theta", "base"),
    "window_size": ("window_size", "window"),
    "sr": ("sr", "sample_rate"),
}


def convert(model: nn.Module, arguments: dict[str, Arguments] | None = None) -> nn.Module:
    """Replace every block of a model by this package's block of the same class name, in place.

    Parameters and buffers are kept as the objects they are, so an optimizer that holds them goes on working.

    Args:
        model: any module; if it is a block itself, use what is returned.
        arguments: constructor arguments that the blocks do not tell themselves, by class name or by path in the model
            (paths win): `{"RoFormerBlock": {"n_head": 4, "rope_base": 10000}}`.

    Returns:
        The model, or the new block where the model is one.

    Raises:
        ValueError: if an argument cannot be found, or a block's state_dict is not that of its namesake. The model is
            unchanged then.
    """
    arguments = arguments or {}
    found = {
        path: module
        for path, module in model.named_modules(remove_duplicate=False)
        if type(module).__name__ in _READERS and not type(module).__module__.startswith("fastblocks.")
    }
    if unknown := arguments.keys() - found.keys() - {type(module).__name__ for module in found.values()}:
        raise ValueError(f"arguments are given for {sorted(unknown)}, but the model has no such block")
    made: dict[nn.Module, nn.Module] = {}  # a block that stands in two places stays one
    for path, module in found.items():
        if module not in made:
            name = type(module).__name__
            made[module] = _rebuild(path, module, {**arguments.get(name, {}), **arguments.get(path, {})})
    for module, block in made.items():
        _adopt(block, module)
    for path, module in found.items():
        if path:
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, made[module])
    return made.get(model, model)


def _rebuild(path: str, module: nn.Module, given: Arguments) -> nn.Module:
    """A new block with the arguments of the old one, its own weights still in it."""
    name, state = type(module).__name__, module.state_dict()
    where = f"{name} at '{path}'" if path else name
    try:
        block_class, read = _READERS[name]
        block = block_class(**{**read(module, state, given), **given})
    except (_Unknown, KeyError, AttributeError, IndexError) as problem:
        raise ValueError(
            f"{where}: cannot tell {problem}; pass arguments={{'{path or name}': {{{problem}: …}}}}"
        ) from None
    wanted = block.state_dict()
    differing = [
        key
        for key in sorted(wanted.keys() | state.keys())
        if key not in wanted or key not in state or wanted[key].shape != state[key].shape
    ]
    if differing:
        raise ValueError(f"{where}: its state_dict is not that of fastblocks.{name}; it differs at {differing[:4]}")
    return block


def _adopt(block: nn.Module, module: nn.Module) -> None:
    """Put the old block's parameters, persistent buffers, device and mode into the new one."""
    tensors = dict(module.named_parameters()) | {
        key: buffer for key, buffer in module.named_buffers() if key in module.state_dict(keep_vars=True)
    }
    if tensors:
        block.to(next(iter(tensors.values())).device)
    for key, tensor in tensors.items():
        parent, _, name = key.rpartition(".")
        holder = block.get_submodule(parent)
        (holder._parameters if name in holder._parameters else holder._buffers)[name] = tensor
    block.train(module.training)


class _Unknown(LookupError):
    def __str__(self) -> str:
        return repr(self.args[0])


def _look_up(argument: str, *holders: nn.Module) -> Any:
    """An argument among the attributes of modules, under any of its names."""
    for holder in holders:
        for name in _SYNONYMS.get(argument, (argument,)):
            value = getattr(holder, name, None)
            if value is not None and not isinstance(value, torch.Tensor | nn.Module):
                return value
    raise _Unknown(argument)


def _want(given: Arguments, argument: str, *holders: nn.Module) -> Any:
    return given[argument] if argument in given else _look_up(argument, *holders)


def _roformer(module: nn.Module, state: State, given: Arguments) -> Arguments:
    holders = [module, *module.modules()]
    wanted = {name: _want(given, name, *holders) for name in ("n_head", "max_seq_len", "rope_base")}
    return {"n_embd": state["att_norm.scale"].shape[0], **wanted}


def _register_roformer(module: nn.Module, state: State, given: Arguments) -> Arguments:
    registers = state["registers"].shape[0] if "registers" in state else 0
    window = _want(given, "window_size", module, *module.modules())
    return {**_roformer(module, state, given), "num_register_tokens": registers, "window_size": window}


def _rnn(module: nn.Module, state: State, given: Arguments) -> Arguments:
    rows, hidden = state["rnn.rnns.0.weight_hh_l0"].shape
    names = [key.split(".")[2:] for key in state if key.startswith("rnn.rnns.")]
    return {
        "n_embd": state["rnn_norm.scale"].shape[0],
        "n_layer": sum(group == "0" and "weight_hh" in weight and "_reverse" not in weight for group, weight in names),
        "n_groups": len({group for group, _ in names}),
        "rnn_type": {3: "gru", 4: "lstm"}[rows // hidden],
        "bidirectional": any("_reverse" in weight for _, weight in names),
    }


def _convnext(module: nn.Module, state: State, given: Arguments) -> Arguments:
    conv = module.dwconv
    return {
        "kernel_size": tuple(conv.kernel_size),
        "stride": tuple(conv.stride),
        "input_dim": conv.in_channels,
        "output_dim": state["pwconv2.weight"].shape[0],
        "mode": "transposed" if isinstance(conv, nn.ConvTranspose1d | nn.ConvTranspose2d) else "normal",
        "variant": "msrkit" if "norm.scale" in state else "convnext",
    }


def _normed(state: State) -> bool:
    return any(key.endswith("weight_orig") for key in state)


def _first_conv(state: State, prefix: str) -> torch.Size:
    """The shape of the first convolution's weight below a prefix: (out, in, *kernel)."""
    return next(value.shape for key, value in state.items() if key.startswith(prefix) and value.dim() > 2)


def _each(module: nn.Module, given: Arguments, argument: str, singular: tuple[str, ...]) -> list:
    """A list with an entry a sub-discriminator, from the argument or from an attribute of each."""
    if argument in given:
        return given[argument]
    value = getattr(module, argument, None)
    if isinstance(value, list | tuple):
        return list(value)
    values = [
        next((v for n in singular if (v := getattr(d, n, None)) is not None), None) for d in module.discriminators
    ]
    if None in values:
        raise _Unknown(argument)
    return values


def _multi_period(module: nn.Module, state: State, given: Arguments) -> Arguments:
    nch = _first_conv(state, "discriminators.0.layers.0.")[1]
    return {"nch": nch, "periods": _each(module, given, "periods", ("period",)), "norm": _normed(state)}


def _multi_scale(module: nn.Module, state: State, given: Arguments) -> Arguments:
    return {
        "sample_rate": given.get("sample_rate", getattr(module, "sample_rate", 48000)),
        "downsample_rates": _each(module, given, "downsample_rates", ("downsample_rate", "rate")),
        "nch": _first_conv(state, "discriminators.0.layers.0.")[1],
        "norm": _normed(state),
    }


def _multi_resolution(module: nn.Module, state: State, given: Arguments) -> Arguments:
    first = _first_conv(state, "discriminators.0.band_discriminators.0.0.")
    sub = module.discriminators[0]
    return {
        "nch": first[1] // 2,
        "window_lengths": _each(module, given, "window_lengths", ("window_length", "n_fft")),
        "hop_factor": _want(given, "hop_factor", module, sub),
        "bands": _want(given, "bands", module, sub),
        "norm": _normed(state),
        "hidden_channels": first[0],
    }


def _multi_frequency(module: nn.Module, state: State, given: Arguments) -> Arguments:
    first = _first_conv(state, "discriminators.0.layers.0.")
    return {
        "nch": first[1] // 2,
        "window_sizes": _each(module, given, "window_sizes", ("window_size", "window_length", "n_fft")),
        "hidden_channels": first[0],
        "sample_rate": _want(given, "sample_rate", module, module.discriminators[0]),
        "norm": _normed(state),
    }


def _fourier(module: nn.Module, state: State, given: Arguments) -> Arguments:
    return {"n_fft": state["window"].shape[0], "hop_length": _want(given, "hop_length", module)}


def _band(module: nn.Module, state: State, given: Arguments) -> Arguments:
    bands, bins = state["filterbanks"].shape
    return {
        "sr": _want(given, "sr", module),
        "n_fft": _want(given, "n_fft", module) if "n_fft" in given or hasattr(module, "n_fft") else 2 * (bins - 1),
        "bands_num": bands,
        "in_channels": state["pre_bandnet.weight"].shape[1] * bands // len(state["f_idxes"]),
        "out_channels": state["pre_bandnet.weight"].shape[2],
        "scale": _want(given, "scale", module),
    }


_READERS: dict[str, tuple[type[nn.Module], Callable[[nn.Module, State, Arguments], Arguments]]] = {
    "AttentionRegisterRoFormerBlock": (AttentionRegisterRoFormerBlock, _register_roformer),
    "Band": (Band, _band),
    "ConvNeXt1DBlock": (ConvNeXt1DBlock, _convnext),
    "ConvNeXt2DBlock": (ConvNeXt2DBlock, _convnext),
    "Fourier": (Fourier, _fourier),
    "MultiFrequencyDiscriminator": (MultiFrequencyDiscriminator, _multi_frequency),
    "MultiPeriodDiscriminator": (MultiPeriodDiscriminator, _multi_period),
    "MultiResolutionDiscriminator": (MultiResolutionDiscriminator, _multi_resolution),
    "MultiScaleDiscriminator": (MultiScaleDiscriminator, _multi_scale),
    "RNNBlock": (RNNBlock, _rnn),
    "RoFormerBlock": (RoFormerBlock, _roformer),
}
