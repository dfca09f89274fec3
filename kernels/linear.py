"""Linear layer for a few rows: every weight byte is read once, whatever the number of rows.

A weight is either plain, [N, K] as in `torch.nn.Linear`, or packed by `pack()` into strips of 16 columns for the C++ op
of `cpp/linear.h`: bf16 [N/16, K/2, 16, 2], fp32 [N/16, K, 16]. The packed op gives each row the same bits at every row
count and every thread count, so a verified draft token sees the same logits as a token decoded alone.
"""
import torch
import torch.nn.functional as F

from kernels import cpu

STRIP = 16  # output features that lie together; cpp/linear.h has the same constants
BLOCK = 32  # packed weights hold a multiple of these


def linear_reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return x @ weight.T for x [..., K] and a plain weight [N, K]; bits may depend on the number of rows."""
    return F.linear(x, weight)


def linear(x: torch.Tensor, weight: torch.Tensor, out_features: int) -> torch.Tensor:
    """Return x [..., K] times a plain or packed weight, [..., out_features], in x's dtype."""
    if weight.dim() == 2:
        return linear_reference(x, weight)
    return torch.ops.skipfast_cpu.linear.default(x.contiguous(), weight, out_features)


def is_packed(weight: torch.Tensor) -> bool:
    """Return whether the weight came out of `pack()` in packed form."""
    return weight.dim() > 2


def pack(weight: torch.Tensor) -> torch.Tensor:
    """Pack a CPU weight [N, K] for the C++ op, N padded with zeros to a multiple of 32.

    Returns the weight itself where the op cannot take it: ops not loaded, not on the CPU, not bf16 or fp32, odd K in
    bf16.
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


def unpack_rows(packed: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return rows `ids` of a packed weight, [len(ids), K]: the embedding lookup when the LM head is tied and packed."""
    return packed[ids // STRIP, :, ids % STRIP].flatten(1)
