"""The standard workloads: what they cover, how they are timed, and the command line that says what is wrong."""

import copy
import importlib.util
import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch

import fastblocks
from benchmarks import original, providers, run
from benchmarks.__main__ import main
from benchmarks.measure.error import errors
from benchmarks.measure.timing import interleaved, peak_bytes, quartiles
from benchmarks.options import BadInput
from benchmarks.workloads import FAMILIES, SIZES, all_workloads, select
from tests.integration.converted import assert_follows

GOLDEN = Path(__file__).parents[1] / "golden"
CPU = torch.device("cpu")


@pytest.mark.parametrize("size", SIZES)
def test_every_class_has_a_workload(size):
    asked = set()

    class Kit:
        def __getattr__(self, name):
            asked.add(name)
            return getattr(original, name)

    for workload in all_workloads(size):
        workload.build(Kit())
    assert set(original.__all__) - asked == set()


@pytest.mark.parametrize("size", ["toy", "cpu"])
def test_every_function_has_a_workload(size):
    called = set()
    for workload in all_workloads(size):
        if workload.what != "model":  # spectral norm is measured in its discriminators, whole blocks in their modules
            inputs = workload.inputs(torch.Generator().manual_seed(0))
            called |= {
                line.partition(":")[0] for line in fastblocks.explain(workload.build(fastblocks), *inputs).split("\n")
            }
    called |= {f"{name}s" for name in called}  # norms of one weight and of several
    losses = {"adversarial_loss", "discriminator_loss", "feature_matching"}  # in the steps of the discriminators
    assert set(fastblocks.functional.__all__) - called == {"rope_table"} | losses


@pytest.mark.parametrize("size", SIZES)
def test_names_are_unique_and_a_family_selects_its_own(size):
    everything = all_workloads(size)
    names = [workload.name for workload in everything]
    assert len(set(names)) == len(names)
    assert [w.name for family in FAMILIES for w in select(size, [family])] == names
    assert [w.name for w in select(size, [])] == names
    assert {w.name for w in select(size, ["att-time"])} == {"att-time", "att-time-block"}
    with pytest.raises(BadInput, match=r"^at is no workload"):
        select(size, ["att-time", "at"])


def test_reference_in_float64_is_float64():
    """The baseline's float32 islands must not leak into the reference of the error columns."""
    (workload,) = (w for w in all_workloads("toy") if w.name == "att-time-block")
    double, single = providers.reference(workload, CPU, "fp32"), providers.prepare("baseline", workload, CPU, "fp32")
    (out,) = double.run("forward")
    assert out.dtype == torch.float64
    nudged = copy.deepcopy(double)
    nudged._plain = [double.inputs[0].detach() + 1e-12]
    change = (nudged.run("forward")[0] - out).abs().max()
    assert 1e-13 < change < 1e-9  # float32 anywhere would give 0 or 1e-7
    assert errors(single.run("forward"), [out])[0] > 1e-9


@pytest.mark.parametrize("kit", ["benchmarks.original", "fastblocks"])
def test_recorded_numbers(kit):
    specification = importlib.util.spec_from_file_location("golden", GOLDEN / "golden.py")
    golden = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(golden)
    assert golden.main(kit) is False


def test_interleaved_takes_the_runs_in_turn():
    order = []
    runs = {name: (lambda name=name: order.append(f"before {name}"), partial(order.append, name)) for name in "ab"}
    timings = interleaved(runs, 0.0)
    assert order == ["before a", "a", "before b", "b", "before b", "b", "before a", "a"]
    assert [len(samples) for samples in timings.values()] == [2, 2]


def test_quartiles():
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == [2.0, 3.0, 4.0]
    assert quartiles([7.0]) == [7.0, 7.0, 7.0]


def test_peak_bytes_counts_what_lives_at_one_time():
    def run():
        a = torch.ones(1_000_000)
        b = a + 1  # a and b
        del a
        return b * 2  # b and the product

    assert 8e6 <= peak_bytes(run, CPU) < 8.1e6


