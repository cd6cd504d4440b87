"""`python -m benchmarks train`: a small restoration model learns to take one instrument out of a mixture."""

import argparse
import contextlib
import csv
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
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
from benchmarks.options import BadInput, files_named, positive
from benchmarks.report.files import whole
from benchmarks.train.clips import AUDIO
from benchmarks.train.spectrograms import draw_spectrograms
from benchmarks.train.training import (
    CHANGEABLE,
    COLUMNS,
    DISCRIMINATORS,
    SMALL,
    Settings,
    Training,
    read_checkpoint,
)

JUDGE_EVERY = 20  # steps between two judgements of the held-out seconds
LINE_SECONDS = 10.0  # between two lines of progress, where there is no terminal, at most
DEFAULTS = Settings(target=str(AUDIO / "guitar.wav"), other=str(AUDIO / "tabla.wav"))


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks train", description=__doc__)
    parser.add_argument("--model", choices=SMALL, help=f"default: {DEFAULTS.model}")
    parser.add_argument("--discriminator", choices=DISCRIMINATORS, help=f"default: {DEFAULTS.discriminator}")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=positive(int), help=f"stop after this step; default: {DEFAULTS.steps}")
    length.add_argument("--minutes", type=positive(float), help="of training; stop after them instead")
    parser.add_argument("--target", help="wav file or folder: what shall be left (default: a guitar)")
    parser.add_argument("--other", help="wav file or folder: what shall be taken away (default: a tabla)")
    parser.add_argument("--out", type=Path, help="folder of the results; default: runs/MODEL")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="continue the run in --out, as it was started")
    existing.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    backends = (*fastblocks.backend.BACKENDS, "baseline")
    parser.add_argument("--backend", choices=backends, help=f"default: {DEFAULTS.backend}")
    parser.add_argument("--seed", type=int, help=f"default: {DEFAULTS.seed}")
    parser.add_argument("--batch", type=positive(int), help=f"clips a step; default: {DEFAULTS.batch}")
    parser.add_argument("--threads", type=positive(int), help="CPU threads; default: what PyTorch takes")
    help_seconds = f"between two checkpoints; default: {DEFAULTS.checkpoint_seconds:g}"
    parser.add_argument("--checkpoint-seconds", type=positive(float), help=help_seconds)
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
    if out.exists() and not out.is_dir():
        raise BadInput(f"--out {out} is a file")
    given = {f.name: value for f in fields(Settings) if (value := getattr(options, f.name, None)) is not None}
    given |= {name: str(Path(given[name]).resolve()) for name in ("target", "other") if name in given}
    if not options.resume:
        if path.exists() and not options.overwrite:
            raise BadInput(f"{out} holds a run already: --resume continues it, --overwrite replaces it")
        return build(asdict(DEFAULTS), given, device), out
    if not path.exists():
        raise BadInput(f"there is nothing to resume: {path} does not exist")
    state = read_checkpoint(path)
    saved = state["settings"]
    for name, value in given.items():
        if name not in CHANGEABLE and saved[name] != value:
            raise BadInput(f"--{name} {value} contradicts the run in {out}, which has {saved[name]}")
    if options.steps and state["step"] > options.steps:
        raise BadInput(f"--steps {options.steps}: the run in {out} is at step {state['step']} already")
    if options.minutes and state["seconds"] > 60 * options.minutes:
        raise BadInput(f"--minutes {options.minutes:g}: the run in {out} took {state['seconds'] / 60:.3g} already")
    training = build(saved, given, device)
    training.load(state)
    return training, out


def build(settings: dict, given: dict, device: torch.device) -> Training:
    """A training with these settings, but for what is given."""
    if given.keys() & {"steps", "minutes"}:
        settings = settings | {"steps": None, "minutes": None}
    chosen = Settings(**settings | given)
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    return Training(chosen, get_kit(chosen.backend), device)


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


