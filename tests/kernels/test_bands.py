"""Band split and unsplit against a loop over bands in float64, over every kind of band and layout."""

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

import fastblocks
from fastblocks import backend, functional
from fastblocks.backend import use_backend
from tests.compare import ROUNDING, assert_as_exact, assert_close, relative_error

pytest.importorskip("triton")

from fastblocks.kernels import runtime
from fastblocks.kernels.bands import config, plan, split, to_bins, unsplit

pytestmark = pytest.mark.usefixtures("poison")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# B, T, channels of a bin, channels of a band, bins, ranges
BANDS = {
    "overlapping": (2, 9, 2, 20, 40, [(0, 3), (1, 8), (5, 20), (12, 40)]),
    "one bin each": (1, 70, 2, 8, 5, [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]),
    "none, gaps, no order": (3, 5, 1, 7, 30, [(20, 29), (3, 3), (0, 2), (10, 12), (0, 30), (0, 0)]),
    "hundreds of bins": (1, 3, 1, 130, 210, [(0, 210)]),
    "many over the same bins": (1, 4, 3, 5, 12, [(i % 3, 9 + i % 4) for i in range(10)]),
    "four channels, several blocks of rows": (2, 67, 4, 24, 33, [(0, 9), (8, 33)]),
}


def tensors_of(operation: str, case, device) -> list[Tensor]:
    batch, length, channels, features, bins, ranges = case
    width = channels * max(1, *(end - start for start, end in ranges))
    sizes = (len(ranges), width, features), (len(ranges), features), (batch, bins, length, channels)
    if operation == "unsplit":
        sizes = (len(ranges), features, width), (len(ranges), width), (batch, features, length, len(ranges))
    weight, bias, x = (torch.randn(size, device=device) for size in sizes)
    return [x, weight / weight.shape[1] ** 0.5, bias]


def window_of(case, device) -> Tensor:
    return torch.linspace(0.5, 2, case[4], device=device)


def function_of(operation: str, case, device):
    if operation == "split":
        return lambda x, weight, bias: functional.band_split(x, weight, bias, case[5])
    window = window_of(case, device)
    return lambda x, weight, bias: functional.band_unsplit(x, weight, bias, case[5], window.to(weight.dtype))


def exact_of(operation: str, case, window: Tensor | None = None):
    """A loop over bands, in the order of the ranges."""
    _, _, channels, _, bins, ranges = case

    def split_of(x, weight, bias):
        bands = []
        for k, (start, end) in enumerate(ranges):
            lanes = x[:, start:end].transpose(1, 2).flatten(2)
            bands.append(lanes @ weight[k, : lanes.shape[2]] + bias[k])
        return torch.stack(bands, -1).transpose(1, 2)

    def unsplit_of(x, weight, bias):
        total = x.new_zeros(x.shape[0], bins, x.shape[2], channels) + 0 * (x.sum() + weight.sum() + bias.sum())
        for k, (start, end) in enumerate(ranges):
            lanes = x[..., k].transpose(1, 2) @ weight[k] + bias[k]
            lanes = lanes[..., : (end - start) * channels].unflatten(2, (end - start, channels)).transpose(1, 2)
            total = total + torch.nn.functional.pad(lanes, (0, 0, 0, 0, start, bins - end))
        return total / window.double()[:, None, None]

    return split_of if operation == "split" else unsplit_of


