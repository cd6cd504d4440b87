"""The standard workloads at toy size: every provider agrees with float64, a wrong kernel's time is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

import fastblocks
from benchmarks import providers as provide
from benchmarks import workloads
from benchmarks.__main__ import main
from benchmarks.aot import compiling, tuning
from benchmarks.aot.machine_code import Resources, resident_warps
from benchmarks.measure import floor, host, kept, suite
from benchmarks.measure.error import errors
from benchmarks.measure.load import busy
from benchmarks.report import files, plots, table

CPU = torch.device("cpu")
TOYS = {workload.name: workload for workload in workloads.all_workloads("toy")}
QUICK = {"seconds": 0.0, "memory": False, "compiler": "aot_eager"}
RIVALS = ("flex", "block-diagonal", "flashrnn", "max-autotune", "liger")


def measure(name, *modes, providers=("baseline", "fastblocks"), dtype="fp32"):
    found = suite.measure(TOYS[name], CPU, suite.Settings(modes, (dtype,), providers, **QUICK))
    return {(row["mode"], row["provider"]): row for row in found}


@pytest.mark.filterwarnings("ignore:.*cover no bin:UserWarning")
@pytest.mark.parametrize("name", TOYS)
def test_providers_agree_with_float64(name):
    rows = measure(
        name, "forward", "training", providers=("baseline", "fastblocks", "fastblocks-graph", "block-diagonal")
    )
    for (_, provider), row in rows.items():
        if provider == "fastblocks-graph":
            assert row["refused"] == "CUDA graphs need a GPU" and "median" not in row
        else:
            assert "refused" not in row and row["samples"] >= 2


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("name", ["att-long", "rnn-wide-lstm", "cnx-2d-6-down", "rows-mlp-24", "band-split"])
def test_backward_alone_in_every_dtype(name, dtype):
    for row in measure(name, "backward", dtype=dtype).values():
        assert "refused" not in row and row["error"] > 0 and row["bytes"] > 0


@pytest.mark.parametrize("name", ["att-long", "rows-norm-24", "cnx-1d"])
def test_compiled_and_rivals(name):
    rows = measure(name, "forward", providers=("compile", *RIVALS))
    assert "refused" not in rows["forward", "compile"]
    refused = {provider: row["refused"] for (_, provider), row in rows.items() if "refused" in row}
    assert all(provider in RIVALS and len(why) > 10 for provider, why in refused.items())
    assert name != "att-long" or "flex" not in refused


def test_wrong_kernel_is_not_timed(monkeypatch):
    right = fastblocks.functional.rms_norm
    monkeypatch.setattr(fastblocks.functional, "rms_norm", lambda x, scale: right(x, scale) * 1.0001)
    rows = measure("rows-norm-24", "forward", "training")
    assert rows["forward", "baseline"]["median"] > 0
    for mode in ("forward", "training"):
        row = rows[mode, "fastblocks"]
        assert "median" not in row and row["refused"].startswith("wrong: error 1.0e-04")


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * (1 + 1e-4)


@pytest.mark.parametrize("bad", [float("nan"), None])
def test_wrong_gradient_or_nan_is_refused(monkeypatch, bad):
    right = fastblocks.functional.swiglu
    wrong = (lambda x: x * bad) if bad else WrongGradient.apply
    monkeypatch.setattr(fastblocks.functional, "swiglu", lambda gate, up: wrong(right(gate, up)))
    rows = measure("rows-swiglu-24", "forward", "backward")
    assert ("median" in rows["forward", "fastblocks"]) == (bad is None)
    assert rows["backward", "fastblocks"]["refused"].startswith("wrong")


def test_kernel_that_raises_is_skipped_with_its_reason(monkeypatch):
    def broken(*_):
        raise RuntimeError("no such tile\nmore")

    monkeypatch.setattr(fastblocks.functional, "swiglu", broken)
    assert measure("rows-swiglu-24", "forward")["forward", "fastblocks"]["refused"] == "RuntimeError: no such tile"


def test_a_networks_baseline_is_judged_by_more_than_one_rounding():
    """Its error in training varies by a factor of 4 with the inputs' last bit; one lucky run must not refuse others."""
    runner = provide.prepare("baseline", TOYS["model-rnn"], CPU, "fp32")
    truth = provide.reference(TOYS["model-rnn"], CPU, "fp32").run("training")
    inputs = [t.detach().clone() for t in runner.tensors()]
    once = errors(runner.run("training"), truth)
    several = suite._again(runner, truth)
    assert len(several) == suite.NUDGES and len({max(found) for found in several}) > 1
    assert all(torch.equal(a, b) for a, b in zip(inputs, runner.tensors(), strict=True))
    runner.reset()
    assert errors(runner.run("training"), truth) == once


