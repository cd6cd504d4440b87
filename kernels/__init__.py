"""Fused Triton kernels, one operation a file. `runtime` says whether they can run; `fastblocks.functional` calls them.

Nothing is imported here: `import fastblocks` works, and fast, where Triton is missing.
"""
