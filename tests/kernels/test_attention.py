"""rope_attention by its kernels and by plain PyTorch, held against the dense float64 formula."""

import pytest
import torch

from fastblocks import backend, functional
from fastblocks.backend import use_backend
from tests.compare import assert_as_exact, assert_close, relative_error
from tests.reference import attention as reference

pytest.importorskip("triton")

from fastblocks.kernels import launch, runtime
from fastblocks.kernels.attention import config
from fastblocks.kernels.attention import operator as attention

pytestmark = pytest.mark.usefixtures("poison")

GPU = torch.cuda.is_available()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("out", "register_out", "grad_qkv", "grad_register_qkv", "grad_gate")


def make(device, batch, tokens, heads, dim, registers=0, shared=False, dtype=torch.float32):
    width = 3 * heads * dim
    qkv = torch.randn(batch, tokens, width, device=device, dtype=dtype)
    register_qkv = None
    if registers:
        register_qkv = torch.randn(1 if shared else batch, registers, width, device=device, dtype=dtype)
    return qkv, functional.rope_table(registers + tokens, dim).to(device), register_qkv


def run(name, qkv, rope, heads, window, register_qkv, registers_out, upstream, gate=None):
    """out, the registers' output, and all gradients, by one backend."""
    inputs = [x.detach().requires_grad_() if x is not None else None for x in (qkv, register_qkv, gate)]
    with use_backend(name):
        with backend._watch() as decisions:
            results = functional.rope_attention(
                inputs[0], rope, heads, window=window, register_qkv=inputs[1], return_registers=registers_out,
                gate=inputs[2],
            )  # fmt: skip
        assert decisions[0].backend == name, decisions  # a kernel that steps aside has not been tested
        results = list(results) if registers_out else [results]
        grads = gradients(results, inputs, upstream)
    return [results[0].detach(), results[1].detach() if registers_out else None, *grads]


def gradients(results, inputs, upstream):
    """A gradient for each input, None for None."""
    found = iter(torch.autograd.grad(results, [x for x in inputs if x is not None], upstream[: len(results)]))
    return [None if x is None else next(found) for x in inputs]


def check(device, batch, tokens, heads, dim, window=-1, registers=0, shared=False, registers_out=False,
          dtype=torch.float32, layout=lambda x: x, gated=False):  # fmt: skip
    """All results of both backends. A token that sees only itself has P = 1, and dq = dk = 0: plain PyTorch happens to
    be exact there, the kernels for long sequences round a difference of two sums of `dim` products."""
    qkv, rope, register_qkv = make(device, batch, tokens, heads, dim, registers, shared, dtype)
    qkv = layout(qkv)
    register_qkv = None if register_qkv is None else layout(register_qkv)
    gate = layout(2 * torch.randn(batch, tokens, heads, device=device, dtype=dtype)) if gated else None
    upstream = [torch.randn(batch, n, heads * dim, device=device, dtype=dtype) for n in (tokens, registers)]
    wide = [x.detach().double().requires_grad_() if x is not None else None for x in (qkv, register_qkv, gate)]
    exact = list(reference.rope_attention(wide[0], rope, heads, window, *wide[1:]))
    count = 2 if registers_out else 1
    grads = gradients(exact[:count], wide, [g.double() for g in upstream])
    exact = [exact[0], exact[1] if registers_out else None, *grads]
    eager = run("eager", qkv, rope, heads, window, register_qkv, registers_out, upstream, gate)
    fused = run("triton", qkv, rope, heads, window, register_qkv, registers_out, upstream, gate)
    for what, a, b, c in zip(NAMES, fused, eager, exact, strict=True):
        if c is not None:
            assert relative_error(b, c) < 20 * torch.finfo(dtype).eps, f"{what}: plain PyTorch itself is wrong"
            if registers == 0 and (window == 1 or tokens == 1):
                assert_close(a, c, dim, what)
            else:
                assert_as_exact(a, b, c, what)


