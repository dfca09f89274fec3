"""Measure what every layer would say: the numbers behind `scripts.inspect_layers`.

A text (a prompt and what a policy wrote after it) goes through the model once more, in chunks as in a prefill. The
hidden states of all depths are kept. Each of them names, through the final norm and the LM head, the token that it
would write next (the logit lens). Cosines between them say how far apart they are. The Rounds that wrote the text say
where its tokens exited.
"""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from decoding.generation import Generation, rate
from decoding.runner import Runner

TOP = 5  # tokens shown of each prediction
GAPS = (1, 2, 4, 8)  # of the cosines between depths
CHUNK = 64  # positions at a time: their logits and the hidden states of every depth are in memory together


@dataclass(frozen=True)
class TokenExit:
    """Say where a token of the text exited.

    depth: layers run for it; 0 if it was proposed without the model. drafted: it is a draft, not the full model's own.
    rejected: the draft (token, depth) that the full model put this token in place of.
    """

    depth: int
    drafted: bool = False
    rejected: tuple[int, int] | None = None


def token_exits(generation: Generation, n_layer: int) -> list[TokenExit]:
    """Return a TokenExit for each token of the text."""
    exits = [TokenExit(n_layer) for _ in generation.prefill.tokens]
    for step in generation.rounds:
        emitted_unjudged = step.exit_layers and not step.drafted
        drafts = len(step.tokens) if emitted_unjudged else step.accepted
        depths = step.exit_layers or (0,) * len(step.drafted)
        exits += [TokenExit(depth, True) for depth in depths[:drafts]]
        if len(step.tokens) > drafts:  # the full model's own token ends the round
            wrong = drafts < len(step.drafted)
            exits.append(TokenExit(n_layer, False, (step.drafted[drafts], depths[drafts]) if wrong else None))
    return exits


@dataclass
class Lens:
    """Hold what the L layers say at the T positions of one text. Position t predicts the token at t + 1.

    tokens: T + 1 ids, of which the first `prompt_length` are the prompt. top_ids, top_probs: [L][T][TOP], most probable
    first. next_probs, next_ranks: [L][T], of the token that does come next (rank 0: the most probable). cosines: gap n
    -> [L + 1 - n][T], of the states at depths l and l + n, l = 0 being the embedding. departures: the exit of each
    token after the prompt; none if another model wrote them.
    """

    tokens: list[int]
    prompt_length: int
    top_ids: list[list[list[int]]]
    top_probs: list[list[list[float]]]
    next_probs: list[list[float]]
    next_ranks: list[list[int]]
    cosines: dict[int, list[list[float]]]
    departures: list[TokenExit]  # as layers.json calls them

    @property
    def n_layer(self) -> int:
        return len(self.top_ids)

    @property
    def positions(self) -> int:
        return len(self.tokens) - 1

    def choice(self, depth: int, position: int) -> int:
        """Return the token that is most probable after `position` to the first `depth` layers."""
        return self.top_ids[depth - 1][position][0]

    def agrees(self, depth: int, position: int) -> bool:
        return self.choice(depth, position) == self.choice(self.n_layer, position)

    def stable_from(self, position: int) -> int:
        """Return the earliest depth from which on the most probable token stays the final one."""
        depth = self.n_layer
        while depth > 1 and self.agrees(depth - 1, position):
            depth -= 1
        return depth

    def exit_of(self, position: int) -> TokenExit | None:
        """Return where the token after `position` exited; None within the prompt, and in a text of another model."""
        index = position + 1 - self.prompt_length
        return self.departures[index] if self.departures and index >= 0 else None


