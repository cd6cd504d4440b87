"""Kernels compiled ahead of time: what the compiler made of them, and which launch configuration is the fastest."""
