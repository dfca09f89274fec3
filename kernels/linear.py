"""Linear layers for a few rows: every weight byte is read once, whatever the number of rows.

A weight has N output features ("outputs") of K input features each. It is plain, [N, K] as in `torch.nn.Linear`, or
packed for the C++ op (`cpu/linear.h`). `pack()` makes strips of 16 outputs: bf16 [N/16, K/2, 16, 2], fp32
[N/16, K, 16]. `pack_quantised()` makes blocks of 32 outputs. The C++ op gives a row of x the same bits at every number
of rows and threads. So a verified draft sees the same logits as a token that is decoded alone.
"""

import torch
import torch.nn.functional as F

from kernels import cpu, gpu
from kernels.formats import dequantised

STRIP = 16  # outputs that lie together; cpu/weight.h has the same constants
BLOCK = 32  # packed weights hold a multiple of so many outputs
DEQUANTISED = 4096  # outputs of a quantised weight at a time, if no kernel takes it: bounds the memory of a prefill


def linear_reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return x @ weight.T for x [..., K] and a plain weight [N, K]; bits may depend on the number of rows."""
    return F.linear(x, weight)


def linear(x: torch.Tensor, weight: torch.Tensor, out_features: int, scale: torch.Tensor | None = None) -> torch.Tensor:
    """Return x [..., K] times a plain, packed or quantised weight, [..., out_features], in x's dtype.

    scale: of a quantised weight that is not packed, see formats.dequantise_int8 (weight int8) and dequantise_int4
    (weight uint8). A packed weight holds its own scales.
    """
    if weight.dim() > 2:
        return torch.ops.skipfast_cpu.linear.default(x.contiguous(), weight, out_features)
    if gpu.supports(x) and x.shape[-1] % gpu.FEATURES == 0 and not (torch.is_grad_enabled() and weight.requires_grad):
        return _linear_on_gpu(x.flatten(0, -2), weight, scale).view(*x.shape[:-1], out_features)
    if scale is None:
        return linear_reference(x, weight)
    parts = zip(weight.split(DEQUANTISED), scale.split(DEQUANTISED), strict=True)
    return torch.cat([linear_reference(x, dequantised(*part).to(x.dtype)) for part in parts], -1)


def _linear_on_gpu(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    if scale is None:
        return torch.ops.skipfast.linear_bf16.default(x, weight)
    if weight.dtype == torch.int8:
        return torch.ops.skipfast.linear_int8.default(x, weight, scale)
    return torch.ops.skipfast.linear_int4.default(x, weight, scale)


def is_packed(weight: torch.Tensor) -> bool:
    """Tell whether a weight is packed, by `pack()` or `pack_quantised()`."""
    return weight.dim() > 2


def rows_of(weight: torch.Tensor, out_features: int) -> int:
    """Return the length of the weight's first dimension that holds its first `out_features` outputs."""
    if not is_packed(weight):
        return out_features
    blocks = -(-out_features // BLOCK)
    return blocks * (BLOCK // STRIP) if weight.is_floating_point() else blocks


def pack(weight: torch.Tensor) -> torch.Tensor:
    """Pack a CPU weight [N, K] for the C++ op, N padded with zeros to a multiple of 32.

    Returns the weight as it is if the op cannot take it: the ops are not loaded, it is not on the CPU, not bf16 or
    fp32, or K is odd in bf16.
    """
    if weight.dim() != 2 or not cpu.supports(weight) or (weight.dtype == torch.bfloat16 and weight.shape[1] % 2):
        return weight
    weight = weight.detach()
    n, k = weight.shape
    if n % BLOCK:
        weight = F.pad(weight, (0, 0, 0, -n % BLOCK))
    if weight.dtype == torch.bfloat16:  # pairs along K, as the bf16 dot-product instruction reads them
        return weight.view(-1, STRIP, k // 2, 2).permute(0, 2, 1, 3).contiguous()
    return weight.view(-1, STRIP, k).permute(0, 2, 1).contiguous()


def pack_quantised(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor | None:
    """Pack a quantised CPU weight and its scales into one tensor for the C++ op.

    N is padded with zeros to a multiple of 32. int8 [N, K] with scale fp32 [N] -> int8 [N/32, K + 4, 32], 32 outputs
    side by side, then their scales. int4 as in dequantise_int4 -> uint8 [N/32, K/group, 64 + 16 group], the scales of a
    group, then its values in the order of `cpu/weight.h`. Returns None if the op cannot take it: the ops are not
    loaded, it is not on the CPU, or K is odd.
    """
    if weight.dim() != 2 or not cpu.supports(scale) or weight.shape[1] % 2:
        return None
    padding = -len(weight) % BLOCK
    weight, scale = F.pad(weight.detach(), (0, 0, 0, padding)), F.pad(scale, (0, 0) * (scale.dim() - 1) + (0, padding))
    blocks = len(weight) // BLOCK
    if weight.dtype == torch.int8:
        tail = scale.view(blocks, BLOCK).view(torch.int8).view(blocks, -1, BLOCK)
        return torch.cat((weight.view(blocks, BLOCK, -1).transpose(1, 2), tail), 1)
    groups = scale.shape[1]
    heads = scale.view(blocks, BLOCK, groups).transpose(1, 2).contiguous().view(torch.uint8)
    nibbles = weight.view(blocks, 2, STRIP, groups, -1)
    nibbles = torch.cat((nibbles & 15, nibbles >> 4), -1)  # block, strip, output, group, features in order
    nibbles = nibbles.view(*nibbles.shape[:4], -1, 2, 2, 2)  # 8 features: j / 2, j % 2, h
    low, high = nibbles.permute(0, 3, 4, 1, 2, 7, 5, 6).unbind(-1)
    return torch.cat((heads, (low | high << 4).flatten(2)), -1)


def unpack_rows(packed: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return rows `ids` of a packed weight, [len(ids), K]: the embedding of a model that shares it with the LM head."""
    return packed[ids // STRIP, :, ids % STRIP].flatten(1)
