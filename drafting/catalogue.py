"""Every draft policy by name, and the string that makes one: the setting of all programs.

`static:3`, `confidence:threshold=0.8,candidates=3-6`; with `+` policies are combined, as in `prompt_lookup+static:3`.
A policy is one class (`policy.py` shows a complete one) and one line in POLICIES.
"""

import dataclasses
import typing
from collections.abc import Sequence
from types import NoneType

from drafting.auto import Auto
from drafting.exits import Confidence, ConsistentTokens, Entropy, Margin, Saturation, Static
from drafting.lookup import PromptLookup
from drafting.plan import DraftPlan, Round, RoundContext
from drafting.policy import Autoregressive, Depths, DraftPolicy
from drafting.python_exits import LogitsFuture, Random
from drafting.skips import LayerSkipProportion, Learned, SkipSet
from errors import UserError
from kernels.exit_head import Exit


class Combined(DraftPolicy):
    """Combine policies, written first+second.

    A round takes the first policy's plan that proposes tokens. If none does, all policies draft together:
      * a sublayer is skipped if any of them skips it
      * exits, K and the exit decision are those of the last policy that has exits; if none has, K is the largest
      * the stop rule is that of the last policy that has one
    """

    def __init__(self, parts: Sequence[DraftPolicy]):
        self.parts = tuple(parts)
        self.name = "+".join(part.name for part in parts)
        self.num_draft_tokens = max(part.num_draft_tokens for part in parts)
        self.skips_sublayers = any(part.skips_sublayers for part in parts)
        self.verifiable_only = any(part.verifiable_only for part in parts)
        self.reads_hidden = any(part.reads_hidden for part in parts)
        self.file_hashes = [file_hash for part in parts for file_hash in part.file_hashes]

    @property
    def example(self) -> str:
        return str(self)

    def fit(self, n_layer: int) -> None:
        for part in self.parts:
            part.fit(n_layer)
        self.watched_depths = sorted({depth for part in self.parts for depth in part.watched_depths})
        measuring = [part for part in self.parts if part.watched_depths or part.plans_to_time()]
        if len({part.adapters for part in measuring}) > 1:
            raise UserError(f"{' and '.join(map(str, measuring))} measure exits with different adapters: give one")
        self.adapters = measuring[0].adapters if measuring else None

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
        with_exits = [i for i, plan in enumerate(plans) if plan.exits]
        drafting = with_exits[-1] if with_exits else max(range(len(plans)), key=lambda i: plans[i].num_draft_tokens)
        self.exiting = self.parts[drafting]
        self.stopping = [part for part, plan in zip(self.parts, plans, strict=True) if plan.ask_to_stop]
        stop_rules = [plan.stop_unless for plan in plans if plan.stop_unless]
        return dataclasses.replace(
            plans[drafting],
            skip_attention=frozenset().union(*(plan.skip_attention for plan in plans)),
            skip_mlp=frozenset().union(*(plan.skip_mlp for plan in plans)),
            stop_unless=stop_rules[-1] if stop_rules else None,
            ask_to_stop=bool(self.stopping),
            repeats=all(plan.repeats for plan in plans),
            plain=all(plan.plain for plan in plans),
        )

    def should_exit(self, depth: int, exit: Exit) -> bool:
        return self.exiting.should_exit(depth, exit)

    def should_stop(self, exit: Exit) -> bool:
        return any([part.should_stop(exit) for part in self.stopping])  # a list: every part must be told

    def end_round(self, round: Round) -> None:
        for part in self.planned:  # a proposal says nothing about exits, nor the other way round
            part.end_round(round)

    def plans_to_time(self) -> list[DraftPlan]:
        return list(dict.fromkeys(plan for part in self.parts for plan in part.plans_to_time()))

    def calibrate(self, seconds: dict[DraftPlan, float], agreement: dict[int, list[bool]]) -> None:
        for part in self.parts:
            if plans := part.plans_to_time():
                depths = {depth for plan in plans for depth in plan.exits}
                part.calibrate({plan: seconds[plan] for plan in plans}, {depth: agreement[depth] for depth in depths})

    def see_prompt(self, agreement: dict[int, list[bool]]) -> None:
        for part in self.parts:
            if part.watched_depths:
                part.see_prompt({depth: agreement[depth] for depth in part.watched_depths})

    def explain(self) -> list[str]:
        return [line for part in self.parts for line in part.explain()]

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
        LogitsFuture,
        LayerSkipProportion,
        SkipSet,
        Learned,
        PromptLookup,
        Auto,
    )
}
# Names that other projects use -> what they are here. Further keys may follow, as in logits_current:0.8,decay=4.
ALIASES = {"logits_current": "confidence:threshold=0.9"}


