"""A run of transformer layers in one call: the C++ twin of `model.Block` for packed weights on a CPU.

Between the operations of a layer, Python, the dispatcher and the waking of threads take longer than the arithmetic of a
small model. `cpp/layers.h` runs the same operations in the same order, rounding where they round, so the result is
`model.Block`'s bit for bit, with one team of threads from the first layer to the last. The reference is `model.Block`.
"""
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from kernels.exit_head import Head

TENSORS = ("attention_norm", "wqkv", "wo", "mlp_norm", "w13", "w2", "k_cache", "v_cache")  # of a layer, in this order


class PackedLayers:
    """The layers of a model, ready to be run. Holds the tensors, whose addresses are gathered once in `table`."""

    def __init__(self, layers: Sequence[tuple[Tensor, ...]], cos: Tensor, sin: Tensor, n_head: int, eps: float):
        """layers: for each layer its TENSORS, linears packed, caches from `attention.new_cache`. cos, sin: fp32
        [S, 1, E] for every cache slot. Raises RuntimeError for tensors that do not fit each other."""
        self.tensors = [*(tensor for layer in layers for tensor in layer), cos, sin]
        self.table = torch.ops.skipfast_cpu.layer_table.default(self.tensors[:-2], cos, sin, n_head, eps)

    def run(self, hidden: Tensor, position: int, start: int, stop: int, skip_attention: Collection[int] = (),
            skip_mlp: Collection[int] = ()) -> Tensor:
        """Run layers start..stop-1 on hidden [T, D] at position, position + 1, … writing K/V into the caches.

        Layers in `skip_attention` or `skip_mlp` leave that sublayer out. Returns the new hidden [T, D].
        """
        skips = [2 * i for i in skip_attention] + [2 * i + 1 for i in skip_mlp]
        return torch.ops.skipfast_cpu.layers.default(hidden, self.table, position, start, stop, skips)

    def static_round(self, embedding: Tensor, head: Head, token: int, position: int, exit_layer: int, drafts: int
                     ) -> list[int]:
        """Play a whole greedy round: draft `drafts` tokens after `token` with exit_layer layers, verify them all.

        embedding: [V, D], plain or packed. head: its weight packed. Returns the drafted tokens, then the full model's
        choice after each of the drafts + 1 rows: the bits of the same round call by call.
        """
        play = torch.ops.skipfast_cpu.static_round.default
        ends = embedding, head.norm, head.weight, head.n_vocab
        return play(self.table, *ends, token, position, exit_layer, drafts).tolist()