def differentiate(function, tensors, grad=None) -> list[Tensor]:
    """The result, its gradient if none is given, and all gradients."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = function(*leaves)
    grad = torch.randn_like(y) if grad is None else grad.to(y.dtype)
    return [y, grad, *torch.autograd.grad(y, leaves, grad)]


def check(operation: str, case, tensors, device, autocast: torch.dtype | None = None) -> list[Tensor]:
    """The kernels against eager, both against float64: the result and every gradient, the same bits twice."""
    function, found = function_of(operation, case, device), []
    for chosen in ("triton", "triton", "eager"):
        cast = torch.autocast(device.type, autocast, enabled=autocast is not None)
        with use_backend(chosen), backend._watch() as decisions, cast:
            found.append(differentiate(function, tensors, found[0][1] if found else None))
        assert [decision.backend for decision in decisions] == [chosen], decisions
    got, again, eager = found
    window = window_of(case, device).to(tensors[1].dtype)
    exact = differentiate(exact_of(operation, case, window), [t.double() for t in tensors], got[1])
    for what, a, b, c, want in zip(("y", "", "x", "weight", "bias"), got, again, eager, exact, strict=True):
        assert a.shape == c.shape and a.dtype == c.dtype, what
        assert torch.equal(a, b), what
        if a.dtype == torch.float32 and autocast is None and not torch.cuda.is_available():
            # NumPy and the CPU's library sum in orders of their own: a few roundings, and those of eager.
            assert_close(a, want, terms=max(1.0, relative_error(c, want) / ROUNDING[a.dtype]), what=what)
        else:
            assert_as_exact(a, c, want, what)
    return got


@pytest.mark.parametrize("operation", ["split", "unsplit"])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in BANDS), *(("overlapping", dtype) for dtype in DTYPES[1:])],
    ids=str,
)
def test_bands(operation, name, dtype, device):
    case = BANDS[name]
    check(operation, case, [t.to(dtype) for t in tensors_of(operation, case, device)], device)


@pytest.mark.parametrize("operation", ["split", "unsplit"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_autocast(operation, dtype, device):
    """Products in autocast's dtype; results in the biases'. Numbers that 16 bits have, so that only products round."""
    tensors = [t.to(dtype).float() for t in tensors_of(operation, BANDS["overlapping"], device)]
    assert check(operation, BANDS["overlapping"], tensors, device, dtype)[0].dtype == torch.float32


LAYOUTS = {  # of a spectrum (B, F, T, I): the order of dimensions in memory
    "frames of adjacent bins": (0, 2, 1, 3),  # a view of a complex STFT
    "contiguous": (0, 1, 2, 3),
    "channels apart": (3, 0, 2, 1),
    "backwards": (3, 2, 1, 0),
}


def laid(x: Tensor, order) -> Tensor:
    back = sorted(range(x.dim()), key=order.__getitem__)
    return x.permute(order).contiguous().permute(back)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_spectrum_is_read_and_written_as_it_lies(layout, device):
    case, order = BANDS["overlapping"], LAYOUTS[layout]
    x, *others = tensors_of("split", case, device)
    y, _, grad_x, *_ = check("split", case, [laid(x, order), *others], device)
    assert grad_x.stride() == laid(x, order).stride()
    assert y.is_contiguous(memory_format=torch.channels_last)
    y, *others = tensors_of("unsplit", case, device)
    with use_backend("triton"):
        leaves = [t.requires_grad_() for t in (y, *others)]
        z = function_of("unsplit", case, device)(*leaves)
        assert z.transpose(1, 2).is_contiguous()
        grad = torch.randn_like(z)
        grads = [torch.autograd.grad(z, leaves, g, retain_graph=True) for g in (grad, laid(grad, order))]
    for a, b in zip(*grads, strict=True):  # samples that follow one another are summed as one
        assert relative_error(a, b) < 1e-6


def far_apart(x: Tensor, dimension: int) -> Tensor:
    """x with 2^31 elements from the first to the last of a dimension; on a CPU nothing is behind most of them."""
    strides = list(x.contiguous().stride())
    strides[dimension] = 2**31 // (x.shape[dimension] - 1) // 2 * 2 + 2
    count = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, strides, strict=True))
    zeros = np.zeros(count, np.uint16)
    y = torch.zeros(count, dtype=x.dtype, device=x.device) if x.is_cuda else torch.from_numpy(zeros).view(x.dtype)
    return y.as_strided(x.shape, strides).copy_(x)


@pytest.mark.parametrize("dimension", ["samples", "bins", "frames"])
def test_offsets_past_2_to_the_31(dimension, device):
    """In the spectrum, as it is read by split and by the gradients of both, and as it is written."""
    case, at = (2, 5, 2, 8, 12, [(0, 5), (3, 12)]), ["samples", "bins", "frames"].index(dimension)
    x, weight, bias = (t.bfloat16() for t in tensors_of("split", case, device))
    with use_backend("triton"):
        near, grad, *grads = differentiate(function_of("split", case, device), [x, weight, bias])
        far, _, *far_grads = differentiate(function_of("split", case, device), [far_apart(x, at), weight, bias], grad)
        assert torch.equal(near, far)
        for a, b in zip(grads, far_grads, strict=True):
            assert relative_error(a, b) < 0.01
        y, weight, bias = (t.bfloat16() for t in tensors_of("unsplit", case, device))
        z, grad, *grads = differentiate(function_of("unsplit", case, device), [y, weight, bias])
        _, _, *far_grads = differentiate(function_of("unsplit", case, device), [y, weight, bias], far_apart(grad, at))
        for a, b in zip(grads, far_grads, strict=True):
            assert relative_error(a, b) < 0.01
        place, window = far_apart(torch.zeros_like(z), at), window_of(case, device).bfloat16()
        tables = plan.plan_of(place, plan.flat(case[5]))
        y = y.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # features adjacent
        to_bins.to_bins(y, weight, bias, window, place, tables, torch.bfloat16)
    assert torch.equal(place, z)


def test_nothing_as_large_as_the_spectrum_is_copied(device, monkeypatch):
    """A complex STFT is given as it is: no operation of PyTorch makes anything of its size, or of the padded lanes'."""
    from torch.utils._python_dispatch import TorchDispatchMode

    made = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            result = function(*arguments, **(keywords or {}))
            if isinstance(result, Tensor) and "fastblocks" not in str(function):
                made.append((str(function), result.numel(), result.data_ptr()))
            return result

    window = torch.hann_window(64, device=device)
    spectrum = torch.stft(torch.randn(2, 500, device=device), 64, 16, window=window, return_complex=True)
    ranges = [(0, 5), (3, 20), (15, 33)]
    weight, bias = torch.randn(3, 36, 4, device=device), torch.randn(3, 4, device=device)
    conjugate = torch.view_as_real(spectrum.conj().resolve_conj())
    with use_backend("triton"):
        with Sizes():
            y = functional.band_split(spectrum, weight, bias, ranges)
        assert made and all(n < spectrum.numel() or at == spectrum.data_ptr() for _, n, at in made), made
        assert torch.equal(y, functional.band_split(torch.view_as_real(spectrum), weight, bias, ranges))
        y = functional.band_split(spectrum.conj(), weight, bias, ranges)
        assert torch.equal(y, functional.band_split(conjugate, weight, bias, ranges))


