"""How kernels are launched: on the tensors' device, by keyword, held once compiled. Triton's launcher is stood in for,
so no GPU is needed."""

import ast
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

import fastblocks.kernels
from fastblocks.kernels import launch as launching
from fastblocks.kernels.launch import Prepared, config, launch, recording
from fastblocks.kernels.runtime import tl, triton

SOURCES = sorted(Path(fastblocks.kernels.__path__[0]).rglob("*.py"))


def _example(x_ptr, y_ptr, n, stride, batch, eps, FLAG: tl.constexpr, BLOCK: tl.constexpr):
    tl.store(y_ptr + n, tl.load(x_ptr + stride) + eps + batch)


class Kernel(triton.runtime.jit.JITFunction):
    """Not interpreted, and nothing is compiled: notes who was called with what."""

    def __init__(self, held=True):
        super().__init__(_example, do_not_specialize=["batch"])
        self.plain, self.compiled, self.is_held = [], [], held

    def __getitem__(self, grid):
        def call(**arguments):
            self.plain.append((grid, arguments))
            compiled = type("Compiled", (), {"__getitem__": lambda _, g: lambda *a: self.compiled.append((g, a))})()
            if self.is_held:
                compiled.packed_metadata = ()
            return compiled

        return call


def on_gpu(index=0, dtype=torch.float32, address=256):
    """As much of a CUDA tensor as a launch looks at."""
    return SimpleNamespace(
        is_cuda=True, device=f"cuda:{index}", get_device=lambda: index, dtype=dtype, data_ptr=lambda: address
    )


@pytest.fixture
def current(monkeypatch):
    """The current device, and every device that was made current for a launch."""
    state = SimpleNamespace(device=0, entered=[])

    @contextmanager
    def device(name):
        state.entered.append(name)
        before, state.device = state.device, int(name[-1])
        yield
        state.device = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: state.device)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(launching.runtime, "INTERPRETED", False)
    for name in ("_held", "_binders", "_makers"):
        monkeypatch.setattr(launching, name, {})
    return state


CONFIG = config(4, 2, BLOCK=64)


def call(kernel, like=None, chosen=CONFIG, **changes):
    like = on_gpu() if like is None else like
    arguments = {"x_ptr": like, "y_ptr": like, "n": 7, "stride": 48, "batch": 5, "eps": 1e-5, "FLAG": True}
    launch(kernel, (3,), chosen, like=like, **(arguments | changes))


def test_a_second_launch_binds_nothing(current):
    kernel = Kernel()
    call(kernel)
    call(kernel, n=9, stride=96, batch=16, eps=2.0)
    assert len(kernel.plain) == 1 and len(kernel.compiled) == 1
    grid, arguments = kernel.plain[0]
    assert grid == (3,) and arguments["num_warps"] == 4 and arguments["num_stages"] == 2 and arguments["BLOCK"] == 64
    grid, values = kernel.compiled[0]
    assert grid[:3] == (3, 1, 1) and values[2:] == (9, 96, 16, 2.0, True, 64)  # all arguments, in the kernel's order


