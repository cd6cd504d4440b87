"""What the discriminators share: a convolution with a norm of its weight, and spectra as channels."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils import spectral_norm as torch_spectral_norm
from torch.nn.utils.spectral_norm import SpectralNorm as TorchSpectralNorm
from torch.nn.utils.weight_norm import WeightNorm as TorchWeightNorm

from fastblocks import backend, functional
from fastblocks.eager import convolution
from fastblocks.eager.weights import MAX_SHARED
from fastblocks.spectral_ops import short_time_spectrum

SLOPE = 0.2  # of every LeakyReLU
Scores = list[Tensor]
FeatureMaps = list[list[Tensor]]


class _DerivedWeight:
    """A norm leaves the last forward's weight, with its graph, on the module; copies and pickles get it
    detached, and by itself: it may be a part of a tensor that holds all of a discriminator's."""

    def __getstate__(self) -> dict:
        state = dict(self.__dict__)
        if "weight" not in self._parameters:
            derived = state.get("weight")
            if isinstance(derived, Tensor):
                state["weight"] = derived.detach().clone()
        return state

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *arguments) -> None:
        """Also takes the keys of torch.nn.utils.parametrizations' norms."""
        if "weight" not in self._parameters:
            spectral = "weight_orig" in self._parameters
            for old, new in (_KEYS_OF_SPECTRAL_NORM if spectral else _KEYS_OF_WEIGHT_NORM).items():
                if (key := f"{prefix}parametrizations.weight.{old}") in state_dict:
                    state_dict[f"{prefix}weight_{new}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *arguments)


_KEYS_OF_SPECTRAL_NORM = {"original": "orig", "0._u": "u", "0._v": "v"}
_KEYS_OF_WEIGHT_NORM = {"original0": "g", "original1": "v"}


class _Conv(_DerivedWeight):
    def forward(self, input: Tensor, with_bias: bool = True) -> Tensor:
        return self._conv_forward(input, self.weight, self.bias if with_bias else None)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.groups == 1 and self.padding_mode == "zeros":
            convolve = convolution.quicker(input, weight, self.stride, self.padding, self.dilation)
            if convolve is not None:
                return convolve(input, weight, bias)
        return super()._conv_forward(input, weight, bias)


class Conv1d(_Conv, nn.Conv1d):
    pass


class Conv2d(_Conv, nn.Conv2d):
    pass


class SpectralNorm(TorchSpectralNorm):
    """torch.nn.utils.spectral_norm's hook with `functional.spectral_norms` inside: the same numbers, faster. Where
    `prepared_weights` has computed the weight, it computes nothing."""

    def compute_weight(self, module: nn.Module, do_power_iteration: bool) -> Tensor:
        if self.dim != 0:
            return super().compute_weight(module, do_power_iteration)
        return self.compute_weights([module], self.n_power_iterations if do_power_iteration else 0, self.eps)[0]

    def source(self, module: nn.Module) -> Tensor:
        return getattr(module, f"{self.name}_orig")

    def arguments(self, module: nn.Module) -> tuple:
        """What `compute_weights` takes; modules with the same are computed together."""
        return self.n_power_iterations if module.training else 0, self.eps

    def compute_weights(self, modules: list[nn.Module], iterations: int, eps: float) -> list[Tensor]:
        weights, us, vs = ([getattr(m, f"{self.name}_{part}") for m in modules] for part in ("orig", "u", "v"))
        return functional.spectral_norms(weights, us, vs, n_power_iterations=iterations, eps=eps)

    def __call__(self, module: nn.Module, inputs) -> None:
        if not _take_prepared(self, module):
            super().__call__(module, inputs)


class WeightNorm(TorchWeightNorm):
    """torch.nn.utils.weight_norm's hook, as above."""

    def compute_weight(self, module: nn.Module) -> Tensor:
        return self.compute_weights([module])[0] if self.dim == 0 else super().compute_weight(module)

    def source(self, module: nn.Module) -> Tensor:
        return getattr(module, f"{self.name}_v")

    def arguments(self, module: nn.Module) -> tuple:
        return ()

    def compute_weights(self, modules: list[nn.Module]) -> list[Tensor]:
        return functional.weight_norms(*([getattr(m, f"{self.name}_{part}") for m in modules] for part in "vg"))

    def __call__(self, module: nn.Module, inputs) -> None:
        if not _take_prepared(self, module):
            super().__call__(module, inputs)


def _take_prepared(hook: SpectralNorm | WeightNorm, module: nn.Module) -> bool:
    """Whether `prepared_weights` has computed this module's weight; it is the module's now."""
    prepared = module.__dict__.pop(_PREPARED, None)
    if prepared is not None:
        setattr(module, hook.name, prepared)
    return prepared is not None


def spectral_norm(conv: nn.Conv1d | nn.Conv2d) -> nn.Conv1d | nn.Conv2d:
    """torch.nn.utils.spectral_norm with the hook above: the same keys, and `remove_spectral_norm` works."""
    conv = torch_spectral_norm(conv)
    for key, hook in conv._forward_pre_hooks.items():
        if type(hook) is TorchSpectralNorm:
            conv._forward_pre_hooks[key] = SpectralNorm(hook.name, hook.n_power_iterations, hook.dim, hook.eps)
    return conv


def weight_norm(conv: nn.Conv1d | nn.Conv2d) -> nn.Conv1d | nn.Conv2d:
    """torch.nn.utils.weight_norm with the hook above: the same keys, which the checkpoints of HiFi-GAN, BigVGAN and DAC
    have, and `remove_weight_norm` works. That function warns that it is deprecated, so it is not called."""
    weight = conv._parameters.pop("weight").detach()
    conv.register_parameter("weight_g", nn.Parameter(torch.norm_except_dim(weight, 2, 0)))
    conv.register_parameter("weight_v", nn.Parameter(weight))
    conv.weight = weight.clone()
    conv.register_forward_pre_hook(WeightNorm("weight", 0))
    return conv


Norm = bool | Literal["spectral", "weight"]
NORMS = {"spectral": spectral_norm, "weight": weight_norm, True: spectral_norm, False: lambda conv: conv}

_PREPARED = "_prepared_weight"


def prepared_weights(module: nn.Module) -> AbstractContextManager:
    """Inside it the normed weights of all convolutions below the module are there before they run, each for one run:
    computed together, in three launches instead of twelve a convolution. One that runs again computes its own, as it
    would have.

    Not under `torch.compile`, which sees the formulas of each convolution. On a CPU only small ones: large weights that
    are made one by one reuse memory, and pages that are touched first take ten times as long as the division.
    """
    return nullcontext() if torch.compiler.is_compiling() else _prepared(module)


@contextmanager
def _prepared(module: nn.Module) -> Iterator[None]:
    groups: dict[tuple, tuple] = {}
    for conv in module.modules():
        hooks = [hook for hook in conv._forward_pre_hooks.values() if type(hook) in (SpectralNorm, WeightNorm)]
        if len(hooks) == 1 and hooks[0].name == "weight" and hooks[0].dim == 0 and _PREPARED not in conv.__dict__:
            source = hooks[0].source(conv)
            if source.device.type != "cpu" or backend.selected() == "triton" or source.numel() <= MAX_SHARED:
                key = type(hooks[0]), hooks[0].arguments(conv), source.dtype, source.device
                groups.setdefault(key, (hooks[0], []))[1].append(conv)
    try:
        for (_, arguments, *_), (hook, convs) in groups.items():
            for conv in convs:  # the last forward's, so that they are not held twice
                conv.__dict__.pop("weight", None)
            for conv, weight in zip(convs, hook.compute_weights(convs, *arguments), strict=True):
                conv.__dict__[_PREPARED] = weight
        yield
    finally:
        for _, convs in groups.values():
            for conv in convs:
                conv.__dict__.pop(_PREPARED, None)


class ConvLayer(nn.Module):
    """A convolution, normed if asked for, and LeakyReLU 0.2 if asked for.

    Args:
        conv: the convolution.
        norm: 'spectral' or True divides its weight by its largest singular value (torch.nn.utils.spectral_norm),
            'weight' learns length and direction of each output's weights (torch.nn.utils.weight_norm), False neither.
        activate: apply the LeakyReLU.

    Raises:
        ValueError: for another norm.
    """

    def __init__(self, conv: nn.Conv1d | nn.Conv2d, norm: Norm, activate: bool = True):
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"norm must be 'spectral', 'weight', True or False, got {norm!r}")
        self.conv = NORMS[norm](conv)
        self.activation = activate

    def forward(self, x: Tensor) -> Tensor:
        if not self.activation:
            return self.conv(x)
        alone = not torch.compiler.is_compiling() and _is_seen_by_nobody(self.conv)
        if x.device.type == "cpu" and backend.selected() != "triton":
            backend.declined("bias_leaky_relu", "the input is on cpu, where convolutions add their bias")
        elif not alone:
            backend.declined("bias_leaky_relu", "the convolution is replaced, hooked or changed, or has no bias")
        else:  # on a GPU a convolution adds its bias in a launch of its own
            return functional.bias_leaky_relu(self.conv(x, with_bias=False), self.conv.bias, SLOPE)
        # in place where nobody else sees the convolution's output, whose gradient does not need it
        return F.leaky_relu(self.conv(x), SLOPE, inplace=alone)


