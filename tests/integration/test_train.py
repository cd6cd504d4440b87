"""Training: an interrupted and resumed run is the uninterrupted one, and wrong input is named."""

import csv
import os
import signal

import pytest
import soundfile
import torch

from benchmarks import __main__ as benchmarks
from benchmarks.train import models, training
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
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*folders, "--out", str(whole), "--steps", "4"]) == 0
    step = training.Training.train_step

    def interrupted(self):
        if self.step == 1:
            os.kill(os.getpid(), number)
        return step(self)

    monkeypatch.setattr(training.Training, "train_step", interrupted)
    assert main([*folders, "--out", str(parts), "--steps", "4"]) == 128 + number
    assert "--resume" in capsys.readouterr().out
    assert len(metrics(parts)) == 2
    assert main(["--out", str(parts), "--steps", "4", "--resume"]) == 0
    assert [row["total"] for row in metrics(whole)] == [row["total"] for row in metrics(parts)]


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


def test_bad_audio_is_named(tmp_path, folders, capsys):
    empty, slow, short, text, quiet = (tmp_path / name for name in ("empty", "slow", "short", "text", "quiet"))
    for folder in (empty, slow, short, text, quiet):
        folder.mkdir()
    soundfile.write(slow / "slow.wav", torch.randn(3 * 4000).mul(0.1).numpy(), 4000)
    soundfile.write(short / "short.wav", torch.randn(RATE).mul(0.1).numpy(), RATE)
    soundfile.write(quiet / "quiet.wav", torch.zeros(3 * RATE).numpy(), RATE)
    (text / "text.wav").write_text("not audio")

    def message(other):
        return fails([*folders[:2], "--other", str(other), "--out", str(tmp_path / "out")], capsys)

    assert "no .wav file" in message(empty)
    assert "does not exist" in message(tmp_path / "missing")
    assert all(part in message(slow) for part in ("slow.wav", "4000 Hz", "8000 Hz"))
    assert all(part in message(short) for part in ("short.wav", "1.00 s", "1.75 s"))
    assert "text.wav" in message(text)
    assert "quiet.wav" in message(quiet)
    assert not (tmp_path / "out").exists()


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
