"""`python -m benchmarks train`: a small restoration model learns to take one instrument out of a mixture."""

import argparse
import contextlib
import csv
import signal
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
from benchmarks.options import BadInput, positive
from benchmarks.report.files import whole
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
    length.add_argument("--steps", type=positive(int), help=f"stop after this step; default: {DEFAULT_STEPS}")
    length.add_argument("--minutes", type=positive(float), help="stop after this time instead")
    parser.add_argument("--target", help="wav file or folder: what shall be left (default: a guitar)")
    parser.add_argument("--other", help="wav file or folder: what shall be taken away (default: a tabla)")
    parser.add_argument("--out", type=Path, help="folder of the results; default: runs/MODEL")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="continue the run in --out, with its settings")
    existing.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    parser.add_argument("--backend", choices=(*fastblocks.backend.BACKENDS, "baseline"), default="auto")
    parser.add_argument("--seed", type=int, help=f"default: {DEFAULTS.seed}")
    parser.add_argument("--batch", type=positive(int), help=f"clips a step; default: {DEFAULTS.batch}")
    parser.add_argument("--threads", type=positive(int), help="CPU threads; default: what PyTorch takes")
    help_seconds = "between two checkpoints; default: 30"
    parser.add_argument("--checkpoint-seconds", type=positive(float), default=30.0, help=help_seconds)
    return parser.parse_args(arguments)


def get_kit(backend: str) -> ModuleType:
    """The namespace with the blocks: the original formulas, or this package with a backend, which is selected."""
    if backend == "baseline":
        return original
    fastblocks.use_backend(backend)
    return fastblocks


def prepare(options: argparse.Namespace, device: torch.device) -> tuple[Training, Path]:
    """Make a new training or continue the one in the folder.

    Raises:
        BadInput: if the folder holds a run and nobody said what shall happen to it, or the options contradict it.
    """
    out = options.out or Path("runs") / (options.model or DEFAULTS.model)
    path = out / "checkpoint.pt"
    given = {f.name: value for f in fields(Settings) if (value := getattr(options, f.name, None)) is not None}
    given |= {name: str(Path(given[name]).resolve()) for name in ("target", "other") if name in given}
    if not options.resume:
        if path.exists() and not options.overwrite:
            raise BadInput(f"{out} holds a run already: --resume continues it, --overwrite replaces it")
        return Training(Settings(**asdict(DEFAULTS) | given), get_kit(options.backend), device), out
    if not path.exists():
        raise BadInput(f"there is nothing to resume: {path} does not exist")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:  # the unpickler raises whatever it stumbles over
        raise BadInput(f"{path} cannot be read as a checkpoint: {type(problem).__name__}: {problem}") from problem
    saved = state["settings"]
    for name, value in given.items():
        if saved[name] != value:
            raise BadInput(f"--{name} {value} contradicts the run in {out}, which has {saved[name]}")
    training = Training(Settings(**saved), get_kit(options.backend), device)
    training.load(state)
    return training, out


@contextlib.contextmanager
def noted_signals():
    """Ctrl-C and SIGTERM are appended to a list, and the step in progress is finished; a second one ends the process
    at once."""
    noted: list[int] = []

    def note(number, frame):
        noted.append(number)
        restore()

    def restore():
        for each, handler in previous.items():
            signal.signal(each, handler)

    previous = {each: signal.signal(each, note) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        restore()


def save(training: Training, out: Path) -> None:
    """The checkpoint and all rows of the run."""
    training.save(out / "checkpoint.pt")
    with whole(out / "metrics.csv") as path, open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(training.rows)


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

    with bar, noted_signals() as noted:
        first, start, saved = training.step, time.monotonic(), time.monotonic()
        total = 60 * options.minutes if options.minutes else last_step
        task = bar.add_task(training.settings.model, total=total, completed=first, losses="", step=first)
        if options.minutes:
            bar.update(task, completed=0)
        judged = ""
        while training.step < last_step and time.monotonic() < deadline and not noted:
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
                save(training, out)
                saved = now
        save(training, out)
    return noted[0] if noted else None


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    options = parse(arguments)
    errors = Console(stderr=True, highlight=False)
    if not errors.is_terminal:
        errors.width = max(errors.width, 160)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    training, out = prepare(options, device)
    if out.exists() and not out.is_dir():
        raise BadInput(f"--out {out} is a file")
    out.mkdir(parents=True, exist_ok=True)
    print(describe_device())
    mixture, restored, target = training.restore_held_out()
    untrained = restored[0] if training.step == 0 else None
    mixture_sdr, start_sdr = float(si_sdr(mixture, target).mean()), float(si_sdr(restored, target).mean())
    size = sum(parameter.numel() for parameter in training.model.parameters())
    where = "continued at" if training.step else "from"
    print(f"{training.settings.model}: {size:,} parameters, {where} step {training.step}")
    if untrained is not None:
        soundfile.write(out / "before.wav", untrained.numpy(), training.clips.sample_rate, subtype="FLOAT")
    number = loop(training, out, options, errors)
    if number is not None:
        print(f"interrupted at step {training.step}, nothing is lost: continue with --resume --out {out}")
        return 128 + number
    end_sdr = training.judge()
    save(training, out)
    write_audio(training, out, untrained)
    print(
        f"SI-SDR on the held-out second: mixture {mixture_sdr:.2f} dB, at the start {start_sdr:.2f} dB, "
        f"restored {end_sdr:.2f} dB ({end_sdr - mixture_sdr:+.2f} dB)"
    )
    with contextlib.suppress(ValueError):
        out = out.resolve().relative_to(Path.cwd())
    print(f"written: {', '.join(sorted(path.name for path in out.iterdir()))} in {out}")
    return 0
