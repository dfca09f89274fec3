"""Time some rounds of drafts with sublayers left out on this machine, and fit a curve that says what any round costs.

Seconds of a round = a + K · (b + c · attentions + d · MLPs + e · sublayers² - f · layers below the first skip).
A draft of few sublayers stays in the caches, so the last ones cost most. Layers below the first sublayer left out need
not be run again by verification. No term may be negative, so that no draft is ever free. The curve is kept as data: a
search that goes on decides by the same numbers.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from decoding.calibrate import time_rounds
from decoding.compare import fastest_plain
from decoding.runner import Runner
from decoding.sampling import SamplingConfig
from drafting.plan import DraftPlan
from errors import UserError

PLANS, BUDGET_S = 48, 4.0
PLAIN_WEIGHT = 4  # as many rounds as plain decoding counts for in the fit
REFITS = 8


@dataclass
class RoundCosts:
    """plain: seconds of a token of plain decoding at its fastest. fitted: of [the round, each draft, each attention of
    a draft, each MLP of a draft, its sublayers² ÷ 2L, less each layer below its first skip]. error: median |fitted ÷
    measured - 1|.
    """

    plain: float
    fitted: list[float]
    error: float

    def seconds(self, keep: Sequence[bool], num_draft_tokens: int) -> float:
        """Return what a round costs whose drafts run the sublayers that keep [2L] marks (attention, MLP, …)."""
        fitted = sum(a * b for a, b in zip(self.fitted, _features(keep, num_draft_tokens), strict=True))
        return max(fitted, self.plain)  # which every round contains

    def speedup(self, tokens_per_round: float, keep: Sequence[bool], num_draft_tokens: int) -> float:
        """Return the speedup over plain decoding of rounds that emit so many tokens."""
        return tokens_per_round * self.plain / self.seconds(keep, num_draft_tokens)


def restored(path: Path, fields: dict) -> RoundCosts:
    """Make costs from the fields that a run left in a file. Raises UserError for those of another version's curve."""
    try:
        costs = RoundCosts(**fields)
        costs.seconds((True, True), 1)
    except (TypeError, ValueError):
        raise UserError(
            f"{path} has costs of rounds that this version does not understand: give another "
            f"--output_dir, or delete the file"
        ) from None
    return costs


def skips_of(keep: Sequence[bool]) -> tuple[list[int], list[int]]:
    """List the layers whose attention, and those whose MLP, keep [2L] leaves out."""
    return tuple([i for i, kept in enumerate(keep[first::2]) if not kept] for first in (0, 1))


def _features(keep: Sequence[bool], num_draft_tokens: int) -> list[float]:
    below, attentions, mlps = ([*keep] + [False]).index(False) // 2, sum(keep[0::2]), sum(keep[1::2])
    counts = (1, attentions, mlps, (attentions + mlps) ** 2 / len(keep), -below)
    return [1.0, *(num_draft_tokens * count for count in counts)]


def fit(features: torch.Tensor, seconds: torch.Tensor) -> tuple[list[float], float]:
    """Fit coefficients [F], none negative, by which features [N, F] make `seconds` [N]; also the median relative error.

    Relative errors count, not squared: on a busy machine some rounds take many times as long as they should.
    """
    relative, columns = features / seconds[:, None], list(range(features.shape[1]))
    weights = torch.ones_like(seconds)
    for _ in range(REFITS):
        while True:
            weighted = relative[:, columns] * weights[:, None]
            solution = torch.linalg.lstsq(weighted, weights[:, None], driver="gelsd").solution[:, 0]
            if solution.min() >= 0:
                break
            del columns[int(solution.argmin())]
        weights = ((relative[:, columns] @ solution - 1).abs() + 0.02).rsqrt()
    coefficients = torch.zeros(features.shape[1], dtype=features.dtype)
    coefficients[columns] = solution
    return coefficients.tolist(), float((relative @ coefficients - 1).abs().median())


def measure(runner: Runner, sample: Sequence[int], most_drafts: int, seed: int = 0) -> RoundCosts:
    """Time rounds of random sets with 1 to `most_drafts` drafts on a sample text and fit them. Overwrites the cache."""
    draw, rounds = random.Random(seed), []
    for index in range(PLANS):
        below, shares = draw.choice((0, draw.randrange(runner.n_layer))), (draw.random(), draw.random())
        keep = [i < 2 * below or draw.random() < shares[i % 2] for i in range(2 * runner.n_layer)]
        rounds.append((keep, 1 + index % most_drafts))
    sample = list(sample)[: max(1, runner.cache_length - most_drafts - 1)]
    runner.prefill(sample)
    plain, plans = fastest_plain(runner), [DraftPlan((), k, *map(frozenset, skips_of(keep))) for keep, k in rounds]
    none = DraftPlan()
    took = time_rounds(runner, plain, [none, plain.only_plan, *plans], sample, SamplingConfig(), BUDGET_S)
    timed = list(zip(rounds, (took[plan] for plan in plans), strict=True))
    timed += [((rounds[0][0], 0), took[none])] * PLAIN_WEIGHT
    features = torch.tensor([_features(*drafts) for drafts, _ in timed], dtype=torch.float64)
    fitted, error = fit(features, torch.tensor([seconds for _, seconds in timed], dtype=torch.float64))
    return RoundCosts(took[plain.only_plan] / plain.steps, fitted, error)
