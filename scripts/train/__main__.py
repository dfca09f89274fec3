"""Train a Llama with the LayerSkip recipe, so that its early layers can draft for the rest.

Three things differ from ordinary training. Whole layers are dropped per sample, more often the deeper they lie. The
loss is also taken after early layers, through the one final norm and head that every exit shares. And a curriculum says
which exits are on in a step. The result is a Hugging Face folder that `generate.py --draft_exit` reads like any other
Llama. Every random choice is a function of (seed, step), so a run that was killed goes on as if nothing had happened.
"""

from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import cli
from decoding.engine import chosen_device
from errors import UserError
from loading import checkpoint
from loading.files import check_writable, write_json
from scripts.common import ranks
from scripts.common.journal import claimed
from scripts.common.ranks import Ranks
from scripts.train import adapters
from scripts.train.config import TrainConfig, parse_args
from scripts.train.corpus import Data
from scripts.train.loop import load_state, train
from scripts.train.optimizers import make_optimizers
from scripts.train.report import HELDOUT_WINDOWS, export, final_results, print_results
from scripts.train.trainer import Trainer, build_model, heldout_losses, open_checkpoint


def train_with(config: TrainConfig, ranks: Ranks) -> None:
    """Train, or go on with the run found in output_dir, then report and export; the same call on every process."""
    config.validate(ranks.size)
    config = replace(config, device=chosen_device(config.device, cli.notice))
    ranks.take_gpu(config.device)
    if ranks.leads:
        check_writable(config.json)
    source = open_checkpoint(config)
    with claimed(config.output_dir) if ranks.leads else nullcontext():
        adapters.train_adapters(config, source) if config.adapter_exits else train_model(config, source, ranks)


def train_model(config: TrainConfig, source: checkpoint.Source | None, ranks: Ranks) -> None:
    """Train a new model, or that of a checkpoint, whole."""
    data = Data(config, source, ranks)
    model = build_model(config, data.tokenizer, source)
    if model.args.n_layer < 2:
        raise UserError("n_layer must be 2 or more: a single layer has no early exit")
    ranks.agreed(None)  # reading text and weights may have taken some longer than others may be kept waiting
    trainer = Trainer(model, config, ranks, source)
    optimizers = make_optimizers(model, config)
    position = load_state(Path(config.output_dir) / "state.pt", trainer, optimizers, data.hash)
    size = sum(param.numel() for param in model.parameters())
    cli.notice(
        f"{size / 1e6:.1f} M parameters, {len(data.tokens)} training tokens, {len(data.heldout)} held out, "
        f"from step {position['step']}"
    )
    if source is not None:
        names = ("learning_rate", "optimizer", "dropout_schedule", "p_max", "curriculum", "e_scale", "exit_weight")
        cli.notice("continual training: " + ", ".join(f"{name} {getattr(config, name)}" for name in names))
        if not position["step"]:
            position["heldout_before"] = heldout_losses(trainer, data.heldout, HELDOUT_WINDOWS).mean(-1).tolist()
    train(trainer, optimizers, data.tokens, data.heldout, position)
    results = final_results(trainer, data.tokenizer, data.heldout_texts, data.heldout)
    results |= {"parameters": size, "training_tokens": len(data.tokens)} | position
    export(trainer, source, data.tokenizer, data.listing(), results["samples"])
    if ranks.leads:
        print_results(results, Path(config.output_dir))
        if config.json is not None:
            write_json(config.json, {"config": asdict(config), "results": results, **cli.environment()})


def main() -> None:
    with ranks.joined() as group:
        train_with(parse_args(__doc__), group)


if __name__ == "__main__":
    cli.run(main)
