"""What the Triton kernels share: a table of tiles, tickets, rounding under the interpreter, and compile cases.

A result must not depend on the number of rows of a call. So a kernel has one tile shape per operation and dtype: ROWS
rows, of which unused ones are masked. Kernels, their tests and the check that compiles them without a GPU
(tests/kernels/compile_ahead.py) all read the table below.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1 when the kernels were decorated
CPU_PROCESSORS = 132  # multiprocessors that the interpreter pretends to have, as an H100 or H200 has


@dataclass(frozen=True)
class Tile:
    """Hold a tile's shape: n weight rows (or cache slots), k features per step; and warps and stages for Triton."""

    n: int
    k: int
    warps: int = 4
    stages: int = 4

    @property
    def options(self) -> dict[str, object]:
        """Return Triton's launch options. Fusing is set explicitly: its default changes with Triton 3.10."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


TILES = {
    "linear_bf16": Tile(n=64, k=128, stages=3),
    "linear_int8": Tile(n=128, k=128, stages=3),
    "linear_int4": Tile(n=128, k=128),
    "exit_head_bf16": Tile(n=64, k=128),
    "exit_head_int8": Tile(n=64, k=256),
    "attention": Tile(n=64, k=128, stages=3),
}


@dataclass(frozen=True)
class CompileCase:
    """Describe one kernel as it is launched, to compile it without a GPU.

    types: the Triton type of each argument that is not a constant, such as "*bf16" or "i32". constants: the constexprs.
    aligned: pointers and strides that are multiples of 16. mma: the instruction that its products must use.
    wide_copies: weights must arrive by 16-byte asynchronous copies.
    """

    name: str
    kernel: Callable
    types: dict[str, str]
    constants: dict[str, object]
    aligned: tuple[str, ...]
    tile: Tile
    mma: str | None = "HMMA"
    wide_copies: bool = True


@functools.cache
def processors(device: torch.device) -> int:
    """Return the number of multiprocessors of a GPU; for a CPU, CPU_PROCESSORS."""
    return CPU_PROCESSORS if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def tickets_of(device: torch.device) -> Tensor:
    """Return the device's tickets: int32 zeros, two per multiprocessor. Every kernel leaves them zero.

    All kernels share them, so the streams of a device must order its kernels.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("the first call of a kernel on a GPU must come before the capture of a graph")
    return torch.zeros(2 * processors(device), dtype=torch.int32, device=device)


@triton.jit
def rounded_to_bf16(x):
    """Round fp32 to the nearest bf16 value, ties to even, still fp32: the interpreter's own conversion truncates."""
    bits = x.to(tl.int32, bitcast=True)
    bits = bits + 0x7FFF + ((bits >> 16) & 1)
    return (bits & -65536).to(tl.float32, bitcast=True)
