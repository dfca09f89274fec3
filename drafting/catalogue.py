"""Draft policies: where a draft leaves the model. The one place in which exit decisions are made.

One string is the whole setting: `static:3`, `confidence:threshold=0.8,candidates=3-6`, and with `+` a combination:
`prompt_lookup+static:3`. The contract is in `plan.py`; adding a policy is one class and one line in POLICIES.
"""

import dataclasses
from collections.abc import Sequence

from drafting.auto import Auto
from drafting.controls import LogitsFuture, Random
from drafting.exits import (
    Autoregressive,
    Confidence,
    ConsistentTokens,
    Entropy,
    LogitsCurrent,
    Margin,
    Saturation,
    Static,
)
from drafting.lookup import PromptLookup
from drafting.plan import Depths, DraftPlan, Round, RoundContext
from drafting.policy import DraftPolicy
from drafting.skips import LayerSkipProportion, Learned, SkipSet
from errors import UserError
from kernels.exit_head import Exit


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
