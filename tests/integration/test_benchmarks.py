"""The benchmark's two providers agree on every case, and its command line says what is wrong with what it is given."""

import copy
import importlib.util
import json
from pathlib import Path

import pytest
import torch

import fastblocks
from benchmarks import original
from benchmarks.__main__ import main
from benchmarks.case import make_instances, worst_error
from benchmarks.cases import all_cases
from benchmarks.timing import Timing, interleaved, peak_bytes

GOLDEN = Path(__file__).parents[1] / "golden"
TOYS = {case.name: case for case in all_cases(toy=True)}
TOLERANCE = 2e-4  # float32 against float32, gradients of whole models included


@pytest.mark.filterwarnings("ignore:.*cover no bin:UserWarning")
@pytest.mark.parametrize("name", TOYS)
def test_providers_agree_on_outputs_and_gradients(name):
    kits = {"original": original, "fastblocks": fastblocks}
    one, other = make_instances(TOYS[name], kits, torch.device("cpu")).values()
    for instance in (one, other):
        instance.set_training(False)
    assert worst_error(other.forward(), one.forward()) < TOLERANCE
    one.train(), other.train()
    pairs = [(a.grad, b.grad) for a, b in zip(one.leaves(), other.leaves(), strict=True)]
    assert any(a is not None for a, _ in pairs)
    assert all((a is None) == (b is None) for a, b in pairs)
    for a, b in pairs:
        if a is not None:
            assert worst_error([b], [a]) < TOLERANCE or (a - b).abs().max() < 1e-6


def test_every_public_operation_and_class_has_a_case():
    operations = {name for name in TOYS if name.startswith("op-")}
    for function in fastblocks.functional.__all__:
        wanted = {"rope_table": "op-attention", "rope_attention": "op-attention"}.get(function, f"op-{function}")
        assert wanted in operations
    cases = " ".join(TOYS)
    for cls in original.__all__:
        assert cls == "functional" or cls in cases


@pytest.mark.parametrize("name", ["full", "toy"])
def test_names_are_unique(name):
    names = [case.name for case in all_cases(toy=name == "toy")]
    assert len(set(names)) == len(names)


def test_reference_in_float64_is_float64():
    """The original's float32 islands must not leak into the reference of the error columns."""
    (single,) = make_instances(TOYS["RoFormerBlock"], {"original": original}, torch.device("cpu")).values()
    (double,) = make_instances(
        TOYS["RoFormerBlock"], {"original": original}, torch.device("cpu"), torch.float64
    ).values()
    (out,) = double.forward()
    assert out.dtype == torch.float64
    nudged = copy.deepcopy(double)
    nudged.inputs[0] = double.inputs[0].detach() + 1e-12
    change = (nudged.forward()[0] - out).abs().max()
    assert 1e-13 < change < 1e-9  # float32 anywhere would give 0 or 1e-7
    assert worst_error(single.forward(), [out]) > 1e-9


@pytest.mark.parametrize("kit", ["benchmarks.original", "fastblocks"])
def test_recorded_numbers(kit):
    specification = importlib.util.spec_from_file_location("golden", GOLDEN / "golden.py")
    golden = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(golden)
    assert golden.main(kit) is False


def test_interleaved_takes_the_runs_in_turn():
    order = []
    timings = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 0.0, least=3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert [len(t.samples) for t in timings.values()] == [3, 3]


def test_quartiles():
    assert Timing((1.0, 2.0, 3.0, 4.0, 5.0)).quartiles == (2.0, 3.0, 4.0)
    assert Timing((7.0,)).quartiles == (7.0, 7.0, 7.0)


def test_peak_bytes_counts_what_lives_at_one_time():
    def run():
        a = torch.ones(1_000_000)
        b = a + 1  # a and b
        del a
        return b * 2  # b and the product

    assert 8e6 <= peak_bytes(run, torch.device("cpu")) < 8.1e6


def test_command_line(tmp_path, capsys):
    file = tmp_path / "result.json"
    assert main(["op-rms_norm", "--seconds", "0.05", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert "torch" in out and "op-rms_norm" in out and "ratio" in out
    (result,) = json.loads(file.read_text())["results"]
    assert result["name"] == "op-rms_norm" and len(result["forward"]["original"]["samples"]) >= 2
    assert result["bytes"] == 4 * (2 * 16384 * 128 + 128)


def test_list(capsys):
    assert main(["--list", "Discriminator"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_unknown_name_is_an_error_that_names_the_choices(capsys):
    assert main(["no-such-case"]) == 2
    message = capsys.readouterr().err
    assert "no-such-case" in message and "op-rms_norm" in message and "Traceback" not in message


def test_json_into_a_missing_folder_is_an_error_before_anything_runs(tmp_path, capsys):
    assert main(["op-rms_norm", "--json", str(tmp_path / "missing" / "x.json")]) == 2
    assert "missing" in capsys.readouterr().err
