"""C++ operations for CPUs whose rows have the same bits at every number of rows."""

from kernels.cpu.build import DTYPES, load, loaded, supports

__all__ = ["DTYPES", "load", "loaded", "supports"]