def _is_seen_by_nobody(conv: nn.Module) -> bool:
    """Whether a convolution is one of the above with a bias, and nobody gets its output but who calls it: its bias may
    be left to the caller, and its output be changed."""
    return (
        type(conv) in (Conv1d, Conv2d)
        and conv._parameters.get("bias") is not None
        and not conv._forward_hooks
        and not conv._backward_hooks
        and not conv._backward_pre_hooks
        and all(type(hook) in (SpectralNorm, WeightNorm) for hook in conv._forward_pre_hooks.values())
        and not {"forward", "_conv_forward"} & conv.__dict__.keys()
        and not _has_any_global_hook()
    )


def run_layers(layers: nn.ModuleList, x: Tensor, fmap: list[Tensor]) -> Tensor:
    """Run layers in order and append every activation to fmap."""
    for layer in layers:
        x = layer(x)
        fmap.append(x)
    return x


class Discriminators(nn.Module):
    """Several sub-discriminators on one clip: audio (B, nch, T) -> (scores, fmaps), an entry each.

    Args:
        nch: channels of the audio.
        discriminators: modules that turn (B, nch, T) into (score, fmap), and whose `shortest_clip` is the least T.
    """

    def __init__(self, nch: int, discriminators: list[nn.Module]):
        super().__init__()
        if not discriminators:
            raise ValueError(f"{type(self).__name__} needs at least one sub-discriminator, got none")
        self.nch = nch
        self.discriminators = nn.ModuleList(discriminators)

    def forward(self, x: Tensor) -> tuple[Scores, FeatureMaps]:
        """Judge audio x (B, nch, T).

        Raises:
            ValueError: if x has another shape, or is too short.
        """
        if x.dim() != 3 or x.shape[1] != self.nch:
            raise ValueError(f"{type(self).__name__} needs audio of shape (B, {self.nch}, T), got {tuple(x.shape)}")
        shortest = max(discriminator.shortest_clip for discriminator in self.discriminators)
        if x.shape[2] < shortest:
            raise ValueError(
                f"{type(self).__name__}: {x.shape[2]} samples are too short, "
                f"the shortest clip that works has {shortest}"
            )
        scores, fmaps = [], []
        with prepared_weights(self), shared_spectra():
            for discriminator in self.discriminators:
                score, fmap = discriminator(x)
                scores.append(score)
                fmaps.append(fmap)
        return scores, fmaps


