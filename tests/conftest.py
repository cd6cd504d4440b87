"""What every test shares: the device, the interpreter, seeds, poisoned memory."""

import os
import zlib

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read by Triton when a kernel is decorated, so set before imports

import pytest

from fastblocks import backend

# Small shapes: threads of one test only get in the way of those of the next worker.
torch.set_num_threads(1)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _fresh_random_inputs(request):
    # New inputs every run; the seed is printed where a test fails. Under CI the same inputs for the same commit.
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()) if os.environ.get("CI") else torch.seed() % 2**31)
    request.node.user_properties.append(("torch_seed", torch.initial_seed()))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    if report.failed:
        report.sections.append(("torch seed", str(dict(item.user_properties).get("torch_seed"))))


@pytest.fixture(autouse=True)
def _backend_is_restored():
    yield
    backend._of_process.clear()


@pytest.fixture
def poison(monkeypatch):
    """Uninitialised memory is NaN: an element that a kernel does not write shows."""

    def poisoned(allocate):
        def allocate_and_poison(*arguments, **keywords):
            tensor = allocate(*arguments, **keywords)
            if tensor.is_floating_point() and tensor.device.type != "meta":
                tensor.fill_(float("nan"))
            return tensor

        return allocate_and_poison

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, poisoned(getattr(torch.Tensor, name)))
