"""The exit head: final norm and LM head -> the token, how sure the model is of it, and a sample.

Nobody at an exit needs V logits: a policy needs the token and a confidence, a sampler needs one coupled sample. So the
fused kernels reduce the logits on the way and never write them to memory. One is the C++ op, for packed weights; the
other is `gpu/exit_head.py`. Elsewhere the reference computes the logits. With tensor parallelism each rank reduces its
shard of the vocabulary to `Partials`, and every rank merges those of all ranks.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import gpu
from kernels.linear import is_packed, linear, rows_of
from kernels.noise import gumbel_noise
from kernels.rms_norm import rms_norm

LOWEST = -1.0e30  # below every logit, and exp(LOWEST - anything) is 0 where that of -inf - -inf is NaN


class ExitStats(NamedTuple):
    """Hold statistics of T rows of logits: `tokens` int64 [T], the others fp32 [T].

    tokens: the argmax, ties to the lowest id. top1: the largest probability. margin: top-1 minus top-2 probability
    (CALM). entropy: of the probabilities, in nats. logsumexp: of the logits.
    """

    tokens: Tensor
    top1: Tensor
    margin: Tensor
    entropy: Tensor
    logsumexp: Tensor


class Draw(NamedTuple):
    """Hold what a coupled sample depends on besides its logits: the noise of seed and position, and a temperature.

    positions: of the token that each row chooses, int64 [T]; an int is that of the first of consecutive rows. seed:
    int64 [1] or int, 0 or more. temperature: fp32 [1] or float, at least 1e-6. Tensors lie on the exit's device, where
    a captured graph reads their values of the moment.
    """

    positions: Tensor | int
    seed: Tensor | int
    temperature: Tensor | float

    def on(self, device: torch.device, rows: int) -> "Draw":
        """Return this draw as tensors on `device`, for so many rows."""
        if isinstance(self.positions, Tensor):
            return self
        return Draw(
            torch.arange(self.positions, self.positions + rows, device=device),
            torch.tensor([self.seed], device=device),
            torch.tensor([self.temperature], dtype=torch.float32, device=device),
        )


class Partials(NamedTuple):
    """Hold what `merge` needs of m rows of logits z whose vocabulary was reduced in several runs.

    values: fp32 [4, m, runs], of each run the largest logit, the second largest, the sum of exp(z - largest) and the
    sum of exp(z - largest)·(z - largest). When sampling [5, m, runs], also the largest of z / temperature + Gumbel
    noise. ids: int32 [1, m, runs], the token of the largest logit; when sampling [2, m, runs], also that of the largest
    noisy score. Ids are global, ties go to the lowest. Runs of several ranks stand side by side, in any order.
    """

    values: Tensor
    ids: Tensor


def partials_of(logits: Tensor, v_offset: int, draw: Draw | None, want_stats: bool = True) -> Partials:
    """Reduce one run: fp32 logits [m, n], whose first token is v_offset -> [4 or 5, m, 1] and [1 or 2, m, 1].

    Without want_stats only tokens and samples have a meaning. A run may be empty.
    """
    n = logits.shape[-1]
    if n < 2:  # tokens that do not exist are never chosen and add nothing to a sum
        logits = F.pad(logits, (0, 2 - n), value=LOWEST)
    if want_stats:
        top, second = logits.topk(2).values.unbind(-1)
        down = logits - top[:, None]
        values = [top, second, down.exp().sum(-1), (down.exp() * down).sum(-1)]
    else:
        top = logits.amax(-1)
        values = [top, torch.full_like(top, LOWEST), torch.ones_like(top), torch.zeros_like(top)]
    ids = [logits.argmax(-1)]
    if draw is not None:
        token_ids = torch.arange(v_offset, v_offset + logits.shape[-1], device=logits.device)
        noise = torch.stack([gumbel_noise(draw.seed, position, token_ids) for position in draw.positions])
        scores = logits / draw.temperature + noise
        values, ids = [*values, scores.amax(-1)], [*ids, scores.argmax(-1)]
    return Partials(torch.stack(values)[..., None], (torch.stack(ids)[..., None] + v_offset).int())


def merge(values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the `Partials` of runs that together are the vocabulary.

    Returns tokens int64 [m]; statistics fp32 [m, 4], the fields of ExitStats but `tokens`, in order; samples int64 [m],
    or [0] if none were drawn. Tokens and samples come from comparisons alone: whoever merges the same partials gets the
    same ones.
    """
    top, second, total, weighted = values[:4]
    best = top.amax(-1, keepdim=True)
    no_id = torch.iinfo(ids.dtype).max
    tokens = torch.where(top == best, ids[0], no_id).amin(-1)
    runner_up = torch.where(ids[0] == tokens[:, None], second, top).amax(-1)
    down = top - best
    mass = (down.exp() * total).sum(-1)
    moment = (down.exp() * (weighted + total * down)).sum(-1)
    best = best[:, 0]
    margin = (1 - (runner_up - best).exp()) / mass
    stats = torch.stack([1 / mass, margin, mass.log() - moment / mass, best + mass.log()], -1)
    if len(values) == 4:
        return tokens.long(), stats, tokens.new_empty(0, dtype=torch.int64)
    noisy = values[4]
    samples = torch.where(noisy == noisy.amax(-1, keepdim=True), ids[1], no_id).amin(-1)
    return tokens.long(), stats, samples.long()


