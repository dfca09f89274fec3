"""The exit head: final norm, LM head, the token and how sure the model is, without writing the logits to memory.

A policy that asks at an exit whether to stop needs the token and a confidence, a sampler one coupled sample, not V
numbers. With packed weights on a CPU the C++ op reduces each run of columns while it is near, on a GPU the kernel of
`gpu/exit_head.py`; elsewhere the reference computes the logits.
"""
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import gpu
from kernels.linear import BLOCK, STRIP, is_packed, linear
from kernels.rms_norm import rms_norm


class ExitStats(NamedTuple):
    """Of T rows: `tokens` int64 [T], the argmax (ties to the lowest id); and fp32 [T] each, of softmax(logits):
    `top1` its largest probability, `margin` top-1 minus top-2 (CALM), `entropy` in nats; `logsumexp` of the logits."""

    tokens: Tensor
    top1: Tensor
    margin: Tensor
    entropy: Tensor
    logsumexp: Tensor


class Draw(NamedTuple):
    """What a coupled sample depends on besides its logits: `sampling.choose` adds the noise of seed and position.

    positions: of the token that each row chooses, int64 [T], or the int of the first of consecutive rows. seed: int64
    [1] or int, 0 or more. temperature: fp32 [1] or float, above 0 (1e-6 and more, as in sampling.py). Tensors lie on
    the exit's device, so that a captured graph reads today's values.
    """

    positions: Tensor | int
    seed: Tensor | int
    temperature: Tensor | float

    def on(self, device: torch.device, rows: int) -> "Draw":
        """This draw as tensors."""
        if isinstance(self.positions, Tensor):
            return self
        return Draw(torch.arange(self.positions, self.positions + rows, device=device),
                    torch.tensor([self.seed], device=device),
                    torch.tensor([self.temperature], dtype=torch.float32, device=device))


