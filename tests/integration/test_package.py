"""The package as a whole: what an import costs and brings, who imports whom, and how the backend is chosen."""

import ast
import importlib
import inspect
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import fastblocks
import fastblocks.kernels as kernel_package
from fastblocks import backend

ROOT = Path(fastblocks.__file__).parent
FILES = sorted(path for path in ROOT.rglob("*.py") if "kernels" not in path.relative_to(ROOT).parts)

CLASSES = {
    "generator.RoFormerBlock": ["RoFormerBlock"],
    "generator.AttentionRegisterRoFormerBlock": ["AttentionRegisterRoFormerBlock"],
    "generator.RNNBlock": ["RNNBlock", "GroupedRNN"],
    "generator.ConvNeXt1DBlock": ["ConvNeXt1DBlock"],
    "generator.ConvNeXt2DBlock": ["ConvNeXt2DBlock"],
    "discriminator.MultiPeriodDiscriminator": ["MultiPeriodDiscriminator"],
    "discriminator.MultiScaleDiscriminator": ["MultiScaleDiscriminator"],
    "discriminator.EnsembleDiscriminator": ["EnsembleDiscriminator"],
    "discriminator.MultiResolutionDiscriminator": ["MultiResolutionDiscriminator"],
    "discriminator.MultiFrequencyDiscriminator": ["MultiFrequencyDiscriminator"],
    "spectral_ops": ["Fourier", "Band"],
}


def python(code, folder=ROOT.parent, exit_code=0, **environment):
    """Run code in a fresh process, in a folder, and return what it prints."""
    clean = {
        name: value for name, value in os.environ.items() if name not in ("FASTBLOCKS_BACKEND", "TRITON_INTERPRET")
    }
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, env=clean | environment
    )
    assert run.returncode == exit_code, run.stderr
    return run.stdout.strip()


# --- import


@pytest.mark.parametrize("module, names", CLASSES.items())
def test_every_class_has_two_addresses(module, names):
    for name in names:
        assert getattr(importlib.import_module(f"fastblocks.{module}"), name) is getattr(fastblocks, name)
        assert name in fastblocks.__all__


@pytest.mark.parametrize("package", ["generator", "discriminator"])
def test_packages_stay_empty(package):
    """A class re-exported there would shadow its file."""
    assert (ROOT / package / "__init__.py").read_text().strip() == ""
    assert (
        python(
            "import fastblocks, types; "
            "print(isinstance(fastblocks.generator.RoFormerBlock, types.ModuleType), "
            "fastblocks.generator.RoFormerBlock.RoFormerBlock is fastblocks.RoFormerBlock)"
        )
        == "True True"
    )


USE_EVERYTHING = """
import torch, fastblocks
registers = {"num_register_tokens": 2, "window_size": 3}
fastblocks.AttentionRegisterRoFormerBlock(8, 2, 9, **registers)(torch.randn(1, 9, 8)).sum().backward()
fastblocks.RNNBlock(8, 1, 2)(torch.randn(1, 5, 8)).sum().backward()
fastblocks.ConvNeXt1DBlock(3, 1, 4, 4)(torch.randn(1, 4, 9)).sum().backward()
fastblocks.MultiFrequencyDiscriminator(1, [32])(torch.randn(1, 1, 100))
band = fastblocks.Band(8000, 128, 8, 2, 4)
band.unsplit(band.split(fastblocks.Fourier(128, 32).stft(torch.randn(1, 400))))
"""


def test_import_leaves_triton_alone():
    """Against torch alone, which may import it by itself; and a CPU path does not need it either."""
    count = "import sys; print(sum(name.split('.')[0] == 'triton' for name in sys.modules))"
    by_torch = python("import torch; " + count)
    assert python("import fastblocks; " + count) == by_torch
    assert python("import fastblocks, sys; print('fastblocks.kernels.runtime' in sys.modules)") == "False"


BLOCK_TRITON = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
sys.meta_path.insert(0, Blocked())
"""


def test_everything_works_without_triton():
    assert python(BLOCK_TRITON + USE_EVERYTHING + "print('done')") == "done"


def copy_of_the_package(folder, kernels):
    shutil.copytree(ROOT, folder / "fastblocks", ignore=shutil.ignore_patterns("kernels", "__pycache__"))
    if kernels:
        shutil.copytree(Path(kernel_package.__path__[0]), folder / "kernels")


RUN_ON_KERNELS = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]
import torch, fastblocks.kernels
fastblocks.use_backend("triton")
print(fastblocks.kernels.__file__, fastblocks.__file__)
print(fastblocks.explain(fastblocks.RNNBlock(8, 1, 2), torch.randn(1, 5, 8)))
"""


