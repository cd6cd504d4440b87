"""The rotary table is in no checkpoint: whatever is done to a module, it is there again, right, and in float32."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import fastblocks
from tests.compare import assert_close
from tests.modules.harness import randomized

pytestmark = pytest.mark.usefixtures("poison")


def block(**options) -> nn.Module:
    registers = {"num_register_tokens": 2, "window_size": 4, **options}
    return nn.Sequential(
        fastblocks.RoFormerBlock(16, 2, 12, rope_base=500),
        fastblocks.AttentionRegisterRoFormerBlock(16, 2, 12, **registers),
    )


def trained() -> tuple[nn.Module, dict, torch.Tensor, torch.Tensor]:
    """A module, its checkpoint, an input, and what it makes of it."""
    module, x = randomized(block()), torch.randn(2, 9, 16)
    return module, copy.deepcopy(module.state_dict()), x, module(x).detach()


def tables(module: nn.Module) -> list[torch.Tensor]:
    return [child.att.rope for child in module]


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return block()


def on_meta_buffers_too() -> nn.Module:
    """As accelerate's init_empty_weights(include_buffers=True): both ways to register are patched."""
    parameter, buffer = nn.Module.register_parameter, nn.Module.register_buffer

    def register_parameter(module, name, value):
        parameter(module, name, None if value is None else nn.Parameter(value.to("meta")))

    def register_buffer(module, name, value, persistent=True):
        buffer(module, name, value, persistent)
        module._buffers[name] = module._buffers[name].to("meta")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "register_parameter", register_parameter)
        patch.setattr(nn.Module, "register_buffer", register_buffer)
        module = block()
    assert all(tensor.is_meta for tensor in [*module.parameters(), *tables(module)])
    return module


def moved_there() -> nn.Module:
    return randomized(block()).to("meta")


def moved_there_from_half() -> nn.Module:
    return randomized(block()).bfloat16().to("meta").float()


MADE = [on_meta, on_meta_buffers_too, moved_there, moved_there_from_half, block]


def emptied(module: nn.Module, state: dict) -> nn.Module:
    module = module.to_empty(device="cpu")
    module.load_state_dict(state, strict=True)
    return module


def emptied_twice(module: nn.Module, state: dict) -> nn.Module:
    return emptied(module.to_empty(device="cpu").to("meta"), state)


def emptied_one_by_one(module: nn.Module, state: dict) -> nn.Module:
    """As FSDP: module by module, each without its children."""
    for child in module.modules():
        child.to_empty(device="cpu", recurse=False)
    module.load_state_dict(state, strict=True)
    return module


def assigned(module: nn.Module, state: dict) -> nn.Module:
    module.load_state_dict(state, strict=True, assign=True)
    return module


@pytest.mark.parametrize("filled", [emptied, emptied_twice, emptied_one_by_one, assigned])
@pytest.mark.parametrize("make", MADE)
def test_from_a_checkpoint(make, filled):
    _, state, x, want = trained()
    module = filled(make(), state)
    assert torch.equal(module(x), want)
    assert all(table.dtype == torch.float32 and not table.is_meta for table in tables(module))


@pytest.mark.parametrize("make", MADE)
def test_from_a_checkpoint_compiled(make):
    torch.compiler.reset()
    _, state, x, want = trained()
    compiled = torch.compile(assigned(make(), state), fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), want, 64)


def test_skip_init_says_that_it_is_not_for_blocks():
    with pytest.raises(RuntimeError, match="device"):
        torch.nn.utils.skip_init(fastblocks.RoFormerBlock, 16, 2, 12)


@pytest.mark.parametrize("through", ["half", "bfloat16", "double"])
def test_dtypes_do_not_round_it(through):
    module, _, x, want = trained()
    kept = [table.clone() for table in tables(module)]
    module = getattr(module, through)()
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(tables(module), kept, strict=True))
    assert module(x.to(module[0].att.c_attn.weight.dtype)).isfinite().all()
    if through == "double":
        assert torch.equal(module.float()(x), want)


def test_copies_keep_it():
    module, _, x, want = trained()
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    twins = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(saved, weights_only=False)]
    assert all(torch.equal(twin(x), want) for twin in twins)
    fresh = [copy.deepcopy(on_meta()), pickle.loads(pickle.dumps(on_meta()))]
    assert all(torch.equal(emptied(twin, module.state_dict())(x), want) for twin in fresh)


def test_share_memory_shares_it():
    module, _, x, want = trained()
    module.share_memory()
    assert all(table.is_shared() for table in tables(module))
    assert torch.equal(module(x), want)


def test_functional_call_takes_another_one():
    module, state, x, want = trained()
    other = {f"{i}.att.rope": fastblocks.functional.rope_table(14, 8, 7.0) for i in range(2)}
    assert not torch.allclose(torch.func.functional_call(module, other, (x,)), want)
    assert torch.equal(torch.func.functional_call(module, state, (x,)), want)
    filled = torch.func.functional_call(on_meta(), state, (x,))
    assert torch.equal(filled, want)


MOVES = {
    "to": lambda module: module.to("cpu", torch.bfloat16).to(torch.float32),
    "double": lambda module: module.double().float(),
    "to_empty": lambda module: module.to_empty(device="cpu"),
    "meta and back": lambda module: module.to("meta").to_empty(device="cpu"),
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("move", MOVES)
def test_a_table_of_ones_own_is_kept(move):
    module, _, x, _ = trained()
    angle = torch.outer(torch.arange(100.0, 114.0), 0.3 ** torch.arange(4.0)) ** 1.5
    own = torch.stack([angle.cos(), angle.sin()], -1)
    for child in module:
        child.att.rope = own
    state, want = copy.deepcopy(module.state_dict()), module(x)
    module = MOVES[move](module)
    module.load_state_dict(state)
    assert torch.equal(module(x), want)


@pytest.mark.parametrize("device", [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"])
def test_it_is_where_the_input_is(device):
    """Also where only parameters were moved."""
    _, state, x, want = trained()
    state = {name: value.to(device) for name, value in state.items()}
    module = assigned(on_meta(), state)
    assert_close(module(x.to(device)), want, 64)
    assert {table.device for table in tables(module)} == {torch.device(device)}
