"""The adapters of bs-roformer's attention and feed-forward layer."""

import copy
import importlib
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastblocks
from fastblocks.convert import bs_roformer as ours
from tests.compare import assert_as_exact, relative_error
from tests.integration.converted import assert_follows
from tests.modules.harness import EXACT, check, randomized

HEADS, D, C, T = 2, 16, 24, 13


class RMSNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.scale, self.gamma = dim**0.5, nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.normalize(x, dim=-1) * self.scale * self.gamma


class RotaryEmbedding(nn.Module):
    """Names and formula of rotary-embedding-torch for whole heads, with its memory of angles."""

    def __init__(self, dim, learned_freq=False, use_xpos=False, interpolate_factor=1.0):
        super().__init__()
        self.learned_freq, self.use_xpos, self.interpolate_factor = learned_freq, use_xpos, interpolate_factor
        self.default_seq_dim = -2
        self.freqs = nn.Parameter(1.0 / 10000 ** (torch.arange(0, dim, 2).float() / dim), requires_grad=learned_freq)
        self.register_buffer("cached_freqs", torch.zeros(512, dim), persistent=False)
        self.known = 0

    def rotate_queries_or_keys(self, t):
        length = t.shape[-2]
        if length > self.known:
            positions = torch.arange(length, dtype=t.dtype, device=t.device).to(self.freqs.dtype)
            self.cached_freqs[:length] = torch.outer(positions, self.freqs.detach()).repeat_interleave(2, -1)
            self.known = length
        angles = self.cached_freqs[:length].detach()
        even, odd = t.unflatten(-1, (-1, 2)).unbind(-1)
        return (t * angles.cos() + torch.stack((-odd, even), -1).flatten(-2) * angles.sin()).type(t.dtype)


class Attend(nn.Module):
    def __init__(self, dropout=0.0, flash=False, scale=None):
        super().__init__()
        self.scale, self.dropout, self.flash = scale, dropout, flash
        self.attn_dropout = nn.Dropout(dropout)

    def forward(self, q, k, v):
        if self.flash:
            return F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        scores = torch.einsum("bhid,bhjd->bhij", q, k) * (self.scale or q.shape[-1] ** -0.5)
        return torch.einsum("bhij,bhjd->bhid", self.attn_dropout(scores.softmax(-1)), v)


class _Attention(nn.Module):
    def __init__(
        self, dim, heads=8, dim_head=64, dropout=0.0, rotary_embed=None, flash=True, learned_value_residual_mix=False
    ):
        super().__init__()
        self.heads, self.scale = heads, dim_head**-0.5
        self.rotary_embed, self.attend = rotary_embed, Attend(dropout, flash)
        self.norm = RMSNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.to_value_residual_mix = nn.Linear(dim, heads) if learned_value_residual_mix else None
        self.to_gates = nn.Linear(dim, heads)
        self.to_out = nn.Sequential(nn.Linear(heads * dim_head, dim, bias=False), nn.Dropout(dropout))

    def both(self, x, value_residual=None):
        x = self.norm(x)
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        values = v
        if self.to_value_residual_mix is not None:
            v = v.lerp(value_residual, self.to_value_residual_mix(x).mT[..., None].sigmoid())
        q, k = (self.rotary_embed.rotate_queries_or_keys(t) for t in (q, k))
        y = self.attend(q, k, v) * self.to_gates(x).mT[..., None].sigmoid()
        return self.to_out(y.transpose(1, 2).flatten(2)), values


class Attention(_Attention):
    """As in bs-roformer 1.2."""

    def forward(self, x, value_residual=None):
        return self.both(x, value_residual)


class Alone(_Attention):
    """As in its first versions, and in copies of them."""

    def forward(self, x):
        return self.both(x)[0]


Alone.__name__ = "Attention"


class HeadsFirst(nn.Module):
    def forward(self, x):
        return x.mT.unsqueeze(-1)


