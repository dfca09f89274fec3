"""Train exit adapters: for a Llama of any origin, a small map after an early layer, for better drafts from there.

The adapter of exit E takes the hidden state h after E layers to h + up·(down·h); the model's own final norm and LM head
follow. The model is frozen: one forward pass without gradients gives the states that enter the adapters, and the
distribution of the last layer, which the adapted exits are trained to match (KL divergence). Used by `scripts.train
--adapter_exits`; the engine reads the file.
"""

import hashlib
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

import cli
from errors import UserError
from loading import checkpoint
from loading.files import make_folder, replacing, write_json
from loading.progress import LoadBar
from loading.tokenizer import check_vocabulary
from model import Transformer
from scripts.common.ranks import Ranks
from scripts.train.config import TrainConfig
from scripts.train.corpus import Data
from scripts.train.loop import load_state, train
from scripts.train.report import HELDOUT_WINDOWS, NUM_DRAFT_TOKENS, choose_prompts, greedy_acceptance
from scripts.train.trainer import Exits, autocast, heldout_windows

ADAPTER = "adapter.safetensors"
PLAIN, ADAPTED = "without", "with"


class TrainableAdapter(nn.Module):
    """Computes h + up·(down·h); at first the identity, since up is 0."""

    def __init__(self, dim: int, rank: int, generator: torch.Generator):
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, dim, generator=generator) * dim**-0.5)
        self.up = nn.Parameter(torch.zeros(dim, rank))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + F.linear(F.linear(hidden, self.down), self.up)