class Shard(NamedTuple):
    """Say which part of the vocabulary a rank's head has: token ids bounds[rank] .. bounds[rank + 1] - 1.

    gather: stack a tensor of every rank, all of one shape, in rank order: [...] -> [ranks, ...].
    """

    bounds: tuple[int, ...]
    rank: int
    gather: Callable[[Tensor], Tensor]

    @property
    def sizes(self) -> list[int]:
        """Count the tokens of each rank."""
        return [end - first for first, end in zip(self.bounds, self.bounds[1:], strict=False)]

    def trimmed(self, n_vocab: int) -> "Shard":
        """Return the shard of a vocabulary that ends after n_vocab tokens."""
        return self._replace(bounds=tuple(min(bound, n_vocab) for bound in self.bounds))

    def gather_partials(self, values: Tensor, ids: Tensor) -> Partials:
        """Gather, in one message, every rank's Partials of one run -> side by side, a run each."""
        gathered = self.gather(torch.cat((values.view(torch.int32), ids))[..., 0]).movedim(0, -1).contiguous()
        return Partials(gathered[: len(values)].view(torch.float32), gathered[len(values) :])

    def gather_logits(self, logits: Tensor) -> Tensor:
        """Gather every rank's logits [..., n] -> those of the whole vocabulary."""
        parts = self.gather(F.pad(logits, (0, max(self.sizes) - logits.shape[-1])))
        return torch.cat([part[..., :n] for part, n in zip(parts, self.sizes, strict=True)], -1)


class Head(NamedTuple):
    """Hold the end of a model: final norm [D] and its epsilon; LM head, plain, packed or quantised, of n_vocab tokens.

    shard: says which tokens these are, if ranks share the vocabulary; else None.
    """

    norm: Tensor
    eps: float
    weight: Tensor
    scale: Tensor | None  # of a quantised weight
    n_vocab: int
    shard: Shard | None = None

    def trimmed(self, n_vocab: int) -> "Head":
        """Return a view of the head over the first n_vocab tokens. Raises ValueError for fewer than 2 or too many."""
        most, shard = self.n_vocab, self.shard
        if shard:
            most, shard = shard.bounds[-1], shard.trimmed(n_vocab)
        if not 2 <= n_vocab <= most:
            raise ValueError(f"n_vocab must be in 2..{most}, got {n_vocab}")
        if shard:
            n_vocab = shard.sizes[shard.rank]
        weight = self.weight[: rows_of(self.weight, n_vocab)]
        scale = None if self.scale is None else self.scale[:n_vocab]
        return self._replace(weight=weight, scale=scale, n_vocab=n_vocab, shard=shard)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return fp32 logits [..., n_vocab] of hidden [..., D]; of the whole vocabulary even if ranks share it."""
        return self.shard.gather_logits(self.own_logits(hidden)) if self.shard else self.own_logits(hidden)

    def own_logits(self, hidden: Tensor) -> Tensor:
        """Return fp32 logits [..., n_vocab] of hidden [..., D], of this rank's tokens."""
        if not self.n_vocab:  # all of a trimmed vocabulary lies on other ranks
            return hidden.new_empty(*hidden.shape[:-1], 0, dtype=torch.float32)
        return linear(rms_norm(hidden, self.norm, self.eps), self.weight, self.n_vocab, self.scale).float()


def exit_stats_reference(logits: Tensor) -> ExitStats:
    """Return the statistics of fp32 logits [T, V], V >= 2."""
    log_probs = logits.log_softmax(-1)
    probs = log_probs.exp()
    top1, second = probs.topk(2).values.unbind(-1)
    return ExitStats(logits.argmax(-1), top1, top1 - second, -(probs * log_probs).sum(-1), logits.logsumexp(-1))


