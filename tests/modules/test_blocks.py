"""What every generator block must do, one case a block: numbers, gradients, dtypes, layouts, transforms, copies."""

import copy
import io
import pickle

import pytest
import torch

from tests.compare import assert_close
from tests.modules.cases import BLOCKS, CONVNEXT, RNN, ROFORMER, Case
from tests.modules.harness import check, check_low_precision, functional, tensors
from tests.reference import rows

every_block = pytest.mark.parametrize("case", BLOCKS, ids=lambda case: case.name)
# One of each kind where a test is slow.
few_blocks = pytest.mark.parametrize(
    "case",
    [ROFORMER[0], ROFORMER[2], RNN[1], RNN[6], CONVNEXT[2], CONVNEXT[7], CONVNEXT[8]],
    ids=lambda case: case.name,
)


def gradients(module, out):
    return torch.autograd.grad(sum(t.square().sum() for t in tensors(out)), list(module.parameters()))


@every_block
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward_and_every_gradient(case: Case, dtype):
    module = case.module().to(dtype)
    check(module, case.reference, case.input().to(dtype), terms=case.terms, call=case.call(module))


@every_block
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_module(case: Case, dtype):
    module = case.module().to(dtype)
    x = case.input().to(dtype)
    assert case.call(module)(x).dtype == dtype
    check_low_precision(module, case.reference, x, dtype=dtype, call=case.call(module))


