"""Runs of layers and whole rounds in one call each: the C++ twins of `model.Block` and of the loop in rounds.py.

Between the operations of a layer, Python, the dispatcher and the waking of threads take longer than the arithmetic of a
small model. `kernels/cpu/layers.h` runs the same operations in the same order and rounds where they round, so the
result is `model.Block`'s bit for bit; `kernels/cpu/round.h` plays a round of them. What does not change from call to
call stands in tables, which are checked once and hold addresses: whoever has a table must keep its tensors.
"""

from collections.abc import Collection, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from drafting.adapters import Adapters
from drafting.plan import DraftPlan
from kernels.exit_head import Head

TENSORS = ("attention_norm", "wqkv", "wo", "mlp_norm", "w13", "w2", "k_cache", "v_cache")  # of a layer, in this order
PLANS = 64  # tables of plans that are kept; a policy may make a new set of skips every round
NO_RULE = (-1, 0.0)


def sublayers(skip_attention: Collection[int], skip_mlp: Collection[int]) -> list[int]:
    """Number skipped sublayers as C++ does: 2 · layer for its attention, 2 · layer + 1 for its MLP."""
    return [2 * layer for layer in skip_attention] + [2 * layer + 1 for layer in skip_mlp]


class PackedLayers:
    """Holds the layers of a model ready to be run: the tensors, and the table of their addresses."""

    def __init__(self, layers: Sequence[tuple[Tensor, ...]], cos: Tensor, sin: Tensor, n_head: int, eps: float):
        """layers: for each layer its TENSORS, linears packed, caches from `attention.new_cache`. cos, sin: fp32
        [S, 1, E] for every cache slot. Raises RuntimeError for tensors that do not fit each other."""
        for layer in layers:
            assert len(layer) == len(TENSORS), (
                f"a layer has {len(layer)} tensors, C++ takes {len(TENSORS)} ({', '.join(TENSORS)}): on a CPU it runs "
                "in place of Block.forward, so change TENSORS, kernels/cpu/layers.h and layer_table in "
                "kernels/cpu/ops.cpp, too"
            )
        self.n_layer = len(layers)
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
        """Run layers start..stop-1 on hidden [T, D] at position, position + 1, … and write K/V into the caches.

        Layers in `skip_attention` or `skip_mlp` leave that sublayer out. Returns the new hidden [T, D].
        """
        skips = sublayers(skip_attention, skip_mlp)
        return torch.ops.skipfast_cpu.layers.default(hidden, self.table, position, start, stop, skips)


class Played(NamedTuple):
    """Name what the op play_round returns.

    chosen: the full model's token after each row, one more than drafted. exit_layers: none of proposed tokens.
    resume_layer: the shallowest depth from which verification went on. heads: LM heads read while drafting. layers:
    layers read for the model's own states; draft_layers: for states that only draft, in which `skipped` (attentions,
    MLPs) were left out. states: after the last layer, [len(chosen), D], if they were wanted.
    """

    drafted: list[int]
    exit_layers: Sequence[int]
    chosen: list[int]
    resume_layer: int
    heads: int
    layers: int
    draft_layers: int
    skipped: tuple[int, int]
    states: Tensor


class PackedModel:
    """Plays rounds of a model in one call each.

    layers: its own. embedding: [V, D], plain, packed, or quantised with its scale. head: its weight packed.
    draft_layers: low-bit copies of the first layers, for drafts only. draft_head: the head that drafts ask, which may
    know fewer tokens (default: head). Raises RuntimeError for what does not fit together.
    """

    def __init__(
        self,
        layers: PackedLayers,
        embedding: Tensor,
        head: Head,
        embedding_scale: Tensor | None = None,
        draft_layers: PackedLayers | None = None,
        draft_head: Head | None = None,
    ):
        draft_head = draft_head or head
        self.layers, self.draft_layers = layers, draft_layers
        self.kept = embedding, embedding_scale, head, draft_head
        self.table = torch.ops.skipfast_cpu.model_table.default(
            layers.table,
            embedding,
            embedding_scale,
            head.norm,
            head.weight,
            head.n_vocab,
            draft_layers and draft_layers.table,
            draft_head.weight,
            draft_head.n_vocab,
        )
        # Tables that were not used for longest go. A partial instead of a method: no cycle keeps the weights alive.
        self.plan_table = lru_cache(PLANS)(partial(plan_table, self.table, head.norm))

    def play_round(
        self,
        plan: DraftPlan,
        token: int,
        position: int,
        drafts: int,
        proposed: Sequence[int] = (),
        temperature: float = 0.0,
        seed: int = 0,
        eos_ids: tuple[int, ...] = (),
        want_hidden: bool = False,
    ) -> Played:
        """Draft at most `drafts` tokens after `token` at `position`, or take the proposed ones, and verify them all.

        The plan asks no policy. temperature, seed: of a coupled sample, see `Draw`; 0 chooses the best token. eos_ids:
        drafting ends after one of them. want_hidden: also return the states after the last layer. The tokens are those
        of the same round call by call. Raises RuntimeError for what is out of range.
        """
        exit_measure, exit_threshold = plan.exit_if or NO_RULE
        stop_measure, stop_threshold = plan.stop_unless or NO_RULE
        table, _ = self.plan_table(
            plan.candidates(self.layers.n_layer),
            exit_measure,
            stop_measure,
            plan.skip_attention,
            plan.skip_mlp,
            plan.adapters,
            eos_ids,
        )
        found, states = torch.ops.skipfast_cpu.play_round.default(
            table, token, position, drafts, proposed, exit_threshold, stop_threshold, temperature, seed, want_hidden
        )
        n, heads, layers, draft_layers, no_attention, no_mlp, resume, *tokens = found.tolist()
        exit_layers = () if proposed else tokens[n : 2 * n]
        skipped = no_attention, no_mlp
        return Played(tokens[:n], exit_layers, tokens[2 * n :], resume, heads, layers, draft_layers, skipped, states)


def plan_table(
    model_table: Tensor,
    norm: Tensor,
    exits: tuple[int, ...],
    exit_measure: int,
    stop_measure: int,
    skip_attention: frozenset[int],
    skip_mlp: frozenset[int],
    adapters: Adapters | None,
    eos_ids: tuple[int, ...],
) -> tuple[Tensor, list[Tensor]]:
    """Check what a DraftPlan says and gather it -> the table, and tensors to keep with it. Measures: -1 for no rule."""
    ready = adapters.ready(norm) if adapters else {}
    of_exits = [ready.get(depth) or (norm, norm, 0) for depth in exits] if ready else []
    downs, ups, ranks = ([adapter[part] for adapter in of_exits] for part in range(3))
    skips = sublayers(skip_attention, skip_mlp)
    table = torch.ops.skipfast_cpu.plan_table.default(
        model_table, norm, exits, exit_measure, stop_measure, skips, downs, ups, ranks, eos_ids
    )
    return table, downs + ups