def test_a_clone_that_is_not_installed_has_its_kernels(tmp_path):
    copy_of_the_package(tmp_path, kernels=True)
    said = python(RUN_ON_KERNELS, tmp_path, TRITON_INTERPRET="1")
    assert str(tmp_path) in said and "rnn_block: triton" in said


def test_a_package_without_its_kernels_says_so(tmp_path):
    copy_of_the_package(tmp_path, kernels=False)
    code = """
import torch, fastblocks, warnings
from fastblocks import backend
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    print(backend._kernel_runtime()[1], len(caught))
"""
    code = RUN_ON_KERNELS.split("import torch")[0] + code
    assert python(code, tmp_path).startswith("this installation of fastblocks is incomplete")
    assert python(code, tmp_path).endswith(" 1")


def test_asking_for_triton_without_it_says_so():
    code = (
        BLOCK_TRITON
        + """
import torch, fastblocks
fastblocks.use_backend("triton")
try:
    fastblocks.RoFormerBlock(8, 2, 9)(torch.randn(1, 9, 8))
except RuntimeError as problem:
    print(problem)
"""
    )
    said = python(code)
    assert "Triton cannot be imported" in said and "'triton' is selected" in said


def test_import_is_quick():
    """What fastblocks adds to the import of torch and numpy, in CPU time, the quickest of three."""
    code = (
        "import time, torch, numpy; start = time.process_time(); import fastblocks; print(time.process_time() - start)"
    )
    assert min(float(python(code)) for _ in range(3)) < 0.5


def test_import_changes_nothing_global():
    code = """
import torch, warnings
def state():
    return (torch.get_default_dtype(), torch.get_num_threads(), torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.benchmark, torch.initial_seed(),
            torch.random.get_rng_state().sum().item(), list(warnings.filters))
before = state()
import fastblocks
print(state() == before)
"""
    assert python(code) == "True"


def test_version():
    parts = fastblocks.__version__.split(".")
    assert len(parts) == 3 and all(part.isdigit() for part in parts)


# --- constructors: the same arguments in the same order with the same defaults as the originals

BANDS = [(0, 0.1), (0.1, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1)]
ROFORMER = ["n_embd", "n_head", "max_seq_len", ("rope_base", 10000)]
RECURRENT = ["n_embd", "n_layer", "n_groups", ("rnn_type", "gru"), ("bidirectional", False)]
CONVNEXT = ["kernel_size", "stride", "input_dim", "output_dim", ("mode", "normal"), ("variant", "convnext")]
RATE, NORM = ("sample_rate", 48000), ("norm", True)

CONSTRUCTORS = {
    "RoFormerBlock": ROFORMER,
    "AttentionRegisterRoFormerBlock": [*ROFORMER, ("num_register_tokens", 0), ("window_size", -1)],
    "RNNBlock": RECURRENT,
    "GroupedRNN": RECURRENT,
    "ConvNeXt1DBlock": CONVNEXT,
    "ConvNeXt2DBlock": CONVNEXT,
    "MultiPeriodDiscriminator": [("nch", 1), RATE, ("periods", [2, 3, 5, 7, 11]), NORM],
    "MultiScaleDiscriminator": ["sample_rate", ("downsample_rates", [2, 4]), ("nch", 1), NORM],
    "MultiResolutionDiscriminator": [
        ("nch", 1), RATE, ("window_lengths", [2048, 1024, 512]), ("hop_factor", 0.25), ("bands", BANDS), NORM,
        ("hidden_channels", 32),
    ],
    "MultiFrequencyDiscriminator": ["nch", "window_sizes", ("hidden_channels", 8), RATE, NORM],
    "EnsembleDiscriminator": ["discriminators"],
    "Fourier": [("n_fft", 2048), ("hop_length", 441)],
    "Band": ["sr", "n_fft", "bands_num", "in_channels", "out_channels", ("scale", "mel")],
}  # fmt: skip
CALLS = {
    "AttentionRegisterRoFormerBlock": ["x", ("registers", None), ("return_registers", False)],
    "GroupedRNN": ["x", ("state", None), ("return_state", False)],
    "ConvNeXt1DBlock": ["x", ("original_shape", None)],
    "ConvNeXt2DBlock": ["x", ("original_shape", None)],
}


