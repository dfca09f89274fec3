"""Prompt lookup: draft what followed the text's last tokens where they stood before. It needs no model pass at all."""

from collections.abc import Sequence
from dataclasses import dataclass

from drafting.plan import DraftPlan, RoundContext
from drafting.policy import DraftPolicy
from errors import UserError


class NgramIndex:
    """Remember where each n-gram of a growing text occurred last. sizes: n-gram lengths, longest first."""

    def __init__(self, sizes: Sequence[int]):
        self.sizes = sizes
        self.after: dict[tuple[int, ...], int] = {}  # n-gram -> index of the token after its last occurrence
        self.indexed = 1

    def find(self, tokens: Sequence[int], count: int) -> tuple[int, tuple[int, ...]]:
        """Find the longest n-gram that ends `tokens` and occurred before -> its length, and `count` ids that followed.

        Ids that reach the end of the text go on from their own start: a b a b is continued by a b a b …
        Returns 0 and no ids if no n-gram occurred before.
        """
        for end in range(self.indexed, len(tokens)):  # only n-grams that another token follows
            for size in self.sizes:
                if size <= end:
                    self.after[tuple(tokens[end - size : end])] = end
        self.indexed = max(self.indexed, len(tokens))
        for size in self.sizes:
            start = self.after.get(tuple(tokens[-size:]))
            if start is not None:
                continuation = list(tokens[start : start + count])
                while len(continuation) < count:
                    continuation.append(continuation[start - len(tokens)])
                return size, tuple(continuation)
        return 0, ()


@dataclass
class PromptLookup(DraftPolicy):
    """Propose what followed the last tokens of the text where they stood before (prompt lookup decoding, Saxena 2023).

    The longest match wins, of at most `max_ngram` and at least `min_ngram` tokens.
    """

    name = "prompt_lookup"
    num_draft_tokens: int = 7
    max_ngram: int = 3
    min_ngram: int = 2
    verifiable_only = True

    def __post_init__(self):
        if self.num_draft_tokens < 0:
            raise UserError(f"num_draft_tokens must be 0 or more, got {self.num_draft_tokens}")
        if not 1 <= self.min_ngram <= self.max_ngram:
            raise UserError(f"min_ngram must be in 1..max_ngram ({self.max_ngram}), got {self.min_ngram}")

    def draft_depth(self, n_layer: int) -> int:
        return 0

    def start_prompt(self, prompt: Sequence[int]) -> None:
        self.index = NgramIndex(range(self.max_ngram, self.min_ngram - 1, -1))

    def start_round(self, context: RoundContext) -> DraftPlan:
        return DraftPlan(proposed=self.index.find(context.tokens, self.num_draft_tokens)[1])
