"""Training: an interrupted and resumed run is the uninterrupted one, and wrong input is named."""

import csv
import os
import shlex
import signal
from pathlib import Path

import pytest
import soundfile
import torch

from benchmarks import __main__ as benchmarks
from benchmarks import original
from benchmarks.options import BadInput
from benchmarks.train import cli, models, training
from benchmarks.train.clips import Mixtures, si_sdr

RATE = 8000


@pytest.fixture
def folders(tmp_path):
    """--target and --other with two short files of noise each, one of them stereo."""
    generator = torch.Generator().manual_seed(3)
    for name in ("target", "other"):
        (tmp_path / name).mkdir()
        for i, channels in enumerate((1, 2)):
            samples = 0.1 * torch.randn(3 * RATE, channels, generator=generator)
            soundfile.write(tmp_path / name / f"{i}.wav", samples.numpy(), RATE)
    return ["--target", str(tmp_path / "target"), "--other", str(tmp_path / "other"), "--batch", "1"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Models of a few channels, and one thread: sums in one order."""
    size = {"n_fft": 256, "hop_length": 128, "bands": 8}
    monkeypatch.setitem(training.SMALL, "roformer", lambda k, r: models.MelRoFormer(k, 8, 1, 2, sample_rate=r, **size))
    monkeypatch.setitem(training.SMALL, "rnn", lambda k, r: models.MelRNN(k, 8, 1, 2, sample_rate=r, **size))
    monkeypatch.setitem(training.SMALL, "unet", lambda k, r: models.MelUNet(k, 4, 2, sample_rate=r, **size))
    monkeypatch.setitem(
        training.DISCRIMINATORS, "frequency", lambda k, r: k.MultiFrequencyDiscriminator(1, [256], 2, sample_rate=r)
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def main(arguments):
    return benchmarks.main(["train", *arguments])


def metrics(path):
    with open(path / "metrics.csv") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("model", ["roformer", "rnn", "unet"])
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, folders, model):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    common = [*folders, "--model", model]
    assert main([*common, "--out", str(whole), "--steps", "5"]) == 0
    assert main([*common, "--out", str(parts), "--steps", "2"]) == 0
    assert main(["--out", str(parts), "--steps", "5", "--resume"]) == 0
    losses = [[row["total"] for row in metrics(path)] for path in (whole, parts)]
    assert len(losses[0]) == 5 and losses[0] == losses[1]
    for name in ("before.wav", "mixture.wav", "restored.wav", "target.wav", "spectrograms.png"):
        assert (parts / name).stat().st_size > 1000


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step_and_loses_nothing(tmp_path, folders, monkeypatch, capsys, number):
    whole, parts = tmp_path / "whole", tmp_path / "the parts"
    assert main([*folders, "--out", str(whole), "--steps", "4"]) == 0
    step = training.Training.train_step

    def interrupted(self):
        if self.step == 1:
            os.kill(os.getpid(), number)
        return step(self)

    monkeypatch.setattr(training.Training, "train_step", interrupted)
    assert main([*folders, "--out", str(parts), "--steps", "4"]) == 128 + number
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert command[:4] == ["python", "-m", "benchmarks", "train"] and len(metrics(parts)) == 2
    assert main(command[4:]) == 0
    assert [row["total"] for row in metrics(whole)] == [row["total"] for row in metrics(parts)]


def test_a_resumed_run_goes_on_as_it_was_started(tmp_path, folders, monkeypatch, capsys):
    """Its end (beyond the default one), backend and threads stand in the checkpoint; others are refused by name."""
    out, asked = str(tmp_path / "out"), []
    monkeypatch.setattr(cli, "get_kit", lambda backend: asked.append(backend) or original)
    steps = cli.DEFAULTS.steps + 3
    stop_at(monkeypatch, 2)
    options = ["--steps", str(steps), "--backend", "baseline", "--discriminator", "none", "--threads", "1"]
    assert main([*folders, *options, "--out", out]) == 128 + signal.SIGINT
    stop_at(monkeypatch, cli.DEFAULTS.steps + 1)
    assert main(["--resume", "--out", out]) == 128 + signal.SIGINT
    assert asked == ["baseline", "baseline"] and len(metrics(tmp_path / "out")) == cli.DEFAULTS.steps + 1
    message = fails(["--resume", "--out", out, "--backend", "eager"], capsys)
    assert "--backend eager" in message and "baseline" in message
    assert "--steps 100" in fails(["--resume", "--out", out, "--steps", "100"], capsys)
    assert "--minutes 1e-06" in fails(["--resume", "--out", out, "--minutes", "1e-6"], capsys)
    assert main(["--resume", "--out", out]) == 0
    assert len(metrics(tmp_path / "out")) == steps


def stop_at(monkeypatch, last):
    """Ctrl-C in the step after which training stands at `last`."""
    step = training.Training.train_step

    def interrupted(self):
        if self.step == last - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    monkeypatch.setattr(training.Training, "train_step", interrupted)


def test_minutes_are_of_all_parts_together(tmp_path, folders, monkeypatch):
    out, options = tmp_path / "out", ["--discriminator", "none", "--minutes", "0.02"]
    stop_at(monkeypatch, 1)
    assert main([*folders, *options, "--out", str(out)]) == 128 + signal.SIGINT
    first = training.read_checkpoint(out / "checkpoint.pt")["seconds"]
    assert main(["--resume", "--out", str(out)]) == 0
    assert 0 < first < 1.2 <= training.read_checkpoint(out / "checkpoint.pt")["seconds"] < 10


def test_without_a_terminal_there_are_lines(tmp_path, folders, capsys):
    assert main([*folders, "--steps", "21", "--discriminator", "none", "--out", str(tmp_path / "out")]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert {line.partition(":")[0] for line in lines} >= {"step 1", "step 20", "step 21"}
    assert all("loss" in line and "steps/s" in line for line in lines) and "SI-SDR" in lines[-1]


def test_no_discriminator_and_minutes(tmp_path, folders):
    assert main([*folders, "--discriminator", "none", "--minutes", "0.005", "--out", str(tmp_path / "out")]) == 0
    assert all(row["adversarial"] == "" for row in metrics(tmp_path / "out"))


def fails(arguments, capsys):
    capsys.readouterr()
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "Traceback" not in message
    return message


def test_a_finished_run_is_not_overwritten_unasked(tmp_path, folders, capsys):
    arguments = [*folders, "--steps", "1", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert "--resume" in fails(arguments, capsys)
    assert main([*arguments, "--overwrite"]) == 0


def test_resume_contradictions_and_broken_checkpoints(tmp_path, folders, capsys):
    out = tmp_path / "out"
    assert "does not exist" in fails(["--resume", "--out", str(out)], capsys)
    assert main([*folders, "--steps", "1", "--out", str(out)]) == 0
    message = fails(["--resume", "--out", str(out), "--model", "unet"], capsys)
    assert "unet" in message and "roformer" in message
    (out / "checkpoint.pt").write_bytes(b"torn")
    assert "cannot be read" in fails(["--resume", "--out", str(out)], capsys)


def test_a_damaged_checkpoint_is_not_loaded(tmp_path, folders, capsys):
    out = tmp_path / "out"
    assert main([*folders, "--steps", "1", "--out", str(out)]) == 0
    path, damaged = out / "checkpoint.pt", 0
    whole = path.read_bytes()
    want = torch.load(path, weights_only=True)
    for start in range(0, len(whole), len(whole) // 40):
        path.write_bytes(whole[:start] + bytes(50) + whole[start + 50 :])
        try:
            assert equal(training.read_checkpoint(path), want)  # it was padding, or zeros before
        except BadInput:
            damaged += 1
    assert damaged > 30
    middle = whole.index(next(iter(want["model"].values())).numpy().tobytes())
    path.write_bytes(whole[:middle] + bytes(50) + whole[middle + 50 :])
    assert "checksum" in fails(["--resume", "--out", str(out)], capsys)


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize(
    "change",
    [
        lambda state: [1, 2],
        lambda state: {"model": state["model"]},
        lambda state: state | {"settings": {"model": "roformer"}},
        lambda state: state | {"settings": state["settings"] | {"model": "other"}},
        lambda state: state | {"model": {}},
        lambda state: state | {"critic": {key: value[:1] for key, value in state["critic"].items()}},
        lambda state: state | {"critic": None},
        lambda state: state | {"optimizers": state["optimizers"][:1]},
        lambda state: state | {"optimizers": [{}, {}]},
    ],
)
def test_a_checkpoint_of_another_structure_is_refused(tmp_path, folders, capsys, change):
    out = tmp_path / "out"
    assert main([*folders, "--steps", "1", "--out", str(out)]) == 0
    torch.save(change(torch.load(out / "checkpoint.pt", weights_only=True)), out / "checkpoint.pt")
    message = fails(["--resume", "--out", str(out)], capsys)
    assert ("structure" in message or "none of roformer" in message) and message.count("\n") == 1


def test_folders_that_cannot_be_read_or_written_are_named(tmp_path, folders, monkeypatch, capsys):
    file = tmp_path / "file"
    file.touch()
    assert "is a file" in fails([*folders, "--out", str(file)], capsys)
    assert "file/below" in fails([*folders, "--out", str(file / "below")], capsys)
    long = "x" * 300
    assert long in fails([*folders, "--out", str(tmp_path / long)], capsys)
    assert long in fails(["--target", str(tmp_path / long)], capsys)
    listed = Path.iterdir

    def denied(path):
        if path.name == "target":
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", denied)
    message = fails([*folders, "--out", str(tmp_path / "out")], capsys)
    assert "target: Permission denied" in message and message.count("\n") == 1


def test_bad_audio_is_named(tmp_path, folders, capsys):
    empty, slow, short, text = (tmp_path / name for name in ("empty", "slow", "short", "text"))
    for folder in (empty, slow, short, text):
        folder.mkdir()
    soundfile.write(slow / "slow.wav", torch.randn(3 * 4000).mul(0.1).numpy(), 4000)
    soundfile.write(short / "short.wav", torch.randn(RATE).mul(0.1).numpy(), RATE)
    (text / "text.wav").write_text("not audio")

    def message(other):
        return fails([*folders[:2], "--other", str(other), "--out", str(tmp_path / "out")], capsys)

    assert "no .wav file" in message(empty)
    assert "does not exist" in message(tmp_path / "missing")
    assert all(part in message(slow) for part in ("slow.wav", "4000 Hz", "8000 Hz"))
    assert all(part in message(short) for part in ("short.wav", "1.00 s", "1.75 s"))
    assert "text.wav" in message(text)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        (torch.zeros(3 * RATE, 1), "is silent: every sample is 0"),
        (torch.zeros(0, 1), "is empty"),
        (None, "is empty"),
        (torch.cat([torch.ones(3 * RATE, 1), torch.full((2, 1), float("nan"))]), "holds 2 values that are not finite"),
        (torch.linspace(-1, 1, 3 * RATE)[:, None] * torch.tensor([0.5, -0.5]), "has channels out of phase"),
        (torch.linspace(-1, 1, 3 * RATE)[:, None] * torch.tensor([0.5, -0.50001]), "has channels out of phase"),
    ],
)
def test_audio_without_content_is_named(tmp_path, folders, capsys, samples, words):
    path = tmp_path / "bad.wav"
    if samples is None:
        path.touch()
    else:
        soundfile.write(path, samples.numpy(), RATE, subtype="FLOAT")
    assert f"bad.wav {words}" in fails([*folders[:2], "--other", str(path), "--out", str(tmp_path / "out")], capsys)


def test_a_silent_held_out_second_is_said_and_not_scored(tmp_path, folders, capsys):
    path, out = tmp_path / "target" / "0.wav", tmp_path / "out"
    samples, _ = soundfile.read(path, dtype="float32")
    samples[-RATE:] = 0
    soundfile.write(path, samples, RATE)
    assert main([*folders, "--steps", "1", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"{path}: its held-out second is silent" in said and "1.wav: its" not in said
    assert float(metrics(out)[0]["si_sdr"]) > -60
    for name in ("target", "other"):
        for i in range(2):
            soundfile.write(tmp_path / name / f"{i}.wav", samples, RATE)
    assert main([*folders, "--steps", "1", "--out", str(out), "--overwrite"]) == 0
    said = capsys.readouterr().out
    assert "no held-out second can be scored" in said and "dB" not in said and metrics(out)[0]["si_sdr"] == ""


def test_held_out_seconds_are_never_trained_on(tmp_path):
    length = 3 * RATE
    ramp = torch.arange(1, length + 1) / length  # a sample's value tells where it is from
    for name in ("a", "b"):
        soundfile.write(tmp_path / f"{name}.wav", ramp.numpy(), RATE, subtype="FLOAT")
    clips = Mixtures(tmp_path / "a.wav", tmp_path / "b.wav", crop_seconds=0.5)
    generator = torch.Generator().manual_seed(0)
    slope = 1 / length
    latest = 0.0
    for _ in range(200):
        _, target = clips.batch(1, generator)
        gain = (target[0, -1] - target[0, 0]) / (clips.crop - 1) / slope  # undo the random gain
        latest = max(latest, float(target[0, -1] / gain))
    assert 0.6 < latest <= 2 / 3 + 1e-3
    assert float(clips.judged()[1].min()) > 2 / 3


def test_si_sdr():
    target = torch.randn(2, 8000, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(2, 8000, generator=torch.Generator().manual_seed(1))
    estimate = 3 * (target + 0.1 * noise)
    assert torch.allclose(si_sdr(estimate, target), torch.full((2,), 20.0, dtype=torch.float64), atol=0.3)