@contextlib.contextmanager
def progress(training: Training) -> Iterator[Callable[[str], None]]:
    """What tells of each step, in a few words: a bar on a terminal, else a line after every judgement and
    LINE_SECONDS."""
    settings, first = training.settings, training.step
    if not (sys.stdout.isatty() and sys.stderr.isatty()):
        told = float("-inf")

        def line(text: str) -> None:
            nonlocal told
            late = time.monotonic() - told > LINE_SECONDS
            if late or training.step % JUDGE_EVERY == 0 or training.finished:
                print(f"step {training.step}: {text}", flush=True)
                told = time.monotonic()

        yield line
        return
    total = 60 * settings.minutes if settings.minutes else settings.steps
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn() if settings.steps else TextColumn("step {task.fields[step]}"),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True, highlight=False),
    )
    with bar:
        done = training.seconds if settings.minutes else first
        task = bar.add_task(settings.model, total=total, completed=done, text="", step=first)

        def update(text: str) -> None:
            done = training.seconds if settings.minutes else training.step
            bar.update(task, completed=done, text=text, step=training.step)

        yield update


def loop(training: Training, out: Path) -> int | None:
    """Train until the end or a signal; returns the signal."""
    with progress(training) as tell, noted_signals() as noted:
        first, start = training.step, time.monotonic()
        last = saved = start
        judged = ""
        while not training.finished and not noted:
            row = training.train_step()
            if training.step % JUDGE_EVERY == 0 and (score := training.judge()) is not None:
                judged = f" SI-SDR {score:.1f} dB"
            now = time.monotonic()
            training.seconds += now - last
            last = now
            text = f"loss {row['total']:.3f} wave {row['waveform']:.3f} stft {row['spectral']:.3f}"
            if training.critic:
                text += f" adv {row['adversarial']:.2f} disc {row['discriminator']:.2f}"
            tell(f"{text}{judged} {(training.step - first) / (now - start):.2f} steps/s")
            if now - saved > training.settings.checkpoint_seconds:
                save(training, out)
                saved = now
        save(training, out)
    return noted[0] if noted else None


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    options = parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with files_named():
        training, out = prepare(options, device)
        out.mkdir(parents=True, exist_ok=True)
        save(training, out)  # whether anything can be written there is found out before the work
        return run(training, out)


def run(training: Training, out: Path) -> int:
    """Train to the end, and say and write what came of it; returns the exit code."""
    print(describe_device())
    mixture, restored, target = training.restore_held_out()
    untrained = restored[0] if training.step == 0 else None
    mixture_score, start_score, start = training.score(mixture, target), training.score(restored, target), training.step
    size = sum(parameter.numel() for parameter in training.model.parameters())
    print(f"{training.settings.model}: {size:,} parameters, {'continued at' if start else 'from'} step {start}")
    for path in dict.fromkeys(path for pair in training.clips.silent() for path in pair):
        print(f"{path}: its held-out second is silent, and not scored")
    if untrained is not None:
        soundfile.write(out / "before.wav", untrained.numpy(), training.clips.sample_rate, subtype="FLOAT")
    number = loop(training, out)
    if number is not None:
        command = shlex.join(["python", "-m", "benchmarks", "train", "--resume", "--out", str(out)])
        print(f"interrupted at step {training.step}, nothing is lost; to continue:\n{command}")
        return 128 + number
    end_score = training.judge()
    save(training, out)
    write_audio(training, out, untrained)
    if end_score is None:
        print("SI-SDR: none, for no held-out second can be scored")
    else:
        print(
            f"SI-SDR on the held-out second: mixture {mixture_score:.2f} dB, at step {start} {start_score:.2f} dB, "
            f"restored {end_score:.2f} dB ({end_score - mixture_score:+.2f} dB)"
        )
    with contextlib.suppress(ValueError):
        out = out.resolve().relative_to(Path.cwd())
    print(f"written: {', '.join(sorted(path.name for path in out.iterdir()))} in {out}")
    return 0
