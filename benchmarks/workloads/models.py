"""Whole models: inference, and one training step with the multi-frequency discriminator and both optimizers."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from benchmarks.train import losses, models
from benchmarks.workloads.discriminators import WINDOWS
from benchmarks.workloads.workload import SAMPLE_RATE, Workload, normal

LEARNING_RATE = 1e-4
CLIP_NORM = 1.0
NETS = {"roformer": models.MelRoFormer, "rnn": models.MelRNN, "unet": models.MelUNet}
SIZES = {  # arguments of each net
    "full": {"roformer": (128, 12, 4), "rnn": (128, 9, 8), "unet": (32, 4)},
    "cpu": {"roformer": (32, 2, 4), "rnn": (64, 2, 8), "unet": (16, 3)},
    "toy": {"roformer": (8, 1, 2), "rnn": (8, 1, 2), "unet": (4, 2)},
}
CLIPS = {"full": (4, 3 * SAMPLE_RATE), "cpu": (1, SAMPLE_RATE), "toy": (1, 2000)}  # B, samples
CRITICS = {"full": (WINDOWS, 8), "cpu": ((1024,), 4), "toy": ((256, 128), 2)}  # windows, channels
TOY_SPECTRUM = {"sample_rate": 8000, "n_fft": 256, "hop_length": 64, "bands": 8}


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


def step(gan: Callable, inputs: Sequence[Tensor]) -> None:
    """One step: the discriminator's loss, the model's losses, both optimizers; gradients stay on the parameters.

    Args:
        gan: a `Gan`, or what calls one and has its attributes.
        inputs: (mixture, target).
    """
    mixture, target = inputs
    for optimizer in gan.optimizers():
        optimizer.zero_grad(set_to_none=True)
    losses.descend(gan, lambda clip: gan(clip, judge=True), gan.critic, mixture, target)
    for part in gan.parts():
        nn.utils.clip_grad_norm_(part.parameters(), CLIP_NORM)
    for optimizer in gan.optimizers():
        optimizer.step()


def workloads(size: str) -> list[Workload]:
    clip = CLIPS[size]
    windows, width = CRITICS[size]
    spectrum = TOY_SPECTRUM if size == "toy" else {}

    def build(name):
        def gan(kit):
            critic = kit.MultiFrequencyDiscriminator(nch=1, window_sizes=list(windows), hidden_channels=width)
            return Gan(NETS[name](kit, *SIZES[size][name], **spectrum), critic)

        return gan

    return [
        Workload(
            f"model-{name}", "model", f"{clip}, {arguments}", build(name), normal(clip, clip, scale=0.1),
            constant=(0, 1), step=step,
        )
        for name, arguments in SIZES[size].items()
    ]  # fmt: skip