def as_lists(value):
    return [as_lists(item) for item in value] if isinstance(value, list | tuple) else value


def arguments_of(function):
    """Names, with the default where there is one; sequences as lists."""
    return [
        name if parameter.default is parameter.empty else [name, as_lists(parameter.default)]
        for name, parameter in inspect.signature(function).parameters.items()
        if name != "self"
    ]


@pytest.mark.parametrize("name, want", CONSTRUCTORS.items())
def test_constructors(name, want):
    assert arguments_of(getattr(fastblocks, name)) == as_lists(want)


@pytest.mark.parametrize("name, want", CALLS.items())
def test_calls(name, want):
    assert arguments_of(getattr(fastblocks, name).forward) == as_lists(want)


# --- who imports whom


def imports(path):
    """Names of all modules that a file imports, functions' own imports included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(name):
    """Which floor of the house a module belongs to: imports only point to lower floors, or stay on their own."""
    parts = name.split(".")[1:]
    floors = {"generator": 4, "discriminator": 4, "spectral_ops": 4, "functional": 3, "eager": 1, "kernels": 0}
    if not parts or parts[0] not in {*floors, "convert", "backend"}:
        return 6
    return {"convert": 5, "backend": 2}.get(parts[0], floors.get(parts[0]))


def name_of(path):
    return ".".join(["fastblocks", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nobody_but_the_kernels_imports_triton(path):
    assert not [name for name in imports(path) if name.split(".")[0] == "triton"]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_downwards(path):
    own = room(name_of(path))
    for name in imports(path):
        if name.startswith("fastblocks."):
            assert room(name) <= own, f"{name_of(path)} imports {name}"
    if own == 4:
        assert not [name for name in imports(path) if name.startswith("fastblocks.kernels")], (
            "a module imports a kernel"
        )


def test_kernels_import_no_module():
    paths = list(Path(kernel_package.__path__[0]).rglob("*.py"))
    assert len(paths) > 10
    for path in paths:
        for name in imports(path):
            allowed = not name.startswith("fastblocks.") or name.startswith(("fastblocks.kernels", "fastblocks.eager"))
            assert allowed or name.startswith("fastblocks.backend"), f"{path.name} imports {name}"


def test_one_reader_of_the_environment():
    readers = [path.name for path in FILES if "os.environ" in path.read_text() or "getenv" in path.read_text()]
    assert readers == ["backend.py"]


# --- backend


def attention():
    x = torch.randn(1, 6, 24)
    return fastblocks.functional.rope_attention(x, fastblocks.functional.rope_table(6, 4), 2)


def selected():
    return fastblocks.explain(attention)


def test_backend_for_a_block_and_from_here_on():
    assert backend.selected() == "auto"
    with fastblocks.use_backend("eager"):
        assert "'eager' is selected" in selected()
        with fastblocks.use_backend("auto"):
            assert "'eager' is selected" not in selected()
        assert "'eager' is selected" in selected()
    assert "'eager' is selected" not in selected()
    fastblocks.use_backend("eager")
    assert "'eager' is selected" in selected()


def test_backend_is_restored_after_an_error():
    with pytest.raises(KeyError), fastblocks.use_backend("eager"):
        raise KeyError
    assert backend.selected() == "auto"


def test_backends_of_threads_that_overlap():
    """Neither sees the other's block, and nothing is left behind."""
    inside, leave = threading.Barrier(2), threading.Barrier(2)
    seen = {}

    def run(name):
        with fastblocks.use_backend(name):
            inside.wait(10)
            seen[name] = backend.selected()
            leave.wait(10)
        seen[f"after {name}"] = backend.selected()

    threads = [threading.Thread(target=run, args=(name,)) for name in ("eager", "triton")]
    for thread in threads:
        thread.start()
    inside_the_blocks = backend.selected()
    for thread in threads:
        thread.join()
    assert seen == {"eager": "eager", "triton": "triton", "after eager": "auto", "after triton": "auto"}
    assert inside_the_blocks == backend.selected() == "auto"


def test_backend_object_is_entered_twice_and_decorates():
    chosen = fastblocks.use_backend("eager")
    with chosen, fastblocks.use_backend("triton"), chosen:
        assert backend.selected() == "eager"
    assert backend.selected() == "auto"

    @fastblocks.use_backend("eager")
    def decorated():
        return backend.selected()

    assert backend.selected() == "auto" and decorated() == decorated() == "eager" and backend.selected() == "auto"


