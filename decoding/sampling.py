"""From logits to tokens: greedy, temperature, top-k and top-p, and the two ways to verify a draft.

A round asks a sampler for every drafted token and for the verdict on them. Both samplers are lossless. The coupled one
(default) makes the text a function of seed and target model alone: the noise of a token is a hash of (seed, position,
token id). So speculation on or off, any exit and any number of drafts give the same text. The rejection one is the
textbook rule; it keeps the distribution, not the text.

A plain coupled choice (no top-k, no top-p) comes from the fused exit head where there is one, so that no logits are
written; whoever makes the exit passes it the sampler's `draw`. All other arithmetic is fp32 and runs row by row. The
reason: the last bits of a vectorised logarithm may depend on where an element lies in a larger tensor, and a row must
not notice how many rows it is computed with. One SamplingConfig chooses by one arithmetic, whatever drafts.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from errors import UserError
from kernels.exit_head import Draw, Exit
from kernels.noise import MASK32, gumbel_noise, mix32

VERIFICATIONS = ("coupled", "rejection")


@dataclass(frozen=True)
class SamplingConfig:
    """Say how a token is chosen. temperature 0 is greedy; top_k and top_p None keep every token."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    verification: str = "coupled"

    def __post_init__(self):
        if self.temperature != 0 and not 1e-6 <= self.temperature <= 1e6:  # outside, scores leave fp32
            raise UserError(f"temperature must be 0 (greedy) or in 1e-6..1e6, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k must be 1 or more, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed must be in 0..2**63-1, got {self.seed}")
        if self.verification not in VERIFICATIONS:
            raise UserError(f"verification must be one of {', '.join(VERIFICATIONS)}, got {self.verification!r}")

    @property
    def is_plain(self) -> bool:
        """Say whether a coupled choice needs nothing but logits, temperature and noise."""
        return self.top_k is None and self.top_p is None and self.verification == "coupled"


def kept_tokens(logits: Tensor, config: SamplingConfig) -> tuple[Tensor, Tensor]:
    """Keep the tokens that temperature, top-k and top-p leave in: one row of logits [V] -> (ids, scores), fp32.

    Scores are logits ÷ temperature, unnormalised. Top-k comes before top-p, as in transformers; the token that
    crosses top_p is kept.
    """
    scores = logits.float() / config.temperature
    ids = torch.arange(scores.shape[-1], device=scores.device)
    if config.top_k is not None and config.top_k < scores.shape[-1]:
        scores, ids = scores.topk(config.top_k)
    if config.top_p is not None and config.top_p < 1:
        scores, order = scores.sort(descending=True, stable=True)
        probs = scores.softmax(-1)
        kept = int((probs.cumsum(-1) - probs < config.top_p).sum())
        scores, ids = scores[:kept], ids[order[:kept]]
    return ids, scores


def choose(logits: Tensor, position: int, config: SamplingConfig) -> int:
    """Choose the token for `position` from one row of logits [V]: argmax of score + Gumbel noise; greedy: of logits.

    Gumbel-max draws exactly from softmax(scores); draft and target share the noise (Daliri et al. 2408.07978).
    """
    if config.temperature == 0:
        return int(logits.argmax())
    ids, scores = kept_tokens(logits, config)
    return int(ids[(scores + gumbel_noise(config.seed, position, ids)).argmax()])


def probabilities(logits: Tensor, config: SamplingConfig) -> Tensor:
    """Turn one row of logits [V] into fp32 probabilities [V] by temperature, top-k and top-p; one-hot if greedy."""
    if config.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(), logits.shape[-1]).float()
    ids, scores = kept_tokens(logits, config)
    return torch.zeros_like(logits, dtype=torch.float32).index_copy_(0, ids, scores.softmax(-1))


def accept(drafted: Sequence[int], chosen: Iterable[int]) -> tuple[int, int]:
    """Compare K drafts with the target's K+1 choices -> (accepted, next token): all up to the first that differs."""
    for accepted, (token, target) in enumerate(zip([*drafted, None], chosen, strict=False)):
        if token != target:
            return accepted, target
    raise AssertionError("unreachable: the row after the last draft never matches")


