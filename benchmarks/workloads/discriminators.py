"""The norms of their weights, what follows a convolution, each discriminator, and all four.

A training step is the discriminator's losses and the generator's, both with backward.
"""

import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import prod
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.workloads.workload import SAMPLE_RATE, Workload, by, normal, operation

WINDOWS = (2048, 1024, 512)  # samples, of the spectral discriminators
# of a period of 2 in MultiPeriod's third layer
MAPS = {"full": (4, 512, 2667, 2), "cpu": (1, 512, 304, 2), "toy": (2, 3, 40, 2)}  # B, C, rows, period
SHAPES = {"full": (4, 1, 3 * SAMPLE_RATE), "cpu": (1, 1, 16384), "toy": (1, 1, 1200)}  # B, 1, samples


class Critics(nn.Module):
    """A kit's discriminators as one: (B, 1, samples) -> all scores, and a list of feature maps for each score.

    Called with the two clips of `step`, it judges the first; with `generator` it gives what that one's loss needs.
    """

    def __init__(self, kit: ModuleType, parts: Sequence[nn.Module]):
        super().__init__()
        self.ensemble, self.kit = kit.EnsembleDiscriminator(parts), kit.__name__

    def forward(self, clip: Tensor, fake: Tensor | None = None, generator: bool = False) -> tuple[list, ...]:
        return self.ensemble.generator_step(fake, clip) if generator else self.ensemble(clip)


def step(critic: Callable, clips: Sequence[Tensor]) -> None:
    """The discriminator's loss on a real and a fake clip, then the generator's on the fake one, both with backward."""
    (real, fake), functional = clips, sys.modules[critic.kit].functional
    (real_scores, _), (fake_scores, _) = critic(real), critic(fake.detach())
    functional.discriminator_loss(real_scores, fake_scores).backward()
    scores, maps, real_maps = critic(real, fake, generator=True)
    (functional.adversarial_loss(scores) + functional.feature_matching(real_maps, maps)).backward()


def norms(size: str) -> list[Workload]:
    """The weights of MultiPeriod's discriminators, normed together."""
    shapes = [(6, 1, 5, 1), (8, 6, 5, 1), (1, 8, 3, 1)]
    if size != "toy":
        widths = (1, 32, 128, 512, 1024, 1024)
        shapes = [(b, a, 5, 1) for a, b in pairwise(widths)] + [(1, 1024, 3, 1)]
    shapes *= {"full": 5, "cpu": 1, "toy": 2}[size]
    n, outputs, inputs = len(shapes), [s[0] for s in shapes], [prod(s[1:]) for s in shapes]

    def spectral(kit: ModuleType) -> Callable:
        def run(*tensors: Tensor) -> list[Tensor]:
            # copies, because they are changed; of the weights' dtype
            left, right = (t.to(tensors[0].dtype, copy=True) for t in tensors[n:])
            us, vs = left.split(outputs), right.split(inputs)
            return kit.functional.spectral_norms(tensors[:n], us, vs)

        return run

    def weight(kit: ModuleType) -> Callable:
        return lambda *tensors: kit.functional.weight_norms(tensors[:n], tensors[n:])

    def draw_spectral(generator: torch.Generator) -> list[Tensor]:
        weights = normal(*shapes, scale=1.0)(generator)
        left, right = [], []
        for matrix in (w.flatten(1) for w in weights):
            u = torch.randn(len(matrix), generator=generator)
            for _ in range(3):  # closer to the singular vectors, as after some steps
                v = F.normalize(matrix.T @ u, dim=0)
                u = F.normalize(matrix @ v, dim=0)
            left.append(u), right.append(v)
        return [*weights, torch.cat(left), torch.cat(right)]

    draw_weight = normal(*shapes, *[(o, 1, 1, 1) for o in outputs], scale=1.0)
    what = f"{n} weights, {sum(map(prod, shapes)) / 1e6:.1f} M"
    return [
        Workload("disc-spectral-norm", "operation", what, spectral, draw_spectral, constant=(n, n + 1)),
        Workload("disc-weight-norm", "operation", what, weight, draw_weight),
    ]


def activation(size: str) -> Workload:
    b, c, *sizes = MAPS[size]
    build = operation("bias_leaky_relu", slope=0.2)
    return Workload("disc-activation", "operation", by((b, c, *sizes)), build, normal((b, c, *sizes), (c,)))


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
    builds = {name: lambda kit, make=make: Critics(kit, [make(kit)]) for name, make in makers.items()}
    if size != "cpu":
        builds["all"] = lambda kit: Critics(kit, [make(kit) for make in makers.values()])
    shape = SHAPES[size]
    draw = normal(shape, shape, scale=0.1)
    return [*norms(size), activation(size)] + [
        Workload(f"disc-{name}", "discriminator", f"{shape}, real and fake", build, draw, constant=(0,), step=step)
        for name, build in builds.items()
    ]
