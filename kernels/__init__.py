"""Fused Triton kernels, one folder per family. `runtime` says whether they can run; `fastblocks.functional` calls them.

Nothing is imported here: `import fastblocks` works, and fast, where Triton is missing.
"""