@pytest.fixture
def blocks(monkeypatch):
    """Short sequences through the kernels for long ones, with a pass that rotates and several chunks where they may."""
    monkeypatch.setattr(config, "is_short", lambda *_: False)
    monkeypatch.setattr(config, "SPLIT", 64)
    monkeypatch.setattr(config, "ROTATE_FROM", 128)
    config._plan.cache_clear()
    yield
    config._plan.cache_clear()


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 63, 64, 65, 127, 129, 200])
def test_lengths_around_block_edges(device, tokens):
    check(device, 2 if GPU else 1, tokens, 1, 16, dtype=torch.bfloat16)


@pytest.mark.parametrize("tokens", [1, 16, 63, 65, 129])
@pytest.mark.parametrize("window", [-1, 20])
def test_lengths_around_block_edges_in_blocks(device, blocks, tokens, window):
    check(device, 1, tokens, 1, 16, window=window)


ONE_SIDED = [(0, 40), (70, 0), (0, -1), (-1, 0), (-1, 20), (33, 3)]


@pytest.mark.parametrize("window", [1, 2, 3, 31, 64, 65, 130, 1000, *ONE_SIDED])
def test_windows(device, blocks, window):
    check(device, 1, 150, 1, 16, window=window)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("window", [3, 64, 130])
@pytest.mark.parametrize("registers", [0, 3])
def test_windows_over_tokens_that_were_rotated_once(device, blocks, registers, window, dtype):
    """Only 16 bits with a window and at least ROTATE_FROM tokens find q and k rotated."""
    check(device, 1, 150, 2, 16, window=window, registers=registers, registers_out=registers > 0, dtype=dtype)


def test_keys_that_stream(device, blocks):
    """Without a window or registers, 64 channels have tiles of their own where operands come from shared memory."""
    with runtime.pretending("sm_90"):
        qkv, _, _ = make("meta", 1, 150, 1, 64, dtype=torch.bfloat16)
        plan = config.plan_of(qkv, 1, -1, None, False)
        assert plan.rotated and plan.configs["long_forward"]["BLOCK_M"] == 128
        check(device, 1, 150, 1, 64, dtype=torch.bfloat16)


@pytest.fixture(params=[(16, 16), (32, 16), (16, 32)], ids=lambda shape: "{}x{}".format(*shape))
def small_blocks(request, blocks, monkeypatch):
    """The kernels for long sequences in blocks so small that their edges meet those of windows in every way."""
    block_m, block_n = request.param
    original = config.launch_config

    def launch_config(kernel, *arguments):
        if kernel in ("long_forward", "grad_query", "grad_key"):
            return launch.config(4, 1, BLOCK_M=block_m, BLOCK_N=block_n)
        return original(kernel, *arguments)

    monkeypatch.setattr(config, "launch_config", launch_config)


@pytest.mark.parametrize(
    ("tokens", "forms"),
    [(47, [lambda side: 2 * side + 1]),
     (64, [lambda side: (side, 0), lambda side: (5, side), lambda side: (-1, side), lambda side: (side, -1)])],
    ids=["47, both sides", "64, each its own"],
)  # fmt: skip
def test_edges_of_windows_and_of_blocks(device, small_blocks, tokens, forms):
    """Sides from one row of a block to whole blocks, ± 1: what is seen by all rows of a block needs no mask."""
    qkv, rope, _ = make(device, 1, tokens, 1, 8)
    upstream = torch.randn(1, tokens, 8, device=device)
    halves = {0, 1, 7, 8, *(16 * blocks + i for blocks in (1, 2, 3) for i in (-2, -1, 0, 1))}
    for i, side in enumerate(sorted(half for half in halves if half < tokens)):
        window = forms[i % len(forms)](side)
        out, _, grad, *_ = run("triton", qkv, rope, 1, window, None, False, [upstream])
        wide = qkv.double().requires_grad_()
        want = reference.rope_attention(wide, rope, 1, window)[0]
        (want_grad,) = torch.autograd.grad(want, wide, upstream.double())
        for what, a, b in (("out", out, want), ("gradient", grad, want_grad)):
            assert relative_error(a, b) < 1e-5, f"{what} of window {window}"


