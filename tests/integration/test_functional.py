"""Arguments of `fastblocks.functional`: what is refused, by name, and shapes at the edge of what is taken."""

import pytest
import torch

from fastblocks import functional as F
from tests.compare import assert_close


def ones(*size):
    return torch.ones(size)


CALLS = {
    "rms_norm": (F.rms_norm, [ones(2, 8), ones(8)], {}),
    "swiglu": (F.swiglu, [ones(2, 8), ones(2, 8)], {}),
    "swiglu_mlp": (F.swiglu_mlp, [ones(2, 8), ones(4, 8), ones(4, 8), ones(8, 4)], {}),
    "rnn_block": (
        F.rnn_block,
        [ones(1, 4, 6), ones(1, 1, 2, 9, 3), ones(1, 1, 2, 9, 3), ones(4, 6), ones(4, 6), ones(6, 4), ones(6), ones(6)],
        {},
    ),
    "roformer_block": (
        F.roformer_block,
        [ones(1, 6, 8), ones(24, 8), ones(8, 8), ones(4, 8), ones(4, 8), ones(8, 4), ones(8), ones(8),
         F.rope_table(6, 4)],
        {"n_head": 2},
    ),
    "rope_attention": (F.rope_attention, [ones(1, 6, 24), F.rope_table(6, 4)], {"n_head": 2}),
    "grouped_gru": (F.grouped_gru, [ones(1, 4, 6), ones(1, 2, 9, 3), ones(1, 2, 9, 3)], {}),
    "grouped_lstm": (F.grouped_lstm, [ones(1, 4, 6), ones(1, 2, 12, 3), ones(1, 2, 12, 3)], {}),
    "depthwise_conv_layer_norm": (
        F.depthwise_conv_layer_norm, [ones(1, 4, 9), ones(4, 1, 3), ones(4), ones(4), ones(4)], {"stride": (1,)},
    ),
    "bias_leaky_relu": (F.bias_leaky_relu, [ones(2, 4, 3), ones(4)], {}),
    "convnext_mlp": (F.convnext_mlp, [ones(1, 5, 4), ones(8, 4), ones(8), ones(4, 8), ones(4)], {}),
    "band_split": (F.band_split, [ones(1, 5, 3, 2), ones(2, 6, 4), ones(2, 4)], {"ranges": [(0, 3), (2, 5)]}),
    "band_unsplit": (
        F.band_unsplit, [ones(1, 4, 3, 2), ones(2, 4, 6), ones(2, 6)],
        {"ranges": [(0, 3), (2, 5)], "ola_window": ones(5)},
    ),
    "spectral_norm": (F.spectral_norm, [ones(3, 2), ones(3), ones(2)], {}),
}  # fmt: skip


LISTS = {
    "spectral_norms",
    "weight_norms",
    "discriminator_loss",
    "adversarial_loss",
    "feature_matching",
}  # what takes lists of tensors


def test_every_operation_is_called():
    assert set(CALLS) == set(F.__all__) - {"rope_table"} - LISTS


@pytest.mark.parametrize(
    "function, lists, said",
    [
        (F.spectral_norms, ([ones(3, 2)], [ones(3)], []), "1 and 1 and 0"),
        (F.spectral_norms, ([ones(3, 2)] * 2, [ones(3)] * 2, [ones(2), ones(3)]), r"\(3, 2\), \(3,\) and \(3,\)"),
        (F.weight_norms, ([ones(3, 2)], [ones(3)]), r"\(3, 2\) and \(3,\)"),
        (F.weight_norms, ([ones(3, 2)], [ones(3, 1).long()]), "g must be floating-point"),
        (F.discriminator_loss, ([ones(3)], [ones(3)] * 2), "at least one, got 1 and 2"),
        (F.discriminator_loss, ([ones(3)], [ones(3)], "wgan"), "kind must be .* got 'wgan'"),
        (F.adversarial_loss, ([],), "got 0"),
        (F.adversarial_loss, ([ones(3).long()],), "score must be floating-point"),
        (F.feature_matching, ([[ones(3)]], [[ones(3)], []]), r"\[1\] real maps and \[1, 0\]"),
        (F.feature_matching, ([[ones(3)]], [[ones(1, 3)]]), r"\(3,\) and \(1, 3\)"),
        (F.feature_matching, ([[]], [[]]), "at least one map"),
        (F.feature_matching, ([[ones(3).long()]], [[ones(3)]]), "real must be floating-point"),
    ],
)
def test_lists_that_do_not_fit(function, lists, said):
    with pytest.raises(ValueError, match=f".*{said}"):
        function(*lists)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_only_floating_point_numbers_are_taken(name, dtype):
    function, tensors, keywords = CALLS[name]
    function(*tensors, **keywords)
    for i in range(len(tensors)):
        wrong = [t.to(dtype) if i == j else t for j, t in enumerate(tensors)]
        with pytest.raises(ValueError, match=rf"{name}: \w+ must be floating-point, got {dtype}"):
            function(*wrong, **keywords)


