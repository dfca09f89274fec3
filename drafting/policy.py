"""The contract of a draft policy, and what all policies share that draft with the model's own layers.

This is a complete policy. It exits after the first layer that is likely enough to be right:

    from dataclasses import dataclass

    from drafting.policy import SelfDrafting


    @dataclass
    class FirstLikely(SelfDrafting):
        \"""Exit at the first layer of the lower half whose top token is likely enough.\"""

        name = "first_likely"
        threshold: float = 0.6

        def fit(self, n_layer):
            self.only_plan = self.new_plan(exits=range(1, n_layer // 2 + 1))

        def should_exit(self, depth, exit):
            return exit.stats().top1 >= self.threshold

Listed in `catalogue.POLICIES` it is a setting of every program, as in --policy first_likely:0.8,num_draft_tokens=5.
It need not care for exactness: the full model verifies whatever it drafts. A decision that is a `plan.Rule` can be
part of the plan instead of a method, `new_plan(exits, exit_if=Rule(Measure.TOP1, self.threshold))`. It is then made
inside the one call that plays a round, which is faster.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

from drafting.adapters import Adapters
from drafting.plan import DraftPlan, Measure, Round, RoundContext, Rule
from errors import UserError
from kernels.exit_head import Exit


class DraftPolicy:
    """Decide how each round drafts: the contract.

    A subclass is a dataclass; its fields are the keys of the policy string. A field's type turns text into a value.
    A value without a key sets the first field that is not keyword-only.
    """

    name = ""  # in policy strings
    example = ""  # a policy string that works for any model; needed if a key has no default
    num_draft_tokens = 0  # the most tokens a round may draft
    skips_sublayers = False  # True: its plans may leave sublayers out, so that variants must be compiled
    watched_depths: Sequence[int] = ()  # exits that see_prompt is told about; after fit
    verifiable_only = False  # True: its drafts are of no use without verification
    reads_hidden = False  # True: start_round reads RoundContext.hidden
    adapters: Adapters | None = None  # correct the hidden states at some exits
    file_hashes: Sequence[str] = ()  # of the files it has read: equal names may hide different contents

    def fit(self, n_layer: int) -> None:
        """Prepare for a model of `n_layer` layers. Raise UserError if the policy does not fit it."""

    def check_model(self, n_layer: int, dim: int | None) -> None:
        """Raise UserError if a file of the policy is for models of another shape. Called after fit.

        dim: the model's width, None if it is not known.
        """

    def draft_depth(self, n_layer: int) -> int:
        """Return the number of layers that drafts may run, 0 if none. Called after fit."""
        return n_layer

    def start_prompt(self, prompt: Sequence[int]) -> None:
        """Forget the last prompt and its text."""

    def start_round(self, context: RoundContext) -> DraftPlan:
        """Return the plan of the next round."""
        raise NotImplementedError

    def should_exit(self, depth: int, exit: Exit) -> bool:
        """Decide whether the draft exits at candidate `depth`.

        exit: its hidden state [1, D], token and statistics, each computed only when it is asked for. Not called at the
        last candidate, nor if the plan has a rule for exits.
        """
        return True

    def should_stop(self, exit: Exit) -> bool:
        """Decide whether the draft ends after the token of `exit`. Called only if the plan says `ask_to_stop`."""
        return False

    def end_round(self, round: Round) -> None:
        """Learn from what was accepted."""

    def plans_to_time(self) -> Sequence[DraftPlan]:
        """Return plans whose rounds should be timed before decoding. If there are any, `calibrate` is called."""
        return ()

    def calibrate(self, seconds: dict[DraftPlan, float], agreement: dict[int, list[bool]]) -> None:
        """Learn what was measured before decoding.

        seconds: of a round of each of plans_to_time(). agreement: for each of their exits, whether it chose the full
        model's token, token by token of a sample text.
        """

    def see_prompt(self, agreement: dict[int, list[bool]]) -> None:
        """Learn how often exits at the watched depths chose the full model's token at the end of the prompt.

        Called after start_prompt, and only if there are `watched_depths`.
        """

    def explain(self) -> list[str]:
        """Return lines about what was chosen and why, for --verbose."""
        return []

    def __str__(self) -> str:
        """Write the policy string that makes this policy."""
        keys = sorted(dataclasses.fields(self), key=lambda key: key.kw_only)
        pairs = [(key, getattr(self, key.name)) for key in keys]
        settings = [f"{key.name}={value}" for key, value in pairs if value != key.default]
        return ":".join([self.name, *([",".join(settings)] if settings else [])])


@dataclass
class Autoregressive(DraftPolicy):
    """Draft nothing: every token is the full model's own. The baseline, through the same loop.

    steps: tokens per round. Several of them save the Python between calls where a round is one call, a seventh of a
    small model's time. Text then appears that many tokens at a time.
    """

    name = "none"
    steps: int = 1
    only_plan = DraftPlan(repeats=True)

    def __post_init__(self):
        if self.steps < 1:
            raise UserError(f"steps must be 1 or more, got {self.steps}")
        self.num_draft_tokens = self.steps - 1

    def fit(self, n_layer: int) -> None:
        if self.steps > 1:  # "drafts" of the whole depth are the full model's tokens: no layer is left to verify them
            self.only_plan = DraftPlan((n_layer,), self.num_draft_tokens, repeats=True, plain=True)

    def draft_depth(self, n_layer: int) -> int:
        return 0

    def start_round(self, context: RoundContext) -> DraftPlan:
        return self.only_plan


class StopRule:
    """End drafts early, at the first token that is not sure enough.

    text: one of
      never     drafts do not end early
      a number  a token is not sure if its top-1 probability is below that
      adaptive  the same, with a threshold that follows the acceptance rate (Draft & Verify, arXiv 2309.08168)
      svip      a token is not sure if the square root of its entropy, in nats, is above 0.3 (arXiv 2411.18462)
    """

    def __init__(self, text: str):
        self.rule: Rule | None = Rule(Measure.ENTROPY, 0.3**2) if text == "svip" else None
        self.adaptive = text == "adaptive"
        if text not in ("never", "svip", "adaptive"):
            try:
                self.rule = Rule(Measure.TOP1, float(text))
            except ValueError:
                raise UserError(f"stop must be never, adaptive, svip or a number in 0..1, got {text!r}") from None
            check_range("stop", self.rule.threshold, 0.0, 1.0)
        self.forget()

    def forget(self) -> None:
        """Forget what the last text taught."""
        if self.adaptive:
            self.rule, self.acceptance = None, 0.9

    def start_round(self, context: RoundContext, num_draft_tokens: int) -> Rule | None:
        """Return the rule of a round of at most `num_draft_tokens` drafts; None: the draft does not end early."""
        self.most = min(num_draft_tokens, context.remaining - 1)
        if self.adaptive and self.rule is None:
            self.rule = Rule(Measure.TOP1, 0.5 if context.sampled else 0.8)
        return self.rule

    def end_round(self, round: Round) -> None:
        """Move an adaptive threshold: up while too few drafts are accepted, down where good drafts were cut short."""
        if not self.adaptive or not round.drafted:
            return
        self.acceptance = 0.5 * self.acceptance + 0.5 * round.accepted / len(round.drafted)
        stopped = len(round.drafted) < self.most
        step = 0.01 if self.acceptance < 0.9 else -0.01 if stopped else 0.0
        threshold = self.rule.threshold
        self.rule = Rule(Measure.TOP1, min(max(0.9 * threshold + 0.1 * (threshold + step), 0.0), 1.0))


@dataclass
class SelfDrafting(DraftPolicy):
    """Draft with the model's own layers. A subclass sets `only_plan` in fit, or overrides choose_plan.

    num_draft_tokens: K, the most tokens of a draft. stop: when a draft ends early (see StopRule). adapter: a file of
    exit adapters (see adapters.py).
    """

    num_draft_tokens: int = field(default=3, kw_only=True)
    stop: str = field(default="never", kw_only=True)
    adapter: str = field(default="", kw_only=True)
    only_plan = DraftPlan()  # of a policy whose plan never changes

    def __post_init__(self):
        if self.num_draft_tokens < 0:
            raise UserError(f"num_draft_tokens must be 0 or more, got {self.num_draft_tokens}")
        self.stop_rule = StopRule(self.stop)
        if self.adapter:
            self.adapters = Adapters(self.adapter)
            self.file_hashes = [*self.file_hashes, self.adapters.file_hash]

    def check_model(self, n_layer: int, dim: int | None) -> None:
        if self.adapters:
            self.adapters.check(n_layer, dim, self.only_plan.exits or (n_layer,))

    def draft_depth(self, n_layer: int) -> int:
        return max(self.only_plan.exits, default=n_layer)

    def start_prompt(self, prompt: Sequence[int]) -> None:
        self.stop_rule.forget()

    def start_round(self, context: RoundContext) -> DraftPlan:
        plan, rule = self.choose_plan(context), self.stop_rule.start_round(context, self.num_draft_tokens)
        return plan if plan.stop_unless == rule else dataclasses.replace(plan, stop_unless=rule)

    def choose_plan(self, context: RoundContext) -> DraftPlan:
        """Return the plan of a round but for the rule that ends drafts early, which start_round adds."""
        return self.only_plan

    def new_plan(self, exits: Sequence[int] = (), **settings) -> DraftPlan:
        """Return a plan with these exits, these further fields of DraftPlan, and the settings of this class."""
        rule = self.stop_rule.rule
        return DraftPlan(tuple(exits), self.num_draft_tokens, stop_unless=rule, adapters=self.adapters, **settings)

    def end_round(self, round: Round) -> None:
        self.stop_rule.end_round(round)


# ---- values of keys ----


class Depths(tuple):
    """Hold depths of a model, ascending, each once. Written 3-6-9."""

    def __new__(cls, text: str | Sequence[int] = ()):
        return super().__new__(cls, sorted({int(part) for part in text.split("-")} if isinstance(text, str) else text))

    def __str__(self) -> str:
        return "-".join(map(str, self))


def candidates_or_default(candidates: Depths, n_layer: int) -> Depths:
    """Return `candidates`; if there are none, a quarter, three eighths and half of the layers.

    The default is three depths because each check costs an LM head. Raises UserError for a depth the model lacks.
    """
    for depth in candidates:
        check_exit_layer(depth, n_layer, "candidates")
    return candidates or Depths({max(1, eighths * n_layer // 8) for eighths in (2, 3, 4)})


def check_exit_layer(exit_layer: int, n_layer: int, name: str = "exit_layer") -> None:
    """Raise UserError, naming the key `name`, for a depth that the model does not have."""
    if not 1 <= exit_layer <= n_layer:
        raise UserError(f"{name} must be in 1..{n_layer} for this model, got {exit_layer}")


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raise UserError, naming the key `name`, for a value outside low..high or not a number."""
    if not low <= value <= high:
        raise UserError(f"{name} must be in {low:g}..{high:g}, got {value:g}")