@pytest.mark.parametrize("in_blocks", [False, True])
@pytest.mark.parametrize("tokens", [2, 3, 17])
def test_the_largest_window_that_is_not_full(device, in_blocks, tokens, request):
    """Of window 2T - 3 the first token and the last do not see each other, of 2T - 2 they do."""
    if in_blocks:
        request.getfixturevalue("blocks")
    qkv, rope, _ = make(device, 1, tokens, 1, 8)
    for window in range(max(1, 2 * tokens - 4), 2 * tokens):
        want = reference.rope_attention(qkv, rope, 1, window)[0]
        for name in ("triton", "eager"):
            with use_backend(name):
                assert relative_error(functional.rope_attention(qkv, rope, 1, window=window), want) < 1e-5, window


@pytest.mark.parametrize("window", [1, 2, 9, 40, (9, 0), (-1, 0), (0, -1), (3, 12)])
def test_windows_of_short_sequences(device, window):
    check(device, 1, 50, 2, 16, window=window)


@pytest.mark.parametrize("in_blocks", [False, True])
@pytest.mark.parametrize("window", [(12, 0), (-1, 0), (2, 30)])
def test_registers_beside_windows_of_two_sides(device, in_blocks, window, request):
    if in_blocks:
        request.getfixturevalue("blocks")
    check(device, 2, 45, 1, 16, window, 3, True, True, torch.bfloat16)


@pytest.mark.parametrize("name", ["eager", "triton"])
def test_causal(device, name):
    """causal=True takes the right side away from any window."""
    qkv, rope, register_qkv = make(device, 1, 40, 2, 8, 2)
    cases = {-1: (-1, 0), 9: (4, 0), (4, None): (4, 0), (None, -1): (-1, 0), (3, 0): (3, 0)}
    with use_backend(name):
        for window, same in cases.items():
            got = functional.rope_attention(qkv, rope, 2, window=window, causal=True, register_qkv=register_qkv)
            want = functional.rope_attention(qkv, rope, 2, window=same, register_qkv=register_qkv)
            assert torch.equal(got, want), window
            assert relative_error(got, reference.rope_attention(qkv, rope, 2, same, register_qkv)[0]) < 1e-5
        assert torch.equal(
            functional.rope_attention(qkv, rope, 2, window=(39, None)), functional.rope_attention(qkv, rope, 2)
        )


@pytest.mark.parametrize(
    ("architecture", "said"), [("sm_80", "48 register tokens of head size 64, the kernel takes 32"), ("sm_90", "")]
)
def test_register_tokens_that_would_spill_are_refused(architecture, said):
    from fastblocks.kernels.attention.operator import unsupported_reason

    qkv, rope, register_qkv = make("cpu", 1, 8, 1, 64, registers=48)
    with runtime.pretending(architecture):
        assert unsupported_reason(qkv, rope, 1, -1, register_qkv, False, None) == said


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("registers_out", [False, True])
@pytest.mark.parametrize("window", [-1, 12])
def test_registers(device, dtype, shared, registers_out, window):
    check(device, 2, 40, 1, 16, window, 3, shared, registers_out, dtype, gated=shared)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("registers_out", [False, True])
def test_registers_in_blocks(device, blocks, dtype, shared, registers_out):
    check(device, 2, 90, 1, 16, 40, 3, shared, registers_out, dtype, gated=shared)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [40, 100])
