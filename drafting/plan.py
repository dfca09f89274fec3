"""What the decoding loop and a draft policy tell each other: the contract.

At the start of a round the loop asks a policy for a DraftPlan, drafts by it, asks at candidate exits and after drafted
tokens if the plan leaves that open, and at the end hands over the Round, the record everything downstream reads. A
policy never sees the model and cannot change the text: every row of a round is verified from the depth up to which it
is the full model's (`rounds.py`), whatever the policy did.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from drafting.adapters import Adapters
from kernels.exit_head import Exit, ExitStats


class Rule(NamedTuple):
    """A draft is sure of its token if `measure` is at least `threshold` (entropy: at most).

    measure: the top1, margin or entropy of ExitStats; or, only to leave at a candidate, `cosine` of its state with that
    at the candidate before, or `repeats`, of candidates in a row that chose the same token. Data instead of code, so
    that a runner can decide inside the one call in which it plays a round.
    """

    measure: str
    threshold: float

    @property
    def compares(self) -> bool:
        """Whether it looks at the candidate before, too."""
        return self.measure in ("cosine", "repeats")

    def holds(self, stats: ExitStats) -> bool:
        """Decide for one row by its statistics."""
        value = float(getattr(stats, self.measure))
        return value <= self.threshold if self.measure == "entropy" else value >= self.threshold


class Leaving:
    """Whether one draft leaves at a candidate, asked at each on its way up."""

    def __init__(self, rule: Rule):
        self.rule, self.state, self.token, self.repeats = rule, None, None, 0

    def asks(self, exit: Exit) -> bool:
        """Decide by the exit there; looks at no more of it than the rule needs."""
        if self.rule.measure == "cosine":
            before, self.state = self.state, exit.hidden[0].double()
            reach = None if before is None else self.rule.threshold * self.state.norm() * before.norm()
            return reach is not None and bool(self.state @ before >= reach)
        if self.rule.measure == "repeats":
            before, self.token = self.token, exit.tokens()[0]
            self.repeats = self.repeats + 1 if before == self.token else 1
            return self.repeats >= self.rule.threshold
        return self.rule.holds(exit.stats())


@dataclass(frozen=True)
class DraftPlan:
    """How one round drafts. Hashable: compiled and captured work is keyed by it.

    exits: candidate exit layers, ascending (counts of layers run); a draft never goes past the last one. Empty: the
        draft runs the whole depth (which pays if it skips sublayers).
    num_draft_tokens: how many tokens to draft at most (K). 0 is plain autoregressive decoding.
    skip_attention, skip_mlp: layers (0-based) whose sublayer the draft leaves out.
    proposed: drafted tokens that need no model pass (n-gram continuations).
    leave_if: at a candidate but the last, leave the model if this holds. None: the policy is asked (should_exit).
    stop_unless: after each drafted token, end the draft unless this holds. None: it goes on to num_draft_tokens.
    ask_to_stop: whether the policy is asked, too (should_stop).
    adapters: what corrects the states that leave at some of the exits.
    repeats: the policy's next plan will be this one, too, so a GPU may start the next round before this one is read.
    """

    exits: tuple[int, ...] = ()
    num_draft_tokens: int = 0
    skip_attention: frozenset[int] = frozenset()
    skip_mlp: frozenset[int] = frozenset()
    proposed: tuple[int, ...] = ()
    leave_if: Rule | None = None
    stop_unless: Rule | None = None
    ask_to_stop: bool = False
    adapters: Adapters | None = None
    repeats: bool = field(default=False, compare=False)

    @property
    def asks_policy(self) -> bool:
        """Whether the policy has a say while the round runs. If not, a runner may play it in one call."""
        if self.proposed or not self.num_draft_tokens:
            return False
        return self.ask_to_stop or (len(self.exits) > 1 and self.leave_if is None)

    @property
    def is_fixed(self) -> bool:
        """Whether nothing is proposed, and nothing decided while the round runs."""
        decides = self.stop_unless or self.ask_to_stop or len(self.exits) > 1
        return not self.proposed and not (decides and self.num_draft_tokens)

    @property
    def first_skip(self) -> int | None:
        """The first layer with a sublayer left out: hidden states above it are not the full model's. None: no skip."""
        return min(self.skip_attention | self.skip_mlp, default=None)


class RoundContext(NamedTuple):
    """What a policy may look at: all tokens so far (prompt and text), how many are still wanted, greedy or sampled.

    hidden: [1, D], the full model's state after the last layer that chose the last token, for a policy that reads it.
    """

    tokens: Sequence[int]
    remaining: int
    sampled: bool = False
    hidden: Tensor | None = None


@dataclass(frozen=True)
class Round:
    """One step of decoding, the record everything downstream reads (printing, statistics, feedback).

    tokens: ids emitted, `accepted` of them drafted, the last one the target's own unless the round was cut short.
    drafted: every id proposed this round, accepted or not. exit_layers: where each drafted token left the model.
    resume_layer: where verification restarted. seconds: wall time of the round.
    layer_visits: how often a layer's weights were read, head_visits: the LM head's (a trimmed head counts its share).
    """

    tokens: tuple[int, ...]
    drafted: tuple[int, ...] = ()
    accepted: int = 0
    exit_layers: tuple[int, ...] = ()
    resume_layer: int = 0
    seconds: float = 0.0
    layer_visits: float = 0.0
    head_visits: float = 0.0
