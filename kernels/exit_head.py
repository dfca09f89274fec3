"""The exit head: final norm, LM head, the token and how sure the model is, without writing the logits to memory.

A policy that asks at an exit whether to stop needs the token and a confidence, not V numbers. With packed weights on a
CPU the C++ op reduces each run of columns while it is in registers; elsewhere the reference computes the logits.
"""
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import gpu
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


class Head(NamedTuple):
    """The end of a model: final norm [D] and its epsilon; LM head, plain, packed or quantised, of n_vocab tokens."""

    norm: Tensor
    eps: float
    weight: Tensor
    scale: Tensor | None  # of a quantised weight
    n_vocab: int

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] -> fp32 logits [..., n_vocab]."""
        return linear(rms_norm(hidden, self.norm, self.eps), self.weight, self.n_vocab, self.scale).float()


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
    """What the LM head says about T rows of hidden states. Each answer is computed when it is asked for.

    Tokens and statistics come from a fused kernel where there is one. On a CPU its token is the argmax of the logits;
    on a GPU the sums may differ in the last bits, so nobody may mix the two for one decision.
    """

    def __init__(self, hidden: Tensor, head: Head, rows: int):
        """hidden: [>= rows, D], those behind `rows` being padding."""
        self.hidden, self.head, self.rows = hidden, head, rows
        self._logits: Tensor | None = None

    @classmethod
    def of_logits(cls, logits: Tensor) -> "Exit":
        """An exit whose logits [T, V] are known."""
        known = cls(logits, None, len(logits))
        known._logits = logits
        return known

    def _fused_on(self, device: str) -> bool:
        if self._logits is not None:
            return False
        head = self.head
        if device == "cpu":
            return is_packed(head.weight)
        return gpu.supports(self.hidden) and head.weight.dtype in (torch.bfloat16, torch.int8)

    def logits(self) -> Tensor:
        """fp32 [T, V]."""
        if self._logits is None:
            self._logits = self.head.logits(self.hidden)
        return self._logits[: self.rows]

    def token_ids(self) -> Tensor:
        """The argmax of each row, int64 [T], on the device; ties go to the lowest id."""
        if self._fused_on("cpu"):
            head, rows = self.head, self.hidden[: self.rows]  # rows do not depend on one another: no padding
            return exit_head(rows, head.norm, head.weight, head.n_vocab, head.eps, False)
        if self._fused_on("cuda"):
            return self._on_gpu()[0]
        return self.logits().argmax(-1)

    def tokens(self) -> list[int]:
        return self.token_ids().tolist()

    def stats(self) -> ExitStats:
        if self._fused_on("cpu"):
            head = self.head
            return exit_head(self.hidden[: self.rows], head.norm, head.weight, head.n_vocab, head.eps)
        if self._fused_on("cuda"):
            tokens, stats, _ = self._on_gpu()
            return ExitStats(tokens, *stats.unbind(-1))
        return exit_stats_reference(self.logits())

    def can_sample(self) -> bool:
        """Whether `samples` is there: the Gumbel-coupled choice of `sampling.choose` without its logits."""
        return self._fused_on("cuda")

    def samples(self, positions: Tensor, seed: Tensor, temperature: Tensor) -> Tensor:
        """The choice for each row's position, int64 [T]. positions int64 [T]; seed int64 [1]; temperature fp32 [1]."""
        return self._on_gpu(positions, seed, temperature)[2]

    def _on_gpu(self, *draw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        head = self.head
        rows = rms_norm(self.hidden, head.norm, head.eps)[: self.rows]
        return torch.ops.skipfast.exit_head_rows.default(rows, head.weight, head.scale, head.n_vocab, 0, *draw)
