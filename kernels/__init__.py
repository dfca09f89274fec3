"""Kernels: a file for each operation, with its reference in pure torch and the public functions that pick a kernel.

formats.py and noise.py are no operations: they hold the arithmetic of quantised weights and of random choices.
`cpu/` holds the C++ operations, which `cpu/build.py` builds and loads on first use, `gpu/` the Triton kernels. Either
gives a row the same bits at every number of rows.
"""
