"""What a GAN's two sides minimize. Scores are a tensor each sub-discriminator, feature maps lists of tensors each."""

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from fastblocks import backend
from fastblocks.eager import losses as eager
from fastblocks.functional._dispatch import require, require_floating, shape

Kind = Literal["least_squares", "hinge"]


def discriminator_loss(real: Sequence[Tensor], fake: Sequence[Tensor], kind: Kind = "least_squares") -> Tensor:
    """What the discriminators minimize, the mean over their scores.

    'least_squares' (Mao et al., "LSGAN", 2017): `mean (1 − real)² + mean fake²`. 'hinge' (Lim and Ye, "Geometric GAN",
    2017): `mean max(0, 1 − real) + mean max(0, 1 + fake)`.

    Args:
        real, fake: scores of real and of generated audio, in one order, any shape.
        kind: of the loss.

    Raises:
        ValueError: for another kind, or lists that are empty or of different lengths.
    """
    _check("discriminator_loss", kind, real, fake)
    if kind == "hinge":
        return sum(F.relu(1 - r).mean() + F.relu(1 + f).mean() for r, f in zip(real, fake, strict=True)) / len(real)
    return sum((1 - r).square().mean() + f.square().mean() for r, f in zip(real, fake, strict=True)) / len(real)


def adversarial_loss(fake: Sequence[Tensor], kind: Kind = "least_squares") -> Tensor:
    """What the generator minimizes of its scores: `mean (1 − fake)²`, or with 'hinge' `−mean fake`; the mean over them.

    Sources and errors: as of `discriminator_loss`.
    """
    _check("adversarial_loss", kind, fake)
    if kind == "hinge":
        return -sum(f.mean() for f in fake) / len(fake)
    return sum((1 - f).square().mean() for f in fake) / len(fake)


def feature_matching(
    real: Sequence[Sequence[Tensor]], fake: Sequence[Sequence[Tensor]], *, relative: bool = True, eps: float = 1e-5
) -> Tensor:
    """Mean absolute difference of feature maps, the mean over all maps: `mean |fake − real| / (mean |real| + eps)`.

    Source: Kumar et al., "MelGAN", 2019.

    Args:
        real: maps of real audio, a list each sub-discriminator; they take no gradient.
        fake: maps of generated audio, in the same order and shapes.
        relative: divide by the real map's own level; else plain mean absolute differences.
        eps: added to that level.

    Returns:
        A number, in float32 or better. Sums are in a fixed order: the same bits each time.

    Raises:
        ValueError: if maps are missing, empty, or differ in shape.
    """
    require(
        [len(maps) for maps in real] == [len(maps) for maps in fake],
        lambda: f"feature_matching: {[len(m) for m in real]} real maps and {[len(m) for m in fake]} generated ones",
    )
    ys, xs = ([one for maps in of for one in maps] for of in (real, fake))
    require(len(xs) > 0, lambda: "feature_matching needs at least one map")
    for y, x in zip(ys, xs, strict=True):
        require(
            x.shape == y.shape and x.numel() > 0,
            lambda x=x, y=y: f"feature_matching: maps must not be empty or differ in shape: {shape(y)} and {shape(x)}",
        )
        require_floating("feature_matching", real=y, fake=x)

    def unsupported_reason() -> str:
        from fastblocks.kernels.losses import feature_matching

        return backend.traced_reason() or feature_matching.unsupported_reason(xs, ys)

    if backend.decide("feature_matching", xs[0], unsupported_reason):
        from fastblocks.kernels.losses.feature_matching import feature_matching as means
    else:
        means = eager.feature_matching
    differences, magnitudes = means(xs, ys)
    return (differences / (magnitudes + eps) if relative else differences).mean()


def _check(name: str, kind: str, *lists: Sequence[Tensor]) -> None:
    require(
        kind in ("least_squares", "hinge"), lambda: f"{name}: kind must be 'least_squares' or 'hinge', got {kind!r}"
    )
    counts = [len(scores) for scores in lists]
    require(
        min(counts) > 0 and len(set(counts)) == 1,
        lambda: f"{name} needs as many scores of each and at least one, got {' and '.join(map(str, counts))}",
    )
    for scores in lists:
        for score in scores:
            require_floating(name, score=score)