def exit_head(
    hidden: Tensor, head: Head, want_stats: bool = True, draw: Draw | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Pass hidden [T, D] once through a packed LM head -> tokens int64 [T], statistics fp32 [T, 4], samples int64 [T].

    Statistics are the fields of ExitStats but `tokens`, in order. The token is exactly the argmax of `Exit.logits`:
    sums round to the head's dtype before they are compared. The sample is that of `draw` (at consecutive positions); it
    is what `sampling.choose` draws but for the last bits of logarithms. Statistics and samples that were not asked for
    are empty.
    """
    position, seed, temperature = (
        (0, 0, 0.0)
        if draw is None
        else (
            draw.positions if isinstance(draw.positions, int) else int(draw.positions[0]),
            int(draw.seed),
            float(draw.temperature),
        )
    )
    weights = head.norm, head.weight, head.n_vocab, head.eps
    return torch.ops.skipfast_cpu.exit_head.default(hidden, *weights, want_stats, temperature, seed, position)


class Exit:
    """Apply the LM head to T rows of hidden states, each answer once and only when it is asked for.

    Tokens, statistics and samples come from one pass of a fused kernel if there is one. On a CPU its token is the
    argmax of the logits. On a GPU its sums may differ from them in the last bits, so one decision must not mix the two.

    draw: how the samples are drawn. wants_stats: find the statistics in the first pass, because they will be asked for.
    Both may be set later.
    """

    def __init__(self, hidden: Tensor, head: Head, rows: int, draw: Draw | None = None):
        """hidden: [>= rows, D]; what comes after `rows` is padding."""
        self.hidden, self.head, self.rows, self.draw = hidden, head, rows, draw
        self.wants_stats = False
        self._logits = self._tokens = self._stats = self._samples = None

    @classmethod
    def of_logits(cls, logits: Tensor) -> "Exit":
        """Make an exit whose logits [T, V] are known."""
        exit = cls(logits, None, len(logits))
        exit._logits = logits
        return exit

    @property
    def asked(self) -> bool:
        """Tell whether the LM head has been applied."""
        return self._logits is not None or self._tokens is not None

    def _fused_on(self, device: str) -> bool:
        if self.head is None or self.head.shard:
            return False
        if device == "cpu":
            return is_packed(self.head.weight)
        return gpu.supports(self.hidden) and self.head.weight.dtype in (torch.bfloat16, torch.int8)

    def logits(self) -> Tensor:
        """Return the logits, fp32 [T, V]."""
        if self._logits is None:
            self._logits = self.head.logits(self.hidden)
        return self._logits[: self.rows]

    def token_ids(self) -> Tensor:
        """Return the argmax of each row, int64 [T], on the device; ties go to the lowest id."""
        if self._tokens is None and (self._logits is not None or not self.has_fused_head()):
            self._tokens = self.logits().argmax(-1)
        elif self._tokens is None:
            self._pass_through_head(self.wants_stats)
        return self._tokens

    def tokens(self) -> list[int]:
        """Return `token_ids` as numbers. On a GPU this waits for them."""
        return self.token_ids().tolist()

    def stats(self) -> ExitStats:
        """Return the statistics of each row."""
        if self._stats is None and (self._logits is not None or not self.has_fused_head()):
            self._stats = exit_stats_reference(self.logits())
            self._tokens = self._stats.tokens
        elif self._stats is None:
            self._pass_through_head(want_stats=True)
        return self._stats

    def has_fused_head(self) -> bool:
        """Tell whether one pass answers without all logits: with a fused kernel, or where ranks share the vocabulary.

        Then `samples` works: it chooses as `sampling.choose` does.
        """
        return self._fused_on("cpu") or self._fused_on("cuda") or bool(self.head and self.head.shard)

    def samples(self) -> Tensor:
        """Return the token that `draw` chooses in each row, int64 [T].

        It always comes from the fused kernel, so that one arithmetic makes every choice. Raises ValueError without a
        draw, or if `has_fused_head()` is false.
        """
        if self.draw is None or not self.has_fused_head():
            raise ValueError(f"an exit samples with a draw and a fused kernel, got draw {self.draw}")
        if self._samples is None:
            self._pass_through_head(self.wants_stats)
        return self._samples

    def _pass_through_head(self, want_stats: bool) -> None:
        """Find the tokens, the samples if there is a draw, and the statistics if wanted (on a GPU always)."""
        head = self.head
        if head.shard:
            answers = merge(*head.shard.gather_partials(*self._own_partials(want_stats)))
        elif self._fused_on("cpu"):  # rows do not depend on one another: no padding
            answers = exit_head(self.hidden[: self.rows], head, want_stats, self.draw)
        else:
            rows = rms_norm(self.hidden, head.norm, head.eps)[: self.rows]
            draw = () if self.draw is None else self.draw.on(rows.device, self.rows)
            answers = torch.ops.skipfast.exit_head_rows.default(rows, head.weight, head.scale, head.n_vocab, 0, *draw)
        self._tokens, stats, samples = answers
        if want_stats or (len(stats) and not head.shard):
            self._stats = ExitStats(self._tokens, *stats.unbind(-1))
        if self.draw is not None:
            self._samples = samples

    def _own_partials(self, want_stats: bool) -> Partials:
        """Reduce this rank's shard of the vocabulary."""
        head, offset = self.head, self.head.shard.bounds[self.head.shard.rank]
        draw = None if self.draw is None else self.draw.on(self.hidden.device, self.rows)
        fused = gpu.supports(self.hidden) and head.weight.dtype in (torch.bfloat16, torch.int8) and head.n_vocab > 1
        if not fused:
            return partials_of(head.own_logits(self.hidden)[: self.rows], offset, draw, want_stats)
        rows = rms_norm(self.hidden, head.norm, head.eps)[: self.rows]
        return Partials(
            *torch.ops.skipfast.exit_head_partials.default(
                rows, head.weight, head.scale, head.n_vocab, offset, *(draw or ())
            )
        )
