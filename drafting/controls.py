"""Two policies that decide in Python while a draft climbs: a random control, and exits chosen by the last round."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from drafting.plan import Depths, DraftPlan, RoundContext, candidates_or_default, check_range
from drafting.policy import SelfDrafting
from kernels.exit_head import Exit


@dataclass
class Random(SelfDrafting):
    """Leave anywhere between a quarter and three quarters of the depth, drawn anew for each token: the control."""

    name = "random"
    seed: int = 0

    def fit(self, n_layer: int) -> None:
        self.quarter = max(1, n_layer // 4)
        self.deepest = min(n_layer, 3 * self.quarter)

    def start_prompt(self, prompt: Sequence[int]) -> None:
        super().start_prompt(prompt)
        self.random = random.Random(self.seed)

    def plan(self, context: RoundContext) -> DraftPlan:
        self.targets = [self.random.randint(self.quarter, self.deepest) for _ in range(self.num_draft_tokens)]
        return self.new_plan(sorted(set(self.targets)), ask_to_stop=True)  # to be told where a token ends

    def should_exit(self, depth: int, exit: Exit) -> bool:
        return depth >= self.targets[0]

    def should_stop(self, exit: Exit) -> bool:
        del self.targets[:1]  # drafts of another policy may outnumber them
        return False


@dataclass
class LogitsFuture(SelfDrafting):
    """What a round sees chooses the exit of the next: a moving average of the depth at which a draft first chose what
    it finally chose. The first token of each round runs to the last candidate and is asked everywhere; the others
    leave at the average."""

    name = "logits_future"
    smoothing: float = 0.8  # what the average keeps of itself
    candidates: Depths = field(default=Depths(), kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        check_range("smoothing", self.smoothing, 0.0, 1.0)

    def fit(self, n_layer: int) -> None:
        exits = candidates_or_default(self.candidates, n_layer)
        self.only_plan = self.new_plan(exits, ask_to_stop=True)  # to be told where a token ends

    def start_prompt(self, prompt: Sequence[int]) -> None:
        super().start_prompt(prompt)
        self.average = float(self.only_plan.exits[-1])

    def plan(self, context: RoundContext) -> DraftPlan:
        self.seen: list[tuple[int, int]] | None = []  # (depth, token) of the round's first token; None after it
        return self.only_plan

    def should_exit(self, depth: int, exit: Exit) -> bool:
        if self.seen is None:
            return depth >= self.average - 0.5
        self.seen.append((depth, exit.tokens()[0]))
        return False

    def should_stop(self, exit: Exit) -> bool:
        if self.seen is not None:
            last = exit.tokens()[0]
            first = next((depth for depth, token in self.seen if token == last), self.only_plan.exits[-1])
            self.average = self.smoothing * self.average + (1 - self.smoothing) * first
            self.seen = None
        return False
