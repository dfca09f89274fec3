"""The policy that needs no tuning: it drafts in the way that promises most tokens per second, or not at all.

Every few rounds it chooses exit and K anew; in each round it compares that with a proposal of prompt lookup.

It knows three things about a round:

* its cost: whole rounds are timed at start-up;
* how often an exit agrees with the full model: compared on a sample text at start-up, and on the end of the prompt;
* a correction learned while decoding: failed drafts ÷ predicted failures, pooled over all exits and, once an exit has
  enough data, for that exit. One text is too short to judge every exit by itself from the start.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from drafting.adapters import Adapters
from drafting.lookup import NgramIndex
from drafting.plan import DraftPlan, Round, RoundContext
from drafting.policy import Depths, DraftPolicy, candidates_or_default
from errors import UserError

PLAIN = DraftPlan()
NGRAMS = (4, 2)
KEEP = 0.99  # weight of the past after one more draft was verified
SAMPLE_WEIGHT = 20.0  # the sample text counts as much as this many tokens of the prompt
TEXT_PRIOR = 16.0  # after so many verified drafts of a text, its pooled correction has half of the weight
EXIT_PRIOR = 64.0  # after so many verified drafts from one exit, that exit's own correction has half of the weight
MOST_AGREEMENT = 0.98  # believed of an exit, even where a few hundred tokens were all right
LOOKUP_PRIOR = 1.5, 2.0  # right and verified tokens that every n-gram size starts with
REFRESH = 4  # rounds between choices of exit and K: a choice costs as much as a layer of a small model
RETRY = 16  # rounds of plain decoding before drafting is tried again
TIMED_DRAFTS = 3  # K of the rounds that are timed at start-up


def expected_tokens(acceptance: Tensor | float, num_draft_tokens: int) -> Tensor | float:
    """Return the mean number of tokens of a round whose drafts are right with probability a: 1 + a + … + a^K.

    acceptance: a, the probability of each draft if the one before it was right.
    """
    total = power = acceptance * 0 + 1.0
    for _ in range(num_draft_tokens):
        power = power * acceptance
        total = total + power
    return total


class DecayedRatio:
    """Keep a ratio seen ÷ base of two sums in which older entries count less and less."""

    def __init__(self, seen: float = 0.0, base: float = 0.0):
        self.seen, self.base = seen, base

    def add(self, seen: float, base: float, verified: int) -> None:
        """Add to both sums what `verified` drafts contributed."""
        keep = KEEP**verified
        self.seen, self.base = keep * self.seen + seen, keep * self.base + base

    def value(self, prior: float = 0.0, weight: float = 0.0) -> float:
        """Return the ratio, drawn towards `prior` as if a base of `weight` had shown that."""
        return (self.seen + weight * prior) / (self.base + weight)


@dataclass
class Auto(DraftPolicy):
    """Choose exit layer and K, n-gram proposals or plain decoding, by expected tokens per second.

    The objective is that of DEL (arXiv 2504.05598), in measured time instead of layers.

    num_draft_tokens: the most tokens of a draft. candidates: exit layers to choose from (default: five up to L/2, or
    those of the adapters). adapter: a file of exit adapters.
    """

    name = "auto"
    num_draft_tokens: int = 7
    candidates: Depths = field(default=Depths(), kw_only=True)
    adapter: str = field(default="", kw_only=True)
    verifiable_only = True

    def __post_init__(self):
        if self.num_draft_tokens < 1:
            raise UserError(
                f"num_draft_tokens must be 1 or more, got {self.num_draft_tokens}; plain decoding is the policy none"
            )
        if self.adapter:
            self.adapters = Adapters(self.adapter)
            self.file_hashes = [self.adapters.file_hash]

    def check_model(self, n_layer: int, dim: int | None) -> None:
        if self.adapters:
            self.adapters.check(n_layer, dim, self.exits)

    def fit(self, n_layer: int) -> None:
        spread = Depths(
            self.adapters.by_exit
            if self.adapters
            else {max(1, round(share * n_layer / 24)) for share in (3, 4, 6, 8, 12)}
        )
        self.exits = self.watched_depths = candidates_or_default(self.candidates or spread, n_layer)
        # Assumed until measured: costs in layers, the LM head as one, and early exits as good as a LayerSkip model's.
        self.timed_verify_s = {rows: n_layer + 1.0 for rows in self._timed_rows()}
        self.draft_s = {depth: depth + 1.0 for depth in self.exits}
        self.sampled_agreement = {depth: min(0.9, 0.4 + 1.2 * depth / n_layer) for depth in self.exits}
        self.best_by_percent: dict[tuple[int, int | None], tuple[float, int]] = {}
        self.start_prompt(())

    def draft_depth(self, n_layer: int) -> int:
        return self.exits[-1]

    def _timed_rows(self) -> list[int]:
        return sorted({1, 2, *(rows for rows in (4, 8) if rows <= self.num_draft_tokens), self.num_draft_tokens + 1})

    def plans_to_time(self) -> list[DraftPlan]:
        drafts = min(TIMED_DRAFTS, self.num_draft_tokens)
        verifying = [DraftPlan(proposed=(0,) * (rows - 1)) for rows in self._timed_rows()]
        return verifying + [DraftPlan((depth,), drafts, adapters=self.adapters) for depth in self.exits]

    def calibrate(self, seconds: dict[DraftPlan, float], agreement: dict[int, list[bool]]) -> None:
        self.timed_verify_s = {1 + len(plan.proposed): s for plan, s in seconds.items() if not plan.exits}
        for plan, s in seconds.items():
            if plan.exits:
                k = plan.num_draft_tokens
                self.draft_s[plan.exits[0]] = max(0.0, s - self.verify_seconds(k + 1)) / k
        for depth in self.exits:
            self.sampled_agreement[depth] = min(sum(agreement[depth]) / len(agreement[depth]), MOST_AGREEMENT)
        self.best_by_percent.clear()
        self.start_prompt(())

    def verify_seconds(self, rows: int) -> float:
        """Return the seconds of verifying so many rows, by linear interpolation between those that were timed."""
        if rows in self.timed_verify_s:
            return self.timed_verify_s[rows]
        low = max(timed for timed in self.timed_verify_s if timed < rows)
        high = min(timed for timed in self.timed_verify_s if timed > rows)
        share = (rows - low) / (high - low)
        return (1 - share) * self.timed_verify_s[low] + share * self.timed_verify_s[high]

    def start_prompt(self, prompt: Sequence[int]) -> None:
        self.index = NgramIndex(NGRAMS)
        self.agreement = dict(self.sampled_agreement)
        self.failures = DecayedRatio()  # failed drafts ÷ predicted failures, of all exits
        self.exit_failures = {depth: DecayedRatio() for depth in self.exits}
        self.lookups = {size: DecayedRatio(*LOOKUP_PRIOR) for size in NGRAMS}  # right ÷ verified tokens
        self.since_draft = 0
        self.rounds = 0
        self.chosen: Counter[tuple[tuple[int, ...], int]] = Counter()  # rounds by (exits, K)

    def see_prompt(self, agreement: dict[int, list[bool]]) -> None:
        for depth in self.exits:
            agreed = agreement[depth]
            right = SAMPLE_WEIGHT * self.sampled_agreement[depth] + sum(agreed)
            self.agreement[depth] = min(right / (SAMPLE_WEIGHT + len(agreed)), MOST_AGREEMENT)

    def acceptance(self, depth: int) -> float:
        """Return the probability that a draft from an exit at `depth` is right if the one before it was."""
        predicted = 1 - self.agreement[depth]
        pooled = self.failures.value(1.0, TEXT_PRIOR * predicted)
        return 1 - predicted * self.exit_failures[depth].value(pooled, EXIT_PRIOR * predicted)

    def best(self, acceptance: float, depth: int | None) -> tuple[float, int]:
        """Return (expected tokens/s, K) of drafts from an exit at `depth`; None: of n-grams, which cost nothing."""
        percent = min(max(round(100 * acceptance), 0), 99)
        if (percent, depth) not in self.best_by_percent:  # thousands of rounds ask for the same few
            draft_s = self.draft_s[depth] if depth else 0.0
            self.best_by_percent[percent, depth] = max(
                (expected_tokens(percent / 100, k) / (k * draft_s + self.verify_seconds(k + 1)), k)
                for k in range(1, self.num_draft_tokens + 1)
            )
        return self.best_by_percent[percent, depth]

    def best_drafting(self) -> tuple[float, DraftPlan]:
        """Return (expected tokens/s, plan) of the best exit and K."""
        (rate, k), depth = max((self.best(self.acceptance(depth), depth), depth) for depth in self.exits)
        return rate, DraftPlan((depth,), k, adapters=self.adapters)

    def start_round(self, context: RoundContext) -> DraftPlan:
        if self.rounds % REFRESH == 0:
            self.drafting = self.best_drafting()
        self.rounds += 1
        rate, plan = self.drafting
        plain_rate = 1 / self.timed_verify_s[1]
        if rate < plain_rate:
            rate = plain_rate
            plan = PLAIN if self.since_draft < RETRY else plan
        self.ngram, self.guess = self.index.find(context.tokens, self.num_draft_tokens)
        if self.guess:
            lookup_rate, k = self.best(self.lookups[self.ngram].value(), None)
            plan = DraftPlan(proposed=self.guess[:k]) if lookup_rate > rate else plan
        self.since_draft = self.since_draft + 1 if plan is PLAIN else 0
        self.chosen[plan.exits, plan.most_drafts] += 1
        return plan

    def end_round(self, round: Round) -> None:
        if self.guess:  # the text judges it, even if it was not drafted
            right = [guess == token for guess, token in zip(self.guess, round.tokens, strict=False)]
            verified = right.index(False) + 1 if False in right else len(right)
            self.lookups[self.ngram].add(sum(right[:verified]), verified, verified)
        if round.exit_layers:
            depth, failed = round.exit_layers[0], round.accepted < len(round.drafted)
            verified = round.accepted + failed
            predicted = verified * (1 - self.agreement[depth])
            self.failures.add(failed, predicted, verified)
            self.exit_failures[depth].add(failed, predicted, verified)

    def explain(self) -> list[str]:
        plain_s = self.verify_seconds(1)
        exits = (
            f"{depth}: agrees {self.agreement[depth]:.2f}, a draft costs {self.draft_s[depth] / plain_s:.2f}"
            for depth in self.agreement
        )
        rows = (f"{rows}: {seconds / plain_s:.2f}" for rows, seconds in self.timed_verify_s.items())
        lines = [
            "auto: exit layers, agreement with the model before decoding, cost in plain steps: " + "; ".join(exits),
            "auto: rows of a verification, cost in plain steps: " + "; ".join(rows),
            "auto: acceptance expected at the end: "
            + "; ".join(f"{depth}: {self.acceptance(depth):.2f}" for depth in self.exits),
        ]
        if self.chosen:
            counts = (f"{describe(*choice)} {count}" for choice, count in self.chosen.most_common())
            lines.append("auto: rounds: " + ", ".join(counts))
        return lines


def describe(exits: tuple[int, ...], drafts: int) -> str:
    """Name the way a round drafted: "E=3 K=5", "lookup K=7" or "plain"."""
    return f"E={exits[0]} K={drafts}" if exits else f"lookup K={drafts}" if drafts else "plain"
