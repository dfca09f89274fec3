"""The exit head: final norm, LM head, the token and how sure the model is, without writing the logits to memory.

A policy that asks at an exit whether to stop needs the token and a confidence, not V numbers. With packed weights on a
CPU the C++ op reduces each run of columns while it is in registers; elsewhere the reference computes the logits.
"""
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.linear import is_packed, linear
from kernels.rms_norm import rms_norm


class ExitStats(NamedTuple):
    """Of T rows: `tokens` int64 [T], the argmax (ties to the lowest id); and fp32 [T] each, of softmax(logits):
    `top1` its largest probability, `margin` top-1 minus top-2 (CALM), `entropy` in nats; `logsumexp` of the logits."""

    tokens: Tensor
    top1: Tensor
    margin: Tensor
    entropy: Tensor
    logsumexp: Tensor


def exit_logits(hidden: Tensor, norm: Tensor, weight: Tensor, n_vocab: int, eps: float) -> Tensor:
    """Final norm and LM head (plain or packed): hidden [..., D] -> fp32 logits [..., n_vocab]."""
    return linear(rms_norm(hidden, norm, eps), weight, n_vocab).float()


def exit_stats_reference(logits: Tensor) -> ExitStats:
    """The statistics of fp32 logits [T, V], V >= 2."""
    log_probs = logits.log_softmax(-1)
    probs = log_probs.exp()
    top1, second = probs.topk(2).values.unbind(-1)
    return ExitStats(logits.argmax(-1), top1, top1 - second, -(probs * log_probs).sum(-1), logits.logsumexp(-1))


def exit_head(hidden: Tensor, norm: Tensor, packed: Tensor, n_vocab: int, eps: float, want_stats: bool = True
              ) -> ExitStats | Tensor:
    """hidden [T, D], packed LM head -> ExitStats over its first n_vocab columns, or only the tokens [T].

    The token is the argmax of `Exit.logits`, bit for bit: sums round to the head's dtype before they are compared.
    """
    tokens, stats = torch.ops.skipfast_cpu.exit_head.default(hidden, norm, packed, n_vocab, eps, want_stats)
    return ExitStats(tokens, *stats.unbind(-1)) if want_stats else tokens


class Exit:
    """What the LM head says about T rows of hidden states. Each answer is computed when it is asked for."""

    def __init__(self, hidden: Tensor, norm: Tensor, weight: Tensor, n_vocab: int, eps: float, rows: int):
        """hidden: [>= rows, D], those behind `rows` being padding. norm: [D]. weight: LM head, plain or packed."""
        self.hidden, self.norm, self.weight, self.n_vocab, self.eps = hidden, norm, weight, n_vocab, eps
        self.rows = rows
        self._logits: Tensor | None = None

    @classmethod
    def of_logits(cls, logits: Tensor) -> "Exit":
        """An exit whose logits [T, V] are known."""
        known = cls(logits, logits, logits, logits.shape[-1], 0.0, len(logits))
        known._logits = logits
        return known

    @classmethod
    def of_tokens(cls, tokens: list[int]) -> "Exit":
        """An exit of which only the argmax of each row is known."""
        known = cls.__new__(cls)
        known.tokens = lambda: tokens
        return known

    def logits(self) -> Tensor:
        """fp32 [T, V]."""
        if self._logits is None:
            self._logits = exit_logits(self.hidden, self.norm, self.weight, self.n_vocab, self.eps)
        return self._logits[: self.rows]

    def tokens(self) -> list[int]:
        """The argmax of each row; ties go to the lowest id."""
        if self._logits is None and is_packed(self.weight):
            rows = self.hidden[: self.rows]  # rows of the fused head do not depend on one another: no padding
            return exit_head(rows, self.norm, self.weight, self.n_vocab, self.eps, False).tolist()
        return self.logits().argmax(-1).tolist()

    def stats(self) -> ExitStats:
        if self._logits is None and is_packed(self.weight):
            return exit_head(self.hidden[: self.rows], self.norm, self.weight, self.n_vocab, self.eps)
        return exit_stats_reference(self.logits())
