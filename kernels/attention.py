"""Causal attention over a static KV cache: write the call's keys and values to their positions, then attend.

Row t attends to slots 0..positions[t]. Rolling back a rejected draft is only a smaller position.

The C++ op reads used slots only. A row's bits depend neither on the number of rows, nor on the cache length, nor on the
threads. Its key cache is laid out like a packed linear weight with one output per slot: scores are then rows times a
weight.
"""

import torch
import torch.nn.functional as F

from kernels import cpu, gpu
from kernels.linear import BLOCK, STRIP


def new_cache(
    groups: int, slots: int, head_dim: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return zeroed key and value caches for `attention`, their slots rounded up to a multiple of 32.

    Values are [G, S, E]. Keys are [G, S, E] for the reference and the GPU kernel; for the C++ op they are
    [G, S/16, E/2, 16, 2] in bf16 and [G, S/16, E, 16] in fp32.
    """
    slots = -(-slots // BLOCK) * BLOCK
    v_cache = torch.zeros(groups, slots, head_dim, dtype=dtype, device=device)
    if not cpu.supports(v_cache) or (dtype == torch.bfloat16 and head_dim % 2):
        return torch.zeros_like(v_cache), v_cache
    pairs = (head_dim // 2, STRIP, 2) if dtype == torch.bfloat16 else (head_dim, STRIP)
    return torch.zeros(groups, slots // STRIP, *pairs, dtype=dtype), v_cache


def plain_keys(k_cache: torch.Tensor) -> torch.Tensor:
    """Copy the keys out of a cache in any of the layouts of `new_cache` -> [G, S, E], for inspection."""
    if k_cache.dim() == 5:
        k_cache = k_cache.transpose(3, 4).flatten(2, 3)  # [G, S/16, E, 16]
    return k_cache if k_cache.dim() == 3 else k_cache.transpose(2, 3).flatten(1, 2)


def attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """Attend over the whole cache under a mask, as `attention` does -> [T, H, E].

    Unused slots must hold finite numbers. Padding rows write to the last slot, which must be free, and attend to the
    first, so that their result is finite.
    """
    slots = torch.where(positions < 0, k_cache.shape[1] - 1, positions)
    k_cache.index_copy_(1, slots, k.transpose(0, 1))
    v_cache.index_copy_(1, slots, v.transpose(0, 1))
    mask = torch.arange(k_cache.shape[1], device=q.device) <= positions.clamp(min=0)[:, None]  # [T, S]
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None], k_cache[None], v_cache[None], attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out[0].transpose(0, 1)  # [T, H, E]


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """Write k, v [T, G, E] into the caches of `new_cache` at positions [T] (int64) and attend with q [T, H, E].

    Returns [T, H, E] and changes the caches in place. Query head h uses kv head h // (H / G); scores are scaled by
    1/sqrt(E); softmax is in fp32. Position -1 marks a padding row: no other row sees what it writes, and its result has
    no meaning. q, k and v may be slices of a fused projection. The kernels have no gradient.
    """
    if k_cache.dim() > 3:
        return torch.ops.skipfast_cpu.attention.default(q, k, v, k_cache, v_cache, positions)
    fits = q.shape[2] <= gpu.HEAD_DIM and q.shape[1] <= gpu.ROWS * k.shape[1]  # into a tile of the GPU kernel
    if fits and gpu.supports(q[..., 0]):  # [T, H]: as many rows as there are positions
        return torch.ops.skipfast.decode_attention.default(q, k, v, k_cache, v_cache, positions)
    return attention_reference(q, k, v, k_cache, v_cache, positions)
