"""Training steps of whole networks: what a model, its discriminator and their optimizers do with one batch."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from benchmarks import losses

LEARNING_RATE = 1e-4
CLIP_NORM = 1.0


class Critics(nn.Module):
    """Discriminators as one: (B, 1, samples) -> all scores, and a list of feature maps for each score.

    Called with the two clips of `cases.gan_step`, it judges the first.
    """

    def __init__(self, parts: Sequence[nn.Module]):
        super().__init__()
        self.critics = nn.ModuleList(parts)

    def forward(self, clip: Tensor, fake: Tensor | None = None) -> tuple[list[Tensor], list[list[Tensor]]]:
        judged = [part(clip) for part in self.critics]
        return [score for scores, _ in judged for score in scores], [maps for _, each in judged for maps in each]


class Gan(nn.Module):
    """A model and its discriminator. Called with (mixture, target), waveforms (B, samples), it restores the mixture.

    Args:
        model: (B, samples) -> (B, samples).
        critic: (B, 1, samples) -> scores and feature maps.
    """

    def __init__(self, model: nn.Module, critic: nn.Module):
        super().__init__()
        self.model, self.critic = model, critic
        self._optimizers: list[torch.optim.Optimizer] = []

    def forward(self, mixture: Tensor, target: Tensor | None = None, *, judge: bool = False):
        return self.critic(mixture[:, None]) if judge else self.model(mixture)

    def parts(self) -> list[nn.Module]:
        """What is compiled, each as one graph."""
        return [self.model, self.critic]

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """AdamW for both; made at the first step, when the parameters are where they stay."""
        if not self._optimizers:
            options = {"fused": True, "capturable": True} if next(self.parameters()).is_cuda else {}
            self._optimizers = [torch.optim.AdamW(part.parameters(), LEARNING_RATE, **options) for part in self.parts()]
        return self._optimizers


def train(gan: Callable, inputs: Sequence[Tensor]) -> None:
    """One step: the discriminator's loss, the model's losses, both optimizers; gradients stay on the parameters.

    Args:
        gan: a `Gan`, or what calls one and has its attributes.
        inputs: (mixture, target).
    """
    mixture, target = inputs
    optimizers, critic = gan.optimizers(), gan.critic
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    restored = gan(mixture).to(target.dtype)
    (real, real_maps), (fake, _) = gan(target, judge=True), gan(restored.detach(), judge=True)
    losses.discriminator_loss(real, fake).backward()
    critic.requires_grad_(False)
    fake, fake_maps = gan(restored, judge=True)
    real_maps = [[one.detach() for one in maps] for maps in real_maps]
    total = losses.waveform_loss(restored, target) + 0.5 * losses.spectral_loss(restored, target)
    total = total + 0.02 * losses.adversarial_loss(fake) + 0.05 * losses.feature_loss(real_maps, fake_maps)
    total.backward()
    critic.requires_grad_(True)
    for part in gan.parts():
        nn.utils.clip_grad_norm_(part.parameters(), CLIP_NORM)
    for optimizer in optimizers:
        optimizer.step()
