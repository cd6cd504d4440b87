"""Faults and races, by `.ci/faults`: the checker needs a Triton of its own, so plain pytest leaves these tests out."""

import sys

import pytest

if "tests.fault_checker" not in sys.modules:
    pytest.skip("faults and races are looked for by .ci/faults", allow_module_level=True)