def test_integers_of_a_state_and_of_registers():
    x, w, u = CALLS["grouped_gru"][1]
    with pytest.raises(ValueError, match=r"state must be floating-point, got torch\.int64"):
        F.grouped_gru(x, w, u, state=torch.zeros(1, 1, 6, dtype=torch.int64))
    qkv, rope = CALLS["rope_attention"][1]
    with pytest.raises(ValueError, match=r"register_qkv must be floating-point, got torch\.int32"):
        F.rope_attention(qkv[:, :4], rope, 2, register_qkv=torch.ones(1, 2, 24, dtype=torch.int32))


@pytest.mark.parametrize("leading", [(), (3,), (0,), (2, 3)], ids=str)
def test_rows_of_any_number_of_dimensions(leading):
    x, scale = torch.rand(*leading, 8), torch.randn(8)  # positive: of five numbers the error must not cancel
    gate, up, down = torch.rand(6, 8), torch.rand(6, 8), torch.rand(5, 6)
    want = F.swiglu(x.double() @ gate.T.double(), x.double() @ up.T.double()) @ down.T.double()
    assert_close(F.swiglu_mlp(x, gate, up, down), want, 14)
    assert F.rms_norm(x, scale).shape == F.swiglu(x, x).shape == x.shape


def test_a_number_is_not_a_row():
    with pytest.raises(ValueError, match=r"swiglu_mlp: x \(\)"):
        F.swiglu_mlp(torch.tensor(1.0), ones(4, 1), ones(4, 1), ones(1, 4))


@pytest.mark.parametrize("name", ["roformer_block", "rnn_block"])
def test_every_tensor_of_a_block_has_to_fit(name):
    function, tensors, keywords = CALLS[name]
    function(*tensors, **keywords)
    for i, tensor in enumerate(tensors):
        for wrong in (tensor[..., :-1], tensor[None]):
            if i == 0 and wrong.dim() == 3:  # the channels of x are what the others are held against
                wrong = torch.cat((tensor, tensor), -1)
            with pytest.raises(ValueError, match=name):
                function(*(wrong if i == j else t for j, t in enumerate(tensors)), **keywords)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"window": 0}, "window must be positive, or -1 for all, got 0"),
        ({"window": (3, -2)}, r"window must be \(left, right\), .* got \(3, -2\)"),
        ({"window": (1, 2, 3)}, r"window must be \(left, right\), .* got \(1, 2, 3\)"),
        ({"window": (3, 2), "causal": True}, r"causal=True, but the window \(3, 2\) reaches 2 tokens ahead"),
        ({"gate": ones(1, 6, 4)}, r"gate must be \(1, 6, 2\), got \(1, 6, 4\)"),
        ({"gate": torch.ones(1, 6, 2, dtype=torch.int32)}, r"gate must be floating-point, got torch\.int32"),
    ],
)
def test_what_attention_refuses(wrong, said):
    function, tensors, keywords = CALLS["rope_attention"]
    with pytest.raises(ValueError, match=f"rope_attention: {said}"):
        function(*tensors, **(keywords | wrong))


@pytest.mark.parametrize("rotary_dim", [0, -2, 3, 10])
def test_what_rope_table_refuses(rotary_dim):
    with pytest.raises(ValueError, match=f"rotary_dim must be even and at most the head size 8, got {rotary_dim}"):
        F.rope_table(4, 8, rotary_dim=rotary_dim)


def test_registers_and_window_of_a_block():
    function, tensors, keywords = CALLS["roformer_block"]
    for wrong, said in (
        ({"window": 0}, "window must be positive"),
        ({"registers": ones(1, 1, 7)}, r"registers must be \(1 or 1, R, 8\), got \(1, 1, 7\)"),
        ({"registers": ones(1, 1, 8)}, "1 registers and 6 tokens need a rope table of at least"),
        ({"return_registers": True}, "there are no registers"),
        ({"n_head": 3}, "an even D"),
    ):
        with pytest.raises(ValueError, match=f"roformer_block: .*{said}"):
            function(*tensors, **(keywords | wrong))
