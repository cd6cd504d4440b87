"""Several discriminators, called one after the other."""

import torch
from torch import Tensor, nn


class EnsembleDiscriminator(nn.Module):
    """(B, nch, T) -> all scores, and a list of feature maps for each score."""

    def __init__(self, discriminators):
        super().__init__()
        self.discriminators = nn.ModuleList(discriminators)

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[list[Tensor]]]:
        judged = [discriminator(x) for discriminator in self.discriminators]
        return [score for scores, _ in judged for score in scores], [maps for _, each in judged for maps in each]

    def generator_step(self, fake: Tensor, real: Tensor) -> tuple[list, list, list]:
        parameters = [p for p in self.parameters() if p.requires_grad]
        for parameter in parameters:
            parameter.requires_grad_(False)
        with torch.no_grad():
            _, real_maps = self(real)
        scores, maps = self(fake)
        for parameter in parameters:
            parameter.requires_grad_(True)
        return scores, maps, real_maps
