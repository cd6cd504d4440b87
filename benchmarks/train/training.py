"""A restoration model in training with its discriminator: one step, one judgement, one checkpoint."""

import io
import os
import zipfile
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from benchmarks.options import BadInput
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
    """What a run was started with, and is continued with; a part of its checkpoint.

    `steps` or `minutes` says when it ends, of all its parts together; the other one is None.
    """

    model: str = "roformer"
    discriminator: str = "frequency"
    target: str = ""
    other: str = ""
    seed: int = 0
    batch: int = 2
    crop_seconds: float = 0.75
    backend: str = "auto"
    steps: int | None = 200
    minutes: float | None = None
    threads: int | None = None
    checkpoint_seconds: float = 30.0


CHANGEABLE = {"steps", "minutes", "threads", "checkpoint_seconds"}  # a continued run may be given others
CONTENTS = {
    "settings", "step", "seconds", "rows", "model", "critic", "optimizers", "random", "torch_random"
}  # fmt: skip


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
    seconds: float = 0.0  # spent in training
    rows: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self):
        settings = self.settings
        torch.manual_seed(settings.seed)
        self.random = torch.Generator().manual_seed(settings.seed)
        self.clips = Mixtures(Path(settings.target), Path(settings.other), settings.crop_seconds)
        self.scored = torch.tensor([not silent for silent in self.clips.silent()])
        rate = self.clips.sample_rate
        self.model = SMALL[settings.model](self.kit, rate).to(self.device)
        make = DISCRIMINATORS[settings.discriminator]
        self.critic: nn.Module | None = make(self.kit, rate).to(self.device) if make else None
        self.optimizers = [torch.optim.AdamW(self.model.parameters(), LEARNING_RATE, betas=(0.8, 0.99))]
        if self.critic:
            self.optimizers.append(torch.optim.AdamW(self.critic.parameters(), LEARNING_RATE / 4, betas=(0.5, 0.9)))

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end."""
        steps, minutes = self.settings.steps, self.settings.minutes
        return self.step >= steps if steps else self.seconds >= 60 * minutes

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

    def score(self, estimate: Tensor, target: Tensor) -> float | None:
        """SI-SDR in dB of the held-out seconds, the mean over pairs that are not silent; None if all are."""
        return float(si_sdr(estimate, target)[self.scored].mean()) if self.scored.any() else None

    def judge(self) -> float | None:
        """The score of what the model restores; noted in the last row."""
        _, restored, target = self.restore_held_out()
        value = self.score(restored, target)
        if self.rows and value is not None:
            self.rows[-1]["si_sdr"] = value
        return value

    def save(self, path: Path) -> None:
        """Write a checkpoint atomically: whoever reads `path` finds the old one or the new one, whole."""
        state = {
            "settings": asdict(self.settings),
            "step": self.step,
            "seconds": self.seconds,
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
        """Continue from what `read_checkpoint` found.

        Raises:
            BadInput: if it is of another structure than the model or its discriminator.
        """
        try:
            self.step, self.seconds, self.rows = state["step"], state["seconds"], state["rows"]
            self.model.load_state_dict(state["model"])
            if self.critic:
                self.critic.load_state_dict(state["critic"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.random.set_state(state["random"])
            torch.set_rng_state(state["torch_random"])
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as problem:
            raise BadInput(f"the checkpoint is of another structure: {one_line(problem)}") from problem


def read_checkpoint(path: Path) -> dict:
    """What `Training.save` wrote. Every part of it has a checksum, which `torch.load` does not look at.

    Raises:
        BadInput: if it is damaged, no checkpoint, or one of another version.
    """
    data = path.read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            damaged = archive.testzip()
        state = None if damaged else torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as problem:  # the unpickler raises whatever it stumbles over
        raise BadInput(f"{path} cannot be read as a checkpoint: {one_line(problem)}") from problem
    if damaged:
        raise BadInput(f"{path} is damaged: the checksum of its part {damaged} is wrong")
    known = {one.name for one in fields(Settings)}
    settings = state.get("settings") if isinstance(state, dict) and state.keys() == CONTENTS else None
    if not isinstance(settings, dict) or settings.keys() != known:
        raise BadInput(f"{path} is of another structure than a checkpoint of this version")
    for name, choices in (("model", SMALL), ("discriminator", DISCRIMINATORS)):
        if settings[name] not in choices:
            raise BadInput(f"{path} has the {name} {settings[name]!r}, which is none of {', '.join(choices)}")
    return state


def one_line(problem: Exception) -> str:
    """Its type and the beginning of its message."""
    return f"{type(problem).__name__}: {' '.join(str(problem).split())[:200]}"