def test_backend_of_the_process_is_seen_by_threads():
    fastblocks.use_backend("eager")
    seen = []
    thread = threading.Thread(target=lambda: seen.append(backend.selected()))
    thread.start()
    thread.join()
    assert seen == ["eager"]


def test_backend_under_compile():
    """A compiled function follows the block that it is called in."""
    torch.compiler.reset()

    def name():
        return torch.zeros(()) + backend.BACKENDS.index(backend.selected())

    compiled = torch.compile(name, fullgraph=True, backend="eager")
    assert compiled() == 0
    with fastblocks.use_backend("eager"):
        assert compiled() == 2
    fastblocks.use_backend("triton")
    assert compiled() == 1


def test_explaining_threads_do_not_mix():
    rows, started, done = [], threading.Event(), threading.Event()

    def slow(x):
        started.set()
        done.wait(10)
        return fastblocks.functional.swiglu(x, x)

    thread = threading.Thread(target=lambda: rows.append(fastblocks.explain(slow, torch.ones(2))))
    thread.start()
    started.wait(10)
    attention()
    done.set()
    thread.join()
    assert len(rows[0].splitlines()) == 1 and "swiglu" in rows[0]


@pytest.mark.parametrize("name", ["cuda", "", "Triton", None])
def test_unknown_backend(name):
    with pytest.raises(ValueError, match=r"'auto'.*'triton'.*'eager'"):
        fastblocks.use_backend(name)
    assert backend.selected() == "auto"


def test_backend_from_the_environment():
    code = "import fastblocks.backend; print(fastblocks.backend.selected())"
    assert python(code) == "auto"
    assert python(code, FASTBLOCKS_BACKEND="eager") == "eager"
    failing = "\ntry:\n    import fastblocks\nexcept ValueError as problem:\n    print(problem)"
    said = python(failing, FASTBLOCKS_BACKEND="cpu")
    assert "FASTBLOCKS_BACKEND" in said and "'cpu'" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, where triton runs")
def test_triton_on_a_cpu_is_an_error_outside_the_interpreter():
    code = """
import torch, fastblocks
block = fastblocks.RoFormerBlock(8, 2, 9)
try:
    block(torch.randn(1, 9, 8))
except RuntimeError as problem:
    print(problem)
"""
    said = python(code, FASTBLOCKS_BACKEND="triton")
    assert "'triton' is selected" in said and "cpu" in said


def test_explain_names_every_operation():
    block = fastblocks.RoFormerBlock(8, 2, 9)
    lines = fastblocks.explain(block, torch.randn(1, 9, 8)).splitlines()
    assert [line.split(":")[0] for line in lines] == ["roformer_block", "rms_norm", "rope_attention", "swiglu_mlp"]
    assert "× 2" in lines[1] and all("(" in line for line in lines if "eager" in line)
    assert "grouped_lstm" in fastblocks.explain(fastblocks.RNNBlock(8, 1, 2, "lstm"), torch.randn(1, 4, 8))
    convnext = fastblocks.explain(fastblocks.ConvNeXt1DBlock(3, 1, 4, 4), torch.randn(1, 4, 9))
    assert "depthwise_conv_layer_norm" in convnext and "convnext_mlp" in convnext
    assert fastblocks.explain(torch.nn.Linear(2, 2), torch.randn(1, 2)) == "no fused operation is used"


def test_explain_leaves_no_trace():
    module = fastblocks.MultiFrequencyDiscriminator(1, [32], hidden_channels=2)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    fastblocks.explain(module, torch.randn(1, 1, 100))
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())
    assert backend._decisions.get() is None and torch.is_grad_enabled()


def test_explain_with_keywords():
    block = fastblocks.AttentionRegisterRoFormerBlock(8, 2, 9, num_register_tokens=2, window_size=3)
    assert "rope_attention" in fastblocks.explain(block, torch.randn(1, 9, 8), return_registers=True)


def test_self_test():
    """`python -m fastblocks` says what runs here, and that it is right."""
    said = python("import runpy; runpy.run_module('fastblocks', run_name='__main__')")
    assert "torch " in said and "Triton: " in said and said.count(": right") == 6 and "WRONG" not in said


def test_self_test_finds_a_wrong_block():
    code = """
import runpy, torch
from fastblocks.eager import rows
right = rows.rms_norm
rows.rms_norm = lambda x, scale, eps: right(x, scale, eps) * (1.001 if x.dtype == torch.float32 else 1.0)
runpy.run_module("fastblocks", run_name="__main__")
"""
    assert python(code, exit_code=1).count("WRONG") == 4