def test_a_band_that_is_not_finite_stays_in_its_bins(device):
    case = BANDS["overlapping"]
    x, weight, bias = tensors_of("unsplit", case, device)
    with use_backend("triton"):
        want = function_of("unsplit", case, device)(x, weight, bias)
        for bad in (float("nan"), float("inf")):
            x[..., 1] = bad  # bins 1 to 8
            got = function_of("unsplit", case, device)(x, weight, bias)
            others = [0, *range(8, case[4])]
            assert_close(got[:, others], want[:, others].double(), what=f"beside {bad}")
            assert not got[:, 1:8].isfinite().any()


def test_bands_without_a_bin(device):
    """All of them: zeros, and biases alone."""
    case = (1, 3, 2, 4, 5, [(2, 2), (0, 0)])
    with use_backend("triton"):
        assert not function_of("unsplit", case, device)(*tensors_of("unsplit", case, device)).any()
        x, weight, bias = tensors_of("split", case, device)
        y = function_of("split", case, device)(x, weight, bias)
    assert torch.equal(y, bias.T[None, :, None].expand_as(y))


def test_lanes_past_a_bands_end_are_neither_read_nor_left_undefined(device):
    for operation, lanes_at in (("split", 1), ("unsplit", 2)):
        case = BANDS["overlapping"]
        x, weight, bias = tensors_of(operation, case, device)
        past = torch.arange(weight.shape[lanes_at], device=device) >= torch.tensor(
            [2 * (end - start) for start, end in case[5]], device=device
        ).view(-1, 1)  # fmt: skip
        past_weight = (past[:, :, None] if lanes_at == 1 else past[:, None, :]).expand_as(weight)
        weight = weight.masked_fill(past_weight, float("nan"))
        if operation == "unsplit":
            bias = bias.masked_fill(past, float("nan"))
        with use_backend("triton"):
            y, _, *grads = differentiate(function_of(operation, case, device), [x, weight, bias])
        assert all(t.isfinite().all() for t in (y, *grads))
        assert not grads[1][past_weight].any() and (operation == "split" or not grads[2][past].any())


