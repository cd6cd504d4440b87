"""Fourier against sums, Band against a loop over bands, mel filters against librosa bit by bit."""

import copy
import pickle
import warnings
from functools import partial

import librosa
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import fastblocks
from tests.compare import ROUNDING, assert_close, relative_error
from tests.modules.harness import check, check_low_precision, randomized, tensors
from tests.reference import spectral

HALVES = [torch.bfloat16, torch.float16]


# --- Fourier


@pytest.mark.parametrize(
    "n_fft, hop, length", [(64, 16, 300), (50, 11, 301), (33, 8, 100), (16, 16, 64), (128, 441, 1000)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stft(n_fft, hop, length, dtype):
    module = fastblocks.Fourier(n_fft, hop).to(dtype)
    x = torch.randn(2, length).to(dtype)
    if dtype == torch.float64:  # the window was a float32 buffer: its rounding stays
        assert relative_error(module.stft(x), spectral.stft(x, n_fft, hop)) < 4 * ROUNDING[torch.float32]
        return
    check(module, lambda _, x: spectral.stft(x, n_fft, hop), x, terms=n_fft, call=module.stft)


@pytest.mark.parametrize("n_fft, hop, length", [(64, 16, 300), (50, 10, 301), (33, 8, 100)])
def test_istft(n_fft, hop, length):
    """Of a spectrum that belongs to no waveform, with its gradient."""
    module = fastblocks.Fourier(n_fft, hop)
    sp = torch.randn(2, n_fft // 2 + 1, length // hop + 1, 2)
    kept = hop * (length // hop)  # frames are centred on multiples of the hop
    # the envelope of a hann window at the very last sample is small: amplification by 1 / min, bounded by keeping away
    kept -= hop
    check(
        module,
        lambda _, s: spectral.istft(s, n_fft, hop, kept),
        sp,
        terms=4 * n_fft,
        call=lambda s: module.istft(s, kept),
    )


@pytest.mark.parametrize("length", [1000, 1001, 1023])
def test_round_trip(length):
    module, x = fastblocks.Fourier(64, 16), torch.randn(2, length)
    back = module.istft(module.stft(x), length)
    assert back.shape == x.shape
    assert_close(back, x, 4 * 64)


@pytest.mark.parametrize("dtype", HALVES)
def test_fourier_is_float32_inside(dtype):
    """The only rounding of a result is its last one: the window is not rounded, whatever became of the buffer."""
    module, wide = fastblocks.Fourier(64, 16).to(dtype), fastblocks.Fourier(64, 16)
    x = torch.randn(2, 500).to(dtype)
    sp = module.stft(x)
    assert torch.equal(sp, wide.stft(x.float()).to(sp.dtype))
    back = module.istft(sp, 500)
    assert torch.equal(back, wide.istft(sp.float(), 500).to(back.dtype))


def test_fourier_under_autocast():
    module, x = fastblocks.Fourier(64, 16), torch.randn(2, 500)
    want = module.stft(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = module.stft(x)
        back = module.istft(got, 500)
    assert torch.equal(got, want)
    assert_close(back, x, 4 * 64)
    for batch in (2, 0):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = module.stft(x[:batch].bfloat16())
            back = module.istft(got.bfloat16(), 500)
        assert got.dtype == back.dtype == torch.float32
        assert torch.equal(got, module.stft(x[:batch].bfloat16().float()))


def test_fourier_state():
    module = fastblocks.Fourier()
    assert {name: tuple(value.shape) for name, value in module.state_dict().items()} == {"window": (2048,)}
    assert module.stft(torch.randn(1, 4410)).shape == (1, 1025, 11, 2)
    assert_close(module.window, spectral.hann(2048), 1)


def test_istft_takes_any_layout():
    module = fastblocks.Fourier(64, 16)
    sp = torch.randn(2, 33, 20, 2)
    want = module.istft(sp, 300)
    assert torch.equal(module.istft(sp.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0), 300), want)
    assert torch.equal(module.istft(torch.cat([sp, sp], -1)[..., :2], 300), want)


class Calls(TorchDispatchMode):
    """Names of the operations of PyTorch that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.names.append(function._schema.name.removeprefix("aten::"))
        return function(*arguments, **(keywords or {}))


def test_istft_never_waits_for_a_gpu_and_copies_no_stft():
    """On the meta device whoever asks for a value raises; and a spectrum in an STFT's layout is read as it is."""
    module = fastblocks.Fourier(64, 16)
    sp = module.stft(torch.randn(2, 500)) * 1.5
    assert sp.stride()[1] == 2  # adjacent bins
    with Calls() as calls:
        module.istft(sp, 500)
    assert not {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal"} & set(calls.names)
    before = calls.names[: calls.names.index("_fft_c2r")]
    assert not {"clone", "contiguous", "_to_copy", "copy_"} & set(before), before
    assert module.to("meta").istft(sp.to("meta"), 500).shape == (2, 500)


def test_stft_is_torchs_and_its_gradient_adds_up_in_a_fixed_order():
    """Bit by bit, strides included; torch.stft's gradient is an index_add_, which runs on atomics on a GPU."""
    for n_fft, hop in ((64, 16), (15, 4)):
        fourier, x = fastblocks.Fourier(n_fft, hop), torch.randn(3, 200, requires_grad=True)
        got = torch.view_as_complex(fourier.stft(x))
        want = torch.stft(x, n_fft, hop, window=fourier.window, return_complex=True)
        assert torch.equal(got, want) and got.stride() == want.stride()
        grad = torch.randn_like(got)
        (expected,) = torch.autograd.grad(want, x, grad)
        with Calls() as calls:
            (found,) = torch.autograd.grad(got, x, grad)
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
        assert "unfold_backward" in calls.names and "index_add_" not in calls.names, calls.names


def test_fourier_empty_batch_and_short_clips():
    module = fastblocks.Fourier(64, 16)
    assert module.stft(torch.zeros(0, 100)).shape == (0, 33, 7, 2)
    assert module.istft(torch.zeros(0, 33, 7, 2), 100).shape == (0, 100)
    for n_fft in (32, 33):
        odd = fastblocks.Fourier(n_fft, 8)
        for length in (40, 41, 48):
            assert odd.stft(torch.zeros(0, length)).shape[1:] == odd.stft(torch.zeros(2, length)).shape[1:]
            assert odd.double().stft(torch.zeros(0, length).double()).dtype == torch.float64
    assert module.stft(torch.randn(1, 33)).shape == (1, 33, 3, 2)
    with pytest.raises(ValueError, match=r"\(2, 33, 0, 2\)"):
        module.istft(torch.zeros(2, 33, 0, 2), 100)
    with pytest.raises(ValueError, match=r"\b32\b.*\b33\b"):
        module.stft(torch.randn(1, 32))


def test_fourier_double_backward():
    module = fastblocks.Fourier(16, 4).double()
    x = torch.randn(1, 40, dtype=torch.float64, requires_grad=True)

    def call(x):
        return module.istft(module.stft(x).square(), 40)

    assert torch.autograd.gradcheck(call, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, x, fast_mode=True)


# --- mel filters

MEL = [
    (8000, 256, 20), (16000, 512, 40), (22050, 1024, 80), (24000, 1024, 100), (24000, 512, 32), (44100, 2048, 64),
    (48000, 2048, 64), (48000, 4096, 128), (96000, 2048, 100), (48000, 256, 64), (11025, 400, 23), (48000, 1023, 17),
]  # fmt: skip


def quiet_band(*arguments, **keywords):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return randomized(fastblocks.Band(*arguments, **keywords))


@pytest.mark.parametrize("sr, n_fft, bands", MEL)
def test_mel_filters_are_librosas_bit_by_bit(sr, n_fft, bands):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = librosa.filters.mel(sr=sr, n_fft=n_fft, n_mels=bands, norm=None)
    got = quiet_band(sr, n_fft, bands, 1, 2).filterbanks
    assert got.dtype == torch.float32
    assert np.array_equal(got.numpy().view(np.int32), want.view(np.int32))
    assert np.abs(got.double().numpy() - spectral.mel_filterbank(sr, n_fft, bands)).max() < 2 * ROUNDING[torch.float32]


def test_width_with_the_residue_at_nyquist():
    assert quiet_band(48000, 2048, 64, 2, 3).f_idxes.shape == (64 * 125,)


@pytest.mark.parametrize("n_fft, bands", [(512, 24), (100, 7), (64, 20), (32, 30)])
def test_linear_filters(n_fft, bands):
    got = quiet_band(48000, n_fft, bands, 1, 2, scale="linear").filterbanks
    assert np.abs(got.double().numpy() - spectral.linear_filterbank(n_fft, bands)).max() <= ROUNDING[torch.float32]


# --- Band

BANDS = [
    (8000, 128, 10, "mel"),
    (16000, 64, 12, "mel"),
    (48000, 64, 7, "linear"),
    (48000, 32, 20, "linear"),
    (8000, 33, 1, "mel"),
]
bands = pytest.mark.parametrize("sr, n_fft, count, scale", BANDS)


def split(module, x):
    return module.split(x)


def there_and_back(module, x):
    y = module.split(x)
    return y, module.unsplit(y)


def reference_there_and_back(channels, state, x):
    y = spectral.band_split(state, x)
    return y, spectral.band_unsplit(state, y, channels)


@bands
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_band(sr, n_fft, count, scale, channels, dtype):
    module = quiet_band(sr, n_fft, count, channels, 5, scale=scale).to(dtype)
    x = torch.randn(2, n_fft // 2 + 1, 3, channels, dtype=dtype)
    check(module, partial(reference_there_and_back, channels), x, terms=8 * n_fft, call=partial(there_and_back, module))


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([8000, 16000, 44100, 48000]),
    st.integers(16, 130),
    st.integers(1, 24),
    st.integers(1, 3),
    st.integers(1, 5),
    st.sampled_from(["mel", "linear"]),
    st.integers(1, 4),
)
def test_band_shapes(sr, n_fft, count, channels, out, scale, length):
    module = quiet_band(sr, n_fft, count, channels, out, scale=scale).double()
    x = torch.randn(2, n_fft // 2 + 1, length, channels, dtype=torch.float64)
    check(module, partial(reference_there_and_back, channels), x, terms=1, call=partial(there_and_back, module))


@bands
def test_band_buffers(sr, n_fft, count, scale):
    module = quiet_band(sr, n_fft, count, 2, 5, scale=scale)
    bins = n_fft // 2 + 1
    covered = spectral.band_bins(module.filterbanks)
    width = max(map(len, covered))
    assert {name: tuple(value.shape) for name, value in module.state_dict().items()} == {
        "filterbanks": (count, bins), "ola_window": (bins,), "f_idxes": (count * width,), "mask": (count * width,),
        "pre_bandnet.weight": (count, width * 2, 5), "pre_bandnet.bias": (count, 5),
        "post_bandnet.weight": (count, 5, width * 2), "post_bandnet.bias": (count, width * 2),
    }  # fmt: skip
    assert module.f_idxes.dtype == torch.int64
    assert module.f_idxes.view(count, width).tolist() == [list(at) + [0] * (width - len(at)) for at in covered]
    assert module.mask.view(count, width).bool().sum(1).tolist() == [len(at) for at in covered]
    total = module.filterbanks.double().sum(0)
    assert_close(module.ola_window, torch.where(total < 1e-8, 1.0, total), bins)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@bands
def test_bin_0_stays_where_it_belongs(sr, n_fft, count, scale, poison):
    module = quiet_band(sr, n_fft, count, 2, 5, scale=scale)
    x = torch.randn(1, n_fft // 2 + 1, 3, 2)
    want = module.split(x)
    x[:, 0] = poison
    x.requires_grad_()
    got = module.split(x)
    clean = [k for k, at in enumerate(spectral.band_bins(module.filterbanks)) if 0 not in at]
    assert torch.equal(got[..., clean], want[..., clean])
    got[..., clean].sum().backward()
    for name, parameter in module.pre_bandnet.named_parameters():
        assert parameter.grad[clean].isfinite().all(), name


@bands
def test_padded_lanes_reach_nothing(sr, n_fft, count, scale):
    """Weights of lanes beyond a band's width are NaN, and nothing shows it."""
    module = quiet_band(sr, n_fft, count, 2, 5, scale=scale)
    x = torch.randn(1, n_fft // 2 + 1, 3, 2, requires_grad=True)
    want = there_and_back(module, x)
    (slope,) = torch.autograd.grad(want[1].sum(), x)
    lanes = module.mask.view(count, -1).bool().repeat_interleave(2, dim=1)
    with torch.no_grad():
        module.pre_bandnet.weight.masked_fill_(~lanes[:, :, None], float("nan"))
        module.post_bandnet.weight.masked_fill_(~lanes[:, None, :], float("nan"))
        module.post_bandnet.bias.masked_fill_(~lanes, float("nan"))
    got = there_and_back(module, x)
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)
    assert torch.equal(torch.autograd.grad(got[1].sum(), x)[0], slope)


def test_bands_without_a_bin():
    """Their bias alone, one warning that names them; and no warning where there is none."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = randomized(fastblocks.Band(16000, 64, 40, 2, 5))
        fastblocks.Band(8000, 128, 5, 2, 5)
    empty = [k for k, at in enumerate(spectral.band_bins(module.filterbanks)) if not at]
    assert empty and [warning.category for warning in caught] == [UserWarning]
    named = str(caught[0].message)
    assert ", ".join(map(str, empty)) in named
    y = module.split(torch.randn(2, 33, 4, 2))
    for k in empty:
        assert torch.equal(y[..., k], module.pre_bandnet.bias[k][:, None].expand(2, 5, 4))


def test_bins_without_a_band_are_zero():
    module = quiet_band(16000, 64, 20, 2, 5)
    alone = [f for f in range(33) if not any(f in at for at in spectral.band_bins(module.filterbanks))]
    assert alone
    out = module.unsplit(torch.randn(1, 5, 3, 20))
    assert (out[:, alone] == 0).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_band_in_low_precision(dtype):
    module = quiet_band(8000, 128, 10, 2, 5).to(dtype)
    x = torch.randn(2, 65, 3, 2).to(dtype)
    y, back = there_and_back(module, x)
    assert y.dtype == back.dtype == dtype
    check_low_precision(module, spectral.band_split, x, dtype=dtype, call=module.split)
    check_low_precision(
        module,
        partial(spectral.band_unsplit, channels=2),
        torch.randn(2, 5, 3, 10).to(dtype),
        dtype=dtype,
        call=module.unsplit,
    )


@pytest.mark.parametrize("count", [10, 60], ids=["bands", "bands without a bin"])
def test_band_under_autocast(count):
    """Products are rounded, what the biases make of them is not."""
    module = quiet_band(8000, 128, count, 2, 5).bfloat16().float()
    cases = (
        (module.split, spectral.band_split, (2, 65, 3, 2)),
        (module.unsplit, partial(spectral.band_unsplit, channels=2), (2, 5, 3, count)),
    )
    for operation, reference, shape in cases:

        def call(x, operation=operation):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return operation(x)

        x = torch.randn(shape).bfloat16().float()
        check_low_precision(module, reference, x, dtype=torch.bfloat16, call=call)
        assert call(x).dtype == torch.float32


def test_band_operations_check_their_arguments():
    x, ranges = torch.zeros(1, 9, 3, 2), [(0, 4), (3, 9)]
    weight, bias = torch.zeros(2, 12, 5), torch.zeros(2, 5)
    split = fastblocks.functional.band_split
    assert split(x, weight, bias, ranges).shape == (1, 5, 3, 2)
    for wrong, message in (
        ((x[0], weight, bias, ranges), r"\(9, 3, 2\)"),
        ((x, weight[:, 1:], bias, ranges), r"12.*\(2, 11, 5\)"),
        ((x, weight[:1], bias, ranges), r"\(1, 12, 5\)"),
        ((x, weight, bias[:1], ranges), r"\(1, 5\)"),
        ((x, weight, bias, [(0, 4), (3, 10)]), r"within 9.*10"),
        ((x, weight, bias, []), r"at least one"),
    ):
        with pytest.raises(ValueError, match=message):
            split(*wrong)
    x, weight, bias, window = torch.zeros(1, 5, 3, 2), torch.zeros(2, 5, 12), torch.zeros(2, 12), torch.ones(9)
    unsplit = fastblocks.functional.band_unsplit
    assert unsplit(x, weight, bias, ranges, window).shape == (1, 9, 3, 2)
    for wrong, message in (
        ((x[:, :4], weight, bias, ranges, window), r"\(1, 4, 3, 2\)"),
        ((x, weight[..., :11], bias[..., :11], ranges, window), r"\(2, 5, 11\)"),
        ((x, weight, bias[:, :11], ranges, window), r"\(2, 11\)"),
        ((x, weight, bias, ranges, window[:8]), r"within 8.*9"),
        ((x, weight, bias, ranges, window[None]), r"\(1, 9\)"),
    ):
        with pytest.raises(ValueError, match=message):
            unsplit(*wrong)


def test_explain_sees_both_band_operations():
    module = quiet_band(8000, 128, 10, 2, 5)
    said = fastblocks.explain(partial(there_and_back, module), torch.randn(2, 65, 3, 2))
    assert [line.split(":")[0] for line in said.splitlines()] == ["band_split", "band_unsplit"]


def test_band_of_an_unusual_input():
    module = quiet_band(8000, 128, 10, 2, 5)
    x = torch.randn(2, 65, 3, 2)
    want = module.split(x)
    assert_close(module.split(x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)), want, 64)
    assert_close(module.split(x[:1].expand(2, -1, -1, -1))[0], want[0], 64)
    y = want.detach()
    assert_close(module.unsplit(y.contiguous()), module.unsplit(y), 64)
    assert_close(module.unsplit(y[:1].expand(2, -1, -1, -1))[0], module.unsplit(y)[0], 64)
    x = torch.zeros(0, 65, 3, 2, requires_grad=True)
    y, back = there_and_back(module, x)
    assert y.shape == (0, 5, 3, 10) and back.shape == x.shape
    back.sum().backward()


def test_band_transforms():
    module = quiet_band(8000, 128, 10, 2, 5)
    x = torch.randn(3, 2, 65, 3, 2)
    got = torch.func.vmap(partial(there_and_back, module))(x)
    want = [there_and_back(module, item) for item in x]
    for i, g in enumerate(got):
        assert_close(g, torch.stack([w[i] for w in want]), 64)
    tiny = quiet_band(8000, 32, 3, 1, 2).double()
    leaf = torch.randn(1, 17, 2, 1, dtype=torch.float64, requires_grad=True)

    def penalty(item):
        return tiny.unsplit(tiny.split(item).square())

    assert torch.autograd.gradcheck(penalty, leaf, fast_mode=True)
    assert torch.autograd.gradgradcheck(penalty, leaf, fast_mode=True)


class ThereAndBack(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fourier = fastblocks.Fourier(128, 32)
        self.band = quiet_band(8000, 128, 10, 2, 5)

    def forward(self, x):
        return self.fourier.istft(self.band.unsplit(self.band.split(self.fourier.stft(x))), x.shape[-1])


def test_compiles_without_a_graph_break():
    torch.compiler.reset()
    module, x = ThereAndBack(), torch.randn(2, 500)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    got, want = compiled(x), module(x)
    assert_close(got, want, 1024)
    for g, w in zip(
        *(torch.autograd.grad(y.square().sum(), list(module.parameters())) for y in (got, want)), strict=True
    ):
        assert_close(g, w, 1024)


def test_copies_give_the_same():
    module, x = ThereAndBack(), torch.randn(2, 500)
    want = module(x)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), want)
    other = quiet_band(8000, 128, 10, 2, 5)
    other.load_state_dict(module.band.state_dict(), strict=True)
    sp = torch.randn(1, 65, 3, 2)
    assert all(
        torch.equal(a, b)
        for a, b in zip(*map(tensors, (there_and_back(other, sp), there_and_back(module.band, sp))), strict=True)
    )


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda: fastblocks.Band(8000, 128, 10, 2, 5, scale="bark"), "'bark'"),
        (lambda: quiet_band(8000, 128, 10, 2, 5).split(torch.zeros(1, 64, 3, 2)), "65.*64"),
        (lambda: quiet_band(8000, 128, 10, 2, 5).split(torch.zeros(1, 65, 3, 1)), "65"),
        (lambda: quiet_band(8000, 128, 10, 2, 5).unsplit(torch.zeros(1, 5, 3, 9)), "10"),
        (lambda: fastblocks.Fourier(64, 16).istft(torch.zeros(1, 32, 5, 2), 50), "33"),
        (lambda: fastblocks.Fourier(64, 16).stft(torch.zeros(1, 1, 500)), "shape"),
    ],
)
def test_errors_name_what_is_wrong(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


def test_gradients_of_narrow_bands_sum_many_rows_without_losing_digits():
    x, grad = torch.randn(4, 2, 1000, 2), torch.randn(4, 128, 1000, 2)  # 4000 rows of two bands, of one bin each
    weight, bias = torch.randn(2, 2, 128), torch.zeros(2, 128)

    def gradient(dtype: torch.dtype) -> torch.Tensor:
        leaf = weight.to(dtype).requires_grad_()
        y = fastblocks.functional.band_split(x.to(dtype), leaf, bias.to(dtype), [(0, 1), (1, 2)])
        return torch.autograd.grad(y, leaf, grad.to(dtype))[0].double()

    want = gradient(torch.float64)
    error = (gradient(torch.float32) - want).norm() / want.norm()
    assert error < 4e-7  # in parts of 128 rows 2e-7; one after another 1.1e-6


def test_many_rows_train_under_autocast_and_in_low_precision():
    band, x = fastblocks.Band(8000, 256, 8, 2, 4), torch.randn(2, 129, 200, 2, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = band.unsplit(band.split(x))
    y.sum().backward()
    assert x.grad.isfinite().all() and band.pre_bandnet.weight.grad.dtype == torch.float32
    band.zero_grad()
    band.bfloat16().split(x.detach().bfloat16()).float().sum().backward()
    assert band.pre_bandnet.weight.grad.dtype == torch.bfloat16
