"""Triton kernels for NVIDIA GPUs, one file per operation, behind the public functions of the files one folder up."""

from kernels.gpu.build import ROWS, load, supports, uncovered

__all__ = ["ROWS", "load", "supports", "uncovered"]
