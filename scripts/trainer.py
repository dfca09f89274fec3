"""A model in training: its forward passes with dropped layers, the loss of every exit, the gradients of a step."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

import checkpoint
from model import ModelArgs, Transformer, rope_table
from scripts.recipe import active_exits, dropout_probabilities, exit_weights, parse_focus
from scripts.train_config import TrainConfig
from tokenizer import Tokenizer, check_vocabulary


def init_weights(model: Transformer, seed: int) -> None:
    """Start every layer as the identity (its two output matrices are 0): an exit then begins level with the last."""
    generator = torch.Generator().manual_seed(seed)
    for name, param in model.named_parameters():
        if param.ndim == 2:
            param.data.normal_(0, 0.02 if "layers" not in name else param.shape[1] ** -0.5, generator=generator)
            if name.endswith(("wo.weight", "w2.weight")):
                param.data.zero_()


def build_model(config: TrainConfig, tokenizer: Tokenizer) -> tuple[Transformer, dict]:
    """A new model in fp32 and its Hugging Face config, or the checkpoint's."""
    if config.checkpoint_path is not None:
        loaded = checkpoint.load(config.checkpoint_path, torch.float32, config.device, pack=False)
        check_vocabulary(tokenizer, loaded.args.vocab_size)
        return loaded.model.requires_grad_(True), loaded.hf_config
    args = ModelArgs(
        dim=config.dim, n_layer=config.n_layer, n_head=config.n_head, n_kv_head=config.n_kv_head,
        head_dim=config.dim // config.n_head, ffn_dim=config.ffn_dim, vocab_size=tokenizer.vocab_size,
        max_seq_len=config.context, norm_eps=1e-5, rope_base=10000.0, tie_embeddings=config.tie_embeddings,
    )  # fmt: skip
    model = Transformer(args)
    init_weights(model, config.seed)
    hf_config = checkpoint.hf_config_from_args(args, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_ids[0])
    return model.to(config.device), hf_config


