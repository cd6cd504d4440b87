"""The fault checker as a pytest plugin, `python -m pytest -p tests.fault_checker tests/faults`; `.ci/faults` runs it.

Every launch is compiled by Triton for sm_90 and its IR executed on the CPU by `ttsem`, with tensors that say they are
on "cuda". An access outside of a tensor, or an element that two programs touch and one writes, fails the test at the
kernel's line. Memory from `torch.empty` is NaN.
"""

from contextlib import ExitStack

import pytest
from ttsem import sanitize

_open = ExitStack()


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests():
    # Before any test imports a kernel: Triton and fastblocks ask for a GPU then.
    global session
    session = _open.enter_context(sanitize.session())


def pytest_unconfigure():
    _open.close()


@pytest.fixture(autouse=True)
def launches():
    """A test without a launch, or with one too large to be looked through for races, has checked nothing."""
    before, unchecked = session.launches, session.races_unchecked
    yield
    assert session.launches > before, "no kernel was launched"
    assert session.races_unchecked == unchecked, "a launch was too large to be checked for races"
