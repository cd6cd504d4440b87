"""The fault checker as a pytest plugin, `python -m pytest -p tests.fault_checker tests/faults`; `.ci/faults` runs it.

Every launch is compiled by Triton for sm_90 and its IR executed on the CPU by `ttsem`, with tensors that say they are
on "cuda". An access outside of a tensor, or an element that two programs touch and one writes, fails the test at the
kernel's line. Memory from `torch.empty` is NaN. A run of all tests also fails if there is a kernel that none launched.
"""

import importlib
import pkgutil
from contextlib import ExitStack

import pytest
from ttsem import sanitize

_open = ExitStack()
_launched: set[str] = set()  # names of kernels; with pytest-xdist in a worker, and of all workers in their controller


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests():
    # Before any test imports a kernel: Triton and fastblocks ask for a GPU then.
    global session
    session = _open.enter_context(sanitize.session())
    from fastblocks.kernels import launch

    launch_here = launch._launch_here

    def noted(kernel, *arguments):
        _launched.add(name_of(kernel))
        return launch_here(kernel, *arguments)

    launch._launch_here = noted


def pytest_unconfigure():
    _open.close()


@pytest.fixture(autouse=True)
def launches():
    """A test without a launch, or with one too large to be looked through for races, has checked nothing."""
    before, unchecked = session.launches, session.races_unchecked
    yield
    assert session.launches > before, "no kernel was launched"
    assert session.races_unchecked == unchecked, "a launch was too large to be checked for races"


def name_of(kernel) -> str:
    return f"{kernel.fn.__module__}.{kernel.fn.__name__}"


def all_kernels() -> set[str]:
    """What is launched, by its name: `@triton.jit` functions without `_kernel` at the end are called by those."""
    from fastblocks import kernels

    found = set()
    for module in pkgutil.walk_packages(kernels.__path__, kernels.__name__ + "."):
        for value in vars(importlib.import_module(module.name)).values():
            if type(value).__name__ == "JITFunction" and value.fn.__name__.endswith("_kernel"):
                found.add(name_of(value))
    return found


def pytest_testnodedown(node):
    _launched.update(getattr(node, "workeroutput", {}).get("launched", ()))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    config = session.config
    if hasattr(config, "workeroutput"):
        config.workeroutput["launched"] = sorted(_launched)
        return
    everything = not (config.option.keyword or config.option.markexpr or any(".py" in name for name in config.args))
    if everything and not config.option.collectonly and (missing := all_kernels() - _launched):
        print("\nERROR: no test launches these kernels:", *sorted(missing), sep="\n  ")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
