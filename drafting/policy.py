"""What all policies share that draft with the model's own layers: K, when a draft ends early, and exit adapters."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

from drafting.adapters import Adapters
from drafting.plan import DraftPlan, Round, RoundContext, Rule, check_range
from errors import UserError
from kernels.exit_head import Exit


class DraftPolicy:
    """The contract. Subclasses are dataclasses: their fields are the keys of the policy string.

    A field's type turns text into its value; keyword-only fields are never meant by a value without a key.
    """

    name = ""  # in policy strings
    num_draft_tokens = 0  # the most tokens a round may draft
    skips_sublayers = False  # whether its plans may leave sublayers out, so that compiled variants are made ready
    watched_depths: Sequence[int] = ()  # where exits are compared with the full model at the end of a prompt
    verifiable_only = False  # whether its drafts mean nothing unless the full model verifies them
    reads_hidden = False  # whether start_round looks at RoundContext.hidden
    adapters: Adapters | None = None  # what corrects the states that leave at some exits
    contents: Sequence[str] = ()  # a hash of each file it has read: names do not tell what it does

    def fit(self, n_layer: int) -> None:
        """Take a model's number of layers. Raise UserError if the policy does not fit it."""

    def check_model(self, n_layer: int, dim: int | None) -> None:
        """Raise UserError if a file of the policy is for models of another shape. dim None: not known. After fit."""

    def draft_depth(self, n_layer: int) -> int:
        """How many of the first layers a draft may need; 0 if none. After fit."""
        return n_layer

    def start_prompt(self, prompt: Sequence[int]) -> None:
        """Forget the last prompt."""

    def start_round(self, context: RoundContext) -> DraftPlan:
        """Say how this round drafts."""
        raise NotImplementedError

    def should_exit(self, depth: int, exit: Exit) -> bool:
        """Leave the model at candidate `depth`? `exit` has its hidden state [1, D], token and statistics, each computed
        only when asked for. Not asked at the last candidate, nor if the plan has a rule to leave."""
        return True

    def should_stop(self, exit: Exit) -> bool:
        """End the draft after the token that left the model with `exit`? Asked if the plan says so."""
        return False

    def end_round(self, round: Round) -> None:
        """Learn from what was accepted."""

    def plans_to_time(self) -> Sequence[DraftPlan]:
        """Plans whose rounds should be timed before decoding. If there are any, `calibrate` gets the times."""
        return ()

    def calibrate(self, seconds: dict[DraftPlan, float], agreement: dict[int, list[bool]]) -> None:
        """Learn what rounds of plans_to_time() cost, and at which tokens of a sample text an exit at each of their
        depths chose what the full model chose."""

    def see_prompt(self, agreement: dict[int, list[bool]]) -> None:
        """The same of the end of the prompt, for each of `watched_depths`, if there are any. After start_prompt."""

    def explain(self) -> list[str]:
        """Lines about what was chosen and why, for --verbose."""
        return []

    def __str__(self) -> str:
        """The policy string that makes this policy."""
        keys = sorted(dataclasses.fields(self), key=lambda key: key.kw_only)
        pairs = [(key, getattr(self, key.name)) for key in keys]
        settings = [f"{key.name}={value}" for key, value in pairs if value != key.default]
        return ":".join([self.name, *([",".join(settings)] if settings else [])])


class StopRule:
    """When a draft ends early, because its last token is not sure enough.

    never; a number: its top-1 probability is below it; adaptive: the same with a threshold that follows the acceptance
    rate (Draft & Verify, arXiv 2309.08168); svip: the root of its entropy in nats is above 0.3 (arXiv 2411.18462).
    """

    def __init__(self, text: str):
        self.rule: Rule | None = Rule("entropy", 0.3**2) if text == "svip" else None
        self.adaptive = text == "adaptive"
        if text not in ("never", "svip", "adaptive"):
            try:
                self.rule = Rule("top1", float(text))
            except ValueError:
                raise UserError(f"stop must be never, adaptive, svip or a number in 0..1, got {text!r}") from None
            check_range("stop", self.rule.threshold, 0.0, 1.0)
        self.forget()

    def forget(self) -> None:
        if self.adaptive:
            self.rule, self.acceptance = None, 0.9

    def start_round(self, context: RoundContext, most: int) -> Rule | None:
        """The rule of a round of `most` drafts."""
        self.most = min(most, context.remaining - 1)
        if self.adaptive and self.rule is None:
            self.rule = Rule("top1", 0.5 if context.sampled else 0.8)
        return self.rule

    def end_round(self, round: Round) -> None:
        if not self.adaptive or not round.drafted:
            return
        self.acceptance = 0.5 * self.acceptance + 0.5 * round.accepted / len(round.drafted)
        stopped = len(round.drafted) < self.most
        step = 0.01 if self.acceptance < 0.9 else -0.01 if stopped else 0.0
        threshold = self.rule.threshold
        self.rule = Rule("top1", min(max(0.9 * threshold + 0.1 * (threshold + step), 0.0), 1.0))


@dataclass
class SelfDrafting(DraftPolicy):
    """What all policies that draft with the model's own layers share.

    num_draft_tokens: K. stop: when a draft ends early (see StopRule). adapter: a file of exit adapters (adapters.py).
    """

    num_draft_tokens: int = field(default=3, kw_only=True)
    stop: str = field(default="never", kw_only=True)
    adapter: str = field(default="", kw_only=True)
    only_plan = DraftPlan()  # of a policy that has only one

    def __post_init__(self):
        if self.num_draft_tokens < 0:
            raise UserError(f"num_draft_tokens must be 0 or more, got {self.num_draft_tokens}")
        self.stop_rule = StopRule(self.stop)
        if self.adapter:
            self.adapters = Adapters(self.adapter)
            self.contents = [*self.contents, self.adapters.content]

    def check_model(self, n_layer: int, dim: int | None) -> None:
        if self.adapters:
            self.adapters.check(n_layer, dim, self.only_plan.exits or (n_layer,))

    def draft_depth(self, n_layer: int) -> int:
        return max(self.only_plan.exits, default=n_layer)

    def start_prompt(self, prompt: Sequence[int]) -> None:
        self.stop_rule.forget()

    def start_round(self, context: RoundContext) -> DraftPlan:
        plan, rule = self.plan(context), self.stop_rule.start_round(context, self.num_draft_tokens)
        return plan if plan.stop_unless == rule else dataclasses.replace(plan, stop_unless=rule)

    def plan(self, context: RoundContext) -> DraftPlan:
        """The plan of a round; most policies have only one."""
        return self.only_plan

    def new_plan(self, exits: Sequence[int] = (), **settings) -> DraftPlan:
        """A plan with these exits and what all self-drafting policies share."""
        rule = self.stop_rule.rule
        return DraftPlan(tuple(exits), self.num_draft_tokens, stop_unless=rule, adapters=self.adapters, **settings)

    def end_round(self, round: Round) -> None:
        self.stop_rule.end_round(round)
