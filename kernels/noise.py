"""The Gumbel noise of coupled sampling: the definition that `cpu/noise.h` and `gpu/exit_head.py` follow.

`sampling.choose` adds it to a row's scores. The fused exit heads make the same noise while logits are in registers.
"""

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF


def mix32(x: Tensor | int) -> Tensor | int:
    """Hash int64 values in 0..2^32-1 one to one: xor-shift-multiply with the constants of Wellons' lowbias32."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & MASK32
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & MASK32
    return x ^ (x >> 16)


def uniform(seed: Tensor | int, position: Tensor | int, ids: Tensor) -> Tensor:
    """Return the uniform fp32 numbers behind `gumbel_noise`: midpoints of 2^23 equal parts of (0, 1), never 0 or 1."""
    key = mix32(mix32(seed & MASK32) ^ (seed >> 32 & MASK32))
    first = mix32((key + (position & MASK32) * 0x9E3779B9) & MASK32)
    second = mix32(first ^ 0x85EBCA6B)
    bits = mix32((mix32(ids ^ first) + second) & MASK32)
    return ((bits >> 9).float() + 0.5) * 2.0**-23  # exact in fp32


def gumbel_noise(seed: Tensor | int, position: Tensor | int, ids: Tensor) -> Tensor:
    """Return standard Gumbel noise, fp32, one value for each token id in `ids` (int64, any shape).

    It is a pure function of (seed, position, id): device, tiling and tensor-parallel shard do not matter.
    """
    return -torch.log(-torch.log(uniform(seed, position, ids)))