@pytest.mark.parametrize("name", ["model-rnn", "from-msrkit-rnn"])
@pytest.mark.parametrize(
    "error, again, asked, right",
    [
        (1e-6, [], 0, True),
        (5e-6, [], 1, True),  # no worse than the baseline's worst, which is 4e-6
        (9e-6, [3e-6, 4e-6, 9e-6], 2, True),  # by bad luck: the medians are 4e-6 and 3e-6
        (9e-6, [3e-6, 5e-6, 9e-6], 2, False),
    ],
)
def test_a_network_is_asked_again_only_where_it_would_be_refused(name, error, again, asked, right, monkeypatch):
    (workload,) = workloads.select("toy", [name])
    runs = {"baseline": [3e-6, 4e-6, 1e-6], "fastblocks": again}
    monkeypatch.setattr(suite, "_again", lambda name, truth: calls.append(name) or [[e] for e in runs[name]])
    calls, row = [], {"mode": "training", "dtype": "fp32"}
    suite._judge(row, [error], [1e-6], workload, ("baseline", "fastblocks"), [])
    assert len(calls) == asked and ("refused" not in row) == right


SWITCHES = """
import torch
from benchmarks.providers.runner import tf32

cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
name = "fp32_precision" if hasattr(cuda, "fp32_precision") else "allow_tf32"
switches = (cuda, cudnn.conv, cudnn.rnn) if name == "fp32_precision" else (cuda, cudnn)
off, on = ("ieee", "tf32") if name == "fp32_precision" else (False, True)
setattr(switches[0], name, on), setattr(switches[1], name, off)
before = [getattr(switch, name) for switch in switches]
for allowed in (False, True):
    with tf32(allowed):
        assert {getattr(switch, name) for switch in switches} == {on if allowed else off}
    assert [getattr(switch, name) for switch in switches] == before
print("done")
"""


def test_tf32_is_switched_whichever_way_it_was_set_before():
    done = run_python("-c", SWITCHES)
    assert done.returncode == 0 and "done" in done.stdout, done.stderr


def test_table_of_rivals_graphs_floors_and_refusals():
    def row(workload, mode, provider, median):
        head = {"workload": workload, "shape": "s", "mode": mode, "dtype": "bf16", "provider": provider, "error": 1e-3}
        if isinstance(median, str):
            return head | {"refused": median}
        return head | {"median": median, "floor_ratio": 2.0, "peak_bytes": 5e6}

    names = ("baseline", "fastblocks", "fastblocks-graph", "flex", "compile")
    times = (4e-3, 2e-3, 1e-3, 3e-3, 5e-3)
    rows = [row("a", mode, *pair) for mode in workloads.MODES for pair in zip(names, times, strict=True)]
    rows += [row("b", "forward", "baseline", 1.0), row("b", "forward", "fastblocks", "wrong: error 1")]
    header, (first, second), _ = table.summary(rows, everything=True)
    mode = ["×", "in a graph ×", "% of floor", "× rival"]
    assert header == ["workload", "shape", *(h for m in workloads.MODES for h in (f"{m} ms", *mode)), "MB", "error"]
    assert first[:7] == ["a", "s", "4.00→2.00", "2.00", "4.00", "50", "1.50 (flex)"] and first[-2] == "5.00→5.00"
    assert second[2:7] == ["1000→wrong", "", "", "", ""] and second[7] == "–→–"
    header, (first, _), _ = table.summary(rows, everything=False)
    assert header == ["workload", *("forward ms", "×", "× rival"), *("training ms", "×", "× rival")]
    assert first == ["a", *("4.00→2.00", "2.00", "1.50") * 2]


