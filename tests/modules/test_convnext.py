"""ConvNeXt1DBlock and ConvNeXt2DBlock: kernels, strides, modes, output shapes, keys, errors."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import fastblocks
from fastblocks.eager.convnext import window_means
from tests.compare import relative_error
from tests.modules.harness import EXACT, check, randomized
from tests.reference import blocks

BLOCK = {1: fastblocks.ConvNeXt1DBlock, 2: fastblocks.ConvNeXt2DBlock}


@st.composite
def arguments(draw):
    spatial = draw(st.sampled_from([1, 2]))

    def each(values):
        return draw(st.tuples(*[values] * spatial))

    kernel, stride = each(st.sampled_from([1, 3, 5, 7])), each(st.integers(1, 4))
    sizes = each(st.integers(1, 9))
    mode = draw(st.sampled_from(["normal", "transposed"]))
    wanted = None
    if mode == "transposed" and draw(st.booleans()):
        more = each(st.integers(0, 3))
        wanted = tuple((n - 1) * s + 1 + min(m, s - 1) for n, s, m in zip(sizes, stride, more, strict=True))
    dims = draw(st.sampled_from([(4, 4), (4, 6), (6, 4)]))
    return spatial, kernel, stride, sizes, mode, wanted, dims


@settings(max_examples=40, deadline=None)
@given(arguments(), st.sampled_from(["convnext", "msrkit"]))
def test_shapes(case, variant):
    spatial, kernel, stride, sizes, mode, wanted, dims = case
    module = randomized(BLOCK[spatial](kernel, stride, *dims, mode, variant=variant)).double()
    x = torch.randn(2, dims[0], *sizes, dtype=torch.float64)
    reference = partial(blocks.convnext_block, stride=stride, mode=mode, original_shape=wanted, variant=variant)
    check(module, reference, x, terms=1, call=partial(module, original_shape=wanted))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([1, 2]), st.integers(1, 6), st.integers(1, 4), st.integers(-2, 30))
def test_possible_and_impossible_original_shapes(spatial, size, stride, wanted):
    module = BLOCK[spatial](3, stride, 4, 4, "transposed")
    x = torch.zeros(1, 4, *[size] * spatial)
    possible = (size - 1) * stride + 1 <= wanted <= size * stride
    target = (wanted,) * spatial
    if possible:
        assert module(x, original_shape=target).shape[2:] == target
    else:
        with pytest.raises(ValueError, match=str(wanted)):
            module(x, original_shape=target)


@pytest.mark.parametrize("variant", ["convnext", "msrkit"])
def test_original_shape_as_an_int_list_or_size(variant):
    module, x = BLOCK[1](3, 2, 4, 4, "transposed", variant=variant), torch.randn(1, 4, 5)
    for wanted in (10, (10,), [10], torch.Size([10])):
        assert module(x, original_shape=wanted).shape == (1, 4, 10)
    with pytest.raises(ValueError, match="10"):
        module(x, original_shape=(10, 10))


def test_msrkit_checks_original_shape_too():
    module = BLOCK[2](3, 2, 4, 4, "transposed", variant="msrkit")
    with pytest.raises(ValueError, match="11"):
        module(torch.randn(1, 4, 5, 5), original_shape=(10, 11))


@pytest.mark.parametrize("length", range(1, 9))
def test_output_lengths(length):
    for stride in (1, 2, 3):
        x = torch.zeros(1, 4, length)
        assert BLOCK[1](5, stride, 4, 4)(x).shape[-1] == math.ceil(length / stride)
        assert BLOCK[1](5, stride, 4, 4, "transposed")(x).shape[-1] == (length - 1) * stride + 1


@pytest.mark.parametrize("spatial", [1, 2])
def test_ints_are_tuples(spatial):
    by_int, by_tuple = BLOCK[spatial](5, 2, 4, 6), BLOCK[spatial]((5,) * spatial, (2,) * spatial, 4, 6)
    by_tuple.load_state_dict(by_int.state_dict())
    x = torch.randn(1, 4, *[9] * spatial)
    assert torch.equal(by_int(x), by_tuple(x))


def shapes(module):
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


@pytest.mark.parametrize("spatial", [1, 2])
@pytest.mark.parametrize("mode", ["normal", "transposed"])
@pytest.mark.parametrize("stride, dims, changes", [(1, (6, 6), False), (1, (6, 4), True), (2, (6, 6), True)])
def test_state_dict(spatial, mode, stride, dims, changes):
    inner, outer = dims
    kernel = (5, 3)[:spatial]
    want = {
        "dwconv.weight": (inner, 1, *kernel), "dwconv.bias": (inner,),
        "norm.weight": (inner,), "norm.bias": (inner,),
        "pwconv1.weight": (4 * inner, inner), "pwconv1.bias": (4 * inner,),
        "pwconv2.weight": (outer, 4 * inner), "pwconv2.bias": (outer,),
    }  # fmt: skip
    if changes:
        want |= {"residual_conv.weight": (outer, inner, *[1] * spatial), "residual_conv.bias": (outer,)}
    assert shapes(BLOCK[spatial](kernel, stride, *dims, mode)) == want


@pytest.mark.parametrize("spatial, hidden", [(1, 18), (2, 9)])
@pytest.mark.parametrize("mode", ["normal", "transposed"])
def test_state_dict_of_msrkit(spatial, hidden, mode):
    kernel = (5, 3)[:spatial]
    outward = (7, 4) if mode == "transposed" else (4, 7)
    assert shapes(BLOCK[spatial](kernel, 1, 7, 4, mode, variant="msrkit")) == {
        "dwconv.weight": (7, 7, *kernel), "dwconv.bias": (7,),
        "residual_conv.weight": (*outward, *kernel), "residual_conv.bias": (4,),
        "norm.scale": (7,),
        "pwconv1.weight": (2 * hidden, 7), "pwconv1.bias": (2 * hidden,),
        "pwconv2.weight": (4, hidden), "pwconv2.bias": (4,),
    }  # fmt: skip


def test_norm_has_the_small_epsilon():
    """Channels that hardly differ: an epsilon of 1e-5 instead of 1e-6 would be seen."""
    module = randomized(BLOCK[1](3, 1, 4, 4)).double()
    x = 1e-3 * torch.randn(1, 4, 9, dtype=torch.float64)
    with torch.no_grad():
        module.dwconv.bias.zero_()
    check(module, partial(blocks.convnext_block, stride=(1,)), x, terms=1)


def test_mean_of_a_partial_window():
    """Length 5 in windows of 3: the last residual is the mean of two."""
    module = BLOCK[1](3, 3, 4, 4).double()
    with torch.no_grad():
        module.pwconv2.weight.zero_()
        module.pwconv2.bias.zero_()
        module.residual_conv.weight.copy_(torch.eye(4)[..., None])
        module.residual_conv.bias.zero_()
    x = torch.randn(1, 4, 5, dtype=torch.float64)
    want = torch.stack([x[..., :3].mean(-1), x[..., 3:].mean(-1)], dim=-1)
    assert relative_error(module(x), want) < EXACT


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda: BLOCK[1](4, 1, 4, 4), "4"),
        (lambda: BLOCK[2]((3, 6), 1, 4, 4), "6"),
        (lambda: BLOCK[1](3, 1, 4, 4, "upward"), "'upward'"),
        (lambda: BLOCK[2](3, 1, 4, 4, variant="other"), "'other'"),
        (lambda: BLOCK[2]((3, 3, 3), 1, 4, 4), "kernel"),
        (lambda: BLOCK[1](3, 0, 4, 4), "stride"),
        (lambda: BLOCK[1](3, 1, 4, 4)(torch.zeros(1, 5, 9)), r"4.*5"),
        (lambda: BLOCK[2](3, 1, 4, 4)(torch.zeros(1, 4, 9)), "4"),
    ],
)
def test_errors_name_what_is_wrong(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


@pytest.mark.parametrize("stride", [(1,), (3,), (2, 2), (1, 4), (5, 3)], ids=str)
@pytest.mark.parametrize("size", [1, 2, 9, 12])
def test_window_means_are_the_library_s_pooling(size, stride):
    """Whole and partial last windows, windows beyond the end; gradients, and theirs."""
    pool = F.avg_pool1d if len(stride) == 1 else F.avg_pool2d
    x = torch.randn(2, 3, *(size, 7)[: len(stride)], dtype=torch.float64, requires_grad=True)
    got, want = window_means(x, stride), pool(x, stride, stride, ceil_mode=True)
    assert relative_error(got, want) < 1e-14
    grads = [torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)[0] for y in (got, want)]
    assert relative_error(*grads) < 1e-14
    assert relative_error(*(torch.autograd.grad(g.square().sum(), x)[0] for g in grads)) < 1e-14


@pytest.mark.parametrize("size", [(15,), (9, 7)], ids=str)
def test_partial_windows_have_their_gradients_under_the_compiler(size):
    stride = (2, 3)[: len(size)]
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    results = []
    for function in (window_means, torch.compile(window_means)):
        y = function(x, stride)
        results.append((y, *torch.autograd.grad(y.square().sum(), x)))
    for got, want in zip(*results, strict=True):
        assert relative_error(got, want) < EXACT
