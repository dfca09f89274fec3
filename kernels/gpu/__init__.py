"""Triton kernels for NVIDIA GPUs, one file per operation, behind the public functions of the files one folder up."""

from kernels.gpu.build import FEATURES, HEAD_DIM, ROWS, load, supports, uncovered

__all__ = ["FEATURES", "HEAD_DIM", "ROWS", "load", "supports", "uncovered"]
