"""Several discriminators as one, and the two passes of a GAN step."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastblocks.discriminator._layers import FeatureMaps, Scores, prepared_weights, shared_spectra


class Judgement(NamedTuple):
    """Scores, and for each the feature maps of its sub-discriminator."""

    scores: Scores
    fmaps: FeatureMaps


class GeneratorStep(NamedTuple):
    """What a generator's loss needs: scores and feature maps of what it made, maps of real audio without a graph."""

    scores: Scores
    fmaps: FeatureMaps
    real_fmaps: FeatureMaps


class EnsembleDiscriminator(nn.Module):
    """Several discriminators as one: audio (B, nch, T) -> (scores, fmaps), the members' lists one after the other.

    Members that look at spectra of one window and hop share the transform, and on a GPU the norms of all their weights
    are computed in as many launches as those of one.

    Args:
        discriminators: modules that turn audio (B, nch, T) into (scores, fmaps), lists with an entry each
            sub-discriminator: those of fastblocks, or others. Their states are at `discriminators.{i}.`

    Raises:
        ValueError: without a discriminator.

    Example::

        critic = fastblocks.EnsembleDiscriminator([MultiPeriodDiscriminator(), MultiFrequencyDiscriminator(1, [1024])])
        real_side, fake_side = critic.pair(real, fake.detach())
        functional.discriminator_loss(real_side.scores, fake_side.scores).backward()
        scores, fmaps, real_fmaps = critic.generator_step(fake, real)
        (functional.adversarial_loss(scores) + functional.feature_matching(real_fmaps, fmaps)).backward()
    """

    def __init__(self, discriminators: Sequence[nn.Module]):
        super().__init__()
        if not discriminators:
            raise ValueError("EnsembleDiscriminator needs at least one discriminator, got none")
        self.discriminators = nn.ModuleList(discriminators)

    def forward(self, x: Tensor) -> Judgement:
        """Judge audio x (B, nch, T).

        Raises:
            ValueError: if a member cannot take it.
        """
        found = Judgement([], [])
        with prepared_weights(self), shared_spectra():
            for discriminator in self.discriminators:
                scores, fmaps = discriminator(x)
                found.scores.extend(scores)
                found.fmaps.extend(fmaps)
        return found

    def pair(self, real: Tensor, fake: Tensor) -> tuple[Judgement, Judgement]:
        """Judge real and generated audio in one batch, for the discriminators' loss.

        In training mode spectral norm makes one power iteration here, not one for each of the two.

        Args:
            real, fake: (B, nch, T) and (B', nch, T), of one dtype.

        Raises:
            ValueError: if they do not fit into one batch, or a member cannot take them.
        """
        if real.shape[1:] != fake.shape[1:] or real.dtype != fake.dtype:
            raise ValueError(
                f"real and fake must be alike but for the batch, got {tuple(real.shape)} in {real.dtype} and "
                f"{tuple(fake.shape)} in {fake.dtype}"
            )
        both = self(torch.cat((real, fake)))
        sizes = len(real), len(fake)
        scores = [score.split(sizes) for score in both.scores]
        fmaps = [[fmap.split(sizes) for fmap in maps] for maps in both.fmaps]
        return tuple(
            Judgement([score[side] for score in scores], [[fmap[side] for fmap in maps] for maps in fmaps])
            for side in (0, 1)
        )

    def generator_step(self, fake: Tensor, real: Tensor) -> GeneratorStep:
        """Judge for the generator's loss: first real audio without a graph, then `fake`, both with frozen parameters.

        The generator gets the gradients that it gets from two plain calls in this order. No gradient of a parameter is
        computed, which is half of the backward pass. Afterwards parameters ask for gradients again that did before.

        Args:
            fake, real: (B, nch, T).

        Raises:
            ValueError: if a member cannot take them.
        """
        with _frozen(self):
            with torch.no_grad():
                real_fmaps = self(real).fmaps
            return GeneratorStep(*self(fake), real_fmaps)


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