class AdapterTrainer:
    """Trains adapters (`trained`) around a model that stays as it is; takes the place of a `Trainer` in loop.py."""

    measure = "kl_by_exit"

    def __init__(self, model: Transformer, config: TrainConfig, depths: list[int]):
        self.args, self.config, self.depths, self.ranks = model.args, config, depths, Ranks(None)
        self.exits = Exits(model, config)
        generator = torch.Generator().manual_seed(config.seed)
        adapters = {str(depth): TrainableAdapter(model.args.dim, config.adapter_rank, generator) for depth in depths}
        self.trained = nn.ModuleDict(adapters).to(config.device)

    def step(self, step: int, progress: float, inputs: Tensor, targets: Tensor) -> dict[int, float]:
        """Leave the gradients of a step in the adapters; return the KL divergence of each exit in nats per token."""
        by_exit = {}
        with self.autocast():
            states, teacher = self._frozen(inputs)
            for depth in self.depths:
                loss = divergence(teacher, self._log_probs(states[depth - 1], depth)).mean()
                loss.backward()
                by_exit[depth] = loss.item()
        return by_exit

    @torch.no_grad()
    def _frozen(self, tokens: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return hidden states after each layer, and log-probabilities [B, T, V] of the last one."""
        states = self.exits.hidden_states(tokens)
        return states, self.exits.model.head(states[-1]).log_softmax(-1)

    def _log_probs(self, hidden: Tensor, adapter: int | None) -> Tensor:
        if adapter is not None:
            hidden = self.trained[str(adapter)](hidden)
        return self.exits.model.head(hidden).log_softmax(-1)

    @torch.no_grad()
    def drafts(self, tokens: list[int], first: int) -> dict[str, list[int]]:
        """Choose the next token after each position from `first`, at each exit without and with its adapter."""
        states = self.exits.hidden_states(torch.tensor([tokens], device=self.config.device))
        return {
            f"{depth} {kind}": self._log_probs(states[depth - 1][0, first:], adapter).argmax(-1).tolist()
            for depth in self.depths
            for kind, adapter in ((PLAIN, None), (ADAPTED, depth))
        }

    @torch.no_grad()
    def heldout(self, tokens: Tensor, n_window: int) -> dict[str, dict[str, float]]:
        """Measure each exit, without and with its adapter: KL and loss in nats per token, agreement in 0..1."""
        windows, measures = heldout_windows(tokens, self.config.context, n_window), {}
        for window in windows:
            row = window.to(self.config.device)
            with self.autocast():
                states, teacher = self._frozen(row[None, :-1])
                for depth in self.depths:
                    for kind, adapter in ((PLAIN, None), (ADAPTED, depth)):
                        log_probs = self._log_probs(states[depth - 1], adapter)
                        sums = measures.setdefault(f"{depth} {kind}", {"kl": 0.0, "loss": 0.0, "agreement": 0.0})
                        sums["kl"] += divergence(teacher, log_probs).mean().item()
                        sums["loss"] += F.nll_loss(log_probs[0], row[1:]).item()
                        sums["agreement"] += (log_probs.argmax(-1) == teacher.argmax(-1)).float().mean().item()
        return {name: {key: value / len(windows) for key, value in sums.items()} for name, sums in measures.items()}

    def evaluate(self, heldout: Tensor, n_window: int) -> dict:
        """Return held-out divergences for the log."""
        measures = self.heldout(heldout, n_window)
        return {"heldout_kl_by_exit": {depth: measures[f"{depth} {ADAPTED}"]["kl"] for depth in self.depths}}

    def autocast(self):
        return autocast(self.config.device, self.config.precision == "bf16")


def divergence(teacher: Tensor, log_probs: Tensor) -> Tensor:
    """Compute KL(teacher || exit) in nats from log-probabilities [..., V]."""
    return (teacher.exp() * (teacher - log_probs)).sum(-1)


def parse_exits(text: str, n_layer: int) -> list[int]:
    """Read "3,6": the exits that get an adapter, in 1..n_layer - 1."""
    try:
        depths = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise UserError(f"adapter_exits must look like 3 or 3,6, got {text!r}") from None
    if bad := [depth for depth in depths if not 1 <= depth < n_layer]:
        raise UserError(f"adapter_exits must name exits in 1..{n_layer - 1}, got {bad[0]}")
    return depths


def make_optimizer(adapters: nn.ModuleDict, config: TrainConfig) -> torch.optim.AdamW:
    """Make an AdamW whose steps, beside the first values of `down`, are as large in a wide model as in a narrow one."""
    downs, ups = ([getattr(adapter, name) for adapter in adapters.values()] for name in ("down", "up"))
    groups = [{"params": downs, "lr_scale": downs[0].shape[1] ** -0.5}, {"params": ups}]
    return torch.optim.AdamW(groups, config.learning_rate, betas=(0.9, 0.95), weight_decay=config.weight_decay)


def save_adapters(adapters: nn.ModuleDict, args, path: Path) -> None:
    """Write the adapters by rename: fp32 tensors exit.E.down [r, D] and exit.E.up [D, r]."""
    tensors = {f"exit.{name}": tensor.detach().cpu() for name, tensor in adapters.state_dict().items()}
    metadata = {"format": "skipfast exit adapter", "n_layer": str(args.n_layer), "dim": str(args.dim)}
    with replacing(path) as file:
        file.write(save(tensors, metadata))  # save_file would hide it from other users


def train_adapters(config: TrainConfig, source: checkpoint.Source) -> None:
    """Train adapters of a checkpoint, or go on with the run found in output_dir; report, and write them."""
    args, out = source.args, make_folder(config.output_dir)
    depths = parse_exits(config.adapter_exits, args.n_layer)
    if not 2 <= config.adapter_rank <= args.dim:
        raise UserError(f"adapter_rank must be even and in 2..{args.dim} for this model, got {config.adapter_rank}")
    data = Data(config, source, Ranks(None))
    check_vocabulary(data.tokenizer, args.vocab_size)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    model = checkpoint.load(source, dtype, config.device, pack=False, progress=LoadBar()).model
    trainer = AdapterTrainer(model, config, depths)
    optimizers = [make_optimizer(trainer.trained, config)]
    origin = hashlib.sha256(data.hash.encode() + model.norm.weight.float().cpu().numpy().tobytes()).hexdigest()
    position = load_state(out / "state.pt", trainer, optimizers, origin)
    size = sum(param.numel() for param in trainer.trained.parameters())
    cli.notice(
        f"adapters of exits {', '.join(map(str, depths))}: {size / 1e3:.0f} K parameters, {len(data.tokens)} "
        f"training tokens, {len(data.heldout)} held out, learning_rate {config.learning_rate}, from step "
        f"{position['step']}"
    )
    train(trainer, optimizers, data.tokens, data.heldout, position)
    save_adapters(trainer.trained, args, out / ADAPTER)
    results = final_results(trainer, data) | {"parameters": size, "training_tokens": len(data.tokens)} | position
    print_results(results, out / ADAPTER)
    if config.json is not None:
        write_json(config.json, {"config": asdict(config), "results": results, **cli.environment()})


def final_results(trainer: AdapterTrainer, data: Data) -> dict:
    """Measure each exit without and with its adapter: on held-out text, and by acceptance along the model's texts."""
    heldout = trainer.heldout(data.heldout, HELDOUT_WINDOWS)
    prompts = choose_prompts(data.tokenizer, data.heldout_texts)
    greedy, samples = greedy_acceptance(trainer, data.tokenizer, prompts, trainer.drafts)
    rows = []
    for name, measures in heldout.items():
        depth, kind = name.split()
        rates = greedy.get(name, {"acceptance_rate": None, "agreement": None})
        rates = {"acceptance_rate": rates["acceptance_rate"], "greedy_agreement": rates["agreement"]}
        rows.append({"exit_layer": int(depth), "adapter": kind == ADAPTED, **measures, **rates})
    return {"exits": rows, "num_draft_tokens": NUM_DRAFT_TOKENS, "prompts": len(prompts), "samples": samples}


def print_results(results: dict, path: Path) -> None:
    columns = {"kl": "KL", "loss": "loss", "agreement": "agreement", "acceptance_rate": "acceptance"}
    rows = [
        [str(row["exit_layer"]), "yes" if row["adapter"] else "no", *(cli.shown(row[key], ".3f") for key in columns)]
        for row in results["exits"]
    ]
    cli.print_table("exit adapters", ["exit", "adapter", *columns.values()], rows)
    print(
        f"KL to the last layer, loss and agreement on held-out text; acceptance rate of greedy drafting with K = "
        f"{results['num_draft_tokens']} on {results['prompts']} prompts; written: {path}"
    )