class MelBand(_Attention):
    """As in MelBandRoformer's layers behind the first: the values say how far v goes to the sigmoid."""

    def __init__(self, dim, heads=8, dim_head=64, dropout=0.0, rotary_embed=None, flash=True, add_value_residual=True):
        super().__init__(dim, heads, dim_head, dropout, rotary_embed, flash)
        self.learned_value_residual_mix = nn.Sequential(nn.Linear(dim, heads), HeadsFirst(), nn.Sigmoid())
        self._modules["to_out"] = self._modules.pop("to_out")

    def forward(self, x, value_residual=None):
        x = self.norm(x)
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = v.lerp(self.learned_value_residual_mix(x), value_residual)
        q, k = (self.rotary_embed.rotate_queries_or_keys(t) for t in (q, k))
        y = self.attend(q, k, mixed) * self.to_gates(x).mT[..., None].sigmoid()
        return self.to_out(y.transpose(1, 2).flatten(2)), v


MelBand.__name__ = "Attention"


class FeedForward(nn.Module):
    def __init__(self, dim, mult=4, dropout=0.0):
        super().__init__()
        first, second = nn.Linear(dim, dim * mult), nn.Linear(dim * mult, dim)
        self.net = nn.Sequential(RMSNorm(dim), first, nn.GELU(), nn.Dropout(dropout), second, nn.Dropout(dropout))

    def forward(self, x):
        return self.net(x)


