"""RMSNorm as in Llama: normalise in fp32, round to the model's dtype, then multiply by the weight."""

import torch

from kernels import cpu


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return weight * (x / rms(x)) over the last dimension; differentiable."""
    x32 = x.float()
    return weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise x [..., D] with weight [D]. In C++ a row has the same bits at every number of rows."""
    if (not torch.is_grad_enabled() or not (x.requires_grad or weight.requires_grad)) and cpu.supports(x):
        return torch.ops.skipfast_cpu.rms_norm.default(x.contiguous(), weight, eps)
    return rms_norm_reference(x, weight, eps)
