"""Where a draft exits: the policies whose decision is a rule.

A draft climbs through the layers and pauses at candidate depths. At each of them the model's final norm and LM head
tell which token it would choose there, and how surely. The draft exits at the first candidate where the rule holds:

    static              at its only candidate
    confidence          top-1 probability >= threshold
    margin              top-1 minus top-2 probability >= threshold
    entropy             entropy <= threshold
    saturation          cosine of the hidden state with that at the candidate before >= threshold
    consistent_tokens   the last `checks` candidates chose one token

If it holds nowhere, the draft exits at the last candidate. A rule is data, `exit_if` of a DraftPlan. It is judged

    in Python   by `ExitJudge`, which the loop asks at each candidate (`_climb_to_exit` in decoding/rounds.py). With a
                GPU it reads numbers that were copied from the device.
    in C++      by `Round::draft` in kernels/cpu/round.h

No rule is in auto.py, which chooses one exit for a whole round, nor in python_exits.py, whose policies are asked
themselves.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from drafting.plan import DraftPlan, Measure, RoundContext, Rule
from drafting.policy import Depths, SelfDrafting, candidates_or_default, check_exit_layer, check_range
from errors import UserError
from kernels.exit_head import Exit


class ExitJudge:
    """Decides by a rule where one drafted token exits: ask it at each candidate on the way up."""

    def __init__(self, rule: Rule):
        self.rule = rule
        self.state: Tensor | None = None  # of the candidate before
        self.token: int | None = None
        self.repeats = 0  # candidates in a row that chose `token`

    def exits_at(self, exit: Exit) -> bool:
        """Decide at the next candidate; computes no more of its exit than the rule needs."""
        threshold = self.rule.threshold
        if self.rule.measure is Measure.COSINE:
            before, self.state = self.state, exit.hidden[0].double()
            reach = None if before is None else threshold * self.state.norm() * before.norm()
            return reach is not None and bool(self.state @ before >= reach)
        if self.rule.measure is Measure.REPEATS:
            before, self.token = self.token, exit.tokens()[0]
            self.repeats = self.repeats + 1 if before == self.token else 1
            return self.repeats >= threshold
        return self.rule.holds(exit.stats())


@dataclass
class Static(SelfDrafting):
    """Exit every token after the first `exit_layer` layers (LayerSkip, arXiv 2404.16710, section 4.3)."""

    name, example = "static", "static:exit_layer=2"
    exit_layer: int

    def fit(self, n_layer: int) -> None:
        check_exit_layer(self.exit_layer, n_layer)
        self.only_plan = self.new_plan((self.exit_layer,), repeats=True)


@dataclass
class ThresholdExit(SelfDrafting):
    """Exit at the first candidate where a measure reaches a threshold (CALM, arXiv 2207.07061). For subclasses.

    candidates: depths such as 3-6-9 (default: a quarter, three eighths and half of the layers).
    decay: τ of CALM's decaying threshold, threshold · (0.9 + 0.1·exp(−τ·t/N)) for token t of at most N: later tokens
    exit more easily. 0: none; CALM used 4.
    """

    threshold: float
    candidates: Depths = field(default=Depths(), kw_only=True)
    decay: float = field(default=0.0, kw_only=True)
    # Not keys of the policy string, because a dataclass takes only annotated names as fields.
    measure, low, high = Measure.TOP1, 0.0, 1.0  # low, high: the range of the threshold

    def __post_init__(self):
        super().__post_init__()
        check_range("threshold", self.threshold, self.low, self.high)
        check_range("decay", self.decay, 0.0, math.inf)

    def exit_rule(self, ease: float = 1.0) -> Rule:
        """Return the rule to exit by, its threshold lowered by the factor `ease`, at most 1."""
        return Rule(self.measure, self.threshold * ease)

    def fit(self, n_layer: int) -> None:
        self.only_plan = self.new_plan(candidates_or_default(self.candidates, n_layer), exit_if=self.exit_rule())

    def start_prompt(self, prompt: Sequence[int]) -> None:
        super().start_prompt(prompt)
        self.prompt_length = len(prompt)

    def choose_plan(self, context: RoundContext) -> DraftPlan:
        if not self.decay:
            return self.only_plan
        written = len(context.tokens) - self.prompt_length
        ease = 0.9 + 0.1 * math.exp(-self.decay * written / (written + context.remaining))
        return dataclasses.replace(self.only_plan, exit_if=self.exit_rule(ease))


@dataclass
class Confidence(ThresholdExit):
    """Exit where the top-1 probability is at least the threshold (CALM; Dynamic Early Exit)."""

    name, measure = "confidence", Measure.TOP1
    threshold: float = 0.7


@dataclass
class Margin(ThresholdExit):
    """Exit where top-1 minus top-2 probability is at least the threshold (CALM's softmax measure)."""

    name, measure = "margin", Measure.MARGIN
    threshold: float = 0.5


@dataclass
class Entropy(ThresholdExit):
    """Exit where the entropy, in nats, is at most the threshold."""

    name, measure = "entropy", Measure.ENTROPY
    threshold: float = 1.0
    high = math.inf

    def exit_rule(self, ease: float = 1.0) -> Rule:
        return Rule(self.measure, self.threshold / ease)  # the rule is an upper bound: easier is higher


@dataclass
class Saturation(ThresholdExit):
    """Exit where the hidden state has stopped turning: cosine with the candidate before is at least the threshold.

    CALM's state measure. It needs no LM head, and never exits at the first candidate.
    """

    name, measure = "saturation", Measure.COSINE
    threshold: float = 0.9
    low = -1.0


@dataclass
class ConsistentTokens(SelfDrafting):
    """Exit once `checks` candidates in a row have chosen the same token (in the original, 4 layers in a row).

    candidates: as for ThresholdExit; if the default are fewer than `checks`, every depth from a quarter of the layers.
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
        self.only_plan = self.new_plan(exits, exit_if=Rule(Measure.REPEATS, self.checks))
