"""Measure for a policy before it decodes: how long rounds of its plans take here, and how often its exits are right."""

import operator
import statistics
import time
from collections.abc import Sequence

from torch import Tensor

from decoding.rounds import RoundPlayer
from decoding.runner import Runner
from decoding.sampling import Sampler, SamplingConfig
from drafting.adapters import Adapters
from drafting.plan import DraftPlan
from drafting.policy import DraftPolicy

SECONDS, TURNS = 0.5, 9  # rounds are timed for so long or so often, whichever ends first; each plan at least once
SAMPLE_TEXT = """The keeper of the lighthouse wrote down the weather every evening: wind from the west, a calm sea, and
two ships far out. On Sunday, 14 March, her brother asked why she did it. "Because somebody has to," she said.

def average(values):
    total = 0
    for value in values:
        total += value
    return total / len(values)
"""


def calibrate(runner: Runner, policy: DraftPolicy, sample: Sequence[int], sampling: SamplingConfig) -> None:
    """Tell `policy`, if it asks, what its plans' rounds cost and how often its exits agree with the model on `sample`.

    sample: token ids, cut to what the cache leaves room for. Overwrites the cache.
    """
    if not (plans := policy.plans_to_time()):
        return
    most = max(plan.most_drafts for plan in plans)
    sample = list(sample)[: max(1, runner.cache_length - most - 1)] or [0]
    depths = {depth for plan in plans for depth in plan.candidates(runner.n_layer)}
    states = runner.prefill_states(sample, 0, depths)
    position = 1 + len(sample) - len(states[runner.n_layer])
    agreed = agreement(runner, runner.sampler(sampling), states, position, policy.adapters)
    policy.calibrate(time_rounds(runner, policy, plans, sample, sampling), agreed)


def agreement(
    runner: Runner, sampler: Sampler, states: dict[int, Tensor], position: int, adapters: Adapters | None = None
) -> dict[int, list[bool]]:
    """Compare exits with the full model -> for each depth, row by row: does an exit there choose the same token?

    states: hidden [T, D] at each depth and at the top, of rows that choose the tokens for `position`, position + 1, …
    """
    guesses = {}
    for depth, hidden in states.items():
        hidden, guesses[depth] = runner.adapted(hidden, adapters, depth), []
        for rows in hidden.split(runner.width if hidden.is_cuda else len(hidden)):  # what the fused head of a GPU takes
            at = position + len(guesses[depth])
            exit = runner.exit(rows, sampler.draw(at), draft=depth < runner.n_layer)
            guesses[depth] += sampler.guesses(exit, at)
    full = guesses[runner.n_layer]
    return {depth: list(map(operator.eq, tokens, full)) for depth, tokens in guesses.items()}


def time_rounds(
    runner: Runner,
    policy: DraftPolicy,
    plans: Sequence[DraftPlan],
    sample: Sequence[int],
    sampling: SamplingConfig,
    budget_s: float = SECONDS,
) -> dict[DraftPlan, float]:
    """Play a round of each plan in turns at the end of `sample`, which is in the cache -> median seconds."""
    player, position = RoundPlayer(runner, policy, runner.sampler(sampling)), len(sample) - 1
    taken = {plan: [] for plan in plans}

    def play(plan: DraftPlan) -> float:
        wanted = min(plan.most_drafts, runner.cache_length - len(sample)) + 1  # no more: no round is started ahead
        return player.play(plan, sample[-1], position, wanted, time.perf_counter()).seconds

    for _ in range(runner.unsteady_rounds):
        for plan in taken:
            play(plan)
    end = time.perf_counter() + budget_s
    for turn in range(TURNS + 1):
        if turn and runner.agreed(time.perf_counter() > end):
            break
        for plan, times in taken.items():
            times.append(play(plan))
    medians = {plan: statistics.median(times[1:] or times) for plan, times in taken.items()}  # the first may build
    return runner.agreed(medians)
