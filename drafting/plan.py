"""What the decoding loop and a draft policy tell each other: the data of the contract.

At the start of a round the loop asks a policy for a DraftPlan and drafts by it. If the plan leaves a decision open, the
loop asks the policy at candidate exits and after drafted tokens. At the end it hands over the Round, the record that
everything downstream reads. A policy never sees the model and cannot change the text: whatever it does, every row of a
round is verified (`decoding/rounds.py`).
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from drafting.adapters import Adapters
from kernels.exit_head import ExitStats


class Measure(enum.IntEnum):
    """Name the number of an exit that a rule looks at. kernels/cpu/round.h has the same names and values.

    TOP1, MARGIN and ENTROPY are statistics of one exit, see ExitStats. COSINE and REPEATS compare an exit with the one
    at the candidate before: the cosine of the two hidden states, and how many candidates in a row chose one token.
    """

    TOP1 = 0
    MARGIN = 1
    ENTROPY = 2
    COSINE = 3
    REPEATS = 4

    @property
    def compares(self) -> bool:
        """Say whether it also looks at the candidate before."""
        return self >= Measure.COSINE

    def of(self, stats: ExitStats) -> Tensor | float:
        """Pick this measure from the statistics of an exit; not for those that compare."""
        return getattr(stats, self.name.lower())


STATISTICS = tuple(measure for measure in Measure if not measure.compares)  # in the order in which kernels return them


class Rule(NamedTuple):
    """Call an exit sure of its token if `measure` is at least `threshold` (ENTROPY: at most).

    Rules are data instead of code. So C++ judges them inside a round, and with a GPU the host judges them by a few
    numbers that it copies from the device. Measures that compare candidates can only decide where to exit, not when to
    stop.
    """

    measure: Measure
    threshold: float

    def holds(self, stats: ExitStats) -> bool:
        """Decide for one row by its statistics."""
        value = float(self.measure.of(stats))
        return value <= self.threshold if self.measure is Measure.ENTROPY else value >= self.threshold


@dataclass(frozen=True)
class DraftPlan:
    """Say how one round drafts. Hashable: compiled and captured work is keyed by it.

    exits: candidate exit layers, ascending (counts of layers run); a draft never goes past the last one. Empty: the
        draft runs through all layers (which pays if it skips sublayers).
    num_draft_tokens: how many tokens to draft at most (K). 0 is plain autoregressive decoding.
    skip_attention, skip_mlp: layers (0-based) whose sublayer the draft skips.
    proposed: drafted tokens that need no model pass (n-gram continuations).
    exit_if: at every candidate but the last, the draft exits if this rule holds. None: the policy is asked
        (should_exit).
    stop_unless: the draft ends after a token unless this rule holds. None: it goes on to num_draft_tokens.
    ask_to_stop: whether the policy is asked, too (should_stop).
    adapters: correct the hidden states of some of the exits.
    repeats: the policy's next plan will be this one, too, so a GPU may start the next round before this one is read.
    plain: this is plain decoding of several tokens a call. Its "drafts" run all layers and skip nothing, so with the
        model's own layers and LM head they are the full model's tokens, and the record counts nothing as drafted.
    """

    exits: tuple[int, ...] = ()
    num_draft_tokens: int = 0
    skip_attention: frozenset[int] = frozenset()
    skip_mlp: frozenset[int] = frozenset()
    proposed: tuple[int, ...] = ()
    exit_if: Rule | None = None
    stop_unless: Rule | None = None
    ask_to_stop: bool = False
    adapters: Adapters | None = None
    repeats: bool = field(default=False, compare=False)
    plain: bool = field(default=False, compare=False)

    def candidates(self, n_layer: int) -> tuple[int, ...]:
        """List where a drafted token may exit, ascending; nothing where no layer is run to draft."""
        if self.proposed or not self.num_draft_tokens:
            return ()
        return self.exits or (n_layer,)

    @property
    def most_drafts(self) -> int:
        """Return how many tokens the round drafts at most."""
        return len(self.proposed) or self.num_draft_tokens

    @property
    def asks_policy(self) -> bool:
        """Say whether the policy decides anything while the round runs. If not, it may be played in one call."""
        if self.proposed or not self.num_draft_tokens:
            return False
        return self.ask_to_stop or (len(self.exits) > 1 and self.exit_if is None)

    @property
    def is_fixed(self) -> bool:
        """Say whether nothing is proposed, and nothing decided while the round runs."""
        decides = self.stop_unless or self.ask_to_stop or len(self.exits) > 1
        return not self.proposed and not (decides and self.num_draft_tokens)

    def exact_depth(self, n_layer: int) -> int:
        """Return the depth up to which a drafted row is the full model's: where the first sublayer is skipped."""
        return min(self.skip_attention | self.skip_mlp, default=n_layer)


class RoundContext(NamedTuple):
    """Tell a policy what it may look at when it chooses a plan.

    tokens: all so far, prompt and text. remaining: how many are still wanted. sampled: not greedy.
    hidden: [1, D], the model's newest state after the last layer, if the policy reads it; where drafts are verified it
        is the one that chose the last token.
    """

    tokens: Sequence[int]
    remaining: int
    sampled: bool = False
    hidden: Tensor | None = None


@dataclass(frozen=True)
class Round:
    """Record one step of decoding: what everything downstream reads (printing, statistics, feedback).

    tokens: ids emitted. The first `accepted` were drafted; the last one is the full model's own, unless the text ended.
    drafted: every id drafted or proposed, accepted or not. exit_layers: where each drafted token exited.
    A round that is not verified has no `drafted` and `accepted`: its tokens are the drafts, with their exit layers.
    resume_layer: the shallowest depth from which verification went on. seconds: wall time, the policy's choice of a
    plan included. layer_visits: how often a layer's weights were read; a skipped sublayer counts its bytes less, a
    low-bit layer its bytes' share. head_visits: the same of the LM head, of which a trimmed one counts its share.
    """

    tokens: tuple[int, ...]
    drafted: tuple[int, ...] = ()
    accepted: int = 0
    exit_layers: tuple[int, ...] = ()
    resume_layer: int = 0
    seconds: float = 0.0
    layer_visits: float = 0.0
    head_visits: float = 0.0
