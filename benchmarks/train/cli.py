"""`python -m benchmarks train`: a small restoration model learns to take one instrument out of a mixture."""

import argparse
import contextlib
import csv
import os
import signal
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path
from types import ModuleType

import soundfile
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import fastblocks
from benchmarks import original
from benchmarks.measure.environment import describe_device
from benchmarks.train.clips import AUDIO, si_sdr
from benchmarks.train.spectrograms import draw_spectrograms
from benchmarks.train.training import COLUMNS, DISCRIMINATORS, SMALL, Settings, Training

DEFAULT_STEPS = 200
JUDGE_EVERY = 20  # steps between two judgements of the held-out seconds
DEFAULTS = Settings(target=str(AUDIO / "guitar.wav"), other=str(AUDIO / "tabla.wav"))


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks train", description=__doc__)
    parser.add_argument("--model", choices=SMALL, help=f"default: {DEFAULTS.model}")
    parser.add_argument("--discriminator", choices=DISCRIMINATORS, help=f"default: {DEFAULTS.discriminator}")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help=f"stop after this step; default: {DEFAULT_STEPS}")
    length.add_argument("--minutes", type=float, help="stop after this time instead")
    parser.add_argument("--target", help="wav file or folder: what shall be left (default: a guitar)")
    parser.add_argument("--other", help="wav file or folder: what shall be taken away (default: a tabla)")
    parser.add_argument("--out", type=Path, help="folder of the results; default: runs/MODEL")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="continue the run in --out, with its settings")
    existing.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    parser.add_argument("--backend", choices=(*fastblocks.backend.BACKENDS, "baseline"), default="auto")
    parser.add_argument("--seed", type=int, help=f"default: {DEFAULTS.seed}")
    parser.add_argument("--batch", type=int, help=f"clips a step; default: {DEFAULTS.batch}")
    parser.add_argument("--threads", type=int, help="CPU threads; default: what PyTorch takes")
    parser.add_argument("--checkpoint-seconds", type=float, default=30.0, help="between two checkpoints; default: 30")
    options = parser.parse_args(arguments)
    for name in ("steps", "minutes", "batch", "threads", "checkpoint_seconds"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {value}")
    return options


def get_kit(backend: str) -> ModuleType:
    """The namespace with the blocks: the original formulas, or this package with a backend, which is selected."""
    if backend == "baseline":
        return original
    fastblocks.use_backend(backend)
    return fastblocks


def read_checkpoint(path: Path) -> dict:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:  # the unpickler raises whatever it stumbles over
        raise ValueError(f"{path} cannot be read as a checkpoint: {type(problem).__name__}: {problem}") from problem


def prepare(options: argparse.Namespace, device: torch.device) -> tuple[Training, Path]:
    """Make a new training or continue the one in the folder.

    Raises:
        ValueError: if the folder holds a run and nobody said what shall happen to it, or the options contradict it.
    """
    out = options.out or Path("runs") / (options.model or DEFAULTS.model)
    path = out / "checkpoint.pt"
    given = {f.name: getattr(options, f.name, None) for f in fields(Settings)}
    given = {name: value for name, value in given.items() if value is not None}
    for name in ("target", "other"):
        if name in given:
            given[name] = str(Path(given[name]).resolve())
    if not options.resume:
        if path.exists() and not options.overwrite:
            raise ValueError(f"{out} holds a run already: --resume continues it, --overwrite replaces it")
        settings = Settings(**asdict(DEFAULTS) | given)
        return Training(settings, get_kit(options.backend), device), out
    if not path.exists():
        raise ValueError(f"there is nothing to resume: {path} does not exist")
    state = read_checkpoint(path)
    saved = state["settings"]
    for name, value in given.items():
        if saved[name] != value:
            raise ValueError(f"--{name} {value} contradicts the run in {out}, which has {saved[name]}")
    training = Training(Settings(**saved), get_kit(options.backend), device)
    training.load(state)
    return training, out


class Interruption:
    """Ctrl-C and SIGTERM are noted, and the step in progress is finished; a second one ends the process at once."""

    def __init__(self):
        self.signal: int | None = None

    def _note(self, number, frame):
        self.signal = number
        for each, previous in self._previous.items():
            signal.signal(each, previous)

    def __enter__(self) -> "Interruption":
        self._previous = {each: signal.signal(each, self._note) for each in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception) -> None:
        for each, previous in self._previous.items():
            signal.signal(each, previous)


def write_metrics(training: Training, path: Path) -> None:
    """All rows of the run; whole or not at all."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(training.rows)
    os.replace(temporary, path)


def write_audio(training: Training, out: Path, untrained: torch.Tensor | None) -> None:
    """The held-out second of the first pair, as sound and as a picture."""
    mixture, restored, target = (part[0] for part in training.restore_held_out())
    rate = training.clips.sample_rate
    sounds = {"mixture": mixture, "restored": restored, "target": target}
    draw_spectrograms(out / "spectrograms.png", sounds, rate)
    if untrained is not None:
        sounds["before"] = untrained
    for name, samples in sounds.items():
        soundfile.write(out / f"{name}.wav", samples.numpy(), rate, subtype="FLOAT")


def loop(training: Training, out: Path, options: argparse.Namespace, console: Console) -> int | None:
    """Train until the end or a signal; returns the signal."""
    last_step = float("inf") if options.minutes else options.steps or DEFAULT_STEPS
    deadline = time.monotonic() + 60 * (options.minutes or float("inf"))
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn() if not options.minutes else TextColumn("step {task.fields[step]}"),
        TextColumn("{task.fields[losses]}"),
        TimeRemainingColumn(),
        console=console,
    )

    def save():
        training.save(out / "checkpoint.pt")
        write_metrics(training, out / "metrics.csv")

    with bar, Interruption() as interruption:
        first, start, saved = training.step, time.monotonic(), time.monotonic()
        total = 60 * options.minutes if options.minutes else last_step
        task = bar.add_task(training.settings.model, total=total, completed=first, losses="", step=first)
        if options.minutes:
            bar.update(task, completed=0)
        judged = ""
        while training.step < last_step and time.monotonic() < deadline and interruption.signal is None:
            row = training.train_step()
            if training.step % JUDGE_EVERY == 0:
                judged = f" SI-SDR {training.judge():.1f} dB"
            now = time.monotonic()
            text = f"loss {row['total']:.3f} wave {row['waveform']:.3f} stft {row['spectral']:.3f}"
            if training.critic:
                text += f" adv {row['adversarial']:.2f} disc {row['discriminator']:.2f}"
            text += f"{judged} {(training.step - first) / (now - start):.2f} steps/s"
            done = now - start if options.minutes else training.step
            bar.update(task, completed=done, losses=text, step=training.step)
            if now - saved > options.checkpoint_seconds:
                save()
                saved = now
        save()
    return interruption.signal


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    options = parse(arguments)
    console, errors = Console(highlight=False), Console(stderr=True, highlight=False)
    if not errors.is_terminal:
        errors.width = max(errors.width, 160)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        training, out = prepare(options, device)
        out.mkdir(parents=True, exist_ok=True)
    except (ValueError, FileExistsError) as problem:
        errors.print(f"error: {problem}", markup=False, soft_wrap=True)
        return 2
    console.print(describe_device(), markup=False, soft_wrap=True)
    mixture, restored, target = training.restore_held_out()
    untrained = restored[0] if training.step == 0 else None
    mixture_sdr, start_sdr = float(si_sdr(mixture, target).mean()), float(si_sdr(restored, target).mean())
    size = sum(parameter.numel() for parameter in training.model.parameters())
    console.print(
        f"{training.settings.model}: {size:,} parameters, "
        f"{'continued at' if training.step else 'from'} step {training.step}",
        markup=False,
    )
    if untrained is not None:
        soundfile.write(out / "before.wav", untrained.numpy(), training.clips.sample_rate, subtype="FLOAT")
    number = loop(training, out, options, errors)
    if number is not None:
        console.print(
            f"interrupted at step {training.step}, nothing is lost: continue with --resume --out {out}", markup=False
        )
        return 128 + number
    end_sdr = training.judge()
    write_metrics(training, out / "metrics.csv")
    training.save(out / "checkpoint.pt")
    write_audio(training, out, untrained)
    console.print(
        f"SI-SDR on the held-out second: mixture {mixture_sdr:.2f} dB, at the start {start_sdr:.2f} dB, "
        f"restored {end_sdr:.2f} dB ({end_sdr - mixture_sdr:+.2f} dB)",
        markup=False,
        soft_wrap=True,
    )
    with contextlib.suppress(ValueError):
        out = out.resolve().relative_to(Path.cwd())
    names = ", ".join(sorted(path.name for path in out.iterdir()))
    console.print(f"written: {names} in {out}", markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