class Trainer:
    """A model with what a training step needs around it: rotary tables, compiled layers, the loss of all exits."""

    def __init__(self, model: Transformer, config: TrainConfig):
        self.model, self.config = model, config
        self.focus = parse_focus(config.focus_exits, model.args.n_layer)
        self.cos, self.sin = rope_table(model.args, config.context, config.device)
        self.pool = ThreadPoolExecutor(config.workers) if config.workers > 1 else None
        self.shapes: set[torch.Size] = set()  # of batches already seen
        self.layer, self.exit_loss = _layer, _exit_loss
        if config.compile:
            torch._dynamo.config.cache_size_limit = 64
            self.layer = torch.compile(_layer, dynamic=False)
            self.exit_loss = torch.compile(_exit_loss, dynamic=False)

    def hidden_states(self, tokens: Tensor, dropped: Tensor | None = None) -> list[Tensor]:
        """Token ids [B, T] -> hidden [B, T, D] after each layer; `dropped` [L, B] marks samples that skip a layer."""
        if tokens.shape[1] > len(self.cos):  # a prompt and its continuation
            self.cos, self.sin = rope_table(self.model.args, tokens.shape[1], self.config.device)
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        hidden, states = self.model.embed(tokens), []
        for index, layer in enumerate(self.model.layers):
            keep = None if dropped is None else ~dropped[index, :, None, None]
            hidden = self.layer(layer, hidden, cos, sin, positions, keep)
            states.append(hidden)
        return states

    def losses(self, step: int, progress: float, inputs: Tensor, targets: Tensor, part: int = 0):
        """The weighted loss of a step and the cross-entropy (nats per token) of each exit that counted."""
        args, config = self.model.args, self.config
        chance = dropout_probabilities(args.n_layer, config.p_max, config.dropout_schedule, progress)
        generator = torch.Generator().manual_seed((config.seed * 64 + part) * 1_000_003 + step)
        dropped = torch.rand(args.n_layer, len(inputs), generator=generator) < chance[:, None]
        states = self.hidden_states(inputs, dropped.to(inputs.device) if config.p_max else None)
        exits = active_exits(config.curriculum, args.n_layer, step, progress)
        weights = exit_weights(exits, args.n_layer, config.e_scale, config.exit_weight)
        for depth, weight in self.focus.items():
            weights[depth] = weights.get(depth, 0.0) + weight
        total, by_exit, teacher = 0.0, {}, None
        for depth in sorted(weights, reverse=True):
            ce, divergence, log_probs = self.exit_loss(self.model, states[depth - 1], targets, teacher)
            if depth == args.n_layer and config.distill:
                teacher = log_probs.detach()
            by_exit[depth] = ce
            early = depth < args.n_layer and config.distill
            total = total + weights[depth] * ((1 - early) * ce + early * divergence)
        return total, by_exit

    def step(self, step: int, progress: float, inputs: Tensor, targets: Tensor) -> dict[int, float]:
        """Leave the gradients of a step in the parameters; return the cross-entropy of each exit that counted.

        With `workers` above 1, as many threads each take a part of the batch: coarser than threads inside every
        matmul, and faster on a CPU that other programs use too.
        """
        n_worker = min(self.config.workers, len(inputs))

        def part(index):
            picked = slice(index, None, n_worker)
            with self.autocast():
                loss, by_exit = self.losses(step, progress, inputs[picked], targets[picked], index)
            (loss / n_worker).backward()
            return {depth: ce.item() for depth, ce in by_exit.items()}

        if self.pool is None or inputs.shape not in self.shapes:  # one thread compiles for all
            parts = [part(index) for index in range(n_worker)]
            self.shapes.add(inputs.shape)
        else:
            parts = list(self.pool.map(part, range(n_worker)))
        return {depth: sum(each[depth] for each in parts) / n_worker for depth in parts[0]}

    def autocast(self):
        bf16 = self.config.precision == "bf16"
        return torch.autocast(torch.device(self.config.device).type, torch.bfloat16) if bf16 else nullcontext()


def _layer(layer, hidden: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, keep: Tensor | None) -> Tensor:
    out = layer(hidden, cos, sin, positions)
    return out if keep is None else torch.where(keep, out, hidden)


def _exit_loss(model: Transformer, hidden: Tensor, targets: Tensor, teacher: Tensor | None):
    """Cross-entropy, KL(teacher || exit) (0 without teacher) and log-probabilities [B·T, V] of one exit."""
    log_probs = F.log_softmax(model.head(hidden).flatten(0, 1), dim=-1)
    ce = F.nll_loss(log_probs, targets.flatten())
    divergence = 0.0
    if teacher is not None:
        divergence = (teacher.exp() * (teacher - log_probs)).sum(-1).mean()
    return ce, divergence, log_probs


@torch.no_grad()
def heldout_losses(trainer: Trainer, tokens: Tensor, n_window: int) -> Tensor:
    """Mean cross-entropy in nats of each exit at each position of `n_window` windows -> [L, T]."""
    length = min(trainer.config.context, len(tokens) - 1)
    n_window = max(1, min(n_window, len(tokens) // length))
    total = torch.zeros(trainer.model.args.n_layer, length)
    for index in range(n_window):
        start = round(index * (len(tokens) - 1 - length) / max(n_window - 1, 1))
        row = tokens[start : start + length + 1].long().to(trainer.config.device)
        with trainer.autocast():
            for layer, hidden in enumerate(plain_states(trainer, row[None, :-1])):
                total[layer] += F.cross_entropy(trainer.model.head(hidden)[0], row[1:], reduction="none").cpu()
    return total / n_window


def plain_states(trainer: Trainer, tokens: Tensor) -> list[Tensor]:
    """Hidden states without compiled layers: evaluation has other shapes than training."""
    compiled, trainer.layer = trainer.layer, _layer
    try:
        return trainer.hidden_states(tokens)
    finally:
        trainer.layer = compiled
