"""RoFormerBlock and AttentionRegisterRoFormerBlock: shapes of all kinds, windows, registers, errors."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastblocks
from tests.compare import assert_close, relative_error
from tests.modules.cases import tokens
from tests.modules.harness import EXACT, check, randomized
from tests.reference import blocks

KEYS = {
    "att_norm.scale": (48,),
    "att.c_attn.weight": (144, 48),
    "att.c_proj.weight": (48, 48),
    "ffn_norm.scale": (48,),
    "mlp.c_fc1.weight": (128, 48),
    "mlp.c_fc2.weight": (128, 48),
    "mlp.c_proj.weight": (48, 128),
}

few = settings(max_examples=20, deadline=None)


def register_block(width=16, heads=2, length=40, **options):
    return randomized(fastblocks.AttentionRegisterRoFormerBlock(width, heads, length, **options))


def shapes(module):
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def test_state_dict():
    assert shapes(fastblocks.RoFormerBlock(48, 4, 10)) == KEYS
    block = fastblocks.AttentionRegisterRoFormerBlock(48, 4, 10, num_register_tokens=3)
    assert shapes(block) == KEYS | {"registers": (3, 48)}
    assert shapes(fastblocks.AttentionRegisterRoFormerBlock(48, 4, 10)) == KEYS
    assert isinstance(block, fastblocks.RoFormerBlock)
    assert isinstance(block.registers, torch.nn.Parameter)


def test_hidden_width_is_rounded_down():
    assert fastblocks.RoFormerBlock(128, 4, 10).mlp.c_fc1.weight.shape == (341, 128)


def test_registers_start_small():
    registers = fastblocks.AttentionRegisterRoFormerBlock(512, 8, 10, num_register_tokens=64).registers.detach()
    # the standard deviation of n = 32768 normal numbers is known to 1/sqrt(2n) = 0.4 %; six of these
    assert abs(float(registers.std()) / 0.02 - 1) < 0.024


@few
@given(st.integers(1, 70), st.integers(1, 4), st.sampled_from([2, 4, 6, 10]), st.integers(0, 3), st.integers(1, 3))
def test_roformer_shapes(length, heads, dim, slack, batch):
    width = heads * dim
    module = randomized(fastblocks.RoFormerBlock(width, heads, length + slack)).double()
    x = torch.randn(batch, length, width, dtype=torch.float64)
    check(module, tokens(partial(blocks.roformer_block, n_head=heads)), x, terms=1)


@few
@given(
    st.integers(1, 80),
    st.sampled_from([-1, 1, 2, 3, 8, 9, 33, 64, 65, 200]),
    st.integers(0, 5),
    st.sampled_from([(1, 4), (2, 2), (3, 6)]),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_window_and_register_shapes(length, window, registers, heads_and_dim, memory, dtype):
    heads, dim = heads_and_dim
    width = heads * dim
    module = register_block(width, heads, length, num_register_tokens=registers, window_size=window).to(dtype)
    reference = partial(blocks.roformer_block, n_head=heads, window=window)
    inputs = [torch.randn(2, length, width, dtype=dtype)]
    if registers and memory:
        inputs.append(torch.randn(2, registers, width, dtype=dtype))
        call = partial(module, return_registers=True)
    else:
        reference, call = tokens(reference), module
    check(module, reference, *inputs, terms=2 * (registers + length) + 4 * width, call=call, jointly=True)


@pytest.mark.parametrize("length", [31, 32, 33, 63, 64, 65, 96, 97, 128, 129])
@pytest.mark.parametrize("window", [2, 31, 64, 100])
def test_windows_around_block_sizes(length, window):
    """Lengths and windows about the multiples of 32 where blocked implementations have their edges."""
    module = register_block(8, 2, length, num_register_tokens=2, window_size=window).double()
    x = torch.randn(1, length, 8, dtype=torch.float64)
    check(module, tokens(partial(blocks.roformer_block, n_head=2, window=window)), x, terms=1)


@pytest.mark.parametrize("window", [1, 2, 3, 4, 7, 8])
def test_who_sees_whom(window):
    """By perturbation: token s is moved by token t exactly when |s - t| <= window // 2."""
    length = 12
    module = register_block(8, 2, length, window_size=window).double()
    x = torch.randn(1, length, 8, dtype=torch.float64)
    y = module(x)
    for t in range(length):
        moved = x.clone()
        moved[0, t] += torch.randn(8, dtype=torch.float64)
        changed = (module(moved) - y).abs().amax(-1)[0] > 0
        assert changed.tolist() == [abs(s - t) <= window // 2 for s in range(length)]


def test_registers_see_everything_and_are_seen_by_all():
    module = register_block(8, 2, 40, num_register_tokens=2, window_size=2).double()
    x, memory = torch.randn(1, 40, 8, dtype=torch.float64), torch.randn(1, 2, 8, dtype=torch.float64)
    y, out = module(x, memory, return_registers=True)
    moved = x.clone()
    moved[0, 39] += 1
    assert ((module(moved, memory, return_registers=True)[1] - out).abs().amax(-1) > 0).all()
    other = memory.clone()
    other[0, 1] += 1
    assert ((module(x, other) - y).abs().amax(-1) > 0).all()


def test_a_window_without_registers_is_the_plain_block_when_it_spans_everything():
    module = register_block(window_size=500)
    plain = fastblocks.RoFormerBlock(16, 2, 40)
    plain.load_state_dict(module.state_dict())
    x = torch.randn(2, 40, 16)
    assert_close(module(x), plain(x), 64)


def test_memory_across_layers():
    """Three stacked blocks whose registers go from one to the next, all gradients."""
    stack = torch.nn.ModuleList(register_block(num_register_tokens=3, window_size=4) for _ in range(3)).double()

    def run(x):
        memory = None
        for block in stack:
            x, memory = block(x, memory, return_registers=True)
        return x, memory

    def reference(state, x):
        memory = None
        for i in range(3):
            x, memory = blocks.roformer_block(blocks.part(state, f"{i}."), x, memory, n_head=2, window=4)
        return x, memory

    check(stack, reference, torch.randn(2, 20, 16, dtype=torch.float64), terms=1, call=run)


def test_no_memory_is_memory_of_zeros():
    module = register_block(num_register_tokens=3, window_size=4)
    x = torch.randn(2, 20, 16)
    for got, want in zip(
        module(x, return_registers=True), module(x, torch.zeros(2, 3, 16), return_registers=True), strict=True
    ):
        assert_close(got, want, 64)
    assert_close(module(x), module(x, return_registers=True)[0], 64)


def rows_through_mlp(module, *arguments, **keywords):
    seen = []
    handle = module.mlp.register_forward_hook(lambda _, inputs, out: seen.append(inputs[0].shape))
    module(*arguments, **keywords)
    handle.remove()
    return sum(shape[:-1].numel() for shape in seen)


def test_registers_that_are_not_returned_are_not_computed():
    module = register_block(num_register_tokens=3, window_size=4)
    x = torch.randn(2, 20, 16)
    assert rows_through_mlp(module, x) == 2 * 20
    assert rows_through_mlp(module, x, return_registers=True) == 2 * 23


def test_registers_that_are_not_returned_do_not_disturb():
    """The gradient of the query weights comes from tokens alone: it lies in the span of the tokens' rows."""
    module = register_block(num_register_tokens=1, window_size=4).double()
    x = torch.randn(1, 5, 16, dtype=torch.float64)
    module(x).sum().backward()
    queries = module.att.c_attn.weight.grad[:16]
    basis = torch.linalg.qr(module.att_norm(x).detach()[0].T)[0]  # of 5 dimensions in 16
    assert queries.norm() > 0 and relative_error(queries @ basis @ basis.T, queries) < EXACT


def test_positions_start_after_the_registers():
    """With all seeing all, registers are what tokens before the sequence would be."""
    module = register_block(num_register_tokens=3, window_size=-1).double()
    plain = fastblocks.RoFormerBlock(16, 2, 43).double()
    plain.load_state_dict({k: v for k, v in module.state_dict().items() if k != "registers"})
    x = torch.randn(2, 40, 16, dtype=torch.float64)
    whole = plain(torch.cat([module.registers.expand(2, -1, -1), x], dim=1))
    y, memory = module(x, return_registers=True)
    assert relative_error(torch.cat([memory, y], dim=1), whole) < EXACT


def test_full_length_with_registers():
    """max_seq_len counts tokens only."""
    module = register_block(length=10, num_register_tokens=4, window_size=3)
    assert module(torch.randn(1, 10, 16)).shape == (1, 10, 16)
    with pytest.raises(ValueError, match=r"11\b.*\b10\b"):
        module(torch.randn(1, 11, 16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_angles_survive_a_cast_of_the_module(dtype):
    module = randomized(fastblocks.RoFormerBlock(16, 2, 300))
    state = {name: value.clone() for name, value in module.state_dict().items()}
    x = torch.randn(1, 300, 16)
    want = module(x)
    module.to(dtype).float().load_state_dict(state)
    assert torch.equal(module(x), want)


def test_rope_table_is_in_float32_precision():
    """Angles are float32 numbers: a relative rounding each of the frequency and the product, times the angle."""
    table = fastblocks.functional.rope_table(5000, 16, 10000)
    position = torch.arange(5000, dtype=torch.float64)[:, None]
    angle = position * 10000.0 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    allowed = 6 * torch.finfo(torch.float32).eps / 2 * angle + torch.finfo(torch.float32).eps
    assert ((table[..., 0] - angle.cos()).abs() <= allowed).all()
    assert ((table[..., 1] - angle.sin()).abs() <= allowed).all()


ERRORS = [
    (lambda: fastblocks.RoFormerBlock(30, 4, 10), r"30\b.*\b4\b"),
    (lambda: fastblocks.RoFormerBlock(30, 2, 10), r"15\b"),
    (lambda: fastblocks.RoFormerBlock(16, 2, 10)(torch.zeros(1, 11, 16)), r"11\b.*\b10\b"),
    (lambda: fastblocks.RoFormerBlock(16, 2, 10)(torch.zeros(1, 5, 8)), r"16"),
    (lambda: fastblocks.AttentionRegisterRoFormerBlock(16, 2, 10, window_size=0), r"\b0\b"),
    (lambda: fastblocks.AttentionRegisterRoFormerBlock(16, 2, 10, window_size=-2), r"-2\b"),
    (lambda: fastblocks.AttentionRegisterRoFormerBlock(16, 2, 10, num_register_tokens=-1), r"-1\b"),
    (lambda: fastblocks.AttentionRegisterRoFormerBlock(30, 4, 10, num_register_tokens=1), r"30\b.*\b4\b"),
    (lambda: fastblocks.AttentionRegisterRoFormerBlock(30, 2, 10, num_register_tokens=1), r"15\b"),
]


@pytest.mark.parametrize("wrong, message", ERRORS)
def test_errors_name_the_numbers(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


@pytest.mark.parametrize("shape", [(2, 2, 16), (1, 3, 16), (2, 3, 8)])
def test_carried_registers_of_another_shape(shape):
    module = register_block(num_register_tokens=3, window_size=4)
    with pytest.raises(ValueError, match="registers"):
        module(torch.randn(2, 20, 16), torch.randn(shape))


def test_carried_registers_for_a_block_without():
    with pytest.raises(ValueError, match="registers"):
        register_block(window_size=4)(torch.randn(2, 20, 16), torch.randn(2, 3, 16))
