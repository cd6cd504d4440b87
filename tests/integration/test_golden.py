"""The modules against numbers recorded from the original modules: outputs in eval and training mode, gradients, keys.

`tests/golden/reference.json` holds the numbers, `tests/golden/golden.py` says how they were made: weights and inputs
are functions of their names, so that only outputs had to be recorded. It runs by itself, too.
"""

import json
from pathlib import Path

import pytest
import torch

import fastblocks
from tests.golden import golden

REFERENCE = json.loads((Path(golden.__file__).parent / "reference.json").read_text())
# A recorded number is float32 and so is ours: two results of up to 5120 products each, some ten layers deep.
TOLERANCE = 2 * 10 * 5120**0.5 * torch.finfo(torch.float32).eps / 2
# What the interpreter runs in seconds; discriminators have no kernels of their own.
INTERPRETED = [name for name, record in REFERENCE["cases"].items() if "discriminator" not in record["case"]["path"]]


def error_of(name):
    record = REFERENCE["cases"][name]
    module = golden.build(record["case"], "fastblocks")
    assert {key: list(value.shape) for key, value in module.state_dict().items()} == record["state"]
    return golden.worst_error(golden.run(module, record["case"], REFERENCE["salt"], name), record["result"])


@pytest.mark.parametrize("name", REFERENCE["cases"])
def test_recorded_numbers(name):
    assert error_of(name) <= TOLERANCE


@pytest.mark.parametrize("name", INTERPRETED)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: kernels are not interpreted")
def test_recorded_numbers_with_interpreted_kernels(name):
    with fastblocks.use_backend("triton"):
        assert error_of(name) <= TOLERANCE


@pytest.mark.parametrize("name", INTERPRETED)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_recorded_numbers_on_the_gpu(name, monkeypatch):
    build = golden.build
    monkeypatch.setattr(golden, "build", lambda *arguments: build(*arguments).cuda())
    call = golden._call
    monkeypatch.setattr(golden, "_call", lambda module, case, x: [t.cpu() for t in call(module, case, x.cuda())])
    with fastblocks.use_backend("triton"):
        assert error_of(name) <= TOLERANCE