class Head(NamedTuple):
    """The end of a model: final norm [D] and its epsilon; LM head, plain, packed or quantised, of n_vocab tokens."""

    norm: Tensor
    eps: float
    weight: Tensor
    scale: Tensor | None  # of a quantised weight
    n_vocab: int

    def trimmed(self, n_vocab: int) -> "Head":
        """The head over the first n_vocab tokens only, a view. Raises ValueError unless 2 <= n_vocab <= its own."""
        if not 2 <= n_vocab <= self.n_vocab:
            raise ValueError(f"n_vocab must be in 2..{self.n_vocab}, got {n_vocab}")
        blocks = -(-n_vocab // BLOCK)
        rows = n_vocab
        if is_packed(self.weight):
            rows = blocks * (BLOCK // STRIP if self.weight.is_floating_point() else 1)
        weight = self.weight[:rows]
        return self._replace(weight=weight, scale=None if self.scale is None else self.scale[:n_vocab], n_vocab=n_vocab)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] -> fp32 logits [..., n_vocab]."""
        return linear(rms_norm(hidden, self.norm, self.eps), self.weight, self.n_vocab, self.scale).float()


def exit_stats_reference(logits: Tensor) -> ExitStats:
    """The statistics of fp32 logits [T, V], V >= 2."""
    log_probs = logits.log_softmax(-1)
    probs = log_probs.exp()
    top1, second = probs.topk(2).values.unbind(-1)
    return ExitStats(logits.argmax(-1), top1, top1 - second, -(probs * log_probs).sum(-1), logits.logsumexp(-1))


def exit_head(hidden: Tensor, head: Head, want_stats: bool = True, draw: Draw | None = None
              ) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [T, D] -> tokens int64 [T], fp32 [T, 4] of ExitStats, samples int64 [T]: one pass of a packed LM head.

    The token is the argmax of `Exit.logits`, bit for bit: sums round to the head's dtype before they are compared. The
    sample is that of `draw` (of consecutive positions), as `sampling.choose` draws it but for the last bits of
    logarithms. Statistics and samples that were not wanted are empty.
    """
    position, seed, temperature = (0, 0, 0.0) if draw is None else (
        draw.positions if isinstance(draw.positions, int) else int(draw.positions[0]), int(draw.seed),
        float(draw.temperature))  # fmt: skip
    weights = head.norm, head.weight, head.n_vocab, head.eps
    return torch.ops.skipfast_cpu.exit_head.default(hidden, *weights, want_stats, temperature, seed, position)


class Exit:
    """What the LM head says about T rows of hidden states. Each answer is computed once, when it is first asked for.

    Tokens, statistics and samples come from a fused kernel where there is one, in one pass. On a CPU its token is the
    argmax of the logits; on a GPU the sums may differ in the last bits, so nobody may mix the two for one decision.
    `draw` says how the samples are drawn, and may be set later; so may `wants_stats`: that a pass made for something
    else should find the statistics, too, because they will be asked for.
    """

    def __init__(self, hidden: Tensor, head: Head, rows: int, draw: Draw | None = None):
        """hidden: [>= rows, D], those behind `rows` being padding."""
        self.hidden, self.head, self.rows, self.draw = hidden, head, rows, draw
        self.wants_stats = False
        self._logits = self._tokens = self._stats = self._samples = None

    @classmethod
    def of_logits(cls, logits: Tensor) -> "Exit":
        """An exit whose logits [T, V] are known."""
        known = cls(logits, None, len(logits))
        known._logits = logits
        return known

    @property
    def asked(self) -> bool:
        """Whether the LM head has been applied."""
        return self._logits is not None or self._tokens is not None

    def _fused_on(self, device: str) -> bool:
        if self.head is None:
            return False
        if device == "cpu":
            return is_packed(self.head.weight)
        return gpu.supports(self.hidden) and self.head.weight.dtype in (torch.bfloat16, torch.int8)

    def logits(self) -> Tensor:
        """fp32 [T, V]."""
        if self._logits is None:
            self._logits = self.head.logits(self.hidden)
        return self._logits[: self.rows]

    def token_ids(self) -> Tensor:
        """The argmax of each row, int64 [T], on the device; ties go to the lowest id."""
        if self._tokens is None and (self._logits is not None or not self.can_sample()):
            self._tokens = self.logits().argmax(-1)
        elif self._tokens is None:
            self._pass_through_head(self.wants_stats)
        return self._tokens

    def tokens(self) -> list[int]:
        return self.token_ids().tolist()

    def stats(self) -> ExitStats:
        if self._stats is None and (self._logits is not None or not self.can_sample()):
            self._stats = exit_stats_reference(self.logits())
            self._tokens = self._stats.tokens
        elif self._stats is None:
            self._pass_through_head(want_stats=True)
        return self._stats

    def can_sample(self) -> bool:
        """Whether there is a fused kernel, and so `samples`: the choice of `sampling.choose` without its logits."""
        return self._fused_on("cpu") or self._fused_on("cuda")

    def samples(self) -> Tensor:
        """What `draw` chooses in each row, int64 [T]. Always from the fused kernel: one arithmetic for every choice.

        Raises ValueError without a draw or where the exit `can_sample` not.
        """
        if self.draw is None or not self.can_sample():
            raise ValueError(f"an exit samples with a draw and a fused kernel, got draw {self.draw}")
        if self._samples is None:
            self._pass_through_head(self.wants_stats)
        return self._samples

    def _pass_through_head(self, want_stats: bool) -> None:
        """Find the tokens, the samples if there is a draw, and the statistics if wanted (on a GPU always)."""
        head = self.head
        if self._fused_on("cpu"):  # rows do not depend on one another: no padding
            found = exit_head(self.hidden[: self.rows], head, want_stats, self.draw)
        else:
            rows = rms_norm(self.hidden, head.norm, head.eps)[: self.rows]
            draw = () if self.draw is None else self.draw.on(rows.device, self.rows)
            found = torch.ops.skipfast.exit_head_rows.default(rows, head.weight, head.scale, head.n_vocab, 0, *draw)
        self._tokens, stats, samples = found
        if want_stats or len(stats):
            self._stats = ExitStats(self._tokens, *stats.unbind(-1))
        if self.draw is not None:
            self._samples = samples
