"""Compute a training step: forward passes with dropped layers, the loss of every exit, gradients."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import UserError
from loading import checkpoint
from loading.progress import LoadBar
from loading.tokenizer import Tokenizer, check_vocabulary
from model import ModelArgs, Transformer, rope_table
from scripts.common.ranks import Ranks
from scripts.train import parallel
from scripts.train.config import TrainConfig
from scripts.train.recipe import active_exits, dropout_probabilities, exit_weights, parse_focus


def init_weights(model: Transformer, seed: int) -> None:
    """Start every layer as the identity (its two output matrices are 0): an exit then begins level with the last."""
    generator = torch.Generator().manual_seed(seed)
    for name, param in model.named_parameters():
        if param.ndim == 2:
            param.data.normal_(0, 0.02 if "layers" not in name else param.shape[1] ** -0.5, generator=generator)
            if name.endswith(("wo.weight", "w2.weight")):
                param.data.zero_()


def open_checkpoint(config: TrainConfig) -> checkpoint.Source | None:
    """Open the checkpoint to go on from, if there is one. Raises UserError if it cannot be trained."""
    if config.checkpoint_path is None:
        return None
    source = checkpoint.open_source(config.checkpoint_path)
    if source.format:
        raise UserError(f"checkpoint_path {config.checkpoint_path} is quantised ({source.format}): give the plain one")
    if config.context > source.args.max_seq_len:
        raise UserError(f"context must be in 1..{source.args.max_seq_len} for this checkpoint, got {config.context}")
    if not config.adapter_exits and Path(config.output_dir).resolve() == source.folder.resolve():
        raise UserError(
            f"output_dir must not be the folder of the checkpoint, whose weights it would replace, got "
            f"{config.output_dir}"
        )
    return source


def build_model(config: TrainConfig, tokenizer: Tokenizer, source: checkpoint.Source | None) -> Transformer:
    """Make a new model in fp32, or read the checkpoint's. One to be sharded has no weights yet (meta device)."""
    if source is not None:
        check_vocabulary(tokenizer, source.args.vocab_size)
        if config.parallel == "fsdp":
            with torch.device("meta"):
                return Transformer(source.args)
        bar = LoadBar()
        return checkpoint.load(source, torch.float32, config.device, pack=False, progress=bar).model.requires_grad_()
    args = ModelArgs(
        dim=config.dim,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_kv_head=config.n_kv_head,
        head_dim=config.dim // config.n_head,
        ffn_dim=config.ffn_dim,
        vocab_size=tokenizer.vocab_size,
        max_seq_len=config.context,
        norm_eps=1e-5,
        rope_base=10000.0,
        tie_embeddings=config.tie_embeddings,
    )
    model = Transformer(args)
    init_weights(model, config.seed)
    return model.to(config.device)


