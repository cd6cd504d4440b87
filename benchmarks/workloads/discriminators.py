"""The norms of their weights, what follows a convolution, each discriminator, and GAN steps with each and with all.

A GAN step (`gan-step-*`) is what a training loop does with its discriminators for one batch, on real and fake audio:

1. the discriminators' loss: real and fake are judged, and backward gives the gradients of all weights;
2. the generator's loss, adversarial and feature matching: both are judged again, because the weights have changed in
   between, and backward gives the gradient of the fake audio.

The original runs the stock loop: D(real), D(fake.detach()), backward; then D(real), D(fake), both with a graph, and
backward, which computes the weights' gradients once more; they are thrown away. Spectral norm makes an iteration in
each of the four. This package runs `EnsembleDiscriminator`: `pair` judges real and fake in one batch, with one
iteration, and `generator_step` judges real audio without a graph and fake audio with frozen weights.

All start from weights whose singular vectors have converged, so that one or two iterations give the same numbers.
Optimizers have no part in the step, and no gradient is added to an older one.
"""

import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import prod
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import original
from benchmarks.workloads.workload import SAMPLE_RATE, Workload, by, normal, operation

WINDOWS = (2048, 1024, 512)  # samples, of the spectral discriminators
# of a period of 2 in MultiPeriod's third layer
MAPS = {"full": (4, 512, 2667, 2), "cpu": (1, 512, 304, 2), "toy": (2, 3, 40, 2)}  # B, C, rows, period
SHAPES = {"full": (4, 1, 3 * SAMPLE_RATE), "cpu": (1, 1, 16384), "toy": (1, 1, 1200)}  # B, 1, samples
STEP_SHAPES = SHAPES | {"cpu": (2, 1, 4096)}  # two clips: of one small one PyTorch takes other kernels
GAP = 3.0  # of a weight's first singular value to the others
ITERATIONS = 8  # GAP ** -16 is less than a rounding


class Critics(nn.Module):
    """A kit's discriminators as one: (B, 1, samples) -> all scores, and a list of feature maps for each score.

    With a second clip, it judges both as the module's docstring says: scores of real and of fake audio, or for the
    generator scores and maps of fake audio, and maps of real audio.
    """

    def __init__(self, kit: ModuleType, parts: Sequence[nn.Module]):
        super().__init__()
        self.ensemble, self.kit, self.stock = kit.EnsembleDiscriminator(parts), kit.__name__, kit is original
        settle(self)

    def forward(self, real: Tensor, fake: Tensor | None = None, generator: bool = False) -> tuple[list, ...]:
        judge = self.ensemble
        if fake is None:
            return judge(real)
        if not self.stock:
            return judge.generator_step(fake, real) if generator else [side.scores for side in judge.pair(real, fake)]
        (real_scores, real_maps), (scores, maps) = judge(real), judge(fake)
        return (scores, maps, real_maps) if generator else (real_scores, scores)


@torch.no_grad()
def settle(module: nn.Module) -> None:
    """Give each weight under spectral norm one large singular value, and the buffers its vectors."""
    for conv in (child for child in module.modules() if hasattr(child, "weight_orig")):
        matrix = conv.weight_orig.flatten(1)
        u, v = (F.normalize(torch.randn(n), dim=0) for n in matrix.shape)
        others = matrix.std(correction=0) * (len(u) ** 0.5 + len(v) ** 0.5)  # the largest of a random matrix
        matrix += GAP * others * torch.outer(u, v)
        for _ in range(ITERATIONS):
            u = F.normalize(matrix @ v, dim=0)
            v = F.normalize(matrix.T @ u, dim=0)
        conv.weight_u.copy_(u)
        conv.weight_v.copy_(v)


def step(critic: Callable, clips: Sequence[Tensor]) -> None:
    """A GAN step. Leaves the weights' gradients of the discriminators' loss, and the fake clip's of the generator's."""
    (real, fake), functional, weights = clips, sys.modules[critic.kit].functional, list(critic.parameters())
    functional.discriminator_loss(*critic(real, fake.detach())).backward()
    grads = [weight.grad for weight in weights]
    for weight in weights:
        weight.grad = None
    scores, maps, real_maps = critic(real, fake, generator=True)
    (functional.adversarial_loss(scores) + functional.feature_matching(real_maps, maps)).backward()
    for weight, grad in zip(weights, grads, strict=True):
        weight.grad = grad


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
    groups = {name: [make] for name, make in makers.items()} | {"all": list(makers.values())}

    def build(name: str) -> Callable[[ModuleType], nn.Module]:
        return lambda kit: Critics(kit, [make(kit) for make in groups[name]])

    shape, clips = SHAPES[size], STEP_SHAPES[size]
    judged = [name for name in groups if size != "cpu" or name != "all"]
    return [
        *norms(size),
        activation(size),
        *(
            Workload(
                f"disc-{name}",
                "discriminator",
                str(shape),
                build(name),
                normal(shape, scale=0.1),
                constant=(0,),
                modes=("forward",),
            )
            for name in judged
        ),
        *(
            Workload(
                f"gan-step-{name}",
                "discriminator",
                f"{clips}, real and fake",
                build(name),
                normal(clips, clips, scale=0.1),
                constant=(0,),
                step=step,
                modes=("training",),
            )
            for name in groups
        ),
    ]
