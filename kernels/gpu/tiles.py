"""What the Triton kernels share: the tile table, tickets, rounding under the interpreter, and their compile cases.

A result must not depend on how many rows a call has, so a kernel has ONE tile shape per operation and dtype, whatever
the number of rows: ROWS rows, unused ones masked. The table below is read by the kernels, by their tests and by the
ahead-of-time compile check (tests/kernels/compile_ahead.py), so what is checked is what runs.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1 when the kernels were decorated
CPU_PROCESSORS = 132  # what the interpreter pretends to have: those of an H100 or H200


@dataclass(frozen=True)
class Tile:
    """n: weight rows (or cache slots) per tile. k: features per step. warps, stages: of Triton's launch."""

    n: int
    k: int
    warps: int = 4
    stages: int = 4

    @property
    def options(self) -> dict[str, object]:
        """Of Triton's launch. Its default for a product and a sum rounded once changes with Triton 3.10."""
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
    """One kernel as it is launched, for compiling it without a GPU.

    types: Triton type of each argument that is not a constant, such as "*bf16" or "i32"; constants: the constexprs.
    aligned: arguments that are multiples of 16 (pointers and strides). mma: the instruction its products must use.
    wide_copies: whether weights must arrive by 16-byte asynchronous copies.
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
    """Return the number of streaming multiprocessors of a GPU; of a CPU, a number that lets tests reach every path."""
    return CPU_PROCESSORS if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def tickets_of(device: torch.device) -> Tensor:
    """Return the device's tickets, int32 zeros, two per multiprocessor, which every kernel leaves as it found them.

    Kernels share them, so those of one device must be ordered by its streams.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("the first call of a kernel on a GPU must come before the capture of a graph")
    return torch.zeros(2 * processors(device), dtype=torch.int32, device=device)


@triton.jit
def rounded_to_bf16(x):
    """fp32 -> the nearest bf16 value (ties to even), still fp32: the interpreter's own conversion truncates."""
    bits = x.to(tl.int32, bitcast=True)
    bits = bits + 0x7FFF + ((bits >> 16) & 1)
    return (bits & -65536).to(tl.float32, bitcast=True)
