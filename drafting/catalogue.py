"""Draft policies: where a draft leaves the model. The one place in which exit decisions are made.

One string is the whole setting: `static:3`, `confidence:threshold=0.8,candidates=3-6`, and with `+` a combination:
`prompt_lookup+static:3`. The contract is in `plan.py`; adding a policy is one class and one line in POLICIES.
"""

import dataclasses
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from drafting.auto import Auto
from drafting.lookup import PromptLookup
from drafting.plan import (
    Depths,
    DraftPlan,
    DraftPolicy,
    Round,
    RoundContext,
    Rule,
    candidates_or_default,
    check_exit_layer,
    check_range,
)
from drafting.policy import SelfDrafting
from drafting.skips import LayerSkipProportion, Learned, SkipSet
from errors import UserError
from kernels.exit_head import Exit


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


class Combined(DraftPolicy):
    """Several policies, written first+second: proposals come first; where there are none, the others draft together.

    Skip sets add up; exits, K and the decision to leave come from the last policy that has exits, a stop rule from the
    last that has one.
    """

    def __init__(self, parts: Sequence[DraftPolicy]):
        self.parts = tuple(parts)
        self.num_draft_tokens = max(part.num_draft_tokens for part in parts)
        self.skips_sublayers = any(part.skips_sublayers for part in parts)
        self.reads_hidden = any(part.reads_hidden for part in parts)
        self.contents = [content for part in parts for content in part.contents]
        self.verifiable_only = any(part.verifiable_only for part in parts)

    def fit(self, n_layer: int) -> None:
        for part in self.parts:
            part.fit(n_layer)

    def check_model(self, n_layer: int, dim: int | None) -> None:
        for part in self.parts:
            part.check_model(n_layer, dim)

    def draft_depth(self, n_layer: int) -> int:
        return max(part.draft_depth(n_layer) for part in self.parts)

    def start_prompt(self, prompt: Sequence[int]) -> None:
        for part in self.parts:
            part.start_prompt(prompt)

    def start_round(self, context: RoundContext) -> DraftPlan:
        plans = []
        for part in self.parts:
            plans.append(part.start_round(context))
            if plans[-1].proposed:
                self.planned = (part,)
                return plans[-1]
        self.planned = self.parts
        exits = [i for i, plan in enumerate(plans) if plan.exits]
        drafting = exits[-1] if exits else max(range(len(plans)), key=lambda i: plans[i].num_draft_tokens)
        self.leaving = self.parts[drafting]
        self.asked = [part for part, plan in zip(self.parts, plans, strict=True) if plan.ask_to_stop]
        rules = [plan.stop_unless for plan in plans if plan.stop_unless]
        return dataclasses.replace(
            plans[drafting],
            skip_attention=frozenset().union(*(plan.skip_attention for plan in plans)),
            skip_mlp=frozenset().union(*(plan.skip_mlp for plan in plans)),
            stop_unless=rules[-1] if rules else None,
            ask_to_stop=bool(self.asked),
            repeats=all(plan.repeats for plan in plans),
        )

    def should_exit(self, depth: int, exit: Exit) -> bool:
        return self.leaving.should_exit(depth, exit)

    def should_stop(self, exit: Exit) -> bool:
        return any([part.should_stop(exit) for part in self.asked])  # a list: every part must be told

    def end_round(self, round: Round) -> None:
        for part in self.planned:  # a proposal says nothing about exits, nor the other way round
            part.end_round(round)

    def __str__(self) -> str:
        return "+".join(map(str, self.parts))


POLICIES: dict[str, type[DraftPolicy]] = {
    kind.name: kind
    for kind in (
        Autoregressive,
        Static,
        Confidence,
        Margin,
        Entropy,
        Saturation,
        ConsistentTokens,
        Random,
        LogitsCurrent,
        LogitsFuture,
        LayerSkipProportion,
        SkipSet,
        Learned,
        PromptLookup,
        Auto,
    )
}


def make_policy(text: str, n_layer: int, dim: int | None = None, **defaults) -> DraftPolicy:
    """Build the policy that `text` names: "static:3", "confidence:0.8,candidates=3-6", "prompt_lookup+static:3", …

    A value without a key belongs to the policy's first key. `defaults` fill keys the policies have and `text` leaves
    out. dim: the model's width, if known. Raises UserError with the valid names, keys or ranges, and for a file that
    cannot be read or was made for another model.
    """
    parts = [_make_one(part, defaults) for part in text.split("+")]
    if len(parts) > 1 and any(isinstance(part, Auto) for part in parts):
        raise UserError(f"auto combines self-drafting and prompt lookup by itself: give it alone, got {text!r}")
    policy = parts[0] if len(parts) == 1 else Combined(parts)
    policy.fit(n_layer)
    policy.check_model(n_layer, dim)
    return policy


def _make_one(text: str, defaults: dict) -> DraftPolicy:
    name, _, settings = text.partition(":")
    if name not in POLICIES:
        raise UserError(f"policy must be one of {', '.join(POLICIES)}, got {name!r}")
    fields = sorted(dataclasses.fields(POLICIES[name]), key=lambda key: key.kw_only)  # stable: own keys first
    keys = {key.name: key for key in fields}
    values = {key: value for key, value in defaults.items() if key in keys and value is not None}
    given = set()
    for index, setting in enumerate(filter(None, settings.split(","))):
        key, equals, value = setting.partition("=")
        if not equals and index == 0 and keys:
            key, value = next(iter(keys)), setting
        if key in given:
            raise UserError(f"policy {name}: {key} is given twice in {text!r}")
        given.add(key)
        if key not in keys:
            raise UserError(f"policy {name} has the keys {', '.join(keys) or '(none)'}, got {setting!r}")
        kind = keys[key].type
        try:
            values[key] = kind(value)
        except ValueError:
            wanted = "depths such as 3-6-9" if kind is Depths else f"of type {kind.__name__}"
            raise UserError(f"policy {name}: {key} must be {wanted}, got {value!r}") from None
    missing = [k for k, f in keys.items() if k not in values and f.default is dataclasses.MISSING]
    if missing:
        example = "mask.json" if keys[missing[0]].type is str else 2
        raise UserError(f"policy {name} needs {', '.join(missing)}, for example {name}:{missing[0]}={example}")
    try:
        return POLICIES[name](**values)
    except UserError as error:
        raise UserError(f"policy {name}: {error}") from None