def test_tables_on_a_terminal_lose_columns_and_no_characters(capsys):
    """Of every workload in two dtypes, with rivals and the longest figures."""
    figures = {"median": 1.234567, "floor_ratio": None, "peak_bytes": 1.23e9, "error": 1e-7, "shape": "s"}
    rows = [
        {"workload": w.name, "mode": mode, "dtype": dtype, "provider": provider} | figures
        for w in workloads.all_workloads("full")
        for dtype in ("bf16", "fp16-long")
        for mode in workloads.MODES
        for provider in ("baseline", "fastblocks", "flex")
    ]
    for chosen in (rows, [row for row in rows if row["provider"] != "flex"]):
        table.show(chosen)
        out = capsys.readouterr().out
        assert max(map(len, out.splitlines())) <= 80 and "…" not in out
        assert ("left out" in out) == (chosen is not rows)
        assert all(f"{row['workload']} {row['dtype']} " in out for row in chosen)
        assert "1230→1230" in out and "1.00" in out


def test_table_of_compiled_kernels_fits_80_columns():
    found = compiling.Compiled("o", "k" * 30, ["case"], "sm_90", {"num_warps": 4}, 1.0, Resources(9, 0, 0, {}), 8)
    console = Console(width=80, record=True)
    console.print(compiling.make_table([found], console))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80 and "k" * 30 in text and "…" not in text


def test_what_is_kept_is_counted_once_and_without_what_is_there_anyway():
    x, layer = torch.randn(5, 7), torch.nn.Linear(7, 3)
    assert kept.kept_bytes(layer, x.requires_grad_()) <= 2 * (x.numel() + layer.weight.numel())  # autocast's copies

    class Twice(torch.nn.Module):
        def forward(self, x):
            y = x.exp()  # keeps y
            return y.square() + y.view(-1).square().view_as(y)  # both keep y

    assert kept.kept_bytes(Twice(), x) == 4 * x.numel()


def test_host_table_fits_80_columns(capsys, monkeypatch):
    found = {"inference": 1234.0, "forward": 1234.0, "forward + backward": 12345.0}
    found |= {f"{what}, {name}": 12 for name in tuple(found) for what in ("launches", "µs a launch")}
    monkeypatch.setattr(host, "measure", lambda function, leaves: found)
    monkeypatch.setattr(host, "needs_compiled_kernels", lambda: None)
    monkeypatch.setattr(host, "microseconds", lambda function: 1.0)
    threads = torch.get_num_threads()
    assert main(["host"]) == 0
    torch.set_num_threads(threads)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80 and "…" not in out
    assert "depthwise_conv_layer_norm " in out and "rope_attention, window, registers " in out


def test_bars_of_speedups_start_at_1(tmp_path, monkeypatch):
    """A bar's length says how much faster or slower: both ways from 1, on a logarithmic axis."""
    rows = [
        {"workload": name, "mode": "forward", "dtype": "fp32", "provider": provider, "median": median}
        for name, ours in (("a", 0.5), ("b", 2.0))
        for provider, median in (("baseline", 1.0), ("fastblocks", ours))
    ]
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, *_: drawn.append(figure))
    plots.speedups(tmp_path / "x.svg", {"rows": rows})
    (axis,) = drawn[0].axes
    assert [sorted((bar.get_x(), bar.get_x() + bar.get_width())) for bar in axis.patches] == [[1, 2], [0.5, 1]]
    assert axis.get_xscale() == "log" and [text.get_text() for text in axis.texts] == ["2.00", "0.50"]


def test_work_and_floor():
    x, w = torch.zeros(4), torch.zeros(8, requires_grad=True)
    moved = [floor.work(mode, [x], [w], 16, 5) for mode in workloads.MODES]
    assert moved == [{"bytes": b, "flops": f} for b, f in ((64, 5), (96, 10), (160, 15))]
    row = {"bytes": int(4.3e12), "flops": 79 * 10**12}
    assert floor.floor(row, "NVIDIA H200") == pytest.approx(1.0) and floor.floor(row, "AMD EPYC") is None