CHANGES = {
    "an integer of 1": {"n": 1},
    "a multiple of 16": {"n": 16},
    "no multiple of 16": {"stride": 47},
    "64 bits": {"n": 2**31},
    "64 bits, not specialised": {"batch": 2**31},
    "a constant": {"FLAG": False},
    "no pointer": {"x_ptr": None},
    "alignment": {"x_ptr": on_gpu(address=8)},
    "dtype": {"y_ptr": on_gpu(dtype=torch.bfloat16)},
    "warps": {"chosen": config(8, 2, BLOCK=64)},
    "stages": {"chosen": config(4, 3, BLOCK=64)},
    "tile": {"chosen": config(4, 2, BLOCK=32)},
    "device": {"like": on_gpu(1)},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_what_triton_specialises_on_is_compiled_again(current, changes):
    kernel = Kernel()
    call(kernel)
    call(kernel, **changes)
    assert len(kernel.plain) == 2 and not kernel.compiled
    call(kernel, **changes)
    call(kernel)
    assert len(kernel.plain) == 2 and len(kernel.compiled) == 2


def test_what_is_not_compiled_yet_is_not_held(current):
    kernel = Kernel(held=False)
    call(kernel), call(kernel)
    assert len(kernel.plain) == 2 and not kernel.compiled


NUMBERS = {"n": 7, "stride": 48, "batch": 5, "eps": 1e-5, "FLAG": True}


def test_a_prepared_launch_launches_the_same(current):
    """Once with the compiler, then without, with what `launch` gives; and what launch holds is not compiled again."""
    kernel, x = Kernel(), on_gpu()
    prepared = Prepared(kernel, (3,), CONFIG, **NUMBERS)
    for _ in range(3):
        prepared(x, x_ptr=x, y_ptr=None)
    call(kernel, x_ptr=x, y_ptr=None)
    Prepared(kernel, (4,), CONFIG, **NUMBERS | {"n": 9})(x, x_ptr=x, y_ptr=None)
    assert len(kernel.plain) == 1 and kernel.plain[0][1] == {"x_ptr": x, "y_ptr": None, **NUMBERS, **CONFIG.keywords()}
    values = [(grid[:3], arguments) for grid, arguments in kernel.compiled]
    right = (x, None, *NUMBERS.values(), 64)
    assert values == [((3, 1, 1), right)] * 3 + [((4, 1, 1), (x, None, 9, *right[3:]))]


PREPARED_CHANGES = {name: CHANGES[name] for name in ("no pointer", "alignment", "dtype", "device")}


@pytest.mark.parametrize("changes", PREPARED_CHANGES.values(), ids=PREPARED_CHANGES)
def test_a_prepared_launch_tells_tensors_apart(current, changes):
    kernel, x = Kernel(), on_gpu()
    prepared = Prepared(kernel, (3,), CONFIG, **NUMBERS)
    others = {"like": x, "x_ptr": x, "y_ptr": x} | changes
    for like in (x, x):
        prepared(like, x_ptr=x, y_ptr=x)
    for _ in range(2):
        prepared(**others)
    assert len(kernel.plain) == 2 and len(kernel.compiled) == 2
    assert current.entered == (["cuda:1"] * 2 if "like" in changes else []) and current.device == 0


def test_a_prepared_launch_is_seen_by_who_stands_in_and_by_recording(current):
    kernel, x = Kernel(), on_gpu()
    prepared = Prepared(kernel, (3,), CONFIG, **NUMBERS)
    prepared(x, x_ptr=x, y_ptr=x)
    kernel.pre_run_hooks.append(lambda *a, **k: None)
    prepared(x, x_ptr=x, y_ptr=x)
    assert len(kernel.plain) == 2 and not kernel.compiled
    meta = torch.empty(64, device="meta")
    with recording("sm_90") as cases:
        prepared(meta, x_ptr=meta, y_ptr=None)
    assert len(kernel.plain) == 2 and cases[0].constants == {"y_ptr": None, "FLAG": True, "BLOCK": 64}


def test_launches_go_to_the_tensors_device(current):
    kernel = Kernel()
    call(kernel, like=on_gpu(1))
    assert current.entered == ["cuda:1"] and current.device == 0
    call(kernel, like=on_gpu(0))
    assert current.entered == ["cuda:1"] and len(kernel.plain) == 2  # a compiled kernel belongs to a device
    call(kernel, like=on_gpu(1))
    assert current.entered == ["cuda:1", "cuda:1"] and len(kernel.compiled) == 1


def test_who_stands_in_for_tritons_launcher_is_asked(current, monkeypatch):
    """A fault checker or a profiler that patches `run`, and hooks before a run, see every launch."""
    kernel = Kernel()
    call(kernel), call(kernel)
    assert len(kernel.plain) == 1
    with monkeypatch.context() as patched:
        patched.setattr(triton.runtime.jit.JITFunction, "run", lambda self, *a, **k: None)
        call(kernel), call(kernel)
    assert len(kernel.plain) == 3
    call(kernel)
    assert len(kernel.plain) == 3
    kernel.pre_run_hooks.append(lambda *a, **k: None)
    call(kernel)
    assert len(kernel.plain) == 4


@st.composite
def arguments(draw):
    tensor = st.sampled_from(
        [None, *(torch.zeros(64, dtype=d)[o:] for d in (torch.float32, torch.float16) for o in (0, 1))]
    )
    number = st.one_of(st.sampled_from([0, 1, 16, 2**31 - 1, 2**31, -16]), st.integers(-5, 2**33))
    names = {"x_ptr": tensor, "y_ptr": tensor, "n": number, "stride": number, "batch": number}
    names |= {"eps": st.floats(0, 2), "FLAG": st.booleans(), "BLOCK": st.sampled_from([16, 32])}
    return {name: draw(strategy) for name, strategy in names.items()}


@given(arguments(), arguments())
def test_calls_that_share_a_compiled_kernel_are_specialised_alike(first, second):
    """The key is at least as fine as Triton's own."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend

    kernel = Kernel()
    backend = make_backend(GPUTarget("cuda", 90, 32))
    specialise = triton.runtime.jit.create_function_from_signature(kernel.signature, kernel.params, backend)
    bind = launching._binder(kernel, first)
    if bind(0, **first)[0] == bind(0, **second)[0]:
        assert specialise(**first)[1] == specialise(**second)[1]
    assert list(bind(0, **first)[1]) == [first[name] for name in kernel.arg_names]


def test_recording_notes_what_would_be_compiled():
    kernel = Kernel()
    x = torch.empty(64, dtype=torch.bfloat16, device="meta")
    with recording("sm_90", "example") as cases:
        call(kernel, like=x, y_ptr=None, x_ptr=x[1:], n=1, batch=1)
    (case,) = cases
    assert not kernel.plain and case.label == "example: example" and case.config == config(4, 2, BLOCK=64)
    assert case.signature["x_ptr"] == "*bf16" and case.divisible == ("stride",)
    assert case.constants == {"y_ptr": None, "n": 1, "FLAG": True, "BLOCK": 64}
    assert case.signature["batch"] == "i32"  # not specialised


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: "/".join(path.parts[-2:]))
def test_every_kernel_is_launched_by_launch(path):
    """`_some_kernel[grid](…)` stands nowhere; and kernels get every argument by name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
            name = getattr(node.func.value, "id", "")
            assert not name.endswith("_kernel"), f"{path.name}:{node.lineno} launches {name} by itself"
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "launch":
            assert len(node.args) == 3 and any(k.arg == "like" for k in node.keywords), f"{path.name}:{node.lineno}"
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("Prepared", "prepared"):
            assert len(node.args) == {"Prepared": 3, "prepared": 1}[node.func.id], f"{path.name}:{node.lineno}"