class CoupledSampler:
    """Accept a drafted token iff the target chooses the same one at that position. Greedy decoding is temperature 0."""

    def __init__(self, config: SamplingConfig):
        self.config = config

    def draw(self, position: int) -> Draw | None:
        """Return what an exit needs to choose its first row's token for `position`, the others' for those behind it.

        None where a choice takes no noise, or more than noise.
        """
        config = self.config
        return Draw(position, config.seed, config.temperature) if config.temperature and config.is_plain else None

    def choices(self, exit: Exit, position: int) -> Iterable[int]:
        """Choose the token of each row, the first being for `position`."""
        if self.config.temperature == 0:
            return exit.tokens()
        if self.config.is_plain and exit.has_fused_head():
            if exit.draw is None:  # costs a pass of its own if the head was asked already; the choice is the same
                exit.draw = self.draw(position)
            return exit.samples().tolist()
        return (choose(row, position + i, self.config) for i, row in enumerate(exit.logits()))

    def guesses(self, exit: Exit, position: int) -> Iterable[int]:
        """Choose as `choices` does, or take the best token where that takes a sort, to estimate how exits agree."""
        return self.choices(exit, position) if self.config.temperature == 0 or self.config.is_plain else exit.tokens()

    def first(self, exit: Exit, position: int) -> int:
        """Choose the token after a prompt, for `position`, by the full model's one row."""
        return next(iter(self.choices(exit, position)))

    def draft(self, exit: Exit, position: int) -> int:
        """Choose the draft's token for `position` by its one row."""
        return next(iter(self.choices(exit, position)))

    def verify(self, drafted: Sequence[int], exit: Exit, position: int) -> tuple[int, int]:
        """Judge `drafted` (K ids for position, position+1, …) by the target's K+1 rows -> (accepted, next token)."""
        return accept(drafted, self.choices(exit, position))


class RejectionSampler:
    """Speculative rejection sampling (Leviathan et al. 2211.17192; LayerSkip): keeps the target's distribution.

    Accept d with probability min(1, target ÷ draft); at the first rejection draw from max(target − draft, 0).
    Draft and target probabilities are both taken after temperature, top-k and top-p, in fp32.
    """

    def __init__(self, config: SamplingConfig):
        self.config = config
        key = mix32(mix32(config.seed & MASK32) ^ (config.seed >> 32))  # torch's generator reads 32 bits only
        self.random = torch.Generator().manual_seed(key)
        self.draft_probs: dict[int, Tensor] = {}  # position -> [V] or fewer, of the draft now under way

    def draw(self, position: int) -> None:
        """Return None: no exit can choose for this sampler, because a choice takes what was drafted into account."""

    def guesses(self, exit: Exit, position: int) -> list[int]:
        """Return the best token of each row, a stand-in where an exit's agreement with the target is estimated."""
        return exit.tokens()

    def _draw(self, probs: Tensor) -> int:
        return int(torch.multinomial(probs.cpu(), 1, generator=self.random))

    def first(self, exit: Exit, position: int) -> int:
        """Do what CoupledSampler.first does."""
        return self._draw(probabilities(exit.logits()[0], self.config))

    def draft(self, exit: Exit, position: int) -> int:
        """Do what CoupledSampler.draft does, and remember the probabilities for `verify`."""
        self.draft_probs[position] = probs = probabilities(exit.logits()[0], self.config)
        return self._draw(probs)

    def verify(self, drafted: Sequence[int], exit: Exit, position: int) -> tuple[int, int]:
        """Do what CoupledSampler.verify does. Tokens without logits (n-gram drafts) count as certain drafts."""
        draft_probs, self.draft_probs = self.draft_probs, {}
        logits = exit.logits()
        for accepted, token in enumerate(drafted):
            target = probabilities(logits[accepted], self.config)
            draft = draft_probs.get(position + accepted)
            if draft is None:
                draft = torch.zeros_like(target)
                draft[token] = 1
            elif len(draft) < len(target):  # it chose among the first tokens only
                draft = torch.nn.functional.pad(draft, (0, len(target) - len(draft)))
            if torch.rand((), generator=self.random).item() * draft[token].item() >= target[token].item():
                residual = (target - draft).clamp(min=0)
                return accepted, self._draw(residual if residual.sum() > 0 else target)  # 0: equal up to rounding
        return len(drafted), self._draw(probabilities(logits[len(drafted)], self.config))


class LedSampler:
    """Give rank 0's answers on every rank, for choices that take more than comparing numbers.

    Every rank asks its own sampler, because all of them are needed for logits.
    """

    def __init__(self, sampler: CoupledSampler | RejectionSampler, agreed: Callable):
        self.sampler, self.agreed, self.config, self.draw = sampler, agreed, sampler.config, sampler.draw

    def choices(self, exit: Exit, position: int) -> list[int]:
        return self.agreed(list(self.sampler.choices(exit, position)))

    def first(self, exit: Exit, position: int) -> int:
        return self.agreed(self.sampler.first(exit, position))

    def draft(self, exit: Exit, position: int) -> int:
        return self.agreed(self.sampler.draft(exit, position))

    def verify(self, drafted: Sequence[int], exit: Exit, position: int) -> tuple[int, int]:
        return self.agreed(self.sampler.verify(drafted, exit, position))


Sampler = CoupledSampler | RejectionSampler | LedSampler


def make_sampler(config: SamplingConfig, agreed: Callable | None = None) -> Sampler:
    """Make the sampler for `config`.

    Greedy decoding is deterministic, so both rules coincide and the coupled one serves. agreed: turns a value of any
    rank into that of rank 0, where there are several.
    """
    rejecting = config.verification == "rejection" and config.temperature > 0
    sampler = RejectionSampler(config) if rejecting else CoupledSampler(config)
    return LedSampler(sampler, agreed) if agreed and config.temperature and not config.is_plain else sampler
