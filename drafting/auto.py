"""The policy that needs no tuning: each round it drafts as promises most tokens per second, or not at all.

Three things are known of a round: what it costs (whole rounds, timed at start-up), how often an exit at each depth
agrees with the full model (on a sample text at start-up, and on the end of the prompt), and, learned while decoding,
how many times as often as that foretells drafts fail in this text: of all exits together, and of each exit as far as
it has been used. A text is too short to tell exits apart from nothing, and a wrong exit costs more than a wrong K.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from drafting.adapters import Adapters
from drafting.lookup import NgramIndex
from drafting.plan import Depths, DraftPlan, Round, RoundContext, candidates_or_default
from drafting.policy import DraftPolicy
from errors import UserError

PLAIN = DraftPlan()
NGRAMS = (4, 2)
FORGET = 0.99  # what a draft still counts when one more has been judged
SAMPLE_WEIGHT = 20.0  # tokens of the prompt that count as much as the whole sample text
TEXT_PRIOR, EXIT_PRIOR = 16.0, 64.0  # drafts to be judged before the text, then an exit in it, is believed by half
MOST_AGREEMENT = 0.98  # of a few hundred tokens, all right say no more
HITS_PRIOR = 1.5, 2.0  # of continued n-grams: right, judged
REFRESH = 4  # rounds after which exit and K are chosen anew: choosing costs as much as a small model's layer
RETRY = 16  # rounds of plain decoding after which one draft is tried again
TIMED_DRAFTS = 3  # K of the rounds that are timed at start-up


def expected_tokens(acceptance: float, k: int) -> float:
    """Tokens of a round of k drafts, each right with this probability if the one before was: 1 + a + … + a^k."""
    return k + 1 if acceptance >= 1 else (1 - acceptance ** (k + 1)) / (1 - acceptance)


class Tally:
    """Two counts that are compared, forgetting what lies long back: `seen` events, and `base` to measure them by."""

    def __init__(self, seen: float = 0.0, base: float = 0.0):
        self.seen, self.base = seen, base

    def add(self, seen: float, base: float, judged: int) -> None:
        keep = FORGET**judged
        self.seen, self.base = keep * self.seen + seen, keep * self.base + base

    def ratio(self, prior: float = 0.0, weight: float = 0.0) -> float:
        return (self.seen + weight * prior) / (self.base + weight)


@dataclass
class Auto(DraftPolicy):
    """Choose the exit layer, K, n-gram proposals or plain decoding anew each round, by expected tokens per second
    (the objective of DEL, arXiv 2504.05598, in measured time instead of layers).

    num_draft_tokens: the most tokens of a round. candidates: exit layers to choose from (default: five up to L/2, or
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
            self.contents = [self.adapters.content]

    def check_model(self, n_layer: int, dim: int | None) -> None:
        if self.adapters:
            self.adapters.check(n_layer, dim, self.exits)

    def fit(self, n_layer: int) -> None:
        spread = Depths(
            self.adapters.by_exit
            if self.adapters
            else {max(1, round(share * n_layer / 24)) for share in (3, 4, 6, 8, 12)}
        )
        self.exits = candidates_or_default(self.candidates or spread, n_layer)
        # Until something is measured: cost by layers, the head as one, and early exits as those of LayerSkip models.
        self.verify_s = {rows: n_layer + 1.0 for rows in self._timed_rows()}
        self.draft_s = {depth: depth + 1.0 for depth in self.exits}
        self.sampled_agreement = {depth: min(0.9, 0.4 + 1.2 * depth / n_layer) for depth in self.exits}
        self.watched_depths = self.exits
        self.known: dict[tuple[int, int | None], tuple[float, int]] = {}
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
        self.verify_s = {1 + len(plan.proposed): s for plan, s in seconds.items() if not plan.exits}
        for plan, s in seconds.items():
            if plan.exits:
                k = plan.num_draft_tokens
                self.draft_s[plan.exits[0]] = max(0.0, s - self._verify_s(k + 1)) / k
        for depth in self.exits:
            self.sampled_agreement[depth] = min(sum(agreement[depth]) / len(agreement[depth]), MOST_AGREEMENT)
        self.known.clear()
        self.start_prompt(())

    def _verify_s(self, rows: int) -> float:
        """Seconds of verifying so many rows, between the timed ones on a straight line."""
        if rows in self.verify_s:
            return self.verify_s[rows]
        low = max(r for r in self.verify_s if r < rows)
        high = min(r for r in self.verify_s if r > rows)
        share = (rows - low) / (high - low)
        return (1 - share) * self.verify_s[low] + share * self.verify_s[high]

    def start_prompt(self, prompt: Sequence[int]) -> None:
        self.index = NgramIndex(NGRAMS)
        self.agreement = dict(self.sampled_agreement)
        self.failures = Tally()  # drafts that failed in this text, by how many were foreseen to
        self.exit_failures = {depth: Tally() for depth in self.exits}
        self.hits = {size: Tally(*HITS_PRIOR) for size in NGRAMS}  # right tokens of continued n-grams, by those judged
        self.since_draft = 0
        self.rounds = 0
        self.chosen: Counter[tuple[tuple[int, ...], int]] = Counter()  # rounds by exits and drafts

    def see_prompt(self, agreement: dict[int, list[bool]]) -> None:
        for depth in self.exits:
            agreed = agreement[depth]
            right = SAMPLE_WEIGHT * self.sampled_agreement[depth] + sum(agreed)
            self.agreement[depth] = min(right / (SAMPLE_WEIGHT + len(agreed)), MOST_AGREEMENT)

    def acceptance(self, depth: int) -> float:
        """The probability that a draft from an exit at `depth` is right if the one before it was."""
        foreseen = 1 - self.agreement[depth]
        in_text = self.failures.ratio(1.0, TEXT_PRIOR * foreseen)
        return 1 - foreseen * self.exit_failures[depth].ratio(in_text, EXIT_PRIOR * foreseen)

    def best(self, acceptance: float, depth: int | None) -> tuple[float, int]:
        """(expected tokens/s, K) of drafts from an exit at `depth`; None: of proposals, which cost nothing to make."""
        percent = min(max(round(100 * acceptance), 0), 99)
        if (percent, depth) not in self.known:  # thousands of rounds ask for the same few
            draft_s = self.draft_s[depth] if depth else 0.0
            self.known[percent, depth] = max(
                (expected_tokens(percent / 100, k) / (k * draft_s + self._verify_s(k + 1)), k)
                for k in range(1, self.num_draft_tokens + 1)
            )
        return self.known[percent, depth]

    def best_drafting(self) -> tuple[float, DraftPlan]:
        """(expected tokens/s, plan) of the best exit and K."""
        (rate, k), depth = max((self.best(self.acceptance(depth), depth), depth) for depth in self.exits)
        return rate, DraftPlan((depth,), k, adapters=self.adapters)

    def start_round(self, context: RoundContext) -> DraftPlan:
        if self.rounds % REFRESH == 0:
            self.drafting = self.best_drafting()
        self.rounds += 1
        rate, plan = self.drafting
        if rate < 1 / self.verify_s[1]:
            rate = 1 / self.verify_s[1]
            plan = PLAIN if self.since_draft < RETRY else plan
        self.size, self.guess = self.index.find(context.tokens, self.num_draft_tokens)
        if self.guess:
            guessing, k = self.best(self.hits[self.size].ratio(), None)
            plan = DraftPlan(proposed=self.guess[:k]) if guessing > rate else plan
        self.since_draft = self.since_draft + 1 if plan is PLAIN else 0
        self.chosen[plan.exits, len(plan.proposed) or plan.num_draft_tokens] += 1
        return plan

    def end_round(self, round: Round) -> None:
        if self.guess:  # whether or not it was used
            right = [a == b for a, b in zip(self.guess, round.tokens, strict=False)]
            judged = right.index(False) + 1 if False in right else len(right)
            self.hits[self.size].add(sum(right[:judged]), judged, judged)
        if round.exit_layers:
            depth, failed = round.exit_layers[0], round.accepted < len(round.drafted)
            judged = round.accepted + failed
            foreseen = judged * (1 - self.agreement[depth])
            self.failures.add(failed, foreseen, judged)
            self.exit_failures[depth].add(failed, foreseen, judged)

    def explain(self) -> list[str]:
        plain = self._verify_s(1)
        exits = (
            f"{depth}: agrees {self.agreement[depth]:.2f}, a draft costs {self.draft_s[depth] / plain:.2f}"
            for depth in self.agreement
        )
        rows = (f"{rows}: {seconds / plain:.2f}" for rows, seconds in self.verify_s.items())
        return [
            "auto: exit layers, agreement with the model before decoding, cost in plain steps: " + "; ".join(exits),
            "auto: rows of a verification, cost in plain steps: " + "; ".join(rows),
            "auto: acceptance expected at the end: "
            + "; ".join(f"{depth}: {self.acceptance(depth):.2f}" for depth in self.exits),
            *(
                ["auto: rounds: " + ", ".join(f"{describe(*plan)} {n}" for plan, n in self.chosen.most_common())]
                if self.chosen
                else []
            ),
        ]


def describe(exits: tuple[int, ...], drafts: int) -> str:
    return f"E={exits[0]} K={drafts}" if exits else f"lookup K={drafts}" if drafts else "plain"
