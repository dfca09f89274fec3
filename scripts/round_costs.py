"""What a round of drafts with sublayers left out costs on this machine: some rounds timed, and a line through them.

Seconds of a round = fixed + K · (per draft + attentions · … + MLPs · … + layers below the first skip · …): layers below
the first sublayer left out need not be run again by verification. Kept as data, so that a search that goes on decides
by the same numbers.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from calibrate import time_rounds
from plan import DraftPlan
from policies import make_policy
from runner import Runner
from sampling import SamplingConfig

PLANS, BUDGET_S = 24, 4.0


@dataclass
class RoundCosts:
    """plain: seconds of a round of plain decoding. fitted: of [the round, each draft, each attention of a draft, each
    MLP of a draft, each layer below the first skip of a draft]. error: mean |fitted ÷ measured - 1|."""

    plain: float
    fitted: list[float]
    error: float

    def seconds(self, keep: Sequence[bool], num_draft_tokens: int) -> float:
        """Of a round whose drafts run the sublayers that keep [2L] marks (attention and MLP of each layer in turn)."""
        found = sum(a * b for a, b in zip(self.fitted, _features(keep, num_draft_tokens), strict=True))
        return max(found, self.plain)  # a line may go below what verification alone takes

    def speedup(self, tokens_per_round: float, keep: Sequence[bool], num_draft_tokens: int) -> float:
        """Over plain decoding."""
        return tokens_per_round * self.plain / self.seconds(keep, num_draft_tokens)


def skips_of(keep: Sequence[bool]) -> tuple[list[int], list[int]]:
    """keep [2L] -> the layers whose attention, and those whose MLP, are left out."""
    return tuple([i for i, kept in enumerate(keep[first::2]) if not kept] for first in (0, 1))


def _features(keep: Sequence[bool], num_draft_tokens: int) -> list[float]:
    below = ([*keep] + [False]).index(False) // 2
    return [1.0, *(num_draft_tokens * count for count in (1, sum(keep[0::2]), sum(keep[1::2]), below))]


def measure(runner: Runner, sample: Sequence[int], most_drafts: int, seed: int = 0) -> RoundCosts:
    """Time rounds of random sets with 1 to `most_drafts` drafts on a sample text and fit them. Overwrites the cache."""
    draw, rounds = random.Random(seed), []
    for index in range(PLANS):
        below, share = draw.randrange(runner.n_layer), index / PLANS
        keep = [i < 2 * below or draw.random() < share for i in range(2 * runner.n_layer)]
        rounds.append((keep, 1 + index % most_drafts))
    sample = list(sample)[: max(1, runner.cache_length - most_drafts - 1)]
    runner.prefill(sample)
    none, plans = DraftPlan(), [DraftPlan((), k, *map(frozenset, skips_of(keep))) for keep, k in rounds]
    policy = make_policy("none", runner.n_layer)
    took = time_rounds(runner, policy, [none, *plans], sample, SamplingConfig(), BUDGET_S)
    seconds = torch.tensor([took[plan] for plan in plans], dtype=torch.float64)
    features = torch.tensor([_features(*each) for each in rounds], dtype=torch.float64)
    relative = features / seconds[:, None]  # relative errors count, not absolute ones
    fitted = torch.linalg.lstsq(relative, torch.ones_like(seconds)[:, None], driver="gelsd").solution
    error = float((relative @ fitted - 1).abs().mean())
    return RoundCosts(took[none], fitted[:, 0].tolist(), error)
