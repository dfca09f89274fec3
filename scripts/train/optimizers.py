"""The optimisers of training: Muon for the matrices inside layers, AdamW for everything else."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from model import Transformer
from scripts.train.config import TrainConfig

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # the quintic of Muon (Jordan et al. 2024)


def orthogonalize(update: Tensor) -> Tensor:
    """Replace each matrix of a stack [N, rows, columns] by about its nearest orthogonal one, in five bf16 steps."""
    a, b, c = NEWTON_SCHULZ
    tall = update.shape[-2] > update.shape[-1]
    x = (update.mT if tall else update).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(update.dtype)


class Muon(torch.optim.Optimizer):
    """Updates each matrix by its orthogonalised momentum (Jordan et al. 2024).

    An update is scaled to the size of an AdamW step (Moonlight, arXiv 2502.16982): both share one learning rate.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(list(params), {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape = {}
            for param in group["params"]:
                if not self.state[param]:
                    self.state[param]["momentum"] = torch.zeros_like(param)
                buffer = self.state[param]["momentum"]
                buffer.lerp_(param.grad, 1 - group["momentum"])
                by_shape.setdefault(param.shape, []).append((param, param.grad.lerp(buffer, group["momentum"])))
            for shape, pairs in by_shape.items():
                updates = orthogonalize(torch.stack([update for _, update in pairs]))
                scale = 0.2 * math.sqrt(max(shape))
                for (param, _), update in zip(pairs, updates, strict=True):
                    param.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)


def make_optimizers(model: Transformer, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Make Muon for the matrices inside layers and AdamW for the rest, or AdamW for all."""
    hidden = [p for p in model.layers.parameters() if p.ndim == 2] if config.optimizer == "muon" else []
    chosen = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    groups = [
        {"params": [p for p in rest if p.ndim == 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizers = [torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)]
    if hidden:
        optimizers.append(Muon(hidden, config.learning_rate, config.weight_decay))
    return optimizers
