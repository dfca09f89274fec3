"""C++ operations for CPUs. They give a row the same bits at every number of rows."""

from kernels.cpu.build import DTYPES, load, loaded, supports

__all__ = ["DTYPES", "load", "loaded", "supports"]
