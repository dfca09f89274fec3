"""What a policy may measure before decoding: the time of its plans' rounds here, and how well each exit guesses."""

import statistics
import time
from collections.abc import Sequence

from decoding.rounds import Drafter, agreement
from decoding.runner import Runner
from decoding.sampling import SamplingConfig
from drafting.plan import DraftPlan
from drafting.policy import DraftPolicy

SECONDS, TURNS = 0.5, 9  # time rounds for so long or so often, whichever ends first, but each plan at least once
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
    most = max(max(plan.num_draft_tokens, len(plan.proposed)) for plan in plans)
    sample = list(sample)[: max(1, runner.cache_length - most - 1)] or [0]
    states = runner.prefill_states(sample, 0, {depth for plan in plans for depth in plan.exits})
    position = 1 + len(sample) - len(states[runner.n_layer])
    agreed = agreement(runner, runner.sampler(sampling), states, position, policy.adapters)
    policy.calibrate(time_rounds(runner, policy, plans, sample, sampling), agreed)


def time_rounds(
    runner: Runner,
    policy: DraftPolicy,
    plans: Sequence[DraftPlan],
    sample: Sequence[int],
    sampling: SamplingConfig,
    budget_s: float = SECONDS,
) -> dict[DraftPlan, float]:
    """Play a round of each plan in turns at the end of `sample`, which is in the cache -> median seconds."""
    drafter, position = Drafter(runner, policy, runner.sampler(sampling), ()), len(sample) - 1
    taken = {plan: [] for plan in plans}

    def play(plan: DraftPlan) -> float:
        start = time.perf_counter()
        wanted = max(plan.num_draft_tokens, len(plan.proposed))  # no more: no round is started ahead of being asked for
        drafter.round(plan, sample[-1], position, min(wanted, runner.cache_length - len(sample)))
        return time.perf_counter() - start

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
