"""The adapter of x-transformers' attention: rotation in pairs or halves, of all or some channels of a head."""

import copy
import importlib
import io
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastblocks
from fastblocks.convert.x_transformers import USUAL, USUAL_ATTEND
from fastblocks.convert.x_transformers import Attention as Ours
from tests.integration.converted import assert_follows
from tests.modules.harness import check

HEADS, D, C, T = 2, 16, 24, 13
IN_PAIRS = True  # how the stand-in rotates


@dataclass
class Intermediates:
    values: Tensor | None = None
    cached_kv: tuple[Tensor, Tensor] | None = None


class Attend(nn.Module):
    """Names of x-transformers' class, and its attention."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.scale, self.dropout, self.attn_fn = None, dropout, partial(F.softmax, dim=-1)

    def forward(self, q, k, v, mask, causal, past):
        scores = q @ k.mT * q.shape[-1] ** -0.5
        age = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])
        unseen = (age < 0 if causal else age != age) | (age > (len(age) if past is None else past))
        scores = scores.masked_fill(unseen, -1e9)
        return self.attn_fn(scores if mask is None else scores.masked_fill(~mask[:, None, None], -1e9)) @ v


def rotate_half(x):
    pairs = x.unflatten(-1, (-1, 2) if IN_PAIRS else (2, -1))
    a, b = pairs.unbind(-1 if IN_PAIRS else -2)
    return torch.stack((-b, a), dim=-1 if IN_PAIRS else -2).flatten(-2)


def apply_rotary_pos_emb(t, freqs, scale=1):
    freqs = freqs[..., -t.shape[-2] :, :]
    turned, rest = t[..., : freqs.shape[-1]], t[..., freqs.shape[-1] :]
    turned = (turned * freqs.cos() + rotate_half(turned) * freqs.sin()) * scale
    return torch.cat((turned, rest), dim=-1).to(t)


class Attention(nn.Module):
    """Names, state_dict and formula of x-transformers' attention, as far as the adapter goes."""

    def __init__(self, dim, dim_head, heads, flash=False, dropout=0.0, causal=False, max_attend_past=None):
        super().__init__()
        self.heads, self.causal, self.max_attend_past = heads, causal, max_attend_past
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, heads * dim_head, bias=False) for _ in range(3))
        self.attend, self.to_out = Attend(dropout), nn.Linear(heads * dim_head, dim, bias=False)

    def forward(
        self, x, context=None, mask=None, rotary_pos_emb=None, return_intermediates=False, value_residual=None, pos=None
    ):
        source = x if context is None else context
        q, k, v = (
            linear(t).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear, t in ((self.to_q, x), (self.to_k, source), (self.to_v, source))
        )
        cached = k, v
        if rotary_pos_emb is not None:
            q, k = (apply_rotary_pos_emb(t, *rotary_pos_emb) for t in (q, k))
        y = self.attend(q, k, v, mask, self.causal, self.max_attend_past)
        y = self.to_out(y.transpose(1, 2).flatten(2))
        return (y, Intermediates(v, cached)) if return_intermediates else y

    def only_here(self):
        return "a method of the original's"


def sources(which):
    """The class, and the layout of its rotation."""
    if which != "package":
        return Attention, which
    try:
        module = importlib.import_module("x_transformers.x_transformers")
    except ImportError as missing:
        pytest.skip(f"x-transformers is not installed (the extra `adapters`): {missing}")
    return module.Attention, "pairs" if module.rotate_half(torch.arange(4.0))[1] == 0 else "halves"


@pytest.fixture(params=["pairs", "halves", "package"])
def source(request, monkeypatch):
    monkeypatch.setitem(globals(), "IN_PAIRS", request.param != "halves")
    return sources(request.param)