def test_command_line_json_append_report(tmp_path, capsys):
    folder = tmp_path / "results" / "cpu"
    folder.mkdir(parents=True)
    file, options = folder / "a.json", ["--size", "toy", "--seconds", "0.01", "--mode", "training"]
    assert main(["att-sweep", "rows-norm", *options, "--provider", "baseline,fastblocks", "--json", str(file)]) == 0
    assert "rows-norm-24" in capsys.readouterr().out
    assert main(["rows-norm", *options, "--provider", "liger", "--json", str(file), "--append"]) == 0
    document = files.read(file)
    assert {row["provider"] for row in document["rows"]} == {"baseline", "fastblocks", "liger"}
    assert document["torch"] == torch.__version__ and document["threads"] >= 1
    arguments = ["report", "--results", str(tmp_path / "results")]
    assert main(arguments) == 0
    text = (tmp_path / "results" / "README.md").read_text()
    assert "| rows-norm-24 | 37 × 24 |" in text and "plots/cpu-speedups.svg" in text
    assert {p.name for p in (tmp_path / "results" / "plots").iterdir()} == {"cpu-speedups.svg", "cpu-windowed.svg"}
    drawn = {p.name: p.read_bytes() for p in (tmp_path / "results" / "plots").iterdir()}
    assert main(arguments) == 0 and (tmp_path / "results" / "README.md").read_text() == text
    assert {p.name: p.read_bytes() for p in (tmp_path / "results" / "plots").iterdir()} == drawn
    # models before and after `convert`: a section of their own, from whichever file has them
    head = "### Models that `fastblocks.convert` takes"
    assert head not in text
    assert main(["from-msrkit-unet", *options, "--json", str(folder / "b.json")]) == 0
    assert main(arguments) == 0
    both = (tmp_path / "results" / "README.md").read_text()
    assert both.startswith(text) and both.index("| from-msrkit-unet |") > both.index(head)
    assert {p.name: p.read_bytes() for p in (tmp_path / "results" / "plots").iterdir()} == drawn
    gpu = document | {"device": "NVIDIA H200"}
    for row in gpu["rows"]:
        row["floor"] = 1e-9
    assert plots.roofline(tmp_path / "roof.svg", gpu) is True
    assert plots.roofline(tmp_path / "none.svg", document | {"device": "AMD"}) is False


def test_each_condition_has_its_file_and_its_table(tmp_path, capsys):
    folder = tmp_path / "results" / "cpu"
    folder.mkdir(parents=True)
    options = ["rows-norm", "--size", "toy", "--seconds", "0.001", "--json", str(folder)]
    threads = torch.get_num_threads()
    for more in ([], ["--threads", "1", "--busy", "1"], ["--dtype", "bf16"]):
        assert main([*options, *more]) == 0
    assert main([*options, "--dtype", "bf16"]) == 0
    torch.set_num_threads(threads)
    found = {path.stem: files.read(path) for path in folder.iterdir()}
    assert len(found) == 3 and {"bf16", "threads1-busy1"} < found.keys()
    rows = found["bf16"]["rows"]
    for provider, of_baseline in (("compile", 0.5), ("fastblocks-compile", 0.25)):  # one row of each mode
        rows += [
            r | {"provider": provider, "median": r["median"] * of_baseline} for r in rows if r["provider"] == "baseline"
        ]
    rows[1] |= {"median": rows[0]["median"]}
    rows[3] |= {"median": rows[2]["median"] / 4}
    files.write(folder / "compile.json", found["bf16"] | {"condition": ["compile"], "rows": rows})
    assert main(["report", "--results", str(tmp_path / "results")]) == 0
    text = (tmp_path / "results" / "README.md").read_text()
    assert text.count("\n## cpu\n") == 1 and "Beside 1 processes at full load." in text
    parts = {part.split("\n")[0]: part for part in text.split("\n### cpu: ")[1:]}
    assert list(parts) == ["bf16", "compile", "threads1, busy1"]
    assert "| workload | forward × | training × |" in parts["bf16"] and "bf16. ×: " in parts["bf16"]
    assert "| rows-norm-24 | 1.00 | 2.00 | 4.00 | 4.00 | 2.00 | 4.00 |" in parts["compile"]
    assert "by more than 3 %: forward: rows-norm-24 (2.00 to 1.00); training: nowhere." in parts["compile"]