def make_policy(text: str, n_layer: int, dim: int | None = None, **defaults) -> DraftPolicy:
    """Make the policy that `text` names: "static:3", "confidence:0.8,candidates=3-6", "prompt_lookup+static:3", …

    A value without a key sets the policy's first key. defaults: of keys that the policy has and `text` leaves out.
    dim: the model's width, None if it is not known. Raises UserError with the valid names, keys or ranges, and for a
    file that cannot be read or is for another model.
    """
    parts = [_make_part(part, defaults) for part in text.split("+")]
    if len(parts) > 1 and any(isinstance(part, Auto) for part in parts):
        raise UserError(f"auto combines self-drafting and prompt lookup by itself: give it alone, got {text!r}")
    policy = parts[0] if len(parts) == 1 else Combined(parts)
    policy.fit(n_layer)
    policy.check_model(n_layer, dim)
    return policy


def policy_names() -> list[str]:
    """Return every name that a policy string may begin with."""
    return [*POLICIES, *ALIASES]


def keys_of(kind: type[DraftPolicy]) -> dict[str, dataclasses.Field]:
    """Return the keys of a policy by name: its own first, then those of the classes it extends."""
    return {key.name: key for key in sorted(dataclasses.fields(kind), key=lambda key: key.kw_only)}


def _make_part(text: str, defaults: dict) -> DraftPolicy:
    """Make a policy that is not combined."""
    name, _, settings = text.partition(":")
    meant, _, preset = ALIASES.get(name, name).partition(":")
    if meant not in POLICIES:
        raise UserError(f"policy must be one of {', '.join(policy_names())}, got {name!r}")
    kind = POLICIES[meant]
    keys = keys_of(kind)
    values = {key: value for key, value in defaults.items() if key in keys and value is not None}
    values |= _values(name, keys, preset) | _values(name, keys, settings)
    missing = [key.name for key in keys.values() if key.name not in values and key.default is dataclasses.MISSING]
    if missing:
        raise UserError(f"policy {name} needs {', '.join(missing)}, for example {kind.example}")
    try:
        return kind(**values)
    except UserError as error:
        raise UserError(f"policy {name}: {error}") from None


def _values(name: str, keys: dict[str, dataclasses.Field], settings: str) -> dict[str, object]:
    """Read "0.8,candidates=3-6" -> the value of each key that is given. name: of the policy, for messages."""
    values = {}
    for index, setting in enumerate(filter(None, settings.split(","))):
        key, equals, value = setting.partition("=")
        if not equals and index == 0 and keys:
            key, value = next(iter(keys)), setting
        if key in values:
            raise UserError(f"policy {name}: {key} is given twice in {settings!r}")
        if key not in keys:
            raise UserError(f"policy {name} has the keys {', '.join(keys) or '(none)'}, got {setting!r}")
        kind = _value_type(keys[key])
        try:
            values[key] = kind(value)
        except ValueError:
            wanted = "depths such as 3-6-9" if kind is Depths else f"of type {kind.__name__}"
            raise UserError(f"policy {name}: {key} must be {wanted}, got {value!r}") from None
    return values


def _value_type(key: dataclasses.Field) -> type:
    """Return the type that turns a key's text into its value: int of `int`, and of `int | None`."""
    return next((kind for kind in typing.get_args(key.type) if kind is not NoneType), key.type)