class LinearAttention(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm, self.attend, self.to_qkv, self.to_out = RMSNorm(dim), Attend(), nn.Linear(dim, dim), nn.Identity()
        self.temperature = nn.Parameter(torch.zeros(HEADS, 1, 1))


def package():
    try:
        return importlib.import_module("bs_roformer"), importlib.import_module("rotary_embedding_torch")
    except ImportError as missing:
        pytest.skip(f"bs-roformer is not installed (the extra `adapters`): {missing}")


def attention(cls=Attention, rotary=RotaryEmbedding, **settings):
    return randomized_but_rotation(cls(C, HEADS, D, rotary_embed=rotary(D), **settings))


def randomized_but_rotation(module):
    kept = {name: p.detach().clone() for name, p in module.named_parameters() if name.endswith("freqs")}
    randomized(module).load_state_dict(kept, strict=False)
    return module


def sources(which):
    """Attention, FeedForward and RotaryEmbedding."""
    if which == "copy":
        return Attention, FeedForward, RotaryEmbedding
    theirs, rotary = package()
    module = importlib.import_module(f"{theirs.__name__}.bs_roformer")
    return module.Attention, module.FeedForward, rotary.RotaryEmbedding


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("which", ["copy", "bs-roformer"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_layers_are_swapped(which, used, flash):
    cls, feed_forward, rotary = sources(which)
    model = nn.ModuleList(
        [
            attention(cls, rotary, flash=flash),
            attention(cls, rotary, flash=flash, learned_value_residual_mix=True),
            randomized(feed_forward(C)),
        ]
    )
    model[1].rotary_embed = model[0].rotary_embed  # one for all layers
    x = torch.randn(2, T, C, requires_grad=True)
    original = copy.deepcopy(model)
    if used:
        run(model, x)  # its rotary embedding keeps the angles
    parameters = dict(model.named_parameters(remove_duplicate=False))
    keys = list(model.state_dict())
    fastblocks.convert(model)
    assert [type(layer) for layer in model] == [ours.ValueResidualAttention] * 2 + [ours.FeedForward]
    assert list(model.state_dict()) == keys
    assert all(p is parameters[name] for name, p in model.named_parameters(remove_duplicate=False))
    assert_follows(model, original, x, call=run)


def run(model, x):
    first, mixing, feed_forward = model
    y, values = first(x)
    y = x + y
    y = y + mixing(y, value_residual=values)[0]
    return y + feed_forward(y), values


def separate(model, waveform):
    model.stft_window_fn = partial(torch.hann_window, 2048, dtype=waveform.dtype)
    return model(waveform)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:A window was not provided")
def test_whole_models_of_the_package():
    theirs, _ = package()
    size = {"dim": C, "depth": 2, "dim_head": D, "heads": HEADS}
    models = [
        theirs.BSRoformer(**size, freqs_per_bands=(512, 513)),
        theirs.BSRoformer(**size, freqs_per_bands=(512, 513), num_residual_streams=1, flash_attn=False),
        theirs.MelBandRoformer(**size, num_bands=8),
    ]
    for model in models:
        fastblocks_model = fastblocks.convert(copy.deepcopy(model.eval()))
        report = fastblocks.conversion_report(fastblocks_model)
        assert all("linear attention" in why for why in report.left.values())
        names = [type(m).__name__ for m in model.modules()]
        assert len(report.swapped) == names.count("Attention") + names.count("FeedForward") > 0
        assert_follows(fastblocks_model, model, torch.randn(1, 12000), call=separate, jointly=True)


@pytest.mark.parametrize("which", ["copy", "bs-roformer"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("hooked", ["", "to_gates", "learned_value_residual_mix", "learned_value_residual_mix.1"])
def test_mel_bands_way_to_mix_values(which, hooked):
    cls, rotary = MelBand, RotaryEmbedding
    if which != "copy":
        theirs, embedding = package()
        cls = importlib.import_module(f"{theirs.__name__}.mel_band_roformer").Attention
        rotary = embedding.RotaryEmbedding
    block, called = attention(cls, rotary, flash=True, add_value_residual=True), []
    x, values = torch.randn(2, T, C, requires_grad=True), torch.randn(2, HEADS, T, D, requires_grad=True)
    new = fastblocks.convert(nn.Sequential(copy.deepcopy(block)))[0]
    assert type(new) is ours.MelBandAttention and list(new.state_dict()) == list(block.state_dict())
    if hooked:
        new.get_submodule(hooked).register_forward_hook(lambda *_: called.append(hooked))
    assert_follows(new, block, x, values)
    assert called == ([hooked] if hooked else [])
    with pytest.raises(ValueError, match="value_residual is None"):
        new(x)


def test_copies_that_return_the_output_alone():
    block = attention(Alone)
    converted = fastblocks.convert(copy.deepcopy(block))
    assert type(converted) is ours.Attention
    assert_follows(converted, block, torch.randn(2, T, C))


def reference(state, x, value_residual=None):
    y = F.normalize(x, dim=-1) * x.shape[-1] ** 0.5 * state["norm.gamma"]
    q, k, v = F.linear(y, state["to_qkv.weight"]).unflatten(-1, (3, HEADS, D)).permute(2, 0, 3, 1, 4)
    values = v
    if value_residual is not None:
        mix = F.linear(y, state["to_value_residual_mix.weight"], state["to_value_residual_mix.bias"])
        v = v + mix.mT[..., None].sigmoid() * (value_residual - v)
    angle = torch.outer(torch.arange(x.shape[1], dtype=x.dtype), state["rotary_embed.freqs"].detach().to(x.dtype))
    turn = torch.polar(torch.ones_like(angle), angle)
    q, k = (torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (-1, 2))) * turn).flatten(-2) for t in (q, k))
    y2 = (q @ k.mT * D**-0.5).softmax(-1) @ v
    y2 = y2 * F.linear(y, state["to_gates.weight"], state["to_gates.bias"]).mT[..., None].sigmoid()
    y2 = F.linear(y2.transpose(1, 2).flatten(2), state["to_out.0.weight"])
    return y2 if value_residual is None else (y2, values)


@pytest.mark.parametrize("mixes", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_numbers_and_gradients_of_attention(backend, dtype, mixes):
    block = (
        ours.ValueResidualAttention(C, HEADS, D, learned_value_residual_mix=True)
        if mixes
        else ours.Attention(C, HEADS, D)
    )
    block = randomized_but_rotation(block).to(dtype)
    block.rotary_embed.freqs.requires_grad_()  # so that the harness may ask for its gradient, which is 0
    values = [torch.randn(2, HEADS, T, D, dtype=dtype)] if mixes else []
    with fastblocks.use_backend(backend):
        check(block, reference, torch.randn(2, T, C, dtype=dtype), *values, terms=3 * HEADS * D)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_and_gradients_of_the_feed_forward_layer(dtype):
    def formula(state, x):
        y = F.normalize(x, dim=-1) * x.shape[-1] ** 0.5 * state["net.0.gamma"]
        y = F.gelu(F.linear(y, state["net.1.weight"], state["net.1.bias"]))
        return F.linear(y, state["net.4.weight"], state["net.4.bias"])

    check(randomized(ours.FeedForward(C, 3 * C)).to(dtype), formula, torch.randn(2, T, C, dtype=dtype), terms=3 * C)


def test_silence_and_what_is_nearly_silent():
    """The norm's bound, 1e-12, is of the vector's length: nothing is added to it."""
    original = randomized(FeedForward(C))
    x = torch.randn(4, C, dtype=torch.float64) * torch.tensor([[0.0], [1e-14], [1e-12], [1e-9]])
    x.requires_grad_()
    outcomes = []
    for block in (original.double(), fastblocks.convert(copy.deepcopy(original))):
        y = block(x)
        outcomes.append((y, torch.autograd.grad(y.sum(), x)[0]))
    for got, want in zip(outcomes[1], outcomes[0], strict=True):
        assert all(relative_error(*rows) <= EXACT for rows in zip(got, want, strict=True))  # of very unlike lengths


@pytest.mark.parametrize("flash", [False, True])
def test_dropout_in_training_is_pytorchs(flash):
    """The same numbers from the same seed; evaluation is fused."""
    x, blocks = torch.randn(2, T, C), []
    for original in (attention(dropout=0.3, flash=flash), randomized(FeedForward(C, dropout=0.2))):
        blocks.append(fastblocks.convert(copy.deepcopy(original)))
        outcomes = []
        for module in (original, blocks[-1]):
            torch.manual_seed(0)
            outcomes.append([module.train()(x), module.eval()(x)])
        torch.testing.assert_close(*outcomes)
    block = blocks[0]
    assert "dropout 0.3 in training" in fastblocks.explain(block.train(), x)
    assert "dropout" not in fastblocks.explain(block.eval(), x)


def test_the_attentions_dropout_is_its_own():
    """Whoever sets it to 0 in the original has none in the replacement, either."""
    original = attention(dropout=0.3)
    original.attend.dropout = 0.0
    assert "dropout" not in fastblocks.explain(fastblocks.convert(original).train(), torch.randn(2, T, C))


@pytest.mark.parametrize("cast", ["autocast", "bfloat16"])
def test_low_precision_follows_the_original(cast):
    """As near to float64 as the original; a long sequence, whose positions bfloat16 rounds."""
    original = attention(Alone)
    x = torch.randn(1, 400, C)
    exact, found = copy.deepcopy(original).double()(x.double()), []
    for block in (fastblocks.convert(copy.deepcopy(original)), original):
        if cast == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                found.append(block(x))
        else:
            found.append(block.bfloat16()(x.bfloat16()))
        assert found[-1].dtype == torch.bfloat16
    assert_as_exact(*found, exact)


def test_a_compiled_block_is_one_graph():
    block = randomized_but_rotation(ours.ValueResidualAttention(C, HEADS, D, learned_value_residual_mix=True))
    inputs = torch.randn(1, T, C), torch.randn(1, HEADS, T, D)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), block(*inputs))


def test_positions_are_rounded_as_in_the_original():
    """To q's dtype: in bfloat16 the positions 256 and 257 are one."""
    table = ours.RotaryEmbedding(D).table(300, torch.bfloat16)
    assert table.dtype == torch.float32 and torch.equal(table[256], table[257])
    exact = ours.RotaryEmbedding(D).table(300, torch.float32)
    torch.testing.assert_close(exact, fastblocks.functional.rope_table(300, D), rtol=1e-5, atol=1e-5)
    assert not torch.equal(exact[256], exact[257])


@pytest.mark.parametrize("child", ["norm", "to_qkv", "to_gates", "to_value_residual_mix", "to_out", "to_out.0"])
def test_children_with_hooks_are_called(child):
    block = randomized_but_rotation(ours.ValueResidualAttention(C, HEADS, D, learned_value_residual_mix=True))
    inputs, called = (torch.randn(1, T, C), torch.randn(1, HEADS, T, D)), []
    want = block(*inputs)
    block.get_submodule(child).register_forward_hook(lambda *_: called.append(child))
    torch.testing.assert_close(block(*inputs), want)
    assert called == [child]


@pytest.mark.parametrize("child", ["net", *(f"net.{i}" for i in range(6))])
def test_children_of_the_feed_forward_layer_with_hooks_are_called(child):
    block, x, called = randomized(ours.FeedForward(C, 40)), torch.randn(1, T, C), []
    want = block(x)
    block.get_submodule(child).register_forward_hook(lambda *_: called.append(child))
    torch.testing.assert_close(block(x), want)
    assert called == [child]


def changed(change):
    block = attention()
    change(block)
    return block


@pytest.mark.parametrize(
    ("block", "why"),
    [
        (lambda: LinearAttention(C), "linear attention"),
        (lambda: changed(lambda b: setattr(b, "pope_embed", nn.Identity())), "PoPE"),
        (lambda: changed(lambda b: setattr(b, "rotary_embed", None)), "no rotary positions"),
        (lambda: changed(lambda b: setattr(b, "rotary_embed", RotaryEmbedding(D // 2))), f"turns 8 of {D} channels"),
        (lambda: changed(lambda b: setattr(b.rotary_embed, "learned_freq", True)), "learned_freq=True"),
        (lambda: changed(lambda b: b.rotary_embed.freqs.requires_grad_()), "learns its frequencies"),
        (lambda: changed(lambda b: setattr(b.rotary_embed, "use_xpos", True)), "use_xpos=True"),
        (lambda: changed(lambda b: setattr(b.rotary_embed, "interpolate_factor", 2.0)), "interpolate_factor=2.0"),
        (lambda: changed(lambda b: setattr(b.rotary_embed, "default_seq_dim", -3)), "tokens before heads"),
        (lambda: changed(lambda b: setattr(b, "attend", nn.Identity())), "attends by Identity"),
        (lambda: changed(lambda b: setattr(b.attend, "scale", 8)), "scaled by 8"),
        (
            lambda: changed(lambda b: setattr(b, "learned_value_residual_mix", nn.Identity())),
            "mix.0.weight' is not in",
        ),
    ],
)
def test_what_is_not_covered_is_left_alone_with_a_reason(block, why):
    model = nn.Sequential(block())
    kept = model[0]
    fastblocks.convert(model)
    assert model[0] is kept and why in fastblocks.conversion_report(model).left["0"]


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model[1].net, "2", nn.GELU(approximate="tanh")),
        lambda model: setattr(model[0].norm, "forward", lambda x: x),
        lambda model: setattr(model[0].attend, "forward", lambda q, k, v: v),
    ],
)
def test_what_computes_something_else_is_named(change):
    model = nn.ModuleList([attention(), FeedForward(C)])
    change(model)
    blocks = list(model)
    with pytest.raises(ValueError, match=r"(Attention|FeedForward) at '[01]': "):
        fastblocks.convert(model)
    assert list(model) == blocks


def test_other_modules_of_these_names_are_none_of_ours():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.qkv = nn.LayerNorm(C), nn.Linear(C, 3 * C)

    class FeedForward(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.LayerNorm(C), nn.Linear(C, C), nn.GELU(), nn.Linear(C, C))

    model = nn.ModuleList([Attention(), FeedForward()])
    fastblocks.convert(model)
    assert not fastblocks.conversion_report(model).rows


def test_a_missing_value_residual_is_named():
    block = ours.ValueResidualAttention(C, HEADS, D, learned_value_residual_mix=True)
    with pytest.raises(ValueError, match="value_residual is None"):
        block(torch.randn(1, T, C))
    with pytest.raises(ValueError, match=r"\(B, T, 24\), got \(13, 24\)"):
        block(torch.randn(T, C))
