"""The steps of a training run, its log, and its state on disk, from which a killed run goes on."""

import json
import math
import os
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from model import ModelArgs, Transformer
from scripts.corpus import batch_at
from scripts.recipe import learning_rate_factor
from scripts.train_config import TrainConfig
from scripts.trainer import Trainer, heldout_losses


def save_state(path: Path, model: Transformer, optimizers: list, config: TrainConfig, position: dict) -> None:
    """Write the whole run by rename: a kill at any moment leaves the last good state."""
    state = {
        "model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "args": asdict(model.args), "config": asdict(config), **position,
    }  # fmt: skip
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def load_state(path: Path, model: Transformer, optimizers: list, data_hash: str) -> dict:
    """Put a saved run, if there is one, back into model and optimisers -> its position, or that of a new run."""
    if not path.exists():
        return {"step": 0, "minutes": 0.0, "tokens": 0, "data_hash": data_hash}
    state = torch.load(path, map_location=model.norm.weight.device, weights_only=True)
    if ModelArgs(**state["args"]) != model.args:
        raise ValueError(f"output_dir holds a run of another shape ({path}); give its flags or another --output_dir")
    if state["data_hash"] != data_hash:
        raise ValueError(f"output_dir holds a run on other data ({path}); give the same --data or another --output_dir")
    if len(state["optimizers"]) != len(optimizers):
        raise ValueError(f"output_dir holds a run with another --optimizer ({path}); give the same or another folder")
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return {key: state[key] for key in ("step", "minutes", "tokens", "data_hash")}


def train(trainer: Trainer, optimizers: list, tokens: Tensor, heldout: Tensor, position: dict) -> None:
    """Run from `position` to the planned end, moving it along, saving every `save_every` steps and at the end."""
    config, out = trainer.config, Path(trainer.config.output_dir)
    started, spent = time.monotonic(), position["minutes"]
    with _open_log(out / "log.jsonl", position["step"]) as log, tqdm(
        total=config.max_steps, initial=position["step"], unit="step", mininterval=2
    ) as bar:
        while not _is_over(config, position):
            step, progress = position["step"], _progress(config, position)
            inputs, targets = (part.to(config.device) for part in batch_at(tokens, step, config))
            by_exit = trainer.step(step, progress, inputs, targets)
            norm = torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0).item()
            if not math.isfinite(norm):
                raise ValueError(f"the loss diverged in step {step}: lower --learning_rate ({config.learning_rate})")
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = config.learning_rate * learning_rate_factor(config.schedule, config.warmup, progress)
                optimizer.step()
                optimizer.zero_grad()
            position["step"], position["tokens"] = step + 1, position["tokens"] + inputs.numel()
            position["minutes"] = spent + (time.monotonic() - started) / 60
            row = {**position, "step": step, "grad_norm": norm, "loss_by_exit": by_exit}
            del row["data_hash"]
            over = _is_over(config, position)
            if over or position["step"] % config.eval_every == 0:
                row["heldout_by_exit"] = heldout_losses(trainer, heldout, 16).mean(-1).tolist()
            log.write(json.dumps(row) + "\n")
            log.flush()
            if over or position["step"] % config.save_every == 0:
                save_state(out / "state.pt", trainer.model, optimizers, config, position)
            bar.update()
            bar.set_postfix({f"exit {depth}": f"{loss:.2f}" for depth, loss in sorted(by_exit.items())}, refresh=False)


def _open_log(path: Path, step: int):
    """Open the log for appending, without what a killed run wrote after its last saved state."""
    rows = path.read_text().splitlines(keepends=True) if path.exists() else []
    path.write_text("".join(row for row in rows if row.endswith("}\n") and json.loads(row)["step"] < step))
    return path.open("a")


def _is_over(config: TrainConfig, position: dict) -> bool:
    steps, minutes = config.max_steps or math.inf, config.max_minutes or math.inf
    return position["step"] >= steps or position["minutes"] >= minutes


def _progress(config: TrainConfig, position: dict) -> float:
    """Where the schedules stand, 0..1 from first to last step, by whichever limit is nearer."""
    by_step = position["step"] / max(config.max_steps - 1, 1) if config.max_steps else 0.0
    by_time = position["minutes"] / config.max_minutes if config.max_minutes else 0.0
    return min(max(by_step, by_time), 1.0)
