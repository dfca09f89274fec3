"""Judge sets of sublayers at each position of a text: the rewards of the policy that chooses them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from decoding.visits import module_bytes
from drafting.auto import expected_tokens
from kernels.exit_head import Exit
from model import Transformer
from scripts.common.first_drafts import FirstDrafts
from scripts.common.round_costs import RoundCosts


class Outcome(NamedTuple):
    """Measures of drafts at R positions, each [R].

    kl: KL(full model || draft) in nats. ce: cross-entropy of the text's token in nats. agrees: the draft's best token
    is the full model's. chance: the draft's probability of the full model's best token.
    """

    kl: Tensor
    ce: Tensor
    agrees: Tensor
    chance: Tensor


class Window:
    """A piece of text, seen by the full model, at whose positions sets of sublayers can be tried.

    Position p (from 1 on: a set is chosen by the state at p - 1) drafts the token at p + 1; R = T - 1 positions.
    Attributes: states, [R, D], by which a set is chosen.
    """

    @torch.no_grad()
    def __init__(self, model: Transformer, tokens: Sequence[int]):
        """tokens: T + 1 ids."""
        self.drafts = FirstDrafts(model, tokens[:-1])
        last = self.drafts.states[-1]
        self.states, self.rows = last[:-1].float(), torch.arange(1, len(last), device=last.device)
        self.targets = torch.tensor(tokens[2:], device=last.device)
        self.full = self._log_probs(last[1:])
        self.best = self.full.argmax(-1)

    def _log_probs(self, hidden: Tensor) -> Tensor:
        return Exit(hidden, self.drafts.model.exit_head(), len(hidden)).logits().log_softmax(-1)

    @torch.no_grad()
    def judge(self, keep: Tensor) -> Outcome:
        """Judge drafts that run the sublayers of keep, bool [R, 2L], one set for each position."""
        log_probs = self._log_probs(self.drafts.draft_states(keep, self.rows))
        kl = F.kl_div(log_probs, self.full, reduction="none", log_target=True).sum(-1)
        ce = F.nll_loss(log_probs, self.targets, reduction="none")
        chance = log_probs.gather(-1, self.best[:, None])[:, 0].exp()
        return Outcome(kl, ce, log_probs.argmax(-1) == self.best, chance)


def layers_skipped(keep: Tensor, model: Transformer) -> Tensor:
    """Count the layers that each set of keep, bool [..., 2L], leaves out: a sublayer counts its share of the bytes."""
    attention, mlp = (module_bytes(part) for part in (model.layers[0].attention, model.layers[0].mlp))
    shares = torch.tensor([attention, mlp], device=keep.device) / (attention + mlp)
    return (~keep).float() @ shares.repeat(keep.shape[-1] // 2)


@dataclass
class SkipReward:
    """Rewards with -loss + alpha · layers left out. loss: kl or ce of Outcome."""

    model: Transformer
    loss: str
    alpha: float

    def __call__(self, outcome: Outcome, keep: Tensor) -> Tensor:
        return self.alpha * layers_skipped(keep, self.model) - getattr(outcome, self.loss)


@dataclass
class SpeedReward:
    """Rewards with the expected speedup over plain decoding: of K drafts, each accepted with Outcome's `chance`."""

    costs: RoundCosts
    num_draft_tokens: int

    def __call__(self, outcome: Outcome, keep: Tensor) -> Tensor:
        seconds = [self.costs.seconds(row, self.num_draft_tokens) for row in keep.tolist()]
        tokens = expected_tokens(outcome.chance, self.num_draft_tokens)
        return tokens * self.costs.plain / torch.tensor(seconds, device=tokens.device)


Reward = Callable[[Outcome, Tensor], Tensor]  # outcome and keep [R, 2L] -> the worth of each set, [R]


def numbers(outcome: Outcome, keep: Tensor, reward: Tensor, model: Transformer) -> dict[str, float]:
    """Return means over the positions, by their names in tables and files."""
    by_position = {
        "reward": reward,
        "kl": outcome.kl,
        "ce": outcome.ce,
        "agreement": outcome.agrees.float(),
        "skipped": layers_skipped(keep, model),
    }
    return {name: values.mean().item() for name, values in by_position.items()}


def mean(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return each number's mean over rows."""
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