def test_blocks_cover_all_bins_and_steps_all_bands():
    """Every lane belongs to one block, which has exactly the bands that reach into it, in order; the pieces of a band
    are its lanes. Programs with most to do start first."""
    for ranges in ([(0, 3), (1, 8), (5, 20), (12, 40)], [(i % 3, 9 + i % 4) for i in range(13)], [(7, 7)]):
        for channels in (1, 3):
            found = plan.plan(plan.flat(ranges), 45, channels, (32, 64, 64), torch.device("cpu"))
            spans, ends, sizes = [(a * channels, b * channels) for a, b in ranges], [0], []
            for first_step, last_step, first, last in found.blocks.tolist():
                sizes.append(last_step - first_step)
                inside = [(k, a, b) for k, (a, b) in enumerate(spans) if a < min(b, last) and b > first]
                steps = found.steps[first_step:last_step].tolist()
                assert steps == [[k, a, first, min(b, last)] for k, a, b in inside]
            for first, last in sorted(found.blocks[:, 2:].tolist()):
                assert first == ends[-1] < last <= first + 64
                ends.append(last)
            assert ends[-1] == 45 * channels and sizes == sorted(sizes, reverse=True)
            widths = []
            for k, first, lanes, piece in found.order.tolist():
                assert (first, first + lanes) == spans[k]
                widths.append(lanes)
                for start in range(first, first + lanes, 32):
                    assert found.pieces[piece].tolist() == [k, first, start, min(start + 32, first + lanes)]
                    piece += 1
            assert len(widths) == len(ranges) and widths == sorted(widths, reverse=True)


def test_a_first_call_cannot_be_captured(monkeypatch):
    """The tables are copied from the host then, which an error of the driver's would not say."""
    monkeypatch.setattr(runtime, "is_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="call it once before capturing; 45 bins"):
        plan.plan((0, 3, 1, 8), 45, 1, (32, 64, 64), torch.device("cuda"))


def test_why_kernels_step_aside(device):
    case = BANDS["overlapping"]
    x, weight, bias = tensors_of("split", case, device)
    ranges, window = case[5], window_of(case, device)
    assert split.unsupported_reason(x, weight, bias, ranges) == ""
    assert "float64" in split.unsupported_reason(x, weight.double(), bias, ranges)
    assert "different dtypes" in split.unsupported_reason(x, weight.half(), bias, ranges)
    with torch.autocast(device.type, torch.bfloat16):
        assert split.unsupported_reason(x, weight.bfloat16(), bias, ranges) == ""
    x, weight, bias = tensors_of("unsplit", case, device)
    assert unsplit.unsupported_reason(x, weight, bias, ranges, window) == ""
    assert "gradient" in unsplit.unsupported_reason(x, weight, bias, ranges, window.clone().requires_grad_())
    assert "float64" in unsplit.unsupported_reason(x, weight, bias, ranges, window.double())


def test_the_module_runs_on_kernels_and_keeps_its_numbers(device):
    """Mel bands, some of them without a bin, through the module; on a model's layouts no copy is made."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        band = fastblocks.Band(16000, 32, 12, 2, 6).to(device)
    x = torch.randn(2, 7, 17, 2, device=device).transpose(1, 2)
    results = []
    for chosen in ("triton", "eager"):
        with use_backend(chosen):
            leaf = x.detach().requires_grad_()
            y = band.split(leaf)
            z = band.unsplit(y)
            results.append([y, z, *torch.autograd.grad(z.square().sum(), [leaf, *band.parameters()])])
    for a, b in zip(*results, strict=True):
        assert relative_error(a, b) < 1e-5
    with use_backend("triton"):
        assert torch.equal(band.split(torch.view_as_complex(x)), band.split(x))
        said = fastblocks.explain(lambda t: band.unsplit(band.split(t)), x)
    assert said == "band_split: triton\nband_unsplit: triton"


@pytest.mark.parametrize("operation", ["split", "unsplit"])
def test_rows_are_shared_by_as_many_slabs_as_there_are(operation, device, monkeypatch):
    """However many there are, the sums are right."""
    case = BANDS["four channels, several blocks of rows"]
    tensors = tensors_of(operation, case, device)
    for slabs in (1, 3):
        monkeypatch.setattr(config, "slabs", lambda *arguments, n=slabs: n)
        check(operation, case, tensors, device)
