"""Kernels: one file per operation, each with a reference in pure torch and one public function that dispatches.

`cpu/build.py` builds and loads the C++ operations, whose rows are bit-identical at every row count. Nothing is built
at import.
"""
