"""The references themselves, against torch's own float64 functions where it has them."""

import librosa
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.compare import relative_error
from tests.modules.harness import EXACT
from tests.reference import blocks, discriminators, rows, spectral


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def agree(got, want):
    assert relative_error(got, want) < EXACT


def test_rows():
    x, scale, bias = draw(3, 8), draw(8), draw(8)
    agree(rows.rms_norm(x, scale), F.rms_norm(x, (8,), scale, 1e-6))
    agree(rows.layer_norm(x, scale, bias), F.layer_norm(x, (8,), scale, bias, 1e-6))
    agree(rows.swiglu(x, scale), F.silu(x) * scale)
    agree(rows.gelu(x), F.gelu(x))


@pytest.mark.parametrize("kind", ["gru", "lstm"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_recurrence(kind, bidirectional):
    make = {"gru": torch.nn.GRU, "lstm": torch.nn.LSTM}[kind]
    theirs = make(6, 5, 2, bias=False, batch_first=True, bidirectional=bidirectional).double()
    x = draw(3, 7, 6)
    agree(blocks.rnn(theirs.state_dict(), x, 2, kind, bidirectional), theirs(x)[0])


@pytest.mark.parametrize("groups", [1, 4])
def test_convolutions(groups):
    x, bias = draw(2, 4, 9, 8), draw(4)
    weight = draw(4, 4 // groups, 3, 5)
    stride, more = (2, 3), (1, 2)
    options = {"stride": stride, "padding": (1, 2), "groups": groups}
    agree(blocks.conv(x, weight, bias, stride, (0, 0)), F.conv2d(x, weight, bias, **options))
    want = F.conv_transpose2d(x, weight, bias, output_padding=more, **options)
    agree(blocks.conv_transposed(x, weight, bias, stride, tuple(want.shape[2:])), want)


def test_pooling_and_resampling():
    x = draw(2, 3, 9, 7)
    agree(blocks.pool(x, (2, 3)), F.avg_pool2d(x, (2, 3), ceil_mode=True, count_include_pad=False))
    agree(blocks.repeat(x, (2, 3), (18, 21)), x.repeat_interleave(2, 2).repeat_interleave(3, 3))
    clip = draw(2, 1, 50)
    for rate in (1, 2, 4):
        want = F.interpolate(clip, scale_factor=1 / rate, mode="linear", align_corners=False)
        agree(discriminators.resampled(clip, rate), want)


@pytest.mark.parametrize("n_fft, hop", [(16, 4), (18, 7), (15, 5)])
def test_stft(n_fft, hop):
    x = draw(2, 64)
    window = torch.hann_window(n_fft, dtype=torch.float64)
    spectrum = torch.stft(x, n_fft, hop, window=window, return_complex=True)
    agree(spectral.stft(x, n_fft, hop), torch.view_as_real(spectrum))
    want = torch.istft(spectrum * 1.5, n_fft, hop, window=window, length=50)
    agree(spectral.istft(1.5 * torch.view_as_real(spectrum), n_fft, hop, 50), want)


@pytest.mark.parametrize("sr, n_fft, bands", [(8000, 256, 20), (22050, 1024, 80), (48000, 2048, 64)])
def test_mel(sr, n_fft, bands):
    want = librosa.filters.mel(sr=sr, n_fft=n_fft, n_mels=bands, norm=None, dtype=np.float64)
    assert np.abs(spectral.mel_filterbank(sr, n_fft, bands) - want).max() < 1e-9


def test_spectral_norm():
    theirs = torch.nn.utils.spectral_norm(torch.nn.Conv1d(3, 5, 4).double())
    state = {name: value.clone() for name, value in theirs.state_dict().items()}
    theirs(draw(1, 3, 8))
    agree(discriminators.conv_weight(state, training=True), theirs.weight)