def rotary(layout, rotated=D, length=T, dtype=torch.float32):
    angles = torch.outer(torch.arange(length, dtype=dtype), 0.7 ** torch.arange(rotated // 2, dtype=dtype))
    return (angles.repeat_interleave(2, dim=-1) if layout == "pairs" else angles.repeat(1, 2))[None], 1.0


def pair(cls, **options):
    """The original, and its converted copy."""
    theirs = nn.Sequential(cls(C, dim_head=D, heads=HEADS, **options))
    ours = fastblocks.convert(copy.deepcopy(theirs))
    return theirs[0], ours[0]


@pytest.mark.parametrize("rotated", [D, D // 2, 2])
@pytest.mark.parametrize(
    "options", [{}, {"max_attend_past": 3}, {"causal": True}, {"causal": True, "max_attend_past": 4, "flash": True}]
)
def test_attention_is_swapped(source, options, rotated):
    cls, layout = source
    theirs, ours = pair(cls, **options)
    assert isinstance(ours, Ours) and isinstance(ours, cls)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in theirs.named_modules()]
    x = torch.randn(2, T, C)

    def call(block, x):
        turn = rotary(layout, rotated, T + 2, x.dtype)
        y, intermediates = block(x, rotary_pos_emb=turn, return_intermediates=True, pos=torch.arange(T))
        return y, intermediates.values, *intermediates.cached_kv

    assert_follows(ours, theirs, x, call=call)
    assert "rope_attention: eager (the input" in fastblocks.explain(ours, x, rotary_pos_emb=rotary(layout, rotated))


def test_other_calls_are_the_originals_own(source):
    cls, layout = source
    theirs, ours = pair(cls)
    x, turn = torch.randn(2, T, C), rotary(layout)
    mask = torch.arange(T).expand(2, T) < torch.tensor([[T], [T - 4]])
    several = turn[0] * torch.tensor([1.0, 0.5])[:, None, None]  # each clip's own
    calls = {
        "without rotary positions": {},
        "with context": {"context": x[:, :5]},
        "with mask": {"mask": mask, "rotary_pos_emb": turn},
        "differ within the batch": {"rotary_pos_emb": (several if cls is not Attention else several[:, None], 1.0)},
        "xpos": {"rotary_pos_emb": (turn[0], torch.full((1, T, 1), 2.0))},
    }
    for why, named in calls.items():
        assert torch.equal(ours(x, **named), theirs(x, **named))
        assert why in fastblocks.explain(ours, x, **named)


@pytest.mark.parametrize("child", ["attend", "to_q", "to_out"])
def test_children_with_hooks_are_called(source, child):
    cls, layout = source
    theirs, ours = pair(cls)
    x, called = torch.randn(2, T, C), []
    getattr(ours, child).register_forward_hook(lambda *_: called.append(child))
    torch.testing.assert_close(ours(x, rotary_pos_emb=rotary(layout)), theirs(x, rotary_pos_emb=rotary(layout)))
    assert called == [child]


def test_copies_and_pickles(source):
    cls, layout = source
    theirs, ours = pair(cls)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    x, turn = torch.randn(2, T, C), rotary(layout)
    for twin in (copy.deepcopy(ours), torch.load(file, weights_only=False)):
        assert type(twin) is type(ours)
        assert torch.equal(twin(x, rotary_pos_emb=turn), ours(x, rotary_pos_emb=turn))
        assert twin.to_q.weight is not ours.to_q.weight
    assert fastblocks.convert(nn.Sequential(ours))[0] is ours
    assert cls is not Attention or ours.only_here() == theirs.only_here()


def reference(state, x, angles):
    q, k, v = (
        F.linear(x, state[f"to_{name}.weight"]).unflatten(-1, (HEADS, D)).transpose(1, 2) for name in ("q", "k", "v")
    )
    q, k = (apply_rotary_pos_emb(t, angles.to(x.dtype)) for t in (q, k))
    y = (q @ k.mT * D**-0.5).softmax(-1) @ v
    return F.linear(y.transpose(1, 2).flatten(2), state["to_out.weight"])


@pytest.mark.parametrize("layout", ["pairs", "halves"])
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_numbers_and_gradients(backend, layout, monkeypatch):
    monkeypatch.setitem(globals(), "IN_PAIRS", layout == "pairs")
    _, ours = pair(Attention)
    angles = rotary(layout, D // 2)[0]

    class Bound(nn.Module):
        def __init__(self):
            super().__init__()
            self.__dict__["_modules"] = dict(ours._modules)

        def forward(self, x):
            return ours(x, rotary_pos_emb=(angles, 1.0))

    with fastblocks.use_backend(backend):
        check(Bound(), lambda state, x: reference(state, x, angles), torch.randn(2, T, C), terms=3 * HEADS * D)


@pytest.mark.parametrize("name", [*USUAL, *(f"attend.{name}" for name in USUAL_ATTEND)])
def test_what_is_not_covered_is_left_alone_with_a_reason(name):
    model = nn.Sequential(Attention(C, D, HEADS))
    holder, attribute = (model[0].attend, name[7:]) if name.startswith("attend.") else (model[0], name)
    setattr(holder, attribute, 1)
    kept = model[0]
    fastblocks.convert(model)
    words = (USUAL_ATTEND if holder is kept.attend else USUAL)[attribute][1]
    assert model[0] is kept and fastblocks.conversion_report(model).left["0"] == words


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"kv_heads": 1}, "share 1 heads of keys"),
        ({"qk_norm": True}, "qk_norm"),
        ({"sigmoid": True}, "another function than softmax"),
        ({"rotate_num_heads": 1}, "it rotates 1 of 2"),
        ({"value_dim_head": 8}, "'to_v.weight' is"),
        ({"learned_value_residual_mix": True}, "'to_value_residual_mix.0.weight' is only in it"),
        ({"on_attn": True}, "on_attn"),
        ({"laser": True}, "laser"),
        ({"head_scale": True}, "head_scale"),
        ({"gate_values": True}, "gate_values"),
        ({"softclamp_logits": True}, "softclamp_logits"),
        ({"num_mem_kv": 2}, "num_mem_kv"),
    ],
)
def test_settings_of_the_package_that_are_not_covered(options, why):
    cls, _ = sources("package")
    model = nn.Sequential(cls(C, dim_head=D, heads=HEADS, **options))
    fastblocks.convert(model)
    assert why in fastblocks.conversion_report(model).left["0"]


