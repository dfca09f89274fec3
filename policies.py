"""Where a draft leaves the model: the one place in which exit decisions are made.

`generate.decode` asks the policy for a plan at the start of every round, drafts by it, and tells the policy what became
of the draft. A policy never sees the model and cannot change the text: verification restarts at the first layer where
any drafted token stopped being identical to the full model, whatever the policy did (`Draft.resume_layer`).

One string is the whole setting: `static:3`, `static:exit_layer=3,num_draft_tokens=5`. Adding a policy is one class and
one line in POLICIES.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class DraftPlan:
    """How one round drafts. Hashable: compiled and captured work is keyed by it.

    exits: candidate exit layers, ascending (counts of layers run); a draft never goes past the last one.
    num_draft_tokens: how many tokens to draft at most (K). 0 is plain autoregressive decoding.
    skip_attention, skip_mlp: layers (0-based) whose sublayer the draft leaves out.
    proposed: drafted tokens that need no model pass (n-gram continuations).
    """

    exits: tuple[int, ...] = ()
    num_draft_tokens: int = 0
    skip_attention: frozenset[int] = frozenset()
    skip_mlp: frozenset[int] = frozenset()
    proposed: tuple[int, ...] = ()

    @property
    def is_static(self) -> bool:
        """Whether nothing has to be decided while drafting: one exit at most, every sublayer runs, nothing proposed."""
        one_exit = len(self.exits) == 1 or not self.num_draft_tokens
        return one_exit and not (self.proposed or self.skip_attention or self.skip_mlp)

    @property
    def first_skip(self) -> int | None:
        """The first layer with a sublayer left out: hidden states above it are not the full model's. None: no skip."""
        return min(self.skip_attention | self.skip_mlp, default=None)


@dataclass(frozen=True)
class RoundContext:
    """What a policy may look at: all tokens so far (prompt and text) and how many are still wanted."""

    tokens: Sequence[int]
    remaining: int


@dataclass(frozen=True)
class Round:
    """One step of decoding, the record everything downstream reads (printing, statistics, feedback).

    tokens: ids emitted, `accepted` of them drafted, the last one the target's own unless the round was cut short.
    drafted: every id proposed this round, accepted or not. exit_layers: where each drafted token left the model.
    resume_layer: where verification restarted. seconds: wall time of the round.
    """

    tokens: tuple[int, ...]
    drafted: tuple[int, ...] = ()
    accepted: int = 0
    exit_layers: tuple[int, ...] = ()
    resume_layer: int = 0
    seconds: float = 0.0


class DraftPolicy:
    """The contract. Subclasses are dataclasses: their fields are the keys of the policy string."""

    num_draft_tokens = 0  # the most tokens a round may draft

    def check(self, n_layer: int) -> None:
        """Raise ValueError if the policy does not fit a model of n_layer layers."""

    def start_prompt(self, prompt: Sequence[int]) -> None:
        """Forget the last prompt."""

    def start_round(self, context: RoundContext) -> DraftPlan:
        """Say how this round drafts."""
        raise NotImplementedError

    def should_exit(self, depth: int, hidden: Tensor) -> bool:
        """Leave the model at candidate `depth`, where the state is `hidden` [1, D]? Not asked at the last candidate."""
        return False

    def end_round(self, round: Round) -> None:
        """Learn from what was accepted."""


def check_exit_layer(exit_layer: int, n_layer: int) -> None:
    if not 1 <= exit_layer <= n_layer:
        raise ValueError(f"exit_layer must be in 1..{n_layer} for this model, got {exit_layer}")


@dataclass
class Autoregressive(DraftPolicy):
    """Draft nothing: every token is the full model's own. The baseline, through the same loop."""

    def start_round(self, context: RoundContext) -> DraftPlan:
        return DraftPlan()


@dataclass
class Static(DraftPolicy):
    """Draft every token with the first `exit_layer` layers (LayerSkip, arXiv 2404.16710, section 4.3)."""

    exit_layer: int
    num_draft_tokens: int = field(default=3)

    def __post_init__(self):
        if self.num_draft_tokens < 0:
            raise ValueError(f"num_draft_tokens must be 0 or more, got {self.num_draft_tokens}")
        self.plan = DraftPlan(exits=(self.exit_layer,), num_draft_tokens=self.num_draft_tokens)

    def check(self, n_layer: int) -> None:
        check_exit_layer(self.exit_layer, n_layer)

    def start_round(self, context: RoundContext) -> DraftPlan:
        return self.plan


POLICIES: dict[str, type[DraftPolicy]] = {
    "none": Autoregressive,
    "static": Static,
}


def make_policy(text: str, n_layer: int, **defaults) -> DraftPolicy:
    """Build the policy that `text` names, such as "static:3" or "static:exit_layer=3,num_draft_tokens=5".

    A value without a key belongs to the policy's first key. `defaults` fill keys the policy has and `text` leaves out.
    Raises ValueError with the valid names, keys or ranges.
    """
    name, _, settings = text.partition(":")
    if name not in POLICIES:
        raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {name!r}")
    keys = {f.name: f for f in dataclasses.fields(POLICIES[name])}
    values = {key: value for key, value in defaults.items() if key in keys and value is not None}
    given = set()
    for index, setting in enumerate(filter(None, settings.split(","))):
        key, equals, value = setting.partition("=")
        if not equals and index == 0 and keys:
            key, value = next(iter(keys)), setting
        if key in given:
            raise ValueError(f"policy {name}: {key} is given twice in {text!r}")
        given.add(key)
        if key not in keys:
            raise ValueError(f"policy {name} has the keys {', '.join(keys) or '(none)'}, got {setting!r}")
        kind = keys[key].type
        try:
            values[key] = kind(value)
        except ValueError:
            raise ValueError(f"policy {name}: {key} must be of type {kind.__name__}, got {value!r}") from None
    missing = [k for k, f in keys.items() if k not in values and f.default is dataclasses.MISSING]
    if missing:
        raise ValueError(f"policy {name} needs {', '.join(missing)}, for example {name}:{missing[0]}=2")
    policy = POLICIES[name](**values)
    policy.check(n_layer)
    return policy
