"""Attention over a static KV cache addressed by position: writes the call's keys and values, then attends causally.

Row t attends to slots 0..positions[t], so rolling back a rejected draft is only a smaller position. The C++ op reads
used slots only, and a row's bits depend neither on the number of rows nor on the cache length nor on the threads.
"""
import torch
import torch.nn.functional as F

from kernels import cpu


def attention_reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
                        positions: torch.Tensor) -> torch.Tensor:
    """Return attention [T, H, E] over the whole static cache under a mask; unused slots must hold finite numbers."""
    k_cache.index_copy_(1, positions, k.transpose(0, 1))
    v_cache.index_copy_(1, positions, v.transpose(0, 1))
    mask = torch.arange(k_cache.shape[1], device=q.device) <= positions[:, None]  # [T, S]
    out = F.scaled_dot_product_attention(q.transpose(0, 1)[None], k_cache[None], v_cache[None], attn_mask=mask,
                                         enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)  # [T, H, E]


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
              positions: torch.Tensor) -> torch.Tensor:
    """Write k, v [T, G, E] into caches [G, S, E] at positions [T] (int64) and attend with q [T, H, E].

    Query head h uses kv head h // (H / G); scale 1/sqrt(E); softmax in fp32. The caches are changed in place. Rows that
    share a position (padding) all write there, the last one wins. Returns [T, H, E]. The C++ op takes row strides as
    they are, so slices of a fused qkv projection need no copy.
    """
    if cpu.supports(q) and not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)):
        return torch.ops.skipfast_cpu.attention.default(q, k, v, k_cache, v_cache, positions)
    return attention_reference(q, k, v, k_cache, v_cache, positions)
