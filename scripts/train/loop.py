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

import cli
from errors import UserError
from loading.files import read_text, replacing, write_text
from scripts.common.journal import read_state
from scripts.train.config import TrainConfig
from scripts.train.corpus import batch_at
from scripts.train.parallel import averaged, part_of, whole
from scripts.train.recipe import learning_rate_factor
from scripts.train.trainer import Trainer

# Settings that a run may go on with changed, which is worth a notice.
DECIDING = (
    "seed",
    "batch_size",
    "context",
    "short_context",
    "long_every",
    "p_max",
    "dropout_schedule",
    "curriculum",
    "e_scale",
    "exit_weight",
    "focus_exits",
    "distill",
    "learning_rate",
    "weight_decay",
    "schedule",
    "warmup",
    "precision",
    "max_steps",
    "max_minutes",
)


def save_state(path: Path, trainer: Trainer, optimizers: list, position: dict) -> None:
    """Write the whole run by rename: a kill at any moment leaves the last good state. Called on all processes."""
    leads = trainer.ranks.leads
    state = {
        "model": whole(trainer.trained.state_dict(), leads),
        "optimizers": [whole(optimizer.state_dict(), leads) for optimizer in optimizers],
        "args": asdict(trainer.args),
        "config": asdict(trainer.config),
        **position,
    }
    if leads:
        with replacing(path) as file:
            torch.save(state, file)
    trainer.ranks.agreed(None)  # a disk may take longer than the others may be kept waiting for a message


def load_state(path: Path, trainer: Trainer, optimizers: list, data_hash: str) -> dict:
    """Put a saved run, if there is one, back into model and optimisers -> its position, or that of a new run."""
    position = {"step": 0, "minutes": 0.0, "tokens": 0, "data_hash": data_hash, "heldout_before": None}
    if not path.exists():
        return position
    kinds = {"model": dict, "optimizers": list, "args": dict, "config": dict, "data_hash": str, "step": int}
    state, present = read_state(path, kinds), trainer.trained.state_dict()
    shapes = [{name: tensor.shape for name, tensor in tensors.items()} for tensors in (state["model"], present)]
    args = state["args"] | {"dtype": trainer.args.dtype}  # with fsdp the file's, otherwise the weights' own
    if args != asdict(trainer.args) or shapes[0] != shapes[1]:
        raise UserError(f"output_dir holds a run of another shape ({path}); give its flags or another --output_dir")
    if state["data_hash"] != data_hash:
        raise UserError(
            f"output_dir holds a run on other data or of another checkpoint ({path}); give the same or "
            "another --output_dir"
        )
    if len(state["optimizers"]) != len(optimizers):
        raise UserError(f"output_dir holds a run with another --optimizer ({path}); give the same or another folder")
    if trainer.ranks.leads:
        for name in DECIDING:
            if (then := state["config"].get(name)) != (now := getattr(trainer.config, name)):
                cli.notice(f"goes on with another {name}: {now!r}, {then!r} before")
    trainer.trained.load_state_dict({name: part_of(tensor, present[name]) for name, tensor in state["model"].items()})
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        params = [param for group in optimizer.param_groups for param in group["params"]]
        for index, values in saved["state"].items():
            for name, value in values.items():
                part = part_of(value, params[index]) if value.shape == params[index].shape else value
                values[name] = part.clone()  # not mapped from a file that will be replaced
        optimizer.load_state_dict(saved)
    return position | {key: state[key] for key in position if key in state}


def train(trainer: Trainer, optimizers: list, tokens: Tensor, heldout: Tensor, position: dict) -> None:
    """Run from `position` to the planned end, moving it along, saving every `save_every` steps and at the end."""
    config, out, leads = trainer.config, Path(trainer.config.output_dir), trainer.ranks.leads
    started, spent = time.monotonic(), position["minutes"]
    with (
        _open_log(out / "log.jsonl" if leads else None, position["step"]) as log,
        tqdm(total=config.max_steps, initial=position["step"], unit="step", mininterval=2) as bar,
    ):
        while not _is_over(config, position):
            step, progress = position["step"], _progress(config, position)
            inputs, targets = (part.to(config.device) for part in batch_at(tokens, step, config))
            by_exit = trainer.step(step, progress, inputs, targets)
            norm = whole(torch.nn.utils.clip_grad_norm_(trainer.trained.parameters(), 1.0)).item()
            if not math.isfinite(norm):
                raise UserError(f"the loss diverged in step {step}: lower --learning_rate ({config.learning_rate})")
            rate = config.learning_rate * learning_rate_factor(config.schedule, config.warmup, progress)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate * group.get("lr_scale", 1.0)
                optimizer.step()
                optimizer.zero_grad()
            position["step"], position["tokens"] = step + 1, position["tokens"] + inputs.numel()
            minutes = spent + (time.monotonic() - started) / 60
            position["minutes"], *losses = averaged(trainer.ranks, [minutes, *by_exit.values()])
            by_exit = dict(zip(by_exit, losses, strict=True))
            row = {name: position[name] for name in ("minutes", "tokens")}
            row |= {"step": step, "grad_norm": norm, trainer.measure: by_exit}
            over = _is_over(config, position)
            if over or position["step"] % config.eval_every == 0:
                row |= trainer.evaluate(heldout, 16)
            log.write(json.dumps(row) + "\n")
            log.flush()
            if over or position["step"] % config.save_every == 0:
                save_state(out / "state.pt", trainer, optimizers, position)
            bar.update()
            bar.set_postfix({f"exit {depth}": f"{loss:.2f}" for depth, loss in sorted(by_exit.items())}, refresh=False)


def _open_log(path: Path | None, step: int):
    """Open the log for appending, without what a killed run wrote after its last saved state; None: no log."""
    if path is None:
        return open(os.devnull, "w")
    rows = read_text(path).splitlines(keepends=True) if path.exists() else []
    try:
        kept = [row for row in rows if row.endswith("}\n") and json.loads(row)["step"] < step]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not what this program writes: delete it, or give another --output_dir") from None
    write_text(path, "".join(kept))
    return path.open("a")


def _is_over(config: TrainConfig, position: dict) -> bool:
    steps, minutes = config.max_steps or math.inf, config.max_minutes or math.inf
    return position["step"] >= steps or position["minutes"] >= minutes


def _progress(config: TrainConfig, position: dict) -> float:
    """Return how far the schedules are, 0..1 from first to last step, by whichever limit is nearer."""
    by_step = position["step"] / max(config.max_steps - 1, 1) if config.max_steps else 0.0
    by_time = position["minutes"] / config.max_minutes if config.max_minutes else 0.0
    return min(max(by_step, by_time), 1.0)