def test_what_computes_something_else_is_named():
    model = nn.Sequential(Attention(C, D, HEADS))
    forward = Attend.forward
    model[0].attend.__class__ = type("Attend", (Attend,), {"forward": lambda *inputs: 1.1 * forward(*inputs)})
    with pytest.raises(ValueError, match="Attention at '0': in training its forward computes something else"):
        fastblocks.convert(model)


def test_a_decoder_of_the_package_generates_with_its_cache():
    sources("package")
    theirs = importlib.import_module("x_transformers")
    layers = theirs.Decoder(dim=64, depth=2, heads=2, attn_dim_head=32, rotary_pos_emb=True)
    model = theirs.TransformerWrapper(num_tokens=50, max_seq_len=40, attn_layers=layers).eval()
    converted = fastblocks.convert(copy.deepcopy(model))
    assert len(fastblocks.conversion_report(converted).swapped) == 2
    prompt = torch.arange(7)[None]
    assert_follows(converted, model, call=lambda net: net(prompt), gradients=False)
    tokens = [
        theirs.AutoregressiveWrapper(net).generate(prompt, 20, temperature=0.0, cache_kv=True)
        for net in (model, converted)
    ]
    assert torch.equal(*tokens)


@pytest.mark.parametrize("flash", [True, False])
def test_a_whole_encoder_of_the_package(flash):
    sources("package")
    encoder = importlib.import_module("x_transformers").Encoder
    model = encoder(dim=64, depth=2, heads=2, attn_dim_head=32, rotary_pos_emb=True, attn_flash=flash, ff_glu=True)
    converted = fastblocks.convert(copy.deepcopy(model))
    assert len(fastblocks.conversion_report(converted).swapped) == 2
    x, mask = torch.randn(2, 20, 64), torch.arange(20).expand(2, 20) < torch.tensor([[20], [15]])
    for named in ({}, {"mask": mask}):
        assert_follows(converted, model, x, call=lambda net, x, named=named: net(x, **named), jointly=True)
