"""A network that chooses which sublayers a draft runs. It learns from sets that it has drawn (REINFORCE).

Its input is known before a round drafts: the full model's state that chose the last token. While learning it draws
sets. In use (the policy `learned`) it keeps a sublayer where its logit is above 0.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from loading.files import replacing

FORMAT = "skipfast learned policy"
KEEP_AT_START = 0.9  # chance of keeping a sublayer before anything is learned


class SkipNetwork(nn.Module):
    """Computes w2·relu(w1·h/rms(h) + b1) + b2: the logit of keeping each sublayer, or with per_layer each layer.

    Sublayers: attention and MLP of each layer in turn. The first weights follow from the seed alone.
    """

    def __init__(self, dim: int, n_layer: int, hidden: int = 64, per_layer: bool = False, seed: int = 0):
        super().__init__()
        self.per_layer = per_layer
        actions, generator = n_layer * (1 if per_layer else 2), torch.Generator().manual_seed(seed)
        self.w1 = nn.Parameter(torch.randn(hidden, dim, generator=generator) / math.sqrt(dim))
        self.b1 = nn.Parameter(torch.zeros(hidden))
        self.w2 = nn.Parameter(torch.randn(actions, hidden, generator=generator) * 0.1 / math.sqrt(hidden))
        self.b2 = nn.Parameter(torch.full((actions,), math.log(KEEP_AT_START / (1 - KEEP_AT_START))))

    def forward(self, states: Tensor) -> Tensor:
        """Map the full model's states [R, D] to logits [R, actions], fp32."""
        x = states.float()
        x = x * (x.shape[-1] / x.square().sum(-1, keepdim=True).clamp_min(1e-12)).sqrt()
        return F.linear(F.relu(F.linear(x, self.w1, self.b1)), self.w2, self.b2)

    def sublayers(self, actions: Tensor) -> Tensor:
        """Spread values of actions [..., actions] to sublayers [..., 2L]."""
        return actions.repeat_interleave(2, -1) if self.per_layer else actions

    @torch.no_grad()
    def choose(self, states: Tensor) -> Tensor:
        """Choose the sublayers to keep after each of states [R, D], as the policy `learned` does -> bool [R, 2L]."""
        return self.sublayers(self(states) > 0)

    def export(self, path: Path, metadata: dict[str, str]) -> None:
        """Write the file that the policy `learned` reads; it appears complete, by rename."""
        tensors = {"w1": self.w1, "b1": self.b1, "w2": self.sublayers(self.w2.T).T, "b2": self.sublayers(self.b2)}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        with replacing(path) as file:
            file.write(save(tensors, {"format": FORMAT, **metadata}))


def draw_actions(logits: Tensor, samples: int, generator: torch.Generator) -> Tensor:
    """Draw actions from logits [R, A] -> bool [samples, R, A]. The generator is a CPU's: the same draws everywhere."""
    noise = torch.rand(samples, *logits.shape, generator=generator)
    return noise.to(logits.device) < logits.detach().sigmoid()


def policy_loss(logits: Tensor, actions: Tensor, rewards: Tensor) -> Tensor:
    """Return a loss whose gradient is, in the mean over draws, that of minus the expected reward; averaged over rows.

    logits: [R, A]. actions: bool [S, R, A], drawn from them. rewards: [S, R]. The baseline of a draw is the mean of the
    S - 1 others of its row (leave-one-out, Kool et al. 2019): as it does not depend on the draw, it costs no bias.
    """
    samples = len(actions)
    log_chance = -F.binary_cross_entropy_with_logits(
        logits.expand(actions.shape), actions.to(logits.dtype), reduction="none"
    ).sum(-1)
    others = (rewards.sum(0) - rewards) / (samples - 1)
    return -((rewards - others) * log_chance).mean()