@every_block
def test_cpu_autocast(case: Case):
    module, x = case.module().bfloat16().float(), case.input().bfloat16().float()

    def call(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return case.call(module)(x)

    check_low_precision(module, case.reference, x, dtype=torch.bfloat16, call=call)


@every_block
def test_gradients_by_finite_differences(case: Case):
    module = case.module().double()
    call, parameters = functional(module, case.keywords)
    x = case.input(batch=1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (x, *parameters), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (x, *parameters), fast_mode=True)


@every_block
def test_double_backward_in_float32(case: Case):
    """The gradient of a gradient penalty, against the same in float64."""
    module = case.module()
    x = case.input()
    penalties = []
    for dtype in (torch.float32, torch.float64):
        twin, leaf = copy.deepcopy(module).to(dtype), x.detach().clone().to(dtype).requires_grad_()
        (slope,) = torch.autograd.grad(case.call(twin)(leaf).square().sum(), leaf, create_graph=True)
        slope.square().mean().backward()
        penalties.append([leaf.grad, *(p.grad for p in twin.parameters() if p.grad is not None)])
    for got, want in zip(*penalties, strict=True):
        assert_close(got, want, 16 * case.terms, "second derivative")  # four times the depth of a backward pass


@every_block
def test_empty_batch(case: Case):
    module = case.module()
    x = case.input(batch=0, requires_grad=True)
    out = case.call(module)(x)
    assert out.shape == (0, *case.call(module)(case.input()).shape[1:])
    out.sum().backward()
    assert x.grad.shape == x.shape
    for name, parameter in module.named_parameters():
        assert parameter.grad is None or (parameter.grad == 0).all(), name


LAYOUTS = {
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "batch last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "sliced": lambda x: torch.cat((x, x), dim=-1)[..., : x.shape[-1]],
    "strided": lambda x: torch.stack((x, x), dim=-1)[..., 0],
}


@every_block
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_the_input(case: Case, layout):
    module, x = case.module(), case.input()
    unusual = LAYOUTS[layout](x.clone())
    kept = unusual.clone()
    want = case.call(module)(x)
    got = case.call(module)(unusual)
    assert_close(got, want, case.terms)
    for g, w in zip(gradients(module, got), gradients(module, want), strict=True):
        assert_close(g, w, case.terms, "gradient")
    assert torch.equal(unusual, kept), "the input was written to"


@every_block
def test_expanded_input(case: Case):
    module, x = case.module(), case.input(batch=1)
    expanded = x.expand(3, *x.shape[1:])
    assert_close(case.call(module)(expanded), case.call(module)(x.repeat(3, *[1] * (x.dim() - 1))), case.terms)


@every_block
def test_expanded_cotangent(case: Case):
    """`.sum().backward()` sends an expanded tensor of ones."""
    module, x = case.module(), case.input(requires_grad=True)
    out = case.call(module)(x)
    (from_sum,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
    (from_ones,) = torch.autograd.grad(out, x, torch.ones_like(out).contiguous())
    assert_close(from_sum, from_ones, case.terms)


@every_block
def test_vmap_is_a_loop(case: Case):
    module, x = case.module(), case.input(3)
    call = case.call(module)
    assert_close(torch.func.vmap(call)(x), torch.stack([call(item) for item in x]), case.terms)


@every_block
def test_gradient_per_sample(case: Case):
    module, x = case.module(), case.input(3, batch=1)
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(values, item):
        return torch.func.functional_call(module, values, (item,), case.keywords).square().sum()

    together = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i, item in enumerate(x):
        alone = gradients(module, case.call(module)(item))
        for (name, got), want in zip(together.items(), alone, strict=True):
            assert_close(got[i], want, case.terms, name)


@few_blocks
def test_compiles_without_a_graph_break(case: Case):
    torch.compiler.reset()
    module, x = case.module(), case.input(requires_grad=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    got, want = compiled(x, **case.keywords), case.call(module)(x)
    assert_close(got, want, case.terms)
    for g, w in zip(gradients(module, got), gradients(module, want), strict=True):
        assert_close(g, w, case.terms, "gradient")


@every_block
def test_copies_give_the_same(case: Case):
    module, x = case.module(), case.input()
    case.call(module)(x).sum().backward()
    want = case.call(module)(x)
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    twins = {
        "deepcopy": copy.deepcopy(module),
        "pickle": pickle.loads(pickle.dumps(module)),
        "torch.save": torch.load(saved, weights_only=False),
    }
    for name, twin in twins.items():
        assert torch.equal(case.call(twin)(x), want), name
        assert all(a is not b for a, b in zip(twin.parameters(), module.parameters(), strict=True)), name


@every_block
def test_state_dict_round_trip(case: Case):
    module, other, x = case.module(), case.make(), case.input()
    assert other.load_state_dict(module.state_dict(), strict=True).missing_keys == []
    assert torch.equal(case.call(other)(x), case.call(module)(x))


@every_block
def test_deterministic(case: Case):
    module, x = case.module(), case.input()
    first, second = case.call(module)(x), case.call(module)(x)
    assert torch.equal(first, second)
    for a, b in zip(gradients(module, first), gradients(module, second), strict=True):
        assert torch.equal(a, b)


@every_block
def test_frozen_weights(case: Case):
    """Only the input asks for a gradient, then only one weight does."""
    module, x = case.module(), case.input(requires_grad=True)
    (want,) = torch.autograd.grad(case.call(module)(x).square().sum(), x)
    module.requires_grad_(False)
    (got,) = torch.autograd.grad(case.call(module)(x).square().sum(), x)
    assert_close(got, want, case.terms)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(True)
        (alone,) = torch.autograd.grad(case.call(module)(x.detach()).square().sum(), parameter)
        assert alone.shape == parameter.shape and alone.isfinite().all(), name
        parameter.requires_grad_(False)


@pytest.mark.parametrize("case", [ROFORMER[0], RNN[0], CONVNEXT[8]], ids=lambda case: case.name)
def test_statistics_of_norms_are_not_float16(case: Case):
    """The square of 1000 is beyond float16, and that of 1e-4 below it."""
    norms = [child for child in case.module().half().modules() if hasattr(child, "scale")]
    assert norms
    for norm in norms:
        for size in (1000, 1e-2, 1e-4):
            x = (size * torch.randn(5, len(norm.scale))).half()
            assert_close(norm(x), rows.rms_norm(x.double(), norm.scale.double()), 1)
