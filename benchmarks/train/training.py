"""A restoration model in training with its discriminator: one step, one judgement, one checkpoint."""

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from benchmarks.report.files import whole
from benchmarks.train import losses, models
from benchmarks.train.clips import Mixtures, si_sdr

# Sizes that learn to separate two instruments in about two minutes on two CPU cores.
SMALL = {
    "roformer": lambda kit, rate: models.MelRoFormer(kit, 32, 2, 2, sample_rate=rate, bands=32),
    "rnn": lambda kit, rate: models.MelRNN(kit, 32, 2, 2, rnn_layers=1, sample_rate=rate, bands=32),
    "unet": lambda kit, rate: models.MelUNet(kit, 32, 3, sample_rate=rate, bands=40),
}
LEARNING_RATE = 2e-3  # of the model; the discriminator has a quarter
DISCRIMINATORS = {
    "frequency": lambda kit, rate: kit.MultiFrequencyDiscriminator(1, [1024, 512], 2, sample_rate=min(rate, 48000)),
    "period": lambda kit, rate: kit.MultiPeriodDiscriminator(1, rate),
    "scale": lambda kit, rate: kit.MultiScaleDiscriminator(rate),
    "resolution": lambda kit, rate: kit.MultiResolutionDiscriminator(1, rate, hidden_channels=8),
    "none": None,
}
COLUMNS = ("step", "total", "waveform", "spectral", "adversarial", "feature", "discriminator", "si_sdr")
WARMUP, PLATEAU = 20, 150  # steps: the rate rises until the first, falls with 1/√step after the second
CLIP_NORM = 1.0


@dataclass(frozen=True)
class Settings:
    """What has to stay the same for a run to be continued."""

    model: str = "roformer"
    discriminator: str = "frequency"
    target: str = ""
    other: str = ""
    seed: int = 0
    batch: int = 2
    crop_seconds: float = 0.75


@dataclass
class Training:
    """Everything that changes from step to step, and how.

    Args:
        settings: of the run.
        kit: where blocks and discriminators come from.
        device: where it runs.
    """

    settings: Settings
    kit: ModuleType
    device: torch.device
    step: int = 0
    rows: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self):
        settings = self.settings
        torch.manual_seed(settings.seed)
        self.random = torch.Generator().manual_seed(settings.seed)
        self.clips = Mixtures(Path(settings.target), Path(settings.other), settings.crop_seconds)
        rate = self.clips.sample_rate
        self.model = SMALL[settings.model](self.kit, rate).to(self.device)
        make = DISCRIMINATORS[settings.discriminator]
        self.critic: nn.Module | None = make(self.kit, rate).to(self.device) if make else None
        self.optimizers = [torch.optim.AdamW(self.model.parameters(), LEARNING_RATE, betas=(0.8, 0.99))]
        if self.critic:
            self.optimizers.append(torch.optim.AdamW(self.critic.parameters(), LEARNING_RATE / 4, betas=(0.5, 0.9)))

    def learning_rate_factor(self) -> float:
        """Depends on the step alone, so that a run can be continued past its end."""
        return min((self.step + 1) / WARMUP, 1.0, (PLATEAU / (self.step + 1)) ** 0.5)

    def train_step(self) -> dict[str, float]:
        """One step of the discriminator and one of the model; returns the losses."""
        for optimizer, base in zip(self.optimizers, (LEARNING_RATE, LEARNING_RATE / 4), strict=False):
            for group in optimizer.param_groups:
                group["lr"] = base * self.learning_rate_factor()
        mixture, target = (t.to(self.device) for t in self.clips.batch(self.settings.batch, self.random))
        self.model.train()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        found = losses.descend(self.model, lambda clip: self.critic(clip[:, None]), self.critic, mixture, target)
        for module, optimizer in zip((self.model, self.critic), self.optimizers, strict=False):
            nn.utils.clip_grad_norm_(module.parameters(), CLIP_NORM)
            optimizer.step()
        self.step += 1
        row = {"step": self.step} | {name: float(value.detach()) for name, value in found.items()}
        if not all(abs(value) < float("inf") for value in row.values()):
            raise RuntimeError(f"training diverged at step {self.step}: {row}")
        self.rows.append(row)
        return row

    @torch.no_grad()
    def restore_held_out(self) -> tuple[Tensor, Tensor, Tensor]:
        """(mixture, restored, target) of the held-out seconds, each (pairs, samples), on the CPU."""
        mixture, target = self.clips.judged()
        self.model.eval()
        restored = torch.cat([self.model(one[None].to(self.device)).cpu() for one in mixture])
        return mixture, restored, target

    def judge(self) -> float:
        """SI-SDR in dB on the held-out seconds, the mean over pairs; noted in the last row."""
        _, restored, target = self.restore_held_out()
        value = float(si_sdr(restored, target).mean())
        if self.rows:
            self.rows[-1]["si_sdr"] = value
        return value

    def save(self, path: Path) -> None:
        """Write a checkpoint atomically: whoever reads `path` finds the old one or the new one, whole."""
        state = {
            "settings": asdict(self.settings),
            "step": self.step,
            "rows": self.rows,
            "model": self.model.state_dict(),
            "critic": self.critic.state_dict() if self.critic else None,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "random": self.random.get_state(),
            "torch_random": torch.get_rng_state(),
        }
        with whole(path) as temporary, open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())

    def load(self, state: dict) -> None:
        """Continue from what `save` wrote."""
        self.step, self.rows = state["step"], state["rows"]
        self.model.load_state_dict(state["model"])
        if self.critic:
            self.critic.load_state_dict(state["critic"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.random.set_state(state["random"])
        torch.set_rng_state(state["torch_random"])