@torch.inference_mode()
def read(runner: Runner, tokens: Sequence[int], prompt_length: int, exits: Sequence[TokenExit]) -> Lens:
    """Run `tokens` through the model and look at every layer. Overwrites the cache.

    exits: one TokenExit for each token after the prompt; none if another model wrote them.
    """
    n_layer, last = runner.n_layer, len(tokens) - 1
    text = Lens(
        list(tokens),
        prompt_length,
        *([[] for _ in range(n_layer)] for _ in range(4)),
        {n: [[] for _ in range(n_layer + 1 - n)] for n in GAPS if n <= n_layer},
        list(exits),
    )
    for first in range(0, last, CHUNK):
        rows = tokens[first : min(first + CHUNK, last)]
        following = torch.tensor(tokens[first + 1 : first + 1 + len(rows)], device=runner.positions.device)
        states = runner.prefill_states(rows, first, range(1, n_layer + 1)) | {0: runner.embed(rows)}
        for depth in range(1, n_layer + 1):
            add_layer(text, depth - 1, runner.exit(states[depth]).logits(), following)
        units = [F.normalize(states[depth].float(), dim=-1) for depth in range(n_layer + 1)]
        for gap, by_depth in text.cosines.items():
            for depth, values in enumerate(by_depth):
                values += (units[depth] * units[depth + gap]).sum(-1).tolist()
    return text


def add_layer(text: Lens, layer: int, logits: torch.Tensor, following: torch.Tensor) -> None:
    """Add what `logits` [T, V] say to the lists of `layer`. following [T]: the tokens that do come next."""
    probs = logits.softmax(-1)
    chosen = logits.gather(-1, following[:, None])
    best = logits.argmax(-1)  # ties go to the lowest id, as in decoding; topk promises no order
    ids = logits.topk(min(TOP, logits.shape[-1])).indices.tolist()
    ids = [[first, *(i for i in row if i != first)][: len(row)] for first, row in zip(best.tolist(), ids, strict=True)]
    text.top_ids[layer] += ids
    text.top_probs[layer] += probs.gather(-1, torch.tensor(ids, device=logits.device)).tolist()
    text.next_probs[layer] += probs.gather(-1, following[:, None])[:, 0].tolist()
    text.next_ranks[layer] += (logits > chosen).sum(-1).tolist()


def summarise(lenses: Sequence[Lens]) -> dict:
    """Return the numbers of some texts of one model, over all their positions.

    Per depth 1 .. L: agreement, the share of positions whose most probable token is the final one already; top1, the
    median probability of the most probable token; stable_from, how many positions have their earliest stable layer
    there; departures, how many tokens of the texts exited there (depth 0: proposed without it).
    cosine_median: over positions and depths, for each gap; cosine_by_depth: the median over positions.
    """
    n_layer = lenses[0].n_layer
    places = [(lens, t) for lens in lenses for t in range(lens.positions)]
    stable = Counter(lens.stable_from(t) for lens, t in places)
    exits = [exit for lens in lenses for exit in lens.departures]
    depths = [exit.depth for exit in exits]
    counts = Counter(depths)
    by_depth = {
        gap: [statistics.median(v for lens in lenses for v in lens.cosines[gap][at]) for at in range(n_layer + 1 - gap)]
        for gap in lenses[0].cosines
    }
    return {
        "positions": len(places),
        "agreement": [sum(lens.agrees(d, t) for lens, t in places) / len(places) for d in range(1, n_layer + 1)],
        "top1_median": [statistics.median(lens.top_probs[d][t][0] for lens, t in places) for d in range(n_layer)],
        "stable_from": [stable[depth] for depth in range(1, n_layer + 1)],
        "stable_from_mean": sum(depth * n for depth, n in stable.items()) / len(places),
        "departures": [counts[depth] for depth in range(n_layer + 1)],
        "departure_mean": statistics.fmean(depths) if depths else None,
        "drafted_share": rate(sum(exit.drafted for exit in exits), len(exits)),
        "rejected_drafts": sum(exit.rejected is not None for exit in exits),
        "cosine_median": {
            gap: statistics.median(v for lens in lenses for values in lens.cosines[gap] for v in values)
            for gap in lenses[0].cosines
        },
        "cosine_by_depth": by_depth,
    }
