"""Two policies that decide in Python at each candidate: a random control, and exits chosen by earlier rounds."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from drafting.plan import DraftPlan, RoundContext
from drafting.policy import Depths, SelfDrafting, candidates_or_default, check_range
from kernels.exit_head import Exit


@dataclass
class Random(SelfDrafting):
    """Exit anywhere between a quarter and three quarters of the depth, drawn anew for each token: the control."""

    name = "random"
    seed: int = 0

    def fit(self, n_layer: int) -> None:
        self.quarter = max(1, n_layer // 4)
        self.deepest = min(n_layer, 3 * self.quarter)

    def start_prompt(self, prompt: Sequence[int]) -> None:
        super().start_prompt(prompt)
        self.random = random.Random(self.seed)

    def choose_plan(self, context: RoundContext) -> DraftPlan:
        self.depths = [self.random.randint(self.quarter, self.deepest) for _ in range(self.num_draft_tokens)]
        return self.new_plan(sorted(set(self.depths)), ask_to_stop=True)  # should_stop tells when a token is done

    def should_exit(self, depth: int, exit: Exit) -> bool:
        return depth >= self.depths[0]

    def should_stop(self, exit: Exit) -> bool:
        del self.depths[:1]  # a slice: combined with a policy of larger K, there are more drafts than depths
        return False


@dataclass
class LogitsFuture(SelfDrafting):
    """Exit at the depth where earlier rounds already knew their token (the skiplayer project).

    The first token of a round runs to the last candidate. The shallowest candidate that chose the same token updates a
    moving average, at which the round's other tokens exit.
    """

    name = "logits_future"
    smoothing: float = 0.8  # weight of the old average; the new depth has the rest
    candidates: Depths = field(default=Depths(), kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        check_range("smoothing", self.smoothing, 0.0, 1.0)

    def fit(self, n_layer: int) -> None:
        exits = candidates_or_default(self.candidates, n_layer)
        self.only_plan = self.new_plan(exits, ask_to_stop=True)  # should_stop tells when a token is done

    def start_prompt(self, prompt: Sequence[int]) -> None:
        super().start_prompt(prompt)
        self.average = float(self.only_plan.exits[-1])

    def choose_plan(self, context: RoundContext) -> DraftPlan:
        self.seen: list[tuple[int, int]] | None = []  # (depth, token) of the round's first draft; None after it
        return self.only_plan

    def should_exit(self, depth: int, exit: Exit) -> bool:
        if self.seen is None:
            return depth >= self.average - 0.5
        self.seen.append((depth, exit.tokens()[0]))
        return False

    def should_stop(self, exit: Exit) -> bool:
        if self.seen is not None:
            final = exit.tokens()[0]
            shallowest = next((depth for depth, token in self.seen if token == final), self.only_plan.exits[-1])
            self.average = self.smoothing * self.average + (1 - self.smoothing) * shallowest
            self.seen = None
        return False