def test_busy_processes_end_with_what_is_measured():
    with pytest.raises(KeyError), busy(2) as processes:
        assert all(Path(f"/proc/{pid}").exists() for pid in processes) and len(processes) == 2
        raise KeyError
    assert not any(Path(f"/proc/{pid}").exists() for pid in processes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["att-time", "--busy", "0"], "--busy"),
        (["att-time", "--mode", "sideways"], "sideways"),
        (["att-time", "--provider", "nobody"], "nobody"),
        (["att-time", "op-rms_norm"], "op-rms_norm"),
        (["att-time", "--append"], "--json"),
        (["att-time", "--plot", "x.doc"], ".svg"),
        (["tune", "rms_norm"], "GPU"),
        (["report", "--results", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_named_and_exit_code_2(arguments, message, capsys):
    try:
        code = main(arguments)
    except SystemExit as end:  # argparse
        code = end.code
    error = capsys.readouterr().err
    assert code == 2 and message in error and "Traceback" not in error


def test_budget_leaves_out_by_name(tmp_path):
    file = tmp_path / "x.json"
    arguments = ["rows", "--size", "toy", "--seconds", "0.01", "--budget", "1e-9", "--provider", "fastblocks"]
    assert main([*arguments, "--json", str(file)]) == 0
    assert {row["refused"] for row in files.read(file)["rows"]} == {"the time budget was spent"}


def test_measuring_needs_neither_rich_nor_matplotlib():
    code = (
        "import sys; sys.modules['rich'] = sys.modules['matplotlib'] = None\n"
        "from benchmarks.__main__ import main; sys.exit(main(['rows-norm', '--size', 'toy', '--seconds', '0.01']))"
    )
    done = run_python("-c", code)
    assert done.returncode == 0 and "% of floor" not in done.stdout and "rows-norm-24" in done.stdout, done.stderr


def test_the_profiler_does_not_talk():
    done = run_python("-m", "benchmarks", "model-unet", "--size", "toy", "--seconds", "0.01")
    assert done.returncode == 0 and done.stderr == ""


def run_python(*arguments):
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTBLOCKS_BACKEND")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=300, env=environment, cwd=root
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run")
def test_on_device_says_that_there_is_no_gpu():
    script = Path(__file__).parents[2] / "benchmarks" / "on_device.sh"
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(["bash", script], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 2 and "no GPU" in done.stderr


def test_torchrun_counts_steps():
    arguments = ("--nproc-per-node", "2", "-m", "benchmarks", "model-rnn", "--size", "toy", "--steps", "1")
    done = run_python("-m", "torch.distributed.run", *arguments, "--provider", "fastblocks")
    assert done.returncode == 0 and "steps/s" in done.stdout and "model-rnn" in done.stdout, done.stderr


def test_compile_reports_a_kernel(tmp_path):
    file = tmp_path / "compiled.json"
    done = run_python("-m", "benchmarks", "compile", "rnn-freq", "--arch", "90", "--fast", "--json", str(file))
    assert done.returncode in (0, 1), done.stderr  # 1: it spills, which is the kernels' affair
    found = json.loads(file.read_text())
    assert all(one["architecture"] == "sm_90" and not one["error"] for one in found)
    assert all(one["resources"]["registers"] in (None, *range(16, 256)) for one in found)


def test_resident_warps():
    assert resident_warps(Resources(64, 0, 0, {}), 4, "sm_90") == 32  # by registers
    assert resident_warps(Resources(32, 0, 100 << 10, {}), 4, "sm_90") == 8  # by shared memory
    assert resident_warps(Resources(32, 0, 200 << 10, {}), 4, "sm_80") == 0
    assert resident_warps(Resources(32, 0, 0, {}), 8, "sm_89") == 48
    assert resident_warps(Resources(128, 0, 0, {}), 4, "gfx942") == 16


def test_launch_tables_can_be_overridden():
    from fastblocks.kernels import launch

    (module, name, function), *_ = tuning.tables().values()
    config = launch.config(4, 2, BLOCK_M=64)
    near = tuning.neighbours(config)
    assert config not in near and launch.config(8, 2, BLOCK_M=64) in near and launch.config(4, 2, BLOCK_M=32) in near
    assert all(one.num_warps in (2, 4, 8) and one.num_stages in (1, 2, 3) for one in near)
    with tuning.overridden({}):
        assert getattr(module, name) is not function
    assert getattr(module, name) is function
    assert tuning.entry(config, 1e-5, 2e-5, "X") == "config(4, 2, BLOCK_M=64)  # X: 10.0 µs, before 20.0 µs"
