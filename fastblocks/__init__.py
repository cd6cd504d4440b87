"""Drop-in building blocks of neural audio models, with fused Triton kernels. See the README."""

__version__ = "0.1.0"
