"""Kernels: one file per operation, each with a reference in pure torch and one public function that picks a kernel.

`cpu/` holds the C++ operations, which `cpu/build.py` builds and loads on first use, `gpu/` the Triton kernels. Either
gives a row the same bits at every number of rows.
"""