def test_gates_of_short_sequences(device, dtype, tokens):
    """Up to 64 rows in one pass, above in two."""
    check(device, 2, tokens, 2, 10, dtype=dtype, gated=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_in_blocks(device, blocks, dtype):
    check(device, 2, 90, 2, 10, dtype=dtype, gated=True)


def test_gates_of_another_dtype_go_to_pytorch(device):
    qkv, rope, _ = make(device, 1, 4, 1, 8, dtype=torch.bfloat16)
    with use_backend("triton"), backend._watch() as decisions:
        y = functional.rope_attention(qkv, rope, 1, gate=torch.zeros(1, 4, 1, device=device))
    assert "the gates are torch.float32" in decisions[0].reason and y.dtype == torch.float32
    with use_backend("eager"):
        assert torch.equal(y, functional.rope_attention(qkv, rope, 1) * 0.5)


@pytest.mark.parametrize("registers", [1, 17, 64])
def test_many_registers_in_blocks(device, blocks, registers):
    check(device, 1, 140, 1, 16, 30, registers, True, True)


def test_partial_sums_of_registers_in_several_tiles(device, blocks, monkeypatch):
    monkeypatch.setattr(config, "PARTIAL_TILE", 32)  # two partial sums a tile, of 1 + 7 and, of q, of 4
    check(device, 2, 200, 1, 16, 40, 3, True, True)


def test_registers_without_a_window_in_blocks(device, blocks):
    check(device, 1, 140, 2, 16, -1, 2, True, True, torch.bfloat16)


@pytest.mark.parametrize("dim", [8, 10, 24, 72, 104, 128, 256])
def test_head_sizes(device, dim):
    registers = min(9, config.most_registers(dim, "sm_80"))  # the error of two registers alone is a matter of luck
    check(device, 1, 33, 2, dim, 20, registers, True, registers > 0)


@pytest.mark.parametrize("dim", [8, 24, 104, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_sizes_in_blocks(device, blocks, dim, dtype):
    registers = min(9, config.most_registers(dim, "sm_80"))
    check(device, 1, 70, 1, dim, 20, registers, True, registers > 0, dtype)


LAYOUTS = {
    "offset": lambda x: torch.cat((x, x), 0)[x.shape[0] :],
    "strided": lambda x: torch.stack((x, x), 2)[:, :, 1],
    "batch second": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "odd start": lambda x: torch.cat((x[..., :1], x), -1)[..., 1:],
    "last not contiguous": lambda x: torch.stack((x, x), -1)[..., 0],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts(device, layout):
    check(device, 2, 20, 2, 16, 6, 2, False, True, layout=layout, gated=True)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts_in_blocks(device, blocks, layout):
    check(device, 2, 40, 1, 16, 6, 2, False, True, layout=layout, gated=True)


@pytest.mark.parametrize("in_blocks", [False, True])
def test_gradients_that_are_expanded_or_missing(device, in_blocks, request):
    if in_blocks:
        request.getfixturevalue("blocks")
    qkv, rope, register_qkv = make(device, 2, 30, 2, 16, 3)
    qkv.requires_grad_()
    for pick in (0, 1):
        grads = []
        for name in ("eager", "triton"):
            with use_backend(name):
                results = functional.rope_attention(
                    qkv, rope, 2, window=8, register_qkv=register_qkv, return_registers=True
                )
            grads.append(torch.autograd.grad(results[pick].sum(), qkv)[0])
        assert relative_error(grads[1], grads[0]) < 1e-5


@pytest.mark.parametrize("in_blocks", [False, True])
def test_two_runs_give_the_same_bits(device, in_blocks, request):
    if in_blocks:
        request.getfixturevalue("blocks")
    qkv, rope, register_qkv = make(device, 3, 100, 2, 16, 3, True)
    upstream = [torch.randn(3, n, 32, device=device) for n in (100, 3)]
    gate = torch.randn(3, 100, 2, device=device)
    first, second = (run("triton", qkv, rope, 2, 30, register_qkv, True, upstream, gate) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["eager", "triton"])
def test_a_register_is_learned(device, name):
    """The sum of the gradients over a shared register's copies is the gradient of the register."""
    qkv, rope, register_qkv = make(device, 2, 30, 2, 8, 2, True)
    copies = register_qkv.expand(2, -1, -1).contiguous()
    upstream = [torch.randn(2, n, 16, device=device) for n in (30, 2)]
    shared = run(name, qkv, rope, 2, 8, register_qkv, True, upstream)[3]
    each = run(name, qkv, rope, 2, 8, copies, True, upstream)[3]
    assert shared.abs().sum() > 0
    assert relative_error(shared, each.sum(0, keepdim=True)) < 1e-5


def test_second_derivatives(device):
    """create_graph=True goes through the plain formula, and gives what plain PyTorch in float64 gives."""
    qkv, rope, register_qkv = make(device, 1, 20, 2, 8, 2)
    leaves = qkv, register_qkv, torch.randn(1, 20, 2, device=device)
    got, wanted = [], []
    for name, dtype, results in (("triton", torch.float32, got), ("eager", torch.float64, wanted)):
        x, r, z = inputs = [t.to(dtype).requires_grad_() for t in leaves]
        with use_backend(name), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            y = functional.rope_attention(x, rope, 2, window=6, register_qkv=r, return_registers=True, gate=z)
        first = torch.autograd.grad(sum(t.square().sum() for t in y), inputs, create_graph=True)
        results += [*first, *torch.autograd.grad(sum(t.square().sum() for t in first), inputs)]
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(got, wanted, strict=True))


def test_what_the_kernel_does_not_take_goes_to_pytorch(device):
    cases = {
        "head size is 258": make(device, 1, 4, 1, 258),
        "head size is 6": make(device, 1, 4, 1, 6),
        "65 register tokens": make(device, 1, 4, 1, 8, 65),
    }
    qkv, rope, register_qkv = make(device, 1, 4, 1, 8, 2)
    cases["register tokens are torch.bfloat16"] = (qkv, rope, register_qkv.bfloat16())
    cases["rope table is torch.float64"] = (qkv, rope.double(), register_qkv)
    for reason, (x, table, registers) in cases.items():
        with use_backend("triton"), backend._watch() as decisions:
            if "bfloat16" not in reason:
                functional.rope_attention(x, table, 1, register_qkv=registers)
            else:
                assert reason in attention.unsupported_reason(x, table, 1, -1, registers, False, None)
                continue
        assert decisions[0].backend == "eager" and reason in decisions[0].reason, decisions


def test_a_rope_table_that_is_learned_gets_its_gradient(device):
    """The kernels have no gradient of it, so plain PyTorch takes the call."""
    qkv, rope, _ = make(device, 1, 12, 1, 8)
    wide = rope.double().requires_grad_()
    upstream = torch.randn(1, 12, 8, device=device)
    with use_backend("eager"):
        want = functional.rope_attention(qkv.double(), wide, 1)
    (want,) = torch.autograd.grad(want, wide, upstream.double())
    rope.requires_grad_()
    qkv.requires_grad_()
    with use_backend("triton"), backend._watch() as decisions:
        out = functional.rope_attention(qkv, rope, 1)
    assert decisions[0].backend == "eager" and "rope table" in decisions[0].reason, decisions
    got, _ = torch.autograd.grad(out, (rope, qkv), upstream)
    assert want.abs().sum() > 0 and relative_error(got, want) < 1e-5


@pytest.mark.parametrize("name", ["eager", "triton"])
def test_partial_rotary(device, name):
    """Of 16 channels a head the first 6 turn, as a head of 6 channels would."""
    qkv, _, _ = make(device, 1, 20, 1, 16)
    rope = functional.rope_table(20, 16, rotary_dim=6).to(device)
    small = functional.rope_table(20, 6)
    assert torch.equal(rope[:, :3].cpu(), small)
    rows = qkv[0].double().cpu()
    for start in (0, 16):
        rows[:, start : start + 6] = reference.rotate(rows[:, start : start + 6], small)
    q, k, v = rows.split(16, 1)
    want = torch.softmax(q @ k.T / 4, -1) @ v
    with use_backend(name):
        assert relative_error(functional.rope_attention(qkv, rope, 1)[0], want) < 1e-5


def test_two_tiles_hold_the_keys():
    for rows in range(1, 400):
        a, b = config.key_tiles(rows)
        assert a + b >= rows and a <= config.tile(rows) and a + b <= config.tile(rows)
    assert config.key_tiles(282) == (256, 32) and config.key_tiles(64) == (64, 0)


@pytest.mark.skipif(not GPU, reason="needs a GPU: larger than the interpreter can walk")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [(64, 64, 4, 32, -1, 0), (16, 282, 4, 32, -1, 0), (2, 700, 4, 64, 128, 4), (1, 1500, 2, 32, 256, 8),
     (1, 1300, 2, 128, -1, 16), (20000, 5, 4, 16, -1, 0)],
)  # fmt: skip
def test_large(device, dtype, shape):
    batch, tokens, heads, dim, window, registers = shape
    if batch < 1000:
        check(device, batch, tokens, heads, dim, window, registers, True, registers > 0, dtype)
        return
    qkv, rope, _ = make(device, batch, tokens, heads, dim, dtype=dtype)  # B·H past 65535
    with use_backend("eager"):
        want = functional.rope_attention(qkv, rope, heads)
    with use_backend("triton"):
        got = functional.rope_attention(qkv, rope, heads)
    assert relative_error(got, want) < 4 * torch.finfo(dtype).eps
