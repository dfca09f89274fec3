"""A whole transformer layer in one call: the C++ twin of `model.Block` for packed weights on a CPU.

Between the seven operations of a layer, Python and the dispatcher take longer than the arithmetic of a small model.
`cpu_ops.cpp` runs the same operations in the same order, rounding where they round, so the result is `model.Block`'s
bit for bit. The reference is `model.Block` itself.
"""

import torch
from torch import Tensor

WEIGHTS = ("attention_norm", "wqkv", "wo", "mlp_norm", "w13", "w2", "k_cache", "v_cache")


def block(
    hidden: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, weights: tuple[Tensor, ...], n_head: int, eps: float,
    run_attention: bool = True, run_mlp: bool = True,
) -> Tensor:  # fmt: skip
    """Run one layer on hidden [T, D] at positions [T], writing K/V into its caches; return the new hidden [T, D].

    cos, sin: fp32 [T, 1, E]. weights: the tensors of WEIGHTS in that order, linears packed, caches [G, S, E].
    """
    return torch.ops.skipfast_cpu.block.default(
        hidden, cos, sin, positions, *weights, n_head, eps, run_attention, run_mlp
    )
