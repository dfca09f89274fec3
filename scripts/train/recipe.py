"""The LayerSkip recipe (arXiv 2404.16710, section 4) as formulas: which layers drop, which exits count and how much.

Everything is a function of the step and of `progress`, 0..1 from the first step to the last; nothing knows the model.
"""

import math

import torch
from torch import Tensor

from errors import UserError


def dropout_probabilities(n_layer: int, p_max: float, schedule: str, progress: float) -> Tensor:
    """Return the chance of dropping each layer at `progress` (0..1) of the run, fp32 [L]: from 0 to at most p_max."""
    depth = torch.arange(n_layer) / max(n_layer - 1, 1)
    over_time = 1.0 if schedule == "constant" else math.exp(progress * math.log(2)) - 1
    return over_time * (torch.exp(depth * math.log(2)) - 1) * p_max


def active_exits(curriculum: str, n_layer: int, step: int, progress: float) -> list[int]:
    """List the exits (1..L layers run) whose loss counts in this step; the last is always among them."""
    name, _, period = curriculum.partition(":")
    if name == "none":
        return list(range(1, n_layer + 1))
    if name == "gradual":  # from the last layer down, one more every T / 2L steps
        return list(range(max(n_layer - int(progress * 2 * n_layer), 1), n_layer + 1))
    rolled = {layer + 1 for layer in range(n_layer) if layer % int(period) == step % int(period)}
    return sorted(rolled | {n_layer})


def exit_weights(exits: list[int], n_layer: int, e_scale: float, kind: str) -> dict[int, float]:
    """Weigh the loss of each active exit, in sum 1.

    kind: paper, e(l) that grows with depth; uniform, e_scale for each early exit.
    """
    if kind == "uniform":
        raw = {depth: 1.0 if depth == n_layer else e_scale for depth in exits}
    else:
        raw = {depth: e_scale * depth * (depth - 1) / 2 for depth in exits}  # e_scale · Σ_{i ≤ l} i with l = depth - 1
        raw[n_layer] = (n_layer - 1) + e_scale * (n_layer - 1) * (n_layer - 2) / 2
    total = sum(raw.values())
    return {depth: weight / total for depth, weight in raw.items() if weight}


def parse_focus(text: str, n_layer: int) -> dict[int, float]:
    """Read "3:0.5,6:0.2": exits trained on every step, with a weight added on top of the curriculum's."""
    focus = {}
    for part in filter(None, text.split(",")):
        depth, _, weight = part.partition(":")
        try:
            focus[int(depth)] = float(weight or 1)
        except ValueError:
            raise UserError(f"focus_exits must look like 3:0.5,6:0.2, got {text!r}") from None
        if not 0 <= focus[int(depth)] < math.inf:
            raise UserError(f"focus_exits must have weights of 0 or more, got {part}")
        if not 1 <= int(depth) < n_layer:
            raise UserError(f"focus_exits must name exits in 1..{n_layer - 1}, got {depth}")
    return focus


def learning_rate_factor(schedule: str, warmup: float, progress: float) -> float:
    """Return the multiplier of the peak learning rate at `progress` (0..1): linear warm-up, then down to 0."""
    if progress < warmup:
        return progress / warmup + 1e-3
    rest = min((progress - warmup) / max(1 - warmup, 1e-9), 1.0)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * rest))
    if schedule == "wsd":  # stable, then a linear decay over the last third
        return min(1.0, (1 - rest) * 3)
    return 1 - rest