def test_the_profiler_does_not_tell_of_older_memory(capfd):
    """Whatever the log level is: it tells of the first such block and of every 1000th after it."""
    older = [torch.ones(100) for _ in range(2000)]

    def run():
        older.clear()
        os.write(2, b"kept\n")

    assert peak_bytes(run, CPU) == 0
    assert [line for line in capfd.readouterr().err.splitlines() if "profiler_st" not in line] == ["kept"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the defaults are others")
def test_command_line_without_a_gpu(tmp_path, capsys):
    """What `python -m benchmarks` does there: cpu size, forward and training, baseline beside fastblocks."""
    file = tmp_path / "result.json"
    assert main(["rows-norm", "--seconds", "0.05", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert "torch" in out and "[1/1] rows-norm-128 fp32 training: baseline " in out
    assert "forward ms" in out and "error" in out and "1 workloads" in out
    table = out[out.index("\n", out.rindex("[1/1]")) :]
    assert "rows-norm-128" in table and "…" not in table and max(map(len, table.splitlines())) <= 80
    rows = json.loads(file.read_text())["rows"]
    expected = [(mode, name) for mode in ("forward", "training") for name in ("baseline", "fastblocks")]
    assert [(row["mode"], row["provider"]) for row in rows] == expected
    assert all(row["samples"] >= 2 and row["median"] > 0 for row in rows)
    assert rows[0]["bytes"] == 4 * (2 * 16384 * 128 + 128)


def test_list(capsys):
    assert main(["--list", "--size", "cpu", "disc"]) == 0
    assert (
        len(capsys.readouterr().out.splitlines()) == 7
    )  # two norms of weights, an activation, and four discriminators


def test_adapters_without_their_packages(tmp_path, capsys, monkeypatch):
    file, find = tmp_path / "result.json", importlib.util.find_spec
    packages = {workload.package for workload in select("toy", ["adapters"])} - {""}
    assert packages == {"bs_roformer", "vocos", "x_transformers", "timm"}
    monkeypatch.setattr(run, "find_spec", lambda name: None if name in packages else find(name))
    command = ["--size", "toy", "--seconds", "0.001", "--mode", "forward", "--json", str(file)]
    assert main(["from-msrkit-unet", "from-vocos", "from-timm", *command]) == 0
    out = capsys.readouterr().out
    assert "not installed: vocos, timm (from-vocos, from-timm-convnext); pip install -e '.[adapters]'" in out
    assert "from-msrkit-unet" in out[out.index("forward ms") :]
    rows = json.loads(file.read_text())["rows"]
    assert [(row["provider"], row["median"] > 0) for row in rows] == [("baseline", True), ("fastblocks", True)]
    assert main(["from-bs-roformer", *command]) == 2
    assert "not installed: bs-roformer (from-bs-roformer); pip install" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:A window was not provided")
@pytest.mark.parametrize("name", [workload.name for workload in select("toy", ["adapters"])])
def test_adapters_measure_the_converted_model(name):
    (workload,) = select("toy", [name])
    if workload.package and not importlib.util.find_spec(workload.package):
        pytest.skip(f"{workload.package} is not installed (the extra `adapters`)")
    torch.manual_seed(0)
    ours = workload.build(fastblocks)
    torch.manual_seed(0)
    theirs = workload.build(original)
    blocks = [[m for m in model.modules() if type(m).__module__.startswith("fastblocks")] for model in (theirs, ours)]
    assert not blocks[0] and blocks[1] and not fastblocks.conversion_report(ours).left
    ours.load_state_dict(theirs.state_dict())
    inputs = workload.inputs(torch.Generator().manual_seed(0))
    assert_follows(ours.eval(), theirs.eval(), *inputs, gradients=False)


def test_unknown_name_is_an_error_that_names_the_choices(capsys):
    assert main(["no-such-workload", "--size", "cpu"]) == 2
    message = capsys.readouterr().err
    assert "no-such-workload" in message and "rows-norm-128" in message and "Traceback" not in message


def test_json_into_a_missing_folder_is_an_error_before_anything_runs(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["rows", "--json", str(tmp_path / "missing" / "x.json")])
    assert end.value.code == 2 and "missing" in capsys.readouterr().err
