"""The fused operations in plain PyTorch: the CPU path, and the fallback wherever a kernel does not run.

An operation is written twice where that pays: as the formula (`…_formula`), which any transform and derivative can see
through, and as a version for one forward and one backward pass that moves less memory.
"""
