"""Weight-only quantisation in memory: int8 with a scale per row, int4 with a scale per group of features.

A quantised linear stays a `model.Linear`: its `weight` becomes int8 or packed uint8 and its `scale` is set, and
`kernels.linear.linear` does the rest. Rounding is to nearest; embeddings and norms stay as they are.
"""

import torch
from torch import Tensor, nn

from kernels.linear import is_packed
from model import Linear, Transformer

MODES = ("int8", "int4")
GROUPS = (32, 64, 128)


def quantise_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [N, K] -> int8 [N, K] and fp32 scale [N]: the largest magnitude of a row becomes 127."""
    weight = weight.float()
    scale = weight.abs().amax(1).clamp(min=1e-12) / 127
    return (weight / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def quantise_int4(weight: Tensor, group: int = 32) -> tuple[Tensor, Tensor]:
    """weight [N, K] -> uint8 [N, K/2] and bf16 scale [N, K/group]; the layout is that of `dequantise_int4`.

    The value of largest magnitude in a group becomes -8, the one level that has no positive twin, so a scale can be
    negative. Raises ValueError if the group does not divide K.
    """
    n, k = weight.shape
    if group not in GROUPS or k % group:
        raise ValueError(f"group must be one of {GROUPS} and divide the {k} input features, got {group}")
    weight = weight.float().view(n, k // group, group)
    largest = weight.gather(-1, weight.abs().argmax(-1, keepdim=True))
    scale = (largest / -8).to(torch.bfloat16)
    levels = weight / torch.where(scale == 0, 1, scale.float())
    levels = (levels.round().clamp(-8, 7) + 8).to(torch.uint8)
    low, high = levels.chunk(2, dim=-1)
    return (low | high << 4).flatten(1), scale[..., 0].contiguous()


def quantise(model: Transformer, mode: str, group: int = 32, lm_head: bool = True) -> Transformer:
    """Quantise every linear of the model in place, one after the other. Raises ValueError for an unknown mode."""
    if mode not in MODES:
        raise ValueError(f"quantisation must be one of {', '.join(MODES)}, got {mode!r}")
    for module in model.modules():
        if not isinstance(module, Linear) or (module is model.lm_head and not lm_head):
            continue
        if module.scale is not None:
            raise ValueError("the model is quantised already")
        if is_packed(module.weight):
            raise ValueError("the weights are packed for the CPU kernels: quantise before packing")
        weight = module.weight.data
        low, scale = quantise_int8(weight) if mode == "int8" else quantise_int4(weight, group)
        module.weight = nn.Parameter(low, requires_grad=False)  # a tied embedding keeps the old tensor
        module.scale = scale
    return model
