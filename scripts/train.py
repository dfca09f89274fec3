"""Train a Llama with the LayerSkip recipe, so that its early layers can draft for the rest.

Three things differ from ordinary training: whole layers are dropped per sample, more often the deeper they lie; the
loss is also taken after early layers, through the one final norm and head that every exit shares; and a curriculum
says which exits are on in a step. The result is a Hugging Face folder that `generate.py --draft_exit` reads like any
other Llama. Every random choice is a function of (seed, step), so the state of a run is weights, optimiser and step,
and a run that was killed goes on as if nothing had happened.
"""

import hashlib
import platform
from dataclasses import asdict
from pathlib import Path

import cli
from scripts.corpus import encode_texts, find_files, prepare_tokenizer, split_texts
from scripts.optimizers import make_optimizers
from scripts.train_config import parse_args
from scripts.train_loop import load_state, train
from scripts.train_report import export, report
from scripts.trainer import Trainer, build_model


def main() -> None:
    """Train, or go on with the run found in output_dir, then report and export."""
    config = parse_args(__doc__)
    config.validate()
    cli.check_writable(config.json)
    out = Path(config.output_dir)
    train_texts, heldout_texts = split_texts(find_files(config.data, config.glob), config.heldout)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = prepare_tokenizer(config, train_texts, out)
    tokens, heldout = encode_texts(tokenizer, train_texts), encode_texts(tokenizer, heldout_texts)
    if len(tokens) <= config.context:
        raise ValueError(f"data: {len(tokens)} tokens are too few for one window of {config.context} (--context)")
    model, hf_config = build_model(config, tokenizer)
    if model.args.n_layer < 2:
        raise ValueError("n_layer must be 2 or more: a single layer has no early exit")
    optimizers, trainer = make_optimizers(model, config), Trainer(model, config)
    data_hash = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    position = load_state(out / "state.pt", model, optimizers, data_hash)
    size = sum(param.numel() for param in model.parameters())
    cli.notice(f"{size / 1e6:.1f} M parameters, {len(tokens)} training tokens, {len(heldout)} held out, "
               f"from step {position['step']}")  # fmt: skip
    train(trainer, optimizers, tokens, heldout, position)
    results = report(trainer, tokenizer, heldout_texts, heldout)
    results |= {"parameters": size, "training_tokens": len(tokens)} | position
    listing = [f"# Python {platform.python_version()}: split, bytes, name"]
    for split, texts in (("train", dict(train_texts)), ("heldout", dict(heldout_texts))):
        listing += [f"{split}\t{len(text.encode())}\t{name}" for name, text in texts.items()]
    export(trainer, tokenizer, hf_config, listing, results["samples"])
    rows = [[str(depth), f"{loss:.3f}"] for depth, loss in enumerate(results["heldout_loss_by_exit"], start=1)]
    cli.print_table("held-out loss", ["exit", "nats per token"], rows)
    print(f"drafting with {results['exit_layer']} layers, K = {results['num_draft_tokens']}: acceptance rate "
          f"{cli.shown(results['acceptance_rate'], '.3f')}, agreement {cli.shown(results['agreement'], '.3f')}; "
          f"written: {out}")  # fmt: skip
    if config.json is not None:
        cli.write_json(config.json, {"config": asdict(config), "results": results, **cli.environment()})


if __name__ == "__main__":
    cli.run(main)
