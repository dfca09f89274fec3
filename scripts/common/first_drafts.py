"""Draft after every token of a text at once, with sublayers left out: one parallel pass instead of decoding.

The first draft of a round sees the full model's keys and values of all tokens before it, and its own. So a row of the
pass attends to the full model's keys and values at earlier positions and to its own, whatever the other rows leave out:
each row can have a set of its own, and says what the first draft of a round would say there. Later drafts of a round
see the keys and values of earlier drafts instead, which this leaves out (SWIFT, arXiv 2410.06916, has every row see
rows that skip).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.exit_head import Exit
from model import Attention, Transformer, apply_rope, rope_table


def simulate_rounds(agree: Sequence[bool], num_draft_tokens: int) -> tuple[int, int]:
    """Return the accepted and the drafted tokens of greedy self-speculation, given where draft and target agree.

    Exact without drafting: up to the first disagreement the draft sees the very prefix that the target wrote.
    """
    position = accepted = drafted = 0
    while position < len(agree):
        count = min(num_draft_tokens, len(agree) - position - 1)
        prefix = [*agree[position : position + count], False].index(False)
        accepted, drafted, position = accepted + prefix, drafted + count, position + prefix + 1
    return accepted, drafted


class FirstDrafts:
    """The full model's states on one text, and what drafts would make of each position.

    Attributes: states, hidden [T, D] at each depth 0..L; keys and values, of each layer [G, T, E].
    """

    @torch.no_grad()
    def __init__(self, model: Transformer, tokens: Sequence[int]):
        """model: its weights may be packed or quantised; its cache is not used."""
        self.model = model
        ids = torch.tensor(tokens, device=model.norm.weight.device)
        self.cos, self.sin = rope_table(model.args, len(ids), ids.device)
        self.states, self.keys, self.values = [model.embed(ids)], [], []
        causal = torch.ones(len(ids), len(ids), dtype=torch.bool, device=ids.device).tril()
        for layer in model.layers:
            hidden = self.states[-1]
            q, k, v = _heads(layer.attention, layer.attention_norm(hidden), self.cos, self.sin)
            self.keys.append(k)
            self.values.append(v)
            hidden = hidden + _mix(layer.attention, q, k, v, causal)
            self.states.append(hidden + layer.mlp(layer.mlp_norm(hidden)))

    @torch.no_grad()
    def draft_states(self, keep: Tensor, rows: Tensor | None = None) -> Tensor:
        """Run of row i only the sublayers that keep[i] marks -> hidden [R, D] after the last layer.

        keep: bool [R, 2L], attention and MLP of each layer in turn; [2L] is meant for every row. rows: the positions,
        int64 [R] (default: all; a position may occur several times).
        """
        rows = torch.arange(len(self.cos), device=self.cos.device) if rows is None else rows
        keep = keep.expand(len(rows), -1)
        everywhere = keep.all(0).tolist()
        first = (everywhere + [False]).index(False) // 2  # up to here the states are the full model's
        hidden, anywhere = self.states[first][rows], keep.any(0).tolist()
        cos, sin = self.cos[rows], self.sin[rows]
        earlier = torch.arange(len(self.cos), device=rows.device) < rows[:, None]
        mask = torch.cat((earlier, torch.eye(len(rows), dtype=torch.bool, device=rows.device)), 1)
        for i, layer in enumerate(self.model.layers[first:], start=first):
            if anywhere[2 * i]:
                q, k, v = _heads(layer.attention, layer.attention_norm(hidden), cos, sin)
                k, v = torch.cat((self.keys[i], k), 1), torch.cat((self.values[i], v), 1)
                mixed = hidden + _mix(layer.attention, q, k, v, mask)
                hidden = mixed if everywhere[2 * i] else torch.where(keep[:, 2 * i, None], mixed, hidden)
            if anywhere[2 * i + 1]:
                moved = hidden + layer.mlp(layer.mlp_norm(hidden))
                hidden = moved if everywhere[2 * i + 1] else torch.where(keep[:, 2 * i + 1, None], moved, hidden)
        return hidden

    def choices(self, hidden: Tensor) -> Tensor:
        """Choose a token for each of hidden [R, D] by the final norm and the LM head -> int64 [R]."""
        return Exit(hidden, self.model.exit_head(), len(hidden)).token_ids()

    def agreement(self, keep: Tensor, first: int = 0) -> Tensor:
        """Tell where a draft with these sublayers chooses what the full model does, from position `first` on.

        keep: bool [2L]. Returns bool [T - first].
        """
        rows = torch.arange(first, len(self.cos), device=self.cos.device)
        return self.choices(self.draft_states(keep, rows)) == self.choices(self.states[-1][first:])


def _heads(attention: Attention, normed: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [R, D] -> queries [H, R, E], keys and values [G, R, E], rotated to their positions."""
    heads = attention.wqkv(normed).unflatten(-1, (-1, attention.head_dim))
    q, k, v = heads.split((attention.n_head, attention.n_kv_head, attention.n_kv_head), dim=-2)
    return apply_rope(q, cos, sin).transpose(0, 1), apply_rope(k, cos, sin).transpose(0, 1), v.transpose(0, 1)


def _mix(attention: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Return what attention adds to R rows, [R, D]. mask: bool [R, keys]."""
    y = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, enable_gqa=len(q) != len(k))[0]
    return attention.wo(y.transpose(0, 1).flatten(-2))
