"""A run of transformer layers in one call: the C++ twin of `model.Block` for packed weights on a CPU.

Between the operations of a layer, Python, the dispatcher and the waking of threads take longer than the arithmetic of a
small model. `cpp/layers.h` runs the same operations in the same order, rounding where they round, so the result is
`model.Block`'s bit for bit, with one team of threads from the first layer to the last. The reference is `model.Block`.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.exit_head import Head

TENSORS = ("attention_norm", "wqkv", "wo", "mlp_norm", "w13", "w2", "k_cache", "v_cache")  # of a layer, in this order
MEASURES = ("top1", "margin", "entropy", "cosine", "repeats")  # of plan.Rule, in the order of cpp/round.h


class PlayedRound(NamedTuple):
    """What a round drafted and the full model's token after each of its rows, and what was read for it.

    chosen: one more than drafted. exit_layers: of each draft, none if they were proposed. resume_layer: where the
    shallowest row waited for verification. layers: layers read for the model's own states; draft_layers: for states
    that only draft, of which `left_out` attentions and MLPs were not. draft_heads: LM heads read while drafting.
    hidden: states after the last layer [len(chosen), D], if they were wanted.
    """

    drafted: list[int]
    exit_layers: list[int]
    chosen: list[int]
    resume_layer: int
    layers: int
    draft_layers: int
    left_out: tuple[int, int]
    draft_heads: int
    hidden: Tensor | None = None


class PackedLayers:
    """The layers of a model, ready to be run. Holds the tensors, whose addresses are gathered once in `table`."""

    def __init__(self, layers: Sequence[tuple[Tensor, ...]], cos: Tensor, sin: Tensor, n_head: int, eps: float):
        """layers: for each layer its TENSORS, linears packed, caches from `attention.new_cache`. cos, sin: fp32
        [S, 1, E] for every cache slot. Raises RuntimeError for tensors that do not fit each other."""
        self.tensors = [*(tensor for layer in layers for tensor in layer), cos, sin]
        self.table = torch.ops.skipfast_cpu.layer_table.default(self.tensors[:-2], cos, sin, n_head, eps)

    def run(
        self,
        hidden: Tensor,
        position: int,
        start: int,
        stop: int,
        skip_attention: Collection[int] = (),
        skip_mlp: Collection[int] = (),
    ) -> Tensor:
        """Run layers start..stop-1 on hidden [T, D] at position, position + 1, … writing K/V into the caches.

        Layers in `skip_attention` or `skip_mlp` leave that sublayer out. Returns the new hidden [T, D].
        """
        skips = [2 * i for i in skip_attention] + [2 * i + 1 for i in skip_mlp]
        return torch.ops.skipfast_cpu.layers.default(hidden, self.table, position, start, stop, skips)

    def play_round(
        self,
        embedding: Tensor,
        head: Head,
        token: int,
        position: int,
        exits: Sequence[int],
        drafts: int,
        *,
        embedding_scale: Tensor | None = None,
        draft: "PackedLayers | None" = None,
        draft_head: Head | None = None,
        leave_if: tuple[str, float] | None = None,
        stop_unless: tuple[str, float] | None = None,
        skip_attention: Collection[int] = (),
        skip_mlp: Collection[int] = (),
        proposed: Sequence[int] = (),
        temperature: float = 0.0,
        seed: int = 0,
        adapters: Sequence[tuple[Tensor, Tensor, int] | None] = (),
        want_hidden: bool = False,
    ) -> "PlayedRound":
        """Play a whole round: draft at most `drafts` tokens after `token` at `position`, verify them all.

        embedding: [V, D], plain, packed or quantised with its scale. head: its weight packed. draft: low-bit copies of
        the first layers, for drafts only; draft_head: their head (default: head), which may know fewer tokens. exits,
        leave_if, stop_unless, skips, proposed: of a plan.DraftPlan; a rule is one of MEASURES and a threshold.
        temperature, seed: of a coupled sample, see `Draw`; 0 chooses the best token. adapters: none, or of each exit
        (down, up, rank), packed, or None. want_hidden: also return the states after the last layer. The tokens are
        those of the same round call by call. Raises RuntimeError for what is out of range.
        """
        (leave, leave_at), (stay, stay_at) = (
            (MEASURES.index(rule[0]), rule[1]) if rule else (-1, 0.0) for rule in (leave_if, stop_unless)
        )
        skips = [2 * i for i in skip_attention] + [2 * i + 1 for i in skip_mlp]
        draft_head = draft_head or head
        given = [each or (head.norm, head.norm, 0) for each in adapters]
        downs, ups, ranks = ([each[part] for each in given] for part in range(3))
        found, hidden = torch.ops.skipfast_cpu.play_round.default(
            self.table,
            embedding,
            embedding_scale,
            head.norm,
            head.weight,
            head.n_vocab,
            token,
            position,
            exits,
            drafts,
            leave,
            leave_at,
            stay,
            stay_at,
            skips,
            proposed,
            draft and draft.table,
            draft_head.weight,
            draft_head.n_vocab,
            temperature,
            seed,
            downs,
            ups,
            ranks,
            want_hidden,
        )
        n, heads, layers, draft_layers, no_attention, no_mlp, resume, *rest = found.tolist()
        exit_layers = [] if proposed else rest[n : 2 * n]
        left_out = no_attention, no_mlp
        return PlayedRound(
            rest[:n],
            exit_layers,
            rest[2 * n :],
            resume,
            layers,
            draft_layers,
            left_out,
            heads,
            hidden if want_hidden else None,
        )