_spectra: ContextVar[dict[tuple, tuple] | None] = ContextVar("fastblocks_spectra", default=None)


def shared_spectra() -> AbstractContextManager:
    """Inside it `shared` computes once what is asked for again. Not under `torch.compile`, which does so by itself."""
    return nullcontext() if torch.compiler.is_compiling() or _spectra.get() is not None else _shared_spectra()


@contextmanager
def _shared_spectra() -> Iterator[None]:
    token = _spectra.set({})
    try:
        yield
    finally:
        _spectra.reset(token)


def shared(key: tuple, x: Tensor, compute: Callable[[], Tensor]) -> Tensor:
    """What `compute` gives for the clip x; `key` says what that is."""
    known = None if torch.compiler.is_compiling() else _spectra.get()
    if known is None:
        return compute()
    key = (*key, id(x), x._version if not x.is_inference() else 0, torch.is_grad_enabled())
    if key not in known:
        known[key] = x, compute()  # x, so that its id stays its own
    return known[key][1]


class SpectrumDiscriminator(nn.Module):
    """A discriminator on spectra; its Hann window is made at each call, in float32 or better, and is in no state_dict.

    Args:
        window_length: samples of a window.
        hop_length: samples from one frame to the next.
    """

    def __init__(self, window_length: int, hop_length: int):
        super().__init__()
        if window_length < 2 or hop_length < 1:
            raise ValueError(f"a window of {window_length} samples with a hop of {hop_length} is not possible")
        self.window_length, self.hop_length = window_length, hop_length
        self.shortest_clip = window_length // 2 + 1  # a reflect pad of half a window on both sides

    def spectrum(self, x: Tensor) -> Tensor:
        """(B, nch, T) -> (B, 2·nch, frames, bins), channels left.re, left.im, right.re, …; in x's dtype."""
        return shared((self.window_length, self.hop_length), x, lambda: self._spectrum(x))

    def _spectrum(self, x: Tensor) -> Tensor:
        window = torch.hann_window(
            self.window_length, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device
        )
        spectrum = short_time_spectrum(x.flatten(0, 1), window, self.hop_length)
        parts = torch.view_as_real(spectrum).unflatten(0, x.shape[:2])  # (B, nch, bins, frames, 2)
        return parts.permute(0, 1, 4, 3, 2).flatten(1, 2).to(x.dtype)


def same_padding(kernel: tuple[int, ...], dilation: tuple[int, ...] = (1, 1)) -> tuple[int, ...]:
    """Padding that keeps sizes at stride 1, for odd kernels."""
    return tuple((k - 1) * d // 2 for k, d in zip(kernel, dilation, strict=True))


def band_edges(fractions: list[tuple[float, float]], bins: int) -> list[tuple[int, int]]:
    """Bands as bins [start, end); raises a ValueError for one that has none."""
    edges = [(int(low * bins), int(high * bins)) for low, high in fractions]
    for fraction, (start, end) in zip(fractions, edges, strict=True):
        if not 0 <= start < end <= bins:
            raise ValueError(f"band {tuple(fraction)} of {bins} bins covers no bin")
    return edges
