"""Where a draft leaves the model: the exit decision of every policy that exits early by a rule."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from drafting.plan import Depths, DraftPlan, RoundContext, Rule, candidates_or_default, check_exit_layer, check_range
from drafting.policy import DraftPolicy, SelfDrafting
from errors import UserError


@dataclass
class Autoregressive(DraftPolicy):
    """Draft nothing: every token is the full model's own. The baseline, through the same loop.

    steps: tokens of a round. Where a round is one call, several save what Python does between calls, which is a seventh
    of a small model's time; the text then comes by so many tokens.
    """

    name = "none"
    steps: int = 1
    plan = DraftPlan(repeats=True)

    def __post_init__(self):
        if self.steps < 1:
            raise UserError(f"steps must be 1 or more, got {self.steps}")
        self.num_draft_tokens = self.steps - 1  # "drafts" of the whole depth, of which nothing is left to verify

    def fit(self, n_layer: int) -> None:
        if self.steps > 1:
            self.plan = DraftPlan((n_layer,), self.steps - 1, repeats=True)

    def draft_depth(self, n_layer: int) -> int:
        return 0

    def start_round(self, context: RoundContext) -> DraftPlan:
        return self.plan


@dataclass
class Static(SelfDrafting):
    """Draft every token with the first `exit_layer` layers (LayerSkip, arXiv 2404.16710, section 4.3)."""

    name = "static"
    exit_layer: int

    def fit(self, n_layer: int) -> None:
        check_exit_layer(self.exit_layer, n_layer)
        self.only_plan = self.new_plan((self.exit_layer,), repeats=True)


@dataclass
class Sureness(SelfDrafting):
    """Leave at the first candidate depth at which a measure of sureness reaches a threshold (CALM, arXiv 2207.07061).

    candidates: depths to ask at, such as 3-6-9 (default: a quarter, three eighths and half of the layers).
    decay: τ of CALM's position decay, threshold · (0.9 + 0.1·exp(−τ·t/N)) for token t of at most N; 0: none, CALM 4.
    """

    threshold: float
    candidates: Depths = field(default=Depths(), kw_only=True)
    decay: float = field(default=0.0, kw_only=True)
    measure, low, high = "", 0.0, 1.0  # of ExitStats, and the threshold's range; not annotated: no fields

    def __post_init__(self):
        super().__post_init__()
        check_range("threshold", self.threshold, self.low, self.high)
        check_range("decay", self.decay, 0.0, math.inf)

    def fit(self, n_layer: int) -> None:
        self.only_plan = self.new_plan(candidates_or_default(self.candidates, n_layer), leave_if=self.rule(1.0))

    def rule(self, ease: float) -> Rule | None:
        """When to leave, the threshold made easier by a factor."""
        return Rule(self.measure, self.threshold * ease)

    def start_prompt(self, prompt: Sequence[int]) -> None:
        super().start_prompt(prompt)
        self.prompt_length = len(prompt)

    def plan(self, context: RoundContext) -> DraftPlan:
        if not self.decay:
            return self.only_plan
        written = len(context.tokens) - self.prompt_length
        ease = 0.9 + 0.1 * math.exp(-self.decay * written / (written + context.remaining))
        return dataclasses.replace(self.only_plan, leave_if=self.rule(ease))


@dataclass
class Confidence(Sureness):
    """Leave where the top-1 probability reaches the threshold (CALM; Dynamic Early Exit)."""

    name, measure = "confidence", "top1"
    threshold: float = 0.7


@dataclass
class LogitsCurrent(Confidence):
    """Confidence under its name in the skiplayer project, with a threshold of 0.9."""

    name = "logits_current"
    threshold: float = 0.9


@dataclass
class Margin(Sureness):
    """Leave where top-1 minus top-2 probability reaches the threshold (CALM's softmax measure)."""

    name, measure = "margin", "margin"
    threshold: float = 0.5


@dataclass
class Entropy(Sureness):
    """Leave where the entropy, in nats, is at most the threshold. Decay raises the threshold: later is easier."""

    name, measure = "entropy", "entropy"
    threshold: float = 1.0
    high = math.inf

    def rule(self, ease: float) -> Rule:
        return Rule(self.measure, self.threshold / ease)


@dataclass
class Saturation(Sureness):
    """Leave where the hidden state has stopped turning: its cosine with the one at the candidate before reaches the
    threshold (CALM's state measure). Needs no LM head; never leaves at the first candidate."""

    name, measure = "saturation", "cosine"
    threshold: float = 0.9
    low = -1.0


@dataclass
class ConsistentTokens(SelfDrafting):
    """Leave once `checks` candidates in a row have chosen the same token (the original: 4 layers in a row).

    candidates: as of Sureness, or, if those are too few, every depth from a quarter of the layers on.
    """

    name = "consistent_tokens"
    checks: int = 2
    candidates: Depths = field(default=Depths(), kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        if self.checks < 2:
            raise UserError(f"checks must be 2 or more, got {self.checks}")

    def fit(self, n_layer: int) -> None:
        exits = candidates_or_default(self.candidates, n_layer)
        if len(exits) < self.checks and self.candidates:
            raise UserError(
                f"policy {self.name}: checks must be at most {len(exits)}, the number of candidates "
                f"{exits}, got {self.checks}"
            )
        if len(exits) < self.checks:
            exits = range(max(1, n_layer // 4), n_layer + 1)
        self.only_plan = self.new_plan(exits, leave_if=Rule("repeats", self.checks))
