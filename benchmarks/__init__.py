"""Measurements of the package against the formulas that it replaces: `python -m benchmarks --help`."""
