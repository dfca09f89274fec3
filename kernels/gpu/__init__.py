"""The Triton kernels, one file per operation, behind the public functions of the files one folder up.

`tiles.py` holds what they share: one table of tile constants, and how kernels are compiled without a GPU.
Nothing here is imported unless a tensor lies on a GPU or a test asks for it: Triton is optional.
"""
