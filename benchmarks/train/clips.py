"""Audio to train on: pairs of recordings, random mixtures of them, and a held-out second of each."""

from dataclasses import dataclass
from pathlib import Path

import soundfile
import torch
from torch import Tensor

from benchmarks.options import BadInput

AUDIO = Path(__file__).parents[1] / "audio"
HELD_OUT_SECONDS = 1.0
SILENT_DB = -60.0  # a second that is softer than its recording by more than this says nothing about a model
CANCELLED_DB = -80.0  # a mix-down that is softer than its channels by more than this
GAIN_DB = 6.0  # every training example is made louder or softer by up to this much, its two parts independently


@dataclass(frozen=True)
class Recording:
    """One file as mono float32 samples (length,)."""

    path: Path
    samples: Tensor
    sample_rate: int


def read_recordings(source: Path) -> list[Recording]:
    """Read a wav file, or all wav files of a folder, mixed down to mono.

    Raises:
        BadInput: if there is nothing to read, or a file is no audio, empty, silent, not finite, or its channels cancel.
    """
    if not source.exists():
        raise BadInput(f"{source} does not exist")
    paths = sorted(p for p in source.iterdir() if p.suffix.lower() == ".wav") if source.is_dir() else [source]
    if not paths:
        raise BadInput(f"{source} holds no .wav file")
    recordings = []
    for path in paths:
        try:
            samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as problem:
            if path.is_file() and not path.stat().st_size:
                raise BadInput(f"{path} is empty: it holds no byte") from problem
            raise BadInput(f"{path} cannot be read as audio: {problem.error_string}") from problem
        if problem := useless(torch.from_numpy(samples)):
            raise BadInput(f"{path} {problem}")
        recordings.append(Recording(path, torch.from_numpy(samples).mean(dim=1), rate))
    return recordings


def useless(samples: Tensor) -> str:
    """Why nothing can be learnt from a file's samples (length, channels); an empty string if something can."""
    if not len(samples):
        return "is empty: it holds no sample"
    if bad := int((~samples.isfinite()).sum()):
        return f"holds {bad} values that are not finite"
    if not samples.any():
        return "is silent: every sample is 0"
    if power(samples.mean(dim=1)) <= 10 ** (CANCELLED_DB / 10) * power(samples):
        return "has channels out of phase: they cancel when mixed down to mono"
    return ""


def power(samples: Tensor) -> float:
    """The mean square."""
    return float(samples.double().square().mean())


class Mixtures:
    """Random mixtures of target and other recordings for training, and fixed ones of their last seconds for judging.

    Args:
        target: what shall be left, a wav file or a folder of them.
        other: what shall be taken away, likewise.
        crop_seconds: length of a training example.

    Raises:
        BadInput: if files are missing, too short, or differ in sample rate.
    """

    def __init__(self, target: Path, other: Path, crop_seconds: float):
        self.targets, self.others = read_recordings(target), read_recordings(other)
        first = self.targets[0]
        self.sample_rate = first.sample_rate
        self.crop = round(crop_seconds * self.sample_rate)
        self.held_out = round(HELD_OUT_SECONDS * self.sample_rate)
        for recording in self.targets + self.others:
            if recording.sample_rate != self.sample_rate:
                raise BadInput(
                    f"{recording.path} has {recording.sample_rate} Hz, {first.path} has {self.sample_rate} Hz: "
                    "all files must share one sample rate, resample them first"
                )
            if len(recording.samples) < self.crop + self.held_out:
                raise BadInput(
                    f"{recording.path} lasts {len(recording.samples) / self.sample_rate:.2f} s, at least "
                    f"{crop_seconds + HELD_OUT_SECONDS:.2f} s are needed: {HELD_OUT_SECONDS:g} s is held out for "
                    f"judging, and training takes {crop_seconds:g} s at a time"
                )

    def _crop(self, recordings: list[Recording], generator: torch.Generator) -> Tensor:
        samples = recordings[int(torch.randint(len(recordings), (), generator=generator))].samples
        latest = len(samples) - self.held_out - self.crop
        start = int(torch.randint(latest + 1, (), generator=generator))
        gain = 10 ** (GAIN_DB / 20 * float(torch.rand((), generator=generator) * 2 - 1))
        return samples[start : start + self.crop] * gain

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(mixture, target), each (size, crop samples), on the CPU; never from a held-out second."""
        target = torch.stack([self._crop(self.targets, generator) for _ in range(size)])
        other = torch.stack([self._crop(self.others, generator) for _ in range(size)])
        return target + other, target

    def judged(self) -> tuple[Tensor, Tensor]:
        """(mixture, target), each (pairs, held-out samples): the last second of every target, mixed with another's."""
        target = torch.stack([recording.samples[-self.held_out :] for recording in self.targets])
        others = [self.others[i % len(self.others)].samples[-self.held_out :] for i in range(len(self.targets))]
        return target + torch.stack(others), target

    def silent(self) -> list[list[Path]]:
        """For each pair of `judged`, the files whose held-out second is silent; without one it can be scored."""
        pairs = [(target, self.others[i % len(self.others)]) for i, target in enumerate(self.targets)]
        return [[r.path for r in pair if self._is_silent(r.samples)] for pair in pairs]

    def _is_silent(self, samples: Tensor) -> bool:
        held_out = samples[-self.held_out :]
        return power(held_out - held_out.mean()) <= 10 ** (SILENT_DB / 10) * power(samples)


def si_sdr(estimate: Tensor, target: Tensor) -> Tensor:
    """Scale-invariant signal-to-distortion ratio in dB, (B, samples) -> (B,).

    Source: Le Roux et al., "SDR – Half-baked or Well Done?", 2019.
    """
    estimate, target = estimate.double(), target.double()
    estimate, target = estimate - estimate.mean(-1, keepdim=True), target - target.mean(-1, keepdim=True)
    scale = (estimate * target).sum(-1, keepdim=True) / target.square().sum(-1, keepdim=True).clamp_min(1e-12)
    wanted = scale * target
    error = (estimate - wanted).square().sum(-1).clamp_min(1e-12)
    return 10 * torch.log10(wanted.square().sum(-1).clamp_min(1e-12) / error)