class Exits(nn.Module):
    """A model with the outputs of all its exits. The forward pass is the loss of a step.

    Under fsdp weights are whole only inside `forward` and the METHODS.
    """

    METHODS = ("position_losses", "choices")

    def __init__(self, model: Transformer, config: TrainConfig):
        super().__init__()
        self.model, self.distill, self.device = model, config.distill, config.device
        self.cos, self.sin = rope_table(model.args, config.context, config.device)
        self.layer, self.exit_loss = _layer, _exit_loss
        if config.compile:
            torch._dynamo.config.cache_size_limit = 64
            self.layer = torch.compile(_layer, dynamic=False)
            self.exit_loss = torch.compile(_exit_loss, dynamic=False)

    def hidden_states(self, tokens: Tensor, dropped: Tensor | None = None, layer_forward=None) -> list[Tensor]:
        """Map token ids [B, T] to hidden [B, T, D] after each layer. dropped: [L, B], marks samples that skip a layer.

        layer_forward: a compiled one; not for evaluation, which has other shapes.
        """
        if tokens.shape[1] > len(self.cos):  # a prompt and its continuation
            self.cos, self.sin = rope_table(self.model.args, tokens.shape[1], self.device)
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        hidden, states = self.model.embed(tokens), []
        for index, layer in enumerate(self.model.layers):
            keep = None if dropped is None else ~dropped[index, :, None, None]
            hidden = (layer_forward or _layer)(layer, hidden, cos, sin, positions, keep)
            states.append(hidden)
        return states

    def forward(
        self, inputs: Tensor, targets: Tensor, dropped: Tensor | None, weights: dict[int, float]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Compute the loss of a step, and the cross-entropy (nats per token) of each exit in `weights`."""
        states = self.hidden_states(inputs, dropped, self.layer)
        total, by_exit, teacher, n_layer = 0.0, {}, None, self.model.args.n_layer
        for depth in sorted(weights, reverse=True):
            ce, divergence, log_probs = self.exit_loss(self.model, states[depth - 1], targets, teacher)
            if depth == n_layer and self.distill:
                teacher = log_probs.detach()
            by_exit[depth] = ce.detach()
            early = depth < n_layer and self.distill
            total = total + weights[depth] * ((1 - early) * ce + early * divergence)
        return total, by_exit

    @torch.no_grad()
    def position_losses(self, row: Tensor) -> Tensor:
        """Compute for tokens [T + 1] the cross-entropy of each exit at each position [L, T], on the CPU."""
        losses = [
            F.cross_entropy(self.model.head(hidden)[0], row[1:], reduction="none").cpu()
            for hidden in self.hidden_states(row[None, :-1])
        ]
        return torch.stack(losses)

    @torch.no_grad()
    def choices(self, tokens: list[int], first: int, depths: list[int]) -> list[list[int]]:
        """Choose the next token after each position from `first`, by each exit in `depths`."""
        states = self.hidden_states(torch.tensor([tokens], device=self.device))
        return [self.model.head(states[depth - 1][0, first:]).argmax(-1).tolist() for depth in depths]


class Trainer:
    """Leaves the gradients of a step in the parameters: of this process, its threads, and the processes beside it."""

    measure = "loss_by_exit"

    def __init__(
        self,
        model: Transformer,
        config: TrainConfig,
        ranks: Ranks | None = None,
        source: checkpoint.Source | None = None,
    ):
        """source: where a model that is still on the meta device has its weights; under fsdp only."""
        self.trained, self.args, self.config, self.ranks = model, model.args, config, ranks or Ranks(None)
        self.focus = parse_focus(config.focus_exits, model.args.n_layer)
        self.pool = ThreadPoolExecutor(config.workers) if config.workers > 1 else None
        self.shapes: set[torch.Size] = set()  # of batches already seen
        self.bf16 = config.precision == "bf16"
        self.loss = self.exits = Exits(model, config)
        if self.ranks.size == 1:
            return
        if config.parallel == "ddp":
            self.loss = parallel.replicate(self.exits)
            return
        parallel.shard(self.exits, model.layers, Exits.METHODS, config.device, self.bf16)
        self.bf16 = False  # by autocast
        if source is not None:
            parallel.load_sharded(model, source, config.device)

    def step(self, step: int, progress: float, inputs: Tensor, targets: Tensor) -> dict[int, float]:
        """Leave the gradients of a step in the parameters; return the cross-entropy of each exit that counted.

        inputs, targets [B, T]: the whole batch, of which this process takes its rows (the losses returned are theirs).
        With `workers` above 1, as many threads each take a part of the batch: coarser than threads inside every
        matmul, and faster on a CPU that other programs use too.
        """
        dropped, weights = self._dropped(step, progress, len(inputs)), self._weights(step, progress)
        n_worker = min(self.config.workers, len(inputs))

        def part(index):
            rows = slice(self.ranks.rank * n_worker + index, None, self.ranks.size * n_worker)
            with self.autocast():
                skipped = None if dropped is None else dropped[:, rows]
                loss, by_exit = self.loss(inputs[rows], targets[rows], skipped, weights)
            (loss / n_worker).backward()
            return {depth: ce.item() for depth, ce in by_exit.items()}

        if self.pool is None or inputs.shape not in self.shapes:  # one thread compiles for all
            parts = [part(index) for index in range(n_worker)]
            self.shapes.add(inputs.shape)
        else:
            parts = list(self.pool.map(part, range(n_worker)))
        return {depth: sum(losses[depth] for losses in parts) / n_worker for depth in parts[0]}

    def _dropped(self, step: int, progress: float, n_row: int) -> Tensor | None:
        """Draw which rows of the whole batch skip which layers, [L, B]: the same whoever computes a row."""
        args, config = self.args, self.config
        if not config.p_max:
            return None
        chance = dropout_probabilities(args.n_layer, config.p_max, config.dropout_schedule, progress)
        generator = torch.Generator().manual_seed(config.seed * 64 * 1_000_003 + step)
        return (torch.rand(args.n_layer, n_row, generator=generator) < chance[:, None]).to(config.device)

    def _weights(self, step: int, progress: float) -> dict[int, float]:
        config, n_layer = self.config, self.args.n_layer
        exits = active_exits(config.curriculum, n_layer, step, progress)
        weights = exit_weights(exits, n_layer, config.e_scale, config.exit_weight)
        for depth, weight in self.focus.items():
            weights[depth] = weights.get(depth, 0.0) + weight
        return weights

    def evaluate(self, heldout: Tensor, n_window: int) -> dict:
        """Return held-out losses for the log."""
        return {"heldout_by_exit": heldout_losses(self, heldout, n_window).mean(-1).tolist()}

    def autocast(self):
        return autocast(self.config.device, self.bf16)


def autocast(device: str, bf16: bool):
    return torch.autocast(device, torch.bfloat16) if bf16 else nullcontext()


def _layer(layer, hidden: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, keep: Tensor | None) -> Tensor:
    out = layer(hidden, cos, sin, positions)
    return out if keep is None else torch.where(keep, out, hidden)


def _exit_loss(model: Transformer, hidden: Tensor, targets: Tensor, teacher: Tensor | None):
    """Compute cross-entropy, KL(teacher || exit) (0 without teacher) and log-probabilities [B·T, V] of an exit."""
    log_probs = F.log_softmax(model.head(hidden).flatten(0, 1), dim=-1)
    ce = F.nll_loss(log_probs, targets.flatten())
    divergence = 0.0
    if teacher is not None:
        divergence = (teacher.exp() * (teacher - log_probs)).sum(-1).mean()
    return ce, divergence, log_probs


def heldout_windows(tokens: Tensor, length: int, n_window: int) -> list[Tensor]:
    """Cut up to n_window windows of length + 1 tokens, spread evenly over the held-out text."""
    length = min(length, len(tokens) - 1)
    n_window = max(1, min(n_window, len(tokens) // length))
    starts = [round(index * (len(tokens) - 1 - length) / max(n_window - 1, 1)) for index in range(n_window)]
    return [tokens[start : start + length + 1].long() for start in starts]


def heldout_losses(trainer: Trainer, tokens: Tensor, n_window: int) -> Tensor:
    """Compute the mean cross-entropy in nats of each exit at each position of `n_window` windows -> [L, T]."""
    windows = heldout_windows(tokens, trainer.config.context, n_window)
    with trainer.autocast():
        losses = lambda row: trainer.exits.position_losses(row.to(trainer.config.device))
        return sum(parallel.shared_out(trainer.ranks, windows, losses, "held-out loss")) / len(windows)
