"""Each discriminator and all four; a training step is the discriminator's losses and the generator's, both backward."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from benchmarks.train import losses
from benchmarks.workloads.workload import SAMPLE_RATE, Workload, normal

WINDOWS = (2048, 1024, 512)  # samples, of the spectral discriminators
SHAPES = {"full": (4, 1, 3 * SAMPLE_RATE), "cpu": (1, 1, 16384), "toy": (1, 1, 1200)}  # B, 1, samples


class Critics(nn.Module):
    """Discriminators as one: (B, 1, samples) -> all scores, and a list of feature maps for each score.

    Called with the two clips of `step`, it judges the first.
    """

    def __init__(self, parts: Sequence[nn.Module]):
        super().__init__()
        self.critics = nn.ModuleList(parts)

    def forward(self, clip: Tensor, fake: Tensor | None = None) -> tuple[list[Tensor], list[list[Tensor]]]:
        judged = [part(clip) for part in self.critics]
        return [score for scores, _ in judged for score in scores], [maps for _, each in judged for maps in each]


def step(critic: Callable, clips: Sequence[Tensor]) -> None:
    """The discriminator's loss on a real and a fake clip, then the generator's on the fake one, both with backward."""
    real, fake = clips
    parameters = [p for p in critic.parameters() if p.requires_grad]
    (real_scores, _), (fake_scores, _) = critic(real), critic(fake.detach())
    losses.discriminator_loss(real_scores, fake_scores).backward()
    for parameter in parameters:
        parameter.requires_grad_(False)
    with torch.no_grad():
        _, real_maps = critic(real)
    scores, maps = critic(fake)
    (losses.adversarial_loss(scores) + losses.feature_loss(real_maps, maps)).backward()
    for parameter in parameters:
        parameter.requires_grad_(True)


def workloads(size: str) -> list[Workload]:
    toy = size == "toy"
    windows = [256, 128] if toy else list(WINDOWS)
    makers = {
        "period": lambda kit: kit.MultiPeriodDiscriminator(**({"periods": [2, 3]} if toy else {})),
        "scale": lambda kit: kit.MultiScaleDiscriminator(sample_rate=SAMPLE_RATE),
        "resolution": lambda kit: kit.MultiResolutionDiscriminator(
            window_lengths=windows, hidden_channels=4 if toy else 32
        ),
        "frequency": lambda kit: kit.MultiFrequencyDiscriminator(
            nch=1, window_sizes=windows, hidden_channels=2 if toy else 8
        ),
    }
    builds = {name: lambda kit, make=make: Critics([make(kit)]) for name, make in makers.items()}
    if size != "cpu":
        builds["all"] = lambda kit: Critics([make(kit) for make in makers.values()])
    shape = SHAPES[size]
    draw = normal(shape, shape, scale=0.1)
    return [
        Workload(f"disc-{name}", "discriminator", f"{shape}, real and fake", build, draw, constant=(0,), step=step)
        for name, build in builds.items()
    ]
